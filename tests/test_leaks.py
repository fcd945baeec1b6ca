"""What is fitted knows nothing of the test rows, and no gradient step of the validation rows.

Texts, pictures and labels of one part are changed, and everything is made again: encoders,
tokenizers, heads, batch statistics, scales, baselines, fusion models. What is fitted must be the
same bytes. Of one epoch it is what the gradient steps alone have made.
"""
import os
import shutil
import string

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file

import helpers as h
from conftest import write_bert, write_ens
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


def spoil(folder, split: pd.DataFrame, part: str) -> None:
    """Change texts and pictures of the rows of one part."""
    products = h.load_catalogue(folder).set_index("product_id")
    ids = split.loc[split["part"] == part, "product_id"]
    table = pd.read_csv(folder / "X_train_update.csv", index_col=0, keep_default_na=False)
    rows = table["productid"].isin(ids)
    for column in ("designation", "description"):
        table.loc[rows, column] = table.loc[rows, column].str.translate(OTHER_LETTERS)
    table.to_csv(folder / "X_train_update.csv")
    for path in products.loc[ids, "picture"]:
        with Image.open(path) as picture:
            changed = ImageOps.invert(picture.rotate(90))
        changed.save(path)


def relabelled(split: pd.DataFrame, part: str) -> pd.DataFrame:
    """The split with the labels of one part turned round."""
    rows, labels = split["part"] == part, np.sort(split["label_id"].unique())
    turned = dict(zip(labels, np.roll(labels, 1)))
    return split.assign(label_id=split["label_id"].mask(rows, split["label_id"].map(turned)))


def make_all(run: h.Run, names) -> dict:
    """{stage: its folder}, all made."""
    return {name: h.stage(run, name) for name in ("splits", "text", *names)}


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


@pytest.fixture
def three(make_run, tmp_path, monkeypatch, fake_stage):
    """three(names, **settings): (split, {None, "test", "val": folders}): nothing changed, the rows
    of test changed, those of val changed.
    """
    def make(names, **settings):
        run, found = make_run(**{**SETTINGS, **settings}), {}
        split = h.make_split(chosen_products(run), run.split, run.seed)
        fake_stage("splits", copy_split)
        for part in (None, "test", "val"):
            place = tmp_path / str(part)
            folder = write_ens(place / "ens")
            if part:
                spoil(folder, split, part)
            relabelled(split, part).to_csv(place / "split.csv", index=False)
            for variable, value in (("RAKUTEN_DATA", folder), ("STUDY_RUNS", place / "runs"),
                                    ("STUDY_TEST_SPLIT", place / "split.csv")):
                monkeypatch.setenv(variable, str(value))
            found[part] = make_all(run, names)
        return split, found

    return make


def differing(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys() and one
    return [name for name in one if not np.array_equal(one[name], other[name])]


@pytest.mark.parametrize("changed, mode", [("test", "eval"), ("val", "eval"), ("test", "train")])
def test_nothing_fitted_knows_the_rows_of_a_part(three, changed, mode):
    names = ("baselines", *TEXT_STAGES, *IMAGES, *FUSIONS)
    split, folders = three(names, encoder_mode=mode)
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
def test_no_head_of_a_frozen_encoder_knows_the_rows_of_a_part(three, tmp_path, changed):
    bert = str(write_bert(tmp_path / "bert", hidden_size=24, num_hidden_layers=1,
                          num_attention_heads=2, intermediate_size=24))
    names = [name for stage in TEXT_STAGES for name in (f"vectors-{stage}", stage)]
    _, folders = three(names, freeze_encoders=True, camembert=bert, flaubert=bert)
    heads = [{name: load_file(folders[part][name] / "head.safetensors")["weight"].numpy()
              for name in TEXT_STAGES} for part in (None, changed)]
    assert differing(*heads) == []
