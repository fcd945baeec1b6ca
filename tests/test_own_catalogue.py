"""A catalogue of one's own: imported from a table, then the whole chain on its classes."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image

import helpers as h
from commands.importing import Columns, import_catalogue
from commands.site import report_folder
from conftest import ROOT, SMALL, isolate
from engine.catalogue import load_catalogue
from engine.settings import TEXT_STAGES
from own_catalogue import KINDS, make_products

COLUMNS = Columns("name", "category", "details", "photo")


@pytest.fixture
def shop(tmp_path):
    """(folder, table) of 42 products of three kinds, four of them without a picture."""
    folder = tmp_path / "shop"
    table = make_products(folder, 42, kinds=3)
    table.loc[[3, 7, 20, 33], "photo"] = ["-", "", "-", ""]
    return folder, table


def written(folder: Path, table: pd.DataFrame, name: str = "products.csv", **how) -> Path:
    path = folder / name
    table.to_csv(path, index=False, **how)
    return path


@pytest.mark.parametrize("name, how", [
    ("products.csv", {}), ("products.tsv", {"sep": "\t"}), ("semicolon.csv", {"sep": ";"}),
    ("windows.csv", {"encoding": "cp1252"})])
def test_an_imported_table_is_read_as_it_was(shop, tmp_path, name, how):
    folder, table = shop
    table.loc[0, "name"] = 'Crème "Noël", 3 pièces; 12 €'
    counts = import_catalogue(written(folder, table, name, **how), tmp_path / "own", COLUMNS,
                              encoding=how.get("encoding", "utf-8-sig"), blank=True)
    assert counts == {"rows": 42, "classes": 3, "with a picture": 38,
                      "with a description": int((table["details"] != "").sum())}
    found = load_catalogue(tmp_path / "own")
    assert found["product_id"].tolist() == list(range(1, 43))
    assert found["title"].tolist() == table["name"].tolist()
    assert found["description"].tolist() == table["details"].tolist()
    classes = pd.read_csv(tmp_path / "own" / "classes.csv")
    assert classes["name_en"].tolist() == sorted(list(KINDS)[:3])
    assert classes["name_en"][found["label_id"]].tolist() == table["category"].tolist()
    for row in (0, 3):
        picture = np.asarray(Image.open(found["picture"][row]).convert("RGB"))
        truth = 255 if table["photo"][row] == "-" else \
            np.asarray(Image.open(folder / table["photo"][row]))
        assert (picture == truth).all()


def test_parquet_that_cannot_be_read_is_said_so_or_its_library_is_named(shop, tmp_path):
    path = tmp_path / "products.parquet"
    path.write_bytes(b"PAR1 is no table")
    with pytest.raises(ValueError, match="install pyarrow|cannot be read as Parquet"):
        import_catalogue(path, tmp_path / "own", COLUMNS)


def test_parquet_is_read_as_the_table_that_it_is(shop, tmp_path, monkeypatch):
    """With pandas' own reader replaced by the table: pyarrow is an optional library."""
    folder, table = shop
    typed = table.assign(category=table["category"].map(list(KINDS).index) + 0.0, details=None)
    monkeypatch.setattr(pd, "read_parquet", lambda path: typed)
    import_catalogue(folder / "products.parquet", tmp_path / "own", COLUMNS, blank=True)
    found = load_catalogue(tmp_path / "own")
    assert found["prdtypecode"].tolist() == typed["category"].astype(int).tolist()
    assert set(found["description"]) == {""}


def test_numbers_as_labels_stay_the_codes(shop, tmp_path):
    folder, table = shop
    table["category"] = table["category"].map({"Garden tools": 2060, "Kitchenware": 7,
                                               "Board games": 10})
    import_catalogue(written(folder, table), tmp_path / "own", COLUMNS, blank=True)
    classes = pd.read_csv(tmp_path / "own" / "classes.csv")
    assert classes["prdtypecode"].tolist() == [7, 10, 2060]
    assert load_catalogue(tmp_path / "own")["prdtypecode"].tolist() == table["category"].tolist()


@pytest.mark.parametrize("labels", [("None", "NA", "null"), ("001", "01", "1"),
                                    ("True", "False", "nan"), ("1.10", "1.1", "1e1")])
def test_a_classs_name_is_the_text_that_it_is(shop, tmp_path, labels):
    folder, table = shop
    names = dict(zip(("Garden tools", "Kitchenware", "Board games"), labels))
    table["category"] = table["category"].map(names)
    import_catalogue(written(folder, table), tmp_path / "own", COLUMNS, blank=True)
    classes = h.load_classes(h.open_run("sample", "90-10", 0, {"data": str(tmp_path / "own")}))
    assert classes["name_fr"].tolist() == classes["name_en"].tolist() == sorted(labels)
    found = load_catalogue(tmp_path / "own")["label_id"].map(classes["name_en"])
    assert found.tolist() == table["category"].tolist()


@pytest.mark.parametrize("column", ["domain", "name_fr", "name_en"])
@pytest.mark.parametrize("sign", ["\x1b[31m", "\n", "\x9b"])
def test_a_class_table_with_control_characters_is_refused(shop, tmp_path, column, sign):
    import_catalogue(written(*shop), tmp_path / "own", COLUMNS, blank=True)
    path = tmp_path / "own" / "classes.csv"
    classes = pd.read_csv(path)
    classes.loc[1, column] = f"Gar{sign}den"
    classes.to_csv(path, index=False)
    with pytest.raises(ValueError) as error:
        load_catalogue(tmp_path / "own")
    assert f"classes.csv: the {column} {f'Gar{sign}den'!r} holds a control" in str(error.value)


@pytest.mark.parametrize("change, said", [
    (lambda t: t.assign(photo="-"), "42 rows cannot be used (row 1: it names no picture"),
    (lambda t: t.assign(photo="gone.jpg"), "row 1: picture "),
    (lambda t: t.assign(name=[" "] + t["name"].tolist()[1:]), "row 1: its title is empty"),
    (lambda t: t.assign(category=t["category"].mask(t.index == 4, "")),
     "row 5: its label is empty"),
    (lambda t: t.assign(category=t["category"].mask(t.index == 4, "Gar\x1b[31mden")),
     "row 5: its label 'Gar\\x1b[31mden' holds a control character"),
    (lambda t: t.assign(category="all"), "all rows have the label 'all'"),
    (lambda t: t.rename(columns={"details": "text"}), "has no column details; found: name, text")])
def test_what_does_not_fit_is_refused_by_row_and_nothing_is_written(shop, tmp_path, change, said):
    folder, table = shop
    table["photo"] = table["photo"].replace(["-", ""], "photos/0.png")
    with pytest.raises(ValueError) as error:
        import_catalogue(written(folder, change(table)), tmp_path / "own", COLUMNS)
    assert said in str(error.value)
    assert not (tmp_path / "own").exists() and not (tmp_path / "own.partial").exists()


def test_a_folder_that_is_there_is_not_touched(shop, tmp_path):
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError, match="own is there already"):
        import_catalogue(written(*shop), tmp_path / "own", COLUMNS, blank=True)


TINY = {**SMALL, "fusion_seeds": 1, "as_released": False, "text_epochs": 2, "image_epochs": 1}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """(run, what the command said) of the whole chain on 1,000 products of seven kinds."""
    place = tmp_path_factory.mktemp("own")
    table = make_products(place / "shop", 1000)
    import_catalogue(written(place / "shop", table), place / "garden centre", COLUMNS)
    patch = pytest.MonkeyPatch()
    isolate(patch, place, place)
    settings = {**TINY, "data": str(place / "garden centre"), "rows": "all"}
    words = [f"--set={name}={value}" for name, value in settings.items()]
    ended = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "study", "--split", "90-10", *words],
        capture_output=True, text=True,
        env={**os.environ, "STUDY_CORES": "1", "COLUMNS": "200"})
    yield h.open_run("sample", "90-10", 0, settings), ended
    patch.undo()


@pytest.mark.slow
def test_the_chain_runs_on_its_own_classes(studied):
    run, ended = studied
    assert ended.returncode == 0, ended.stderr
    truth, found = h.read_probabilities(run)
    assert {probabilities.shape[-1] for probabilities in found.values()} == {7}
    assert len(truth) == 100 and truth.max() == 6
    assert run.own_catalogue and run.data_name == "catalogue garden centre"


@pytest.mark.slow
def test_what_belongs_to_the_paper_alone_is_left_out_and_said_so(studied):
    run, ended = studied
    assert "the paper's figures are left out" in ended.stdout and "92.67" not in ended.stdout
    for page in ("index.html", "90-10-seed0/08_result_tables.html"):
        text = BeautifulSoup((report_folder(run) / page).read_text(), "html.parser").get_text()
        assert "Rakuten France" not in text and "synthetic sample" not in text


@pytest.mark.slow
def test_three_classes_and_products_without_picture(tmp_path, monkeypatch):
    """From the table to a fusion's prediction, with white pictures for a third of the rows."""
    table = make_products(tmp_path / "shop", 120, kinds=3, without_picture=0.3)
    import_catalogue(written(tmp_path / "shop", table), tmp_path / "own", COLUMNS, blank=True)
    isolate(monkeypatch, tmp_path, tmp_path)
    run = h.open_run("sample", "80-20", 1, {**TINY, "data": str(tmp_path / "own"), "rows": "all"})
    for name in ("splits", "text", *TEXT_STAGES, "seresnext", "image_regions", "fusion-concat-add"):
        h.stage(run, name)
    ids = h.read_split(run).query("part == 'test'")["product_id"]
    x = h.read_representations(run, ids)
    probabilities = h.fusion_probabilities(run, h.named_variant("concat-add"), x)
    assert probabilities.shape == (24, 1, 3)
    assert torch.allclose(probabilities.sum(-1), torch.ones(24, 1))
    products = h.usable_products(run).set_index("product_id").loc[ids]
    predicted = h.load_classifier(run).predict(products, probabilities=True)
    codes = h.load_classes(run)["prdtypecode"].tolist()
    assert predicted.columns.tolist()[4:] == codes and set(predicted["name"]) <= {*KINDS}
    assert np.allclose(predicted[codes], probabilities[:, 0], atol=1e-5)
    assert predicted["code"].tolist() == [codes[i] for i in probabilities[:, 0].argmax(-1)]
