"""The exercises of the notebooks 01, 05 and 06."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from engine.exercises import exercise, expect, same


def refuse_mistakes(found: object, mistakes: dict[str, object]) -> None:
    """NotYet with the sentence of the mistake whose result was found: {sentence: its result}."""
    for sentence, wrong in mistakes.items():
        alike = np.shape(found) == np.shape(wrong)
        expect(not alike or not np.allclose(found, wrong, rtol=1e-5, atol=1e-5), sentence)


# --- 01 -------------------------------------------------------------------------------------------
# (titles and descriptions of train, of test, how many leak, what is wrong with another answer)
LEAKS = [
    ([("a lamp", "it shines")], [("a lamp", "new"), ("a table", "it stands")], 1,
     "A test row whose title is in train should count, one that shares nothing should not."),
    ([("a lamp", "it shines")], [("a vase", "it shines")], 1,
     "A test row whose description is in train should count too."),
    ([("a lamp", "")], [("a vase", "")], 0,
     "Two missing descriptions are no copy of each other: an empty text does not count."),
    ([("a lamp", "it shines")], [("a lamp", "it shines")], 1,
     "A row that shares title and description is one row, not two."),
    ([("a lamp", "one"), ("a lamp", "two")], [("a lamp", "three")], 1,
     "Rows of test are counted: a text that stands twice in train makes no second row."),
    ([("a lamp", "a vase")], [("a vase", "a lamp")], 0,
     "A title is compared with titles and a description with descriptions."),
    ([("a lamp", "<b>It shines</b>,&nbsp;brightly")], [("a vase", "it shines, brightly")], 1,
     "Copies that differ in markup or case escape: clean both sides first."),
    ([("a lamp", "<br />")], [("a vase", "<br />")], 0,
     "A lone <br /> says nothing: look for empty texts after cleaning, not before.")]


@exercise(hint="Clean both sides, then ask each field alone: is the text in train's, and not "
               "empty? Join the two answers by | and sum.",
          insight="Such a row can be answered from memory. Texts that differ in one word still "
                  "escape: the setting grouped=True looks wider.")
def leaked_rows(answer: Callable) -> None:
    """Write a function of two tables with the columns title and description, train and test, that
    returns how many rows of test share a title or a description with train, both cleaned by
    h.clean_text.
    """
    for known, asked, leaked, missing in LEAKS:
        train, test = (pd.DataFrame(rows, columns=["title", "description"])
                       for rows in (known, asked))
        same(answer(train, test), leaked, missing)


# --- 05 -------------------------------------------------------------------------------------------
@exercise(hint="An output channel reads inputs / groups channels, with kernel x kernel weights for "
               "each.",
          insight="So 32 groups make the 3 x 3 convolution of SE-ResNeXt 32 times smaller.")
def grouped_weights(answer: Callable) -> None:
    """Write a function of inputs, outputs, kernel and groups (whole numbers) that returns how many
    weights a grouped kernel x kernel convolution has, without bias.
    """
    for inputs, outputs, kernel, groups in ((6, 10, 3, 1), (128, 128, 3, 32), (8, 12, 5, 4)):
        layer = torch.nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=False)
        weights, found = layer.weight.numel(), answer(inputs, outputs, kernel, groups)
        if groups > 1:
            refuse_mistakes(found, {
                "Your groups save nothing: each output channel still reads all input channels.":
                    weights * groups,
                f"That is one group of {groups}: the others have weights of their own.":
                    weights / groups})
        refuse_mistakes(found, {"A kernel has a weight for each of kernel x kernel places.":
                                weights / kernel})
        same(found, weights, f"For inputs={inputs}, outputs={outputs}, kernel={kernel} and "
                             f"groups={groups}, PyTorch has another number of weights.")


def gates_of(u: Tensor, W1: Tensor, W2: Tensor) -> dict[str, np.ndarray]:
    """The gates [C] of a map u [C, H, W]: the right ones, and those of two mistakes."""
    u, W1, W2 = (x.double().numpy() for x in (u, W1, W2))
    hidden = W1 @ [channel.sum() / channel.size for channel in u]
    before = W2 @ np.maximum(hidden, 0)
    return {"right": 1 / (1 + np.exp(-before)), "no ReLU": 1 / (1 + np.exp(-W2 @ hidden)),
            "softmax": np.exp(before) / np.exp(before).sum()}


@exercise(hint="z = u.mean((1, 2)) has C numbers, and so has s; s[:, None, None] * u gives each "
               "channel its own.",
          insight="One gate for a whole channel: it says what matters, not where.")
def squeeze_excitation(answer: Callable) -> None:
    """Write a function of u [C, H, W], W1 [C / r, C] and W2 [C, C / r] that returns the scaled map,
    [C, H, W], by the three equations of section 1.
    """
    random = torch.Generator().manual_seed(5)
    for shape, inner in (((4, 4, 4), 2), ((6, 2, 3), 3)):
        u = torch.randn(shape, generator=random) + 1
        W1 = torch.randn(inner, shape[0], generator=random)
        W1[0] = -1  # times positive means: what ReLU cuts off
        W2 = torch.randn(shape[0], inner, generator=random)
        found, gates, map_of = answer(u, W1, W2), gates_of(u, W1, W2), u.numpy()
        mistakes = {
            "These are the gates s; the map is still to be multiplied by them.": gates["right"],
            "There is no ReLU between W1 and W2.": gates["no ReLU"][:, None, None] * map_of,
            "By softmax the gates share 1 among them; sigmoid opens each on its own.":
                gates["softmax"][:, None, None] * map_of}
        if shape[0] == shape[-1]:  # so PyTorch does not complain
            mistakes["Your gates multiply the columns of the picture: s[c] belongs to channel c, "
                     "the first axis."] = gates["right"] * map_of
        refuse_mistakes(found, mistakes)
        same(found, gates["right"][:, None, None] * map_of,
             f"Of a map {list(shape)} not every channel is multiplied by its gate.")


@exercise(hint="First pictures / 255 as floats, then minus the mean, then by the deviation, both "
               "with shape [3, 1, 1].",
          insight="A picture in another scale raises no error: the network is only worse.")
def normalised(answer: Callable) -> None:
    """Write a function of pictures (bytes, [N, 3, H, W]), mean and std (three numbers each, for a
    scale from 0 to 1) that returns them normalised as the encoder expects, in float32.
    """
    mean, std = (0.5, 0.4, 0.25), (0.2, 0.25, 0.5)
    pictures = torch.randint(256, (2, 3, 4, 3), generator=torch.Generator().manual_seed(5),
                             dtype=torch.uint8)
    found, scaled = answer(pictures, mean, std), pictures.numpy() / 255
    wanted = np.stack([(scaled[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    refuse_mistakes(found, {
        "The mean belongs to a scale from 0 to 1: divide the bytes by 255 before you subtract it.":
            np.stack([(255 * scaled[:, c] - mean[c]) / std[c] for c in range(3)], 1),
        "You divide by 255 last: then the mean was subtracted from bytes.":
            np.stack([(scaled[:, c] - mean[c] / 255) / std[c] for c in range(3)], 1),
        "Subtract the mean before you divide by the deviation.":
            np.stack([scaled[:, c] / std[c] - mean[c] for c in range(3)], 1),
        "Your constants go along the columns of the picture, which has 3 of them: the channels are "
        "the second axis.": (scaled - mean) / std})
    same(found, wanted, "Each channel should be (x / 255 - mean) / std with its own constants.")
    expect(getattr(found, "dtype", None) == torch.float32, "The numbers should be float32.")


# --- 06 -------------------------------------------------------------------------------------------
def slices(picture: Tensor, grid: int) -> list[Tensor]:
    """The tiles of a picture [C, S, S], row by row, each cut out on its own."""
    side = picture.shape[1] // grid
    corners = [(row * side, column * side) for row in range(grid) for column in range(grid)]
    return [picture[:, y:y + side, x:x + side] for y, x in corners]


@exercise(hint="Reshape to [C, grid, s, grid, s], bring both grid axes to the front by permute, "
               "and only then reshape to [grid * grid, C, s, s].",
          insight="reshape keeps the order in memory; permute is what turns rows of pixels into "
                  "squares.")
def cut_tiles(answer: Callable) -> None:
    """Write a function of picture [C, S, S] and grid that returns its tiles row by row, [grid *
    grid, C, S / grid, S / grid]; without h.split_regions.
    """
    small = torch.arange(16.0).reshape(1, 4, 4)
    tiles = answer(small, 2)
    expect(np.shape(tiles) == (4, 1, 2, 2), "A picture [1, 4, 4] in a grid of 2 has tiles [4, 1, "
                                            f"2, 2]; yours are {list(np.shape(tiles))}.")
    first, second = (np.ravel(np.asarray(tile)).astype(int).tolist() for tile in tiles[:2])
    pixels = "Of 4 x 4 pixels, numbered from 0 row by row,"
    expect(first == [0, 1, 4, 5], f"{pixels} your first tile holds {first} and should hold "
                                  "[0, 1, 4, 5]: a piece of a row is no square.")
    expect(second == [2, 3, 6, 7], f"{pixels} your second tile holds {second} and should hold "
                                   "[2, 3, 6, 7]: tiles are numbered row by row.")
    for shape, grid in (((3, 6, 6), 3), ((2, 12, 12), 4)):
        picture = torch.arange(float(np.prod(shape))).reshape(shape)
        same(answer(picture, grid), torch.stack(slices(picture, grid)),
             f"With {shape[0]} channels and a grid of {grid} the tiles are others: does each hold "
             "all channels of its own square?")


class Counting:
    """An encoder of two numbers a tile that is not linear; it remembers how many tiles it got."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, tiles: Tensor) -> Tensor:
        self.asked.append(len(tiles))
        return torch.stack([tiles.flatten(1).amax(1), tiles.flatten(1).mean(1) ** 2], 1)


@exercise(hint="Add up the vectors of each batch by .sum(0), and divide once, by the number of all "
               "tiles.",
          insight="A mean of means is the mean only where all batches are equally large.")
def mean_in_batches(answer: Callable) -> None:
    """Write a function of encoder, tiles [T, 3, s, s] and batch that returns the mean of the
    encoder's vectors of all tiles, [width], and never gives the encoder more than batch tiles at
    once.
    """
    tiles = torch.arange(250.0 * 12).reshape(250, 3, 2, 2) / 1000
    vectors = torch.cat([Counting()(tile[None]) for tile in tiles])
    for batch in (50, 100, 300):
        encoder, parts = Counting(), torch.split(vectors, batch)
        found, rest = answer(encoder, tiles, batch), len(parts[-1])
        expect(max(encoder.asked, default=0) <= batch,
               f"The encoder got {max(encoder.asked, default=0)} tiles at once, allowed are "
               f"{batch}.")
        if len(parts) > 1 and rest < batch:
            refuse_mistakes(found, {
                f"The last batch has {rest} tiles and counts as much as one of {batch}: this is a "
                "mean of means.": torch.stack([part.mean(0) for part in parts]).mean(0),
                f"The last {rest} tiles are missing: they fill no whole batch, and count too.":
                    torch.cat(parts[:-1]).mean(0)})
        same(found, vectors.mean(0), f"With {len(tiles)} tiles and batches of {batch} this is not "
                                     "the mean of all vectors.", 1e-4)


def bent_mean(picture: Tensor, grid: int, weights: Tensor) -> Tensor:
    """P by an encoder that is not linear: tanh of weighted sums of a tile's numbers."""
    return torch.stack([torch.tanh(tile.flatten() @ weights) for tile in
                        slices(picture, grid)]).mean(0)


@exercise(hint="What changes the order of the tiles, and no tile? Swap two of them, or roll the "
               "picture by the side of one.",
          insight="P says which tiles a picture has, not where they are.")
def twin_picture(answer: Callable) -> None:
    """Write a function of picture [3, S, S], whose tiles all differ, and grid that returns another
    picture which has the same P by any encoder.
    """
    random = torch.Generator().manual_seed(6)
    for side, grid in ((8, 4), (12, 2)):
        picture = torch.rand(3, side, side, generator=random)
        twin = torch.as_tensor(answer(picture.clone(), grid))
        expect(twin.shape == picture.shape, f"Your picture has the shape {list(twin.shape)} and "
                                            f"should have {list(picture.shape)}.")
        expect(not torch.equal(twin, picture), "This is the picture itself.")
        weights = torch.randn(3 * (side // grid) ** 2, 5, generator=random)
        P, of_twin = (bent_mean(each, grid, weights) for each in (picture, twin))
        ordered = (torch.sort(each.flatten()).values for each in (picture, twin))
        expect(torch.allclose(P, of_twin, atol=1e-5) or not torch.equal(*ordered),
               "Your picture has the same pixels in other tiles: a tile must stay whole and "
               "upright, or an encoder that is not linear sees another one.")
        same(of_twin, P, "An encoder that is not linear gives your picture another P.")
