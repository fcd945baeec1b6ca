"""The exercises of the notebooks 02 to 04."""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import accuracy_score, f1_score

from engine.exercises import exercise, expect, same


# --- 02 -------------------------------------------------------------------------------------------
@exercise(hint="The largest class has an F1 of 2 h / (t + p), with h = t and p = all rows; the "
               "others have 0.",
          insight="Accuracy rewards the guess for the size of one class, macro-F1 for one class in "
                  "many.")
def majority_scores(answer: Callable) -> None:
    """Write a function of the rows of each class, such as [6, 3, 1], that returns accuracy and
    macro-F1 of a model that always answers the largest class.
    """
    for rows in ([6, 3, 1], [1, 4], [5, 5, 5, 5], [90, *[5] * 26]):
        truth = np.repeat(np.arange(len(rows)), rows)
        always = np.full(len(truth), np.argmax(rows))
        accuracy, macro = answer(list(rows))
        same(accuracy, accuracy_score(truth, always),
             f"With rows {rows[:4]} the accuracy is the share of the largest class.")
        largest = f1_score(truth, always, average=None, zero_division=0).max()
        expect(not math.isclose(macro, largest), "That is the F1 of the largest class alone; the "
               "other classes have an F1 of 0 and count in the mean.")
        same(macro, f1_score(truth, always, average="macro", zero_division=0),
             f"With rows {rows[:4]} the macro-F1 is another.")


@exercise(hint="Sort, cut into batches, and let each batch count its rows times its longest text.",
          insight="Sorted, even a long tail pads little: long texts have long ones beside them.")
def padding_factor(answer: Callable) -> None:
    """Write a function of the lengths of texts (in tokens) and the batch size that returns how many
    tokens are computed for each real one, where texts are sorted by length and each batch is padded
    to its longest text.
    """
    same(answer([2, 3, 8, 9], 2), 24 / 22, "Texts of 2, 3, 8 and 9 tokens in batches of 2 make two "
         "rectangles, 2 x 3 and 2 x 9, for 22 tokens.")
    same(answer([2, 9, 3, 8], 2), 24 / 22, "The same texts in another order cost the same: sort.")
    same(answer([4, 1, 4], 2), 12 / 9, "Three texts in batches of 2: the last batch has one row.")
    same(answer([5] * 6, 4), 1.0, "Where all texts have one length, nothing is padded.")


@exercise(hint="Of n coins, k or fewer fall on one side with probability "
               "sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n. Which k is as extreme?",
          insight="Only the rows that one model alone has right enter: a thousand more that both "
                  "have right change nothing.")
def mcnemar_p(answer: Callable) -> None:
    """Write a function of two counts, the rows that only the first and only the second model has
    right, that returns the exact two-sided p of McNemar's test.
    """
    wanted = {(11, 0): 2 / 2 ** 11, (0, 11): 2 / 2 ** 11, (3, 1): 10 / 16,
              (7, 15): 561_200 / 2 ** 22, (5, 5): 1.0, (0, 0): 1.0}
    for counts, p in wanted.items():
        found = answer(*counts)
        expect(not math.isclose(2 * found, p, rel_tol=1e-6), f"Of {counts} that is one side: the "
               "other model could have been ahead by as much.")
        expect(found <= 1 + 1e-9, f"Of {counts} comes {found:.3g}, and no probability is above 1.")
        same(found, p, f"Of {counts} the exact p is {p:.5g}.")


@exercise(hint="In a regular expression [^<>]* passes neither the next `<` nor the `>`; put a "
               "space where a tag was.",
          insight="The study's own strip_html knows HTML's names too, so that `<NEUF>` stays.")
def without_tags(answer: Callable) -> None:
    """Write a function of a text that puts a space in place of each whole tag (`<` or `</`, a
    letter, and all up to `>`, with no other `<` between) and keeps everything else.
    """
    def check(text: str, wanted: str, missing: str) -> None:
        expect(" ".join(answer(text).split()) == wanted, missing)

    check("<p>Table en <b>bois</b></p>", "Table en bois", "Some tags are left, or words are gone.")
    check("bois<br />massif", "bois massif", "Two words that only a tag kept apart are now one.")
    check('<a href="x">lien</a> et <b>gras</b>', "lien et gras",
          "What stands between two tags is text: stop at the first `>`.")
    check("poids < 3 kg, largeur > 1 m", "poids < 3 kg, largeur > 1 m",
          "A `<` with a space behind it begins no tag, and text is lost.")
    check("prix<lourd <b>net</b>", "prix<lourd net", "A tag holds no other `<`: words before it "
          "are lost.")
    check("Chaise <b>rouge</b> <a href=", "Chaise rouge <a href=",
          "The unfinished tag at the end is no whole tag: nothing of it may go.")


# --- 03 -------------------------------------------------------------------------------------------
@exercise(hint="Multiply by the mask before you add, and divide by the sum of the mask.",
          insight="Padding has no say, so a text's vector does not depend on what it is batched "
                  "with.")
def masked_mean(answer: Callable) -> None:
    """Write a function of states [N, length, d] and mask [N, length], 1 for a token and 0 for
    padding, that returns the mean of each text's tokens, [N, d].
    """
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [90.0, 90.0]],
                           [[5.0, 6.0], [7.0, 8.0], [9.0, 1.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = answer(states, mask)
    same(found[1], [7.0, 5.0], "A text without padding should give the mean of its tokens.")
    expect(not np.allclose(found[0], [4 / 3, 2.0]), "The padding of the first text adds nothing, "
           "and still counts in the divisor.")
    same(found, [[2.0, 3.0], [7.0, 5.0]], "The padding of the first text still counts.")
    expect(bool(torch.isfinite(answer(states, mask * 0)).all()),
           "A text without any token gives no finite numbers: let the divisor be at least 1.")


@exercise(hint="Round the number of batches up: the rows that are left over need one too.",
          insight="A few rows seen twice cost little, while a step of one left-over row would "
                  "count as much as one of a whole batch.")
def steps_of_epoch(answer: Callable) -> None:
    """Write a function of rows and batch size that returns how many steps an epoch has, and how
    many rows are seen twice, where the last batch is filled up as by EpochSampler.
    """
    for rows, batch in ((980, 32), (64, 32), (33, 32), (5, 8), (7, 1)):
        steps = len(range(0, rows, batch))
        found_steps, twice = answer(rows, batch)
        expect(found_steps != steps - 1 or steps == 1, f"{rows} rows in batches of {batch}: the "
               "rows left over make a step too.")
        same(found_steps, steps, f"{rows} rows in batches of {batch} make {steps} steps.")
        same(twice, steps * batch - rows, f"{rows} rows in batches of {batch}: the steps see "
             f"{steps * batch} rows, and those above {rows} are seen twice.")


@exercise(hint="The rate is the highest times the share of the steps that are still to come, this "
               "one included.",
          insight="Large steps first, small ones last; with half the epochs the rate falls twice "
                  "as fast, so a short training is not the beginning of a long one.")
def learning_rate(answer: Callable) -> None:
    """Write a function of a step (0 is the first), the number of steps and the highest rate that
    returns the learning rate of this step, where it falls in a line from the highest at the first
    step to 0 after the last one.
    """
    for steps, highest in ((4, 1.0), (10, 2e-5), (310, 5e-4)):
        found = np.array([answer(step, steps, highest) for step in range(steps)]) / highest
        same(found[0], 1.0, "The first step has the highest rate.")
        expect(found[-1] > 1e-9, "The last step has a rate of 0, so it would be for nothing: 0 "
               "comes after it.")
        expect(np.allclose(np.diff(found), found[1] - found[0]), "It does not fall by the same "
               "amount from each step to the next.")
        same(found, np.linspace(1, 0, steps + 1)[:-1], f"Of {steps} steps the last should have "
             f"1 / {steps} of the highest rate.")


@exercise(hint="idxmax gives the row of the first largest value; the epoch stands in another "
               "column of this row.",
          insight="The training loss says how well the training rows are known; the epoch is "
                  "chosen by what will be scored, on rows that were not trained on.")
def kept_epoch(answer: Callable) -> None:
    """Write a function of a learning curve, a table with the columns epoch, train_loss, val_loss
    and val_macro_f1, that returns the epoch to keep: the one with the best validation macro-F1, of
    several the first.
    """
    for loss, f1, epoch in (([0.4, 0.5, 0.6, 0.7], [0.2, 0.5, 0.7, 0.6], 3),
                            ([0.9, 0.8, 0.5, 0.6], [0.3, 0.8, 0.7, 0.8], 2),
                            ([0.6, 0.5, 0.4, 0.3], [0.6, 0.5, 0.4, 0.3], 1)):
        curve = pd.DataFrame({"epoch": [1, 2, 3, 4], "train_loss": [0.9, 0.5, 0.3, 0.1],
                              "val_loss": loss, "val_macro_f1": f1})
        found = answer(curve)
        expect(found != epoch - 1 or epoch == 1, "That is the row, counted from 0, not the epoch.")
        expect(found != 1 + np.argmin(loss), "That epoch has the lowest validation loss, and "
               "another one the best macro-F1; the two need not agree.")
        same(found, epoch, f"With the macro-F1 {f1}, epoch {epoch} is kept, not {found}.")


# --- 04 -------------------------------------------------------------------------------------------
@exercise(hint="Each token has one vector, and each vector as many numbers as it is wide.",
          insight="That is nearly all that sets 138M and 110M apart: the layers are of one size.")
def vocabulary_millions(answer: float) -> None:
    """By how many million parameters is the table of token vectors of FlauBERT (68,729 tokens)
    larger than that of CamemBERT (32,005), where both are 768 wide?
    """
    more = 68_729 - 32_005
    expect(not math.isclose(answer, more / 1e6, rel_tol=0.02), "You counted tokens; each of them "
           "has a vector of 768 numbers.")
    expect(not math.isclose(answer, more * 768, rel_tol=0.02), "Nearly: in millions, please.")
    expect(not math.isclose(answer, 68_729 * 768 / 1e6, rel_tol=0.02),
           "That is FlauBERT's whole table: how much larger is it than CamemBERT's?")
    same(answer, more * 768 / 1e6, "It is another number.", tolerance=5e-3)


@exercise(hint="Keep each word as a list of pieces, and build it anew piece by piece: where a "
               "piece and the next are the pair, put their sum and skip one.",
          insight="The list of merges, in this order, is the tokenizer: a new word is cut by "
                  "doing the same merges again.")
def bpe_merges(answer: Callable) -> None:
    """Write a function of words and a number that returns so many byte-pair merges, as a list of
    pairs of pieces: each time the most frequent pair of neighbours, of several the one seen first.
    """
    def check(words: list[str], merges: str, missing: str) -> None:
        wanted = [tuple(pair.split("+")) for pair in merges.split()]
        found = [tuple(pair) for pair in answer(list(words), len(wanted))]
        expect(found == wanted, f"{missing} Of {' '.join(words)} they should be {merges}, not "
               + " ".join(map("+".join, found)) + ".")

    three = ["bas", "basse", "bases"]
    check(["xy", "ab", "ab"], "a+b", "The most frequent pair goes first, wherever it stands.")
    check(["ba", "ca", "ca", "ca"], "c+a", "Pairs are of neighbours within one word.")
    check(three, "b+a ba+s", "After a merge count again, with the new piece in the words.")
    check(three, "b+a ba+s bas+s", "Of several pairs that are as frequent, take the first seen.")
    check(["as", "as", "as", "as", "ass", "xss", "xss", "ss", "of"], "a+s s+s x+ss as+s",
          "A piece that only ends like the pair's first one is another piece.")


@exercise(hint="Count the rows where the first or the second is right, and subtract the count of "
               "the better model alone.",
          insight="This bounds whoever picks one of two answers, and no one knows which to pick. A "
                  "fusion of vectors is no such choice: it may gain more, less, or lose.")
def room_to_choose(answer: Callable) -> None:
    """Write a function of the truth and the predictions of two models that returns by how much the
    accuracy of a perfect choice between the two answers is above that of the better model (0 to 1).
    """
    truth = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    first = np.array([0, 1, 2, 3, 4, 0, 0, 0, 0, 0])   # 6 right
    second = np.array([0, 1, 0, 0, 0, 1, 1, 2, 1, 1])  # 4 right, 2 of them alone
    same(answer(truth, first, first), 0.0, "A model beside itself adds nothing.")
    wrong = np.array([1, 2, 0, 0, 0, 1, 2, 0, 1, 1])   # never right
    same(answer(truth, first, wrong), 0.0, "A model that is never right adds nothing, however "
         "often it differs.")
    for pair in ((first, second), (second, first)):
        found = answer(truth, *pair)
        expect(not math.isclose(found, 0.8), "That is the share on which one of the two is right; "
               "how far is it above the better model?")
        same(found, 0.2, "Of ten rows the better model has 6 right, and the other 2 more.")
