"""What is fitted knows nothing of the test rows, and no gradient step of the validation rows.

Texts, pictures and labels of one part are changed, and everything is made again: encoders,
tokenizers, heads, batch statistics, scales, baselines, fusion models. What is fitted must be the
same bytes. Of one epoch it is what the gradient steps alone have made. What is fitted without being
kept, stacks, weights and a temperature, is seen in what it says of rows that are as they were.
"""
import os
import shutil
import string

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

import helpers as h
from conftest import ROOT, write_bert, write_ens
from engine.files import fast_hash
from engine.rows import chosen_products
from engine.settings import TEXT_STAGES

pytestmark = pytest.mark.slow
# Texts of the same few tokens: other lengths would change how rows are padded, and so rounding.
SETTINGS = {"max_length": 4, "threads": 1, "text_batch": 8, "image_batch": 8, "fusion_batch": 8,
            "fusion_epochs": 1, "text_lr": 1e-3, "text_epochs": 1, "image_epochs": 1, "grid": 8}
FUSIONS = ("fusion-concat-add", "fusion-average-average-layers")
IMAGES = ("seresnext", "image_regions", "image_whole")
OTHER_LETTERS = str.maketrans(string.ascii_letters, string.ascii_letters[7:]
                              + string.ascii_letters[:7])


def copy_split(run, name, folder):
    """Stage splits: the one that the test names, with its labels."""
    shutil.copy(os.environ["STUDY_TEST_SPLIT"], folder / "split.csv")


def spoil(folder, ids: pd.Series) -> None:
    """Change texts and pictures of these products."""
    products = h.load_catalogue(folder).set_index("product_id")
    table = pd.read_csv(folder / "X_train_update.csv", index_col=0, keep_default_na=False)
    rows = table["productid"].isin(ids)
    for column in ("designation", "description"):
        table.loc[rows, column] = table.loc[rows, column].str.translate(OTHER_LETTERS)
    table.to_csv(folder / "X_train_update.csv")
    for path in products.loc[ids, "picture"]:
        with Image.open(path) as picture:
            changed = ImageOps.invert(picture.rotate(90))
        changed.save(path)


def relabelled(split: pd.DataFrame, rows: pd.Series) -> pd.DataFrame:
    """The split with the labels of these rows, a mask, turned round."""
    labels = np.sort(split["label_id"].unique())
    turned = dict(zip(labels, np.roll(labels, 1)))
    return split.assign(label_id=split["label_id"].mask(rows, split["label_id"].map(turned)))


def stages(*names):
    """A function of a run: {stage: its folder}, all made."""
    return lambda run: {name: h.stage(run, name) for name in ("splits", "text", *names)}


def fitted(folders: dict) -> dict[str, str]:
    """The hash of each file that holds something fitted."""
    kinds = ("encoder/*", "encoder.safetensors", "head.safetensors", "model-*.safetensors")
    return {f"{name}: {path.name}": fast_hash(path) for name, folder in folders.items()
            for kind in kinds for path in folder.glob(kind)}


def curves(folders: dict, columns: list[str]) -> dict[str, np.ndarray]:
    """These columns of the learning curves."""
    return {name: pd.read_csv(folder / "curve.csv")[columns].to_numpy()
            for name, folder in folders.items() if (folder / "curve.csv").exists()}


def rows_of(folders: dict, split: pd.DataFrame, part: str) -> dict[str, np.ndarray]:
    """The features, and the baselines' probabilities, of the rows of one part."""
    ids, found = split.loc[split["part"] == part, "product_id"], {}
    for name, folder in folders.items():
        for path in folder.glob("features.safetensors"):
            found[name] = h.load_tensors(path, ids)["features"].numpy()
    if part != "train":
        tensors = h.load_tensors(folders["baselines"] / "probabilities.safetensors", ids)
        found |= {name: tensor.numpy() for name, tensor in tensors.items()}
    return found


PARTS = {part: lambda split, part=part: split["part"] == part for part in ("test", "val")}
UNCHANGED = {None: lambda split: split["part"] == "none"}


@pytest.fixture
def worlds(make_run, tmp_path, monkeypatch, fake_stage):
    """worlds(make, changes, **settings): (split, {name: make(run)}), for each of `changes`, {name:
    a function of the split that gives a mask of rows}, in a world where these rows are others.
    """
    def build(make, changes, **settings):
        run, found = make_run(**{**SETTINGS, **settings}), {}
        split = h.make_split(chosen_products(run), run.split, run.seed)
        fake_stage("splits", copy_split)
        for name, rows_of_split in changes.items():
            place, rows = tmp_path / str(name), rows_of_split(split)
            folder = write_ens(place / "ens")
            if rows.any():
                spoil(folder, split.loc[rows, "product_id"])
            relabelled(split, rows).to_csv(place / "split.csv", index=False)
            for variable, value in (("RAKUTEN_DATA", folder), ("STUDY_RUNS", place / "runs"),
                                    ("STUDY_TEST_SPLIT", place / "split.csv")):
                monkeypatch.setenv(variable, str(value))
            found[name] = make(run)
        return split, found

    return build


def differing(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys() and one
    return [name for name in one if not np.array_equal(one[name], other[name])]


@pytest.mark.parametrize("changed, mode", [("test", "eval"), ("val", "eval"), ("test", "train")])
def test_nothing_fitted_knows_the_rows_of_a_part(worlds, changed, mode):
    make = stages("baselines", *TEXT_STAGES, *IMAGES, *FUSIONS)
    split, folders = worlds(make, UNCHANGED | {changed: PARTS[changed]}, encoder_mode=mode)
    before, after = folders[None], folders[changed]
    assert len(fitted(before)) == 2 * 5 + 2 * 6 + 2 + 2 * 2  # texts, pictures, fusions
    assert differing(fitted(before), fitted(after)) == []
    assert differing(curves(before, ["train_loss"]), curves(after, ["train_loss"])) == []
    scores = ["val_loss", "val_accuracy", "val_macro_f1"]  # by which the best epoch is chosen
    chosen_by = differing(curves(before, scores), curves(after, scores))
    assert (chosen_by == []) == (changed == "test")
    for part in ("train", "val", "test"):
        found = differing(rows_of(before, split, part), rows_of(after, split, part))
        everything = rows_of(before, split, part).keys() - {"majority class"}
        assert set(found) == (everything if part == changed else set()), part


@pytest.mark.parametrize("changed", ["test", "val"])
def test_no_head_of_a_frozen_encoder_knows_the_rows_of_a_part(worlds, tmp_path, changed):
    bert = str(write_bert(tmp_path / "bert", hidden_size=24, num_hidden_layers=1,
                          num_attention_heads=2, intermediate_size=24))
    names = [name for stage in TEXT_STAGES for name in (f"vectors-{stage}", stage)]
    _, folders = worlds(stages(*names), UNCHANGED | {changed: PARTS[changed]},
                        freeze_encoders=True, camembert=bert, flaubert=bert)
    heads = [{name: load_file(folders[part][name] / "head.safetensors")["weight"].numpy()
              for name in TEXT_STAGES} for part in (None, changed)]
    assert differing(*heads) == []


def test_no_late_fusion_knows_other_test_rows(worlds, monkeypatch):
    """Of the test rows every second one is changed: what all models, the late fusions among them,
    say of the others stays, and so does all that they say of the validation rows.
    """
    monkeypatch.setattr(h, "scored_variants", lambda run: [h.named_variant("average-average")])

    def make(run):
        stages("baselines", *TEXT_STAGES, *IMAGES, "fusion-average-average")(run)
        return {part: h.all_probabilities(run, part)[1] for part in ("val", "test")}

    def every_second(split):
        return (split["part"] == "test") & (split["part"].eq("test").cumsum() % 2 == 0)

    split, found = worlds(make, UNCHANGED | {"some": every_second})
    before, after = found[None], found["some"]
    assert set(h.LATE_FUSIONS) < before["val"].keys() == before["test"].keys()
    assert differing(before["val"], after["val"]) == []
    changed = every_second(split)[split["part"] == "test"].to_numpy()
    of = [{model: p.numpy()[~changed] for model, p in each["test"].items()}
          for each in (before, after)]
    assert changed.any() and differing(*of) == []
    assert set(differing(before["test"], after["test"])) == before["test"].keys() - {
        "majority class"}


def test_what_notebook_09_fits_knows_nothing_of_the_test_rows():
    """Its temperature, by its own cell, is the same whatever the test rows are."""
    cells = nbformat.read(ROOT / "notebooks/09_analysis.ipynb", 4)["cells"]
    code, = [cell.source for cell in cells if "T = h.fit_temperature(" in cell.source]
    random = torch.Generator().manual_seed(0)

    def votes(n):
        labels = torch.randint(0, 27, (n,), generator=random)
        return labels, torch.rand(n, 2, 27, generator=random).softmax(-1)

    found, (val_truth, of_val) = [], votes(60)
    for truth, of_test in (votes(40), votes(40)):
        names = {"h": h, "pd": pd, "truth": truth, "probabilities": {"average-average": of_test},
                 "val_truth": val_truth, "val": {"average-average": of_val}}
        exec(code, names)
        found.append(names["T"])
    assert found[0] == found[1] == h.fit_temperature(of_val[:, 0], val_truth)
