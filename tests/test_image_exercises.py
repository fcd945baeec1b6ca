"""What the exercises on pictures say to wrong answers that are not in the answer key."""
import pytest
import torch

from engine.checks import check


def scaled(u, W1, W2, z=None):
    gates = torch.sigmoid(W2 @ torch.relu(W1 @ (u.mean((1, 2)) if z is None else z)))
    return gates[:, None, None] * u


def of_channels(values):
    return torch.tensor(values).view(3, 1, 1)


def swapped_in_place(picture, grid):
    """A right answer that changes the picture it got: the check must not be misled."""
    side = picture.shape[1] // grid
    picture[:, :side], picture[:, -side:] = picture[:, -side:].clone(), picture[:, :side].clone()
    return picture


@pytest.mark.parametrize("name, answer, said", [
    ("leaked_rows", lambda train, test: len(test), "one that shares nothing should not"),
    ("leaked_rows", lambda train, test: test["title"].isin(train["title"]).sum(), "too"),
    ("grouped_weights", lambda inputs, outputs, kernel, groups: inputs + outputs, "PyTorch"),
    ("squeeze_excitation", lambda u, W1, W2: (scaled(u, W1, W2) / u)[:, 0, 0], "still to be"),
    ("squeeze_excitation", lambda u, W1, W2: scaled(u, W1, W2, u.amax((1, 2))), "not every"),
    ("normalised", lambda x, mean, std: x / 255 / of_channels(std) - of_channels(mean), "before"),
    ("normalised", lambda x, mean, std: (x // 255 - of_channels(mean)) / of_channels(std), "own"),
    ("normalised", lambda x, mean, std:
        (x.double() / 255 - of_channels(mean)) / of_channels(std), "float32"),
    ("cut_tiles", lambda picture, grid: picture, "yours are [1, 4, 4]"),
    ("mean_in_batches", lambda encoder, tiles, batch:
        torch.cat([encoder(part) for part in tiles.split(batch)]).mean(), "shape is []"),
    ("twin_picture", lambda picture, grid: picture, "the picture itself"),
    ("twin_picture", lambda picture, grid: picture.flatten(), "should have [3, 8, 8]"),
    ("twin_picture", swapped_in_place, "right.")])
def test_an_answer_is_told_what_is_wrong_with_it(name, answer, said, capsys):
    getattr(check, name)(answer)
    printed = capsys.readouterr().out
    assert said in printed and ("not yet." in printed or said == "right.")
    check.exercises[name].refused = 0
