"""New products: predicted as the study's own stages would, and written in the challenge's two
forms.
"""
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import helpers as h
from commands.submission import write_submission
from conftest import room_for
from engine.catalogue import load_test_products

VARIANT = h.named_variant("concat-add")


def make_unlabelled(folder: Path, products: pd.DataFrame) -> None:
    """The challenge's test table with these products, in their order, and copies of their
    pictures.
    """
    layout = h.LAYOUTS[h.find_layout(folder)]
    table = list(layout["test"])[-1]  # of SIGIR's two phases the first
    place = folder / layout["test"][table][0]
    place.mkdir(parents=True)
    for path in products["picture"]:
        shutil.copy(path, place)
    renamed = {ours: theirs for theirs, ours in layout["columns"].items()}
    rows = products[list(renamed)].rename(columns=renamed)
    rows = rows.set_axis(range(500, 500 + len(products)))
    name = None if table.endswith(".csv") else "Integer_id"
    rows.rename_axis(name).to_csv(folder / table, sep=layout["separator"])


def train(run: h.Run) -> None:
    fusion = f"fusion-{VARIANT.name}"
    for name in ("splits", "text", "seresnext", *h.REPRESENTATIONS.values(), fusion):
        h.stage(run, name)


@pytest.mark.slow
@pytest.mark.parametrize("layout, settings, file, head", [
    ("tiny_ens", {"regions": "tiles"}, "y_test_update_pred.csv", ",prdtypecode"),
    ("tiny_sigir", {"regions": "feature_map", "rows": "all", "clean": "light", "pooling": "mean"},
     "y_test_task1_phase1_pred.tsv", "Integer_id\tPrdtypecode")])
def test_submission_holds_what_the_stages_predict(make_run, request, monkeypatch, layout, settings,
                                                  file, head):
    folder = request.getfixturevalue(layout)
    run = make_run(image_size=32, region_size=32, grid=8, image_batch=16, **settings)
    monkeypatch.setenv("RAKUTEN_DATA", str(folder))  # make_run has set its own
    train(run)
    ids = h.read_split(run).query("part == 'test'")["product_id"].sample(frac=1, random_state=1)
    products = h.load_catalogue(folder).set_index("product_id", drop=False)
    make_unlabelled(folder, products.loc[ids])
    # As the stage `scores` does it.
    expected = h.fusion_probabilities(run, VARIANT, h.read_representations(run, ids))[:, 0]
    classifier = h.load_classifier(run, VARIANT.name)
    found = classifier.probabilities(load_test_products(folder))
    assert torch.allclose(found, expected, atol=1e-5)
    path = write_submission(run, VARIANT.name)
    lines = path.read_text().splitlines()
    assert path.name == file and lines[0] == head and len(lines) == 1 + len(ids)
    rows = [line.replace("\t", ",").split(",") for line in lines[1:]]
    assert [int(index) for index, _ in rows] == list(range(500, 500 + len(ids)))
    codes = h.load_classes(run)["prdtypecode"]
    assert [int(code) for _, code in rows] == codes[expected.argmax(-1).numpy()].tolist()
    with room_for(10), pytest.raises(OSError, match="no room is left for a file in .*submissions"):
        write_submission(run, VARIANT.name)
    assert list(path.parent.iterdir()) == [path] and path.read_text().splitlines() == lines
    # A run on described rows never saw a missing description.
    missing = h.load_catalogue(folder).query("description == ''")
    probabilities = classifier.probabilities(missing)
    assert torch.allclose(probabilities.sum(1), torch.ones(len(missing)), atol=1e-5)
    for nothing in (None, float("nan")):  # as a user's own table may have it
        own = missing.assign(description=[nothing] * len(missing))
        assert torch.equal(classifier.probabilities(own), probabilities)
    # A run is read with the settings that it was made with, or not at all.
    other = {"paper": "light", "light": "paper"}[run.profile.clean]
    for changed, said in (({"clean": other}, f"clean={run.profile.clean}"),
                          ({"max_length": 16}, "max_length=32")):
        unlike = make_run(**{**run.changed, **changed})
        with pytest.raises(FileNotFoundError, match=f"is missing.*there is one with .*{said}"):
            write_submission(unlike, VARIANT.name)


@pytest.mark.parametrize("layout", ["tiny_ens", "tiny_sigir"])
def test_unlabelled_table_loads_as_the_labelled_one_with_its_own_index(request, layout):
    folder = request.getfixturevalue(layout)
    products = h.load_catalogue(folder)
    make_unlabelled(folder, products[::-1])
    found = load_test_products(folder)
    assert found.index.tolist() == list(range(500, 560))
    assert set(products) - set(found) == {"prdtypecode", "label_id"} and set(found) <= set(products)
    for column in set(found) - {"picture"}:
        assert found[column].tolist() == products[column][::-1].tolist()
    assert "" in found["description"].tolist() and "NA" in found["title"].tolist()
    assert all(Path(path).is_file() and "test" in path for path in found["picture"])
    assert h.load_catalogue(folder).equals(products)  # the labelled part is as it was


@pytest.mark.parametrize("layout, file", [
    ("tiny_ens", "X_test_update.csv"), ("tiny_sigir", "x_test_task1_phase1.tsv")])
def test_missing_unlabelled_table_is_named(request, layout, file):
    with pytest.raises(FileNotFoundError, match=file):
        load_test_products(request.getfixturevalue(layout))


def test_a_run_without_the_variant_says_how_to_make_it(run, tiny_ens, monkeypatch):
    monkeypatch.setattr(h, "load_checkpoint", lambda *_: pytest.fail("minutes before the error"))
    make_unlabelled(tiny_ens, h.load_catalogue(tiny_ens).head(3))
    said = "stage fusion-.*python run.py study --profile paper"
    with pytest.raises(FileNotFoundError, match=said):
        write_submission(run, VARIANT.name)
    assert not (run.folder / "submissions").exists()


def test_variants_are_known_by_their_names():
    assert all(h.named_variant(variant.name) == variant for variant in h.TABLE_VARIANTS)
    raw = h.Variant("add", "concat", "layers", standardise=False)
    assert h.named_variant(raw.name) == raw
    with pytest.raises(ValueError, match="unknown variant 'concat'; a variant is .*concat-add"):
        h.named_variant("concat")
