"""A classifier in memory: it says what the stages say, of a run, of an exported folder, of a CSV
file; and what is missing, wrong or damaged is named.
"""
import csv
import io
import pickletools
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import helpers as h
import run as command_line
from commands.products import card_of
from conftest import SMALL, isolate, write_bert, write_ens
from engine.exports import parts_of_folder, parts_of_run, write_export
from engine.processes import use_threads
from engine.variants import text_level

VARIANT, TEXTS = h.named_variant("concat-add"), h.named_variant("concat-concat-text")
SETTINGS = SMALL | {"image_size": 32, "region_size": 32, "grid": 8, "image_batch": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has trained concat-add and the fusion of its texts, for all tests here."""
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder, write_ens(folder / "ens"))
        run = h.open_run("paper", "90-10", 0, SETTINGS)
        for name in ("splits", "text", "seresnext", *h.REPRESENTATIONS.values(), "image_whole",
                     f"fusion-{VARIANT.name}", f"fusion-{TEXTS.name}"):
            h.stage(run, name)
        yield run


@pytest.fixture(scope="module")
def classifier(run):
    return h.load_classifier(run)


@pytest.fixture(scope="module")
def products(run):
    """Six products of the test part, as a user's table."""
    ids = h.read_split(run).query("part == 'test'")["product_id"]
    table = h.load_catalogue(h.catalogue_folder(run)).set_index("product_id").loc[ids].head(6)
    return table[["title", "description", "picture"]]


@pytest.fixture
def exported(run, tmp_path):
    folder = tmp_path / "classifier"
    write_export(folder, parts_of_run(run, VARIANT), card_of(run, VARIANT))
    return folder


def fused(run, products, variant=VARIANT, missing=()):
    """What the stages say of these products."""
    x = h.read_representations(run, products.index)
    return h.fusion_probabilities(run, variant, x, missing)[:, 0]


# --- of a run -------------------------------------------------------------------------------------
def test_it_says_what_the_stages_say(run, classifier, products):
    kept = h.read_representations(run, products.index)
    for symbol, rows in classifier.representations(products).items():
        assert torch.allclose(rows, kept[symbol], atol=1e-5), symbol
    assert torch.allclose(classifier.probabilities(products), fused(run, products), atol=1e-5)
    for gone in h.MODALITIES:
        found = classifier.probabilities(products, missing=[gone])
        assert torch.allclose(found, fused(run, products, missing=[gone]), atol=1e-5), gone


def test_each_level_is_asked(run, classifier, products):
    found = classifier.levels(products)
    assert list(found) == [*h.ENCODER_MODELS, TEXTS.name, VARIANT.name]
    for name in h.ENCODER_MODELS:
        wanted = h.encoder_probabilities(run, name, products.index)
        assert torch.allclose(found[name], wanted, atol=1e-5), name
    assert torch.allclose(found[TEXTS.name], fused(run, products, TEXTS), atol=1e-5)
    assert torch.allclose(found[VARIANT.name], fused(run, products), atol=1e-5)


@pytest.mark.parametrize("nothing", [None, float("nan"), ""])
def test_what_is_missing_has_a_stand_in_and_is_said(classifier, products, nothing):
    table = products.astype(object)
    table.iloc[1, 2] = table.iloc[3, 1] = table.iloc[4, 0] = nothing
    found, whole = classifier.probabilities(table), classifier.probabilities(products)
    mean = classifier.probabilities(products, missing=["picture"])
    assert torch.allclose(found[[0, 2, 5]], whole[[0, 2, 5]], atol=1e-5)
    assert torch.allclose(found[1], mean[1], atol=1e-5)
    assert not torch.allclose(found[1], whole[1], atol=1e-3)
    notes = classifier.predict(table)["notes"].tolist()
    assert notes[1] == "no picture: the training rows' mean stands for it"
    assert notes[3] == "no description: read as an empty text"
    assert notes[4] == "no title: read as an empty text" and notes[0] == notes[2] == ""
    levels = classifier.levels(table)
    assert levels["seresnext"][1].isnan().all() and not levels["seresnext"][2].isnan().any()
    assert not any(levels[name].isnan().any() for name in levels if name != "seresnext")


def test_no_picture_at_all(classifier, products):
    found = classifier.probabilities(products.assign(picture=None))
    mean = classifier.probabilities(products, missing=["picture"])
    assert torch.allclose(found, mean, atol=1e-5)


def test_predictions_keep_the_tables_index(classifier, products):
    table = products.set_axis(list("abcdef"))
    found, p = classifier.predict(table, probabilities=True), classifier.probabilities(table)
    classes = classifier.classes
    assert found.index.tolist() == list("abcdef")
    assert found.columns.tolist() == ["code", "name", "probability", "notes",
                                      *classes["prdtypecode"]]
    for place, row in enumerate(found.to_dict("records")):
        best = int(p[place].argmax())
        assert (row["code"], row["name"]) == tuple(classes.loc[best, ["prdtypecode", "name_en"]])
        assert row["probability"] == pytest.approx(row[row["code"]]) == pytest.approx(
            p[place, best].item())
    assert classifier.predict(table).columns.tolist() == ["code", "name", "probability", "notes"]


def test_encoders_are_loaded_once(run, products, monkeypatch):
    loaded, load = [], h.load_checkpoint
    monkeypatch.setattr(h, "load_checkpoint", lambda *a, **k: loaded.append(a) or load(*a, **k))
    classifier = h.load_classifier(run)
    for _ in range(2):
        classifier.predict(products)
    assert len(loaded) == len(h.TEXT_STAGES)


def test_a_fusion_of_texts_needs_no_image_encoder(run, products):
    classifier = h.load_classifier(run, TEXTS.name)
    assert classifier.image is None
    assert list(classifier.levels(products)) == [*h.TEXT_STAGES, TEXTS.name]
    table = products.assign(picture="")
    assert torch.allclose(classifier.probabilities(table), fused(run, products, TEXTS), atol=1e-5)


@pytest.mark.parametrize("change, said", [
    (lambda table: table.drop(columns=["description", "picture"]),
     "no column description, picture; it needs title, description, picture"),
    (lambda table: table.head(0), "holds no row"),
    (lambda table: table.assign(title="", description=None, picture=""),
     "row .* has neither title, description nor picture"),
    (lambda table: table.assign(picture="nowhere.jpg"), "picture nowhere.jpg cannot be read")])
def test_a_table_that_is_none_is_refused(classifier, products, change, said):
    with pytest.raises(ValueError, match=said):
        classifier.predict(change(products))


def test_a_variant_that_is_not_trained_is_named(run):
    with pytest.raises(FileNotFoundError, match="stage fusion-average-average .* is missing"):
        h.load_classifier(run, "average-average")
    with pytest.raises(ValueError, match="unknown variant"):
        h.load_classifier(run, "concat")


@pytest.mark.parametrize("name, level", [
    ("concat-add", "concat-concat-text"),
    ("average-concat-dropout", "average-average-dropout-text"),
    ("concat-concat-whole", "concat-concat-text"), ("concat-concat-flat", None),
    ("concat-concat-text", None)])
def test_the_level_of_the_texts(name, level):
    found = text_level(h.named_variant(name))
    assert (found and found.name) == level


# --- a folder of its own --------------------------------------------------------------------------
def test_an_exported_folder_says_the_same_to_the_bit_without_its_run(classifier, products, exported,
                                                                     monkeypatch, tmp_path):
    for variable in ("STUDY_RUNS", "STUDY_CACHE", "RAKUTEN_DATA"):
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    elsewhere = exported.rename(tmp_path / "moved")
    found = h.load_classifier(elsewhere)
    mixed = products.astype(object)
    mixed.iloc[2, 2] = None
    for table in (products, mixed):
        assert torch.equal(found.probabilities(table), classifier.probabilities(table))
    assert found.predict(mixed).equals(classifier.predict(mixed))
    for name, p in classifier.levels(products).items():
        assert torch.equal(found.levels(products)[name], p), name


def test_a_classifier_computes_on_the_threads_of_its_run(exported):
    parts, usual = parts_of_folder(exported), torch.get_num_threads()
    profile = replace(parts.run.profile, threads=usual + 1)
    try:
        h.ProductClassifier(replace(parts, run=replace(parts.run, profile=profile)))
        assert torch.get_num_threads() == usual + 1
    finally:
        use_threads(replace(profile, threads=usual))


def test_an_exported_folder_is_whole_and_holds_no_pickle(run, exported):
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*")
             if path.is_file()}
    assert {"classifier.json", "hashes.json", "classes.csv", "README.md",
            "camembert_title/encoder/model.safetensors", "seresnext/encoder.safetensors",
            "fusion-concat-add/model-0.safetensors"} <= names
    kinds = {Path(name).suffix for name in names}
    assert kinds <= {".safetensors", ".json", ".csv", ".md", ".txt", ".model"}, kinds
    for path in filter(Path.is_file, exported.rglob("*")):
        content = path.read_bytes()
        assert not content.startswith(b"PK")  # torch's own files are zipped pickles
        with pytest.raises(ValueError):
            list(pickletools.genops(content))
    assert not list(exported.parent.glob("*.partial"))
    card = (exported / "README.md").read_text()
    assert "split 90-10, seed 0" in card and "not been scored" in card and "terms forbid" in card
    assert str(exported.parent) not in card + (exported / "classifier.json").read_text()


def test_a_place_that_is_taken_is_refused(run, exported):
    before = sorted(exported.rglob("*"))
    with pytest.raises(ValueError, match="is there already: name a new folder"):
        write_export(exported, parts_of_run(run, VARIANT), "")
    assert sorted(exported.rglob("*")) == before


def test_a_stop_leaves_no_folder_and_the_next_export_goes_through(run, tmp_path, monkeypatch):
    folder, copy, copied = tmp_path / "classifier", shutil.copyfile, []

    def stop(*places):
        copied.append(copy(*places))
        if len(copied) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", stop)
        with pytest.raises(KeyboardInterrupt):
            write_export(folder, parts_of_run(run, VARIANT), "")
    assert not folder.exists()
    write_export(folder, parts_of_run(run, VARIANT), "")
    assert h.load_classifier(folder).variant == VARIANT
    assert [path.name for path in tmp_path.iterdir()] == ["classifier"]


@pytest.mark.parametrize("file", ["seresnext/head.safetensors", "classes.csv", "hashes.json",
                                  "flaubert_title/encoder/model.safetensors"])
def test_damage_is_named(exported, file):
    place = exported / file
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged or missing; export the classifier again"):
        h.load_classifier(exported)
    place.unlink()
    with pytest.raises(ValueError, match="is damaged or missing; export the classifier again"):
        h.load_classifier(exported)


def test_another_variant_or_no_classifier_is_refused(exported, tmp_path):
    assert h.load_classifier(exported, "concat-add").variant == VARIANT
    with pytest.raises(ValueError, match="holds the variant concat-add, not average-average"):
        h.load_classifier(exported, "average-average")
    with pytest.raises(ValueError, match="is no exported classifier: it has no classifier.json"):
        h.load_classifier(tmp_path)


def test_a_fusion_of_ones_own_is_refused_and_one_of_the_study_beside_it_is_not(tmp_path, run):
    file = tmp_path / "own.py"
    file.write_text("import helpers as h\n\n@h.fusion('x')\ndef own(*x):\n    return sum(x)\n")
    own = h.open_run("paper", "90-10", 0, SETTINGS | {"fusions": str(file)})
    with pytest.raises(ValueError, match="own-own cannot be exported: its Z own is your own code"):
        command_line.export(command_line.parser().parse_args(
            ["export", str(tmp_path / "folder"), "--variant", "own-own", *own.options]))
    assert not (tmp_path / "folder").exists()
    write_export(tmp_path / "folder", parts_of_run(own, VARIANT), card_of(own, VARIANT))
    text = "".join(path.read_text() for path in (tmp_path / "folder").glob("*.*"))
    assert "own.py" not in text.replace(own.name, "")


@pytest.mark.slow
def test_frozen_encoders_predict_and_are_exported_as_they_are(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, write_ens(tmp_path / "ens"))
    bert = str(write_bert(tmp_path / "bert", hidden_size=24, num_hidden_layers=1,
                          num_attention_heads=2, intermediate_size=48))
    run = h.open_run("paper", "90-10", 0, SETTINGS | {
        "camembert": bert, "flaubert": bert, "freeze_encoders": True})
    for name in ("splits", "text", "seresnext", *h.REPRESENTATIONS.values(), "image_whole",
                 f"fusion-{VARIANT.name}", f"fusion-{TEXTS.name}"):
        h.stage(run, name)
    ids = h.read_split(run).query("part == 'test'")["product_id"]
    products = h.usable_products(run).set_index("product_id").loc[ids]
    found = h.load_classifier(run)
    assert torch.allclose(found.probabilities(products), fused(run, products), atol=1e-5)
    write_export(tmp_path / "exported", parts_of_run(run, VARIANT), card_of(run, VARIANT))
    again = h.load_classifier(tmp_path / "exported").levels(products)
    for name, p in found.levels(products).items():
        assert torch.equal(again[name], p), name
        if name in h.TEXT_STAGES:  # the head that was fitted on the frozen vectors
            assert torch.allclose(p, h.encoder_probabilities(run, name, ids), atol=1e-5), name


# --- a CSV file -----------------------------------------------------------------------------------
HEAD = "row,code,name,probability,notes"


@pytest.fixture
def file(products, tmp_path):
    """Three products as a CSV file beside their pictures, one with neither picture nor text."""
    (tmp_path / "shop").mkdir()
    rows = [["image", "title", "description"]]
    for row in products.head(3).itertuples():
        shutil.copy(row.picture, tmp_path / "shop")
        rows.append([Path(row.picture).name, row.title, row.description])
    rows[2][0], rows[3][2] = "-", ""
    path = tmp_path / "shop" / "products.csv"
    with path.open("w", newline="") as out:
        csv.writer(out).writerows(rows)
    return path


def test_a_file_is_predicted_from_a_folder_and_from_a_run(run, classifier, products, file, exported,
                                                          capsys, tmp_path):
    table = products.head(3).astype(object)
    table.iloc[1, 2], table.iloc[2, 1] = None, None
    wanted = classifier.predict(table)
    assert command_line.main(["predict", str(file), "--from-folder", str(exported)]) == 0
    said = capsys.readouterr().out
    found = pd.read_csv(io.StringIO(said), keep_default_na=False)
    assert said.splitlines()[0] == HEAD and found["row"].tolist() == [1, 2, 3]
    for column in ("code", "name", "notes"):
        assert found[column].tolist() == wanted[column].tolist()
    assert found["probability"].tolist() == pytest.approx(wanted["probability"].tolist(), abs=1e-5)
    to = tmp_path / "out.csv"
    assert command_line.main(["predict", str(file), "--to", str(to), *run.options]) == 0
    assert capsys.readouterr().out == "" and to.read_text() == said
    assert command_line.main(["predict", str(file), "--probabilities", *run.options]) == 0
    assert len(capsys.readouterr().out.splitlines()[0].split(",")) == 5 + 27


@pytest.mark.parametrize("text, said", [
    ("title,description,picture\na,b,c\n",
     "lacks the column image and has the unknown column picture: its columns must be title, "),
    ("title;description;image\na;b;c\n", "lacks the column title, description, image"),
    ("title,title,description,image\na,a,b,-\n", "has twice title"),
    ("title,description,image\n", "holds no rows"),
    ("title,description,image\na,b\n", "has 2 fields"),
    ("title,description,image\na,b,-\n,-,\nc,,gone.jpg\n",
     "2 rows cannot be used .row 2: it has neither title, description nor image; row 3: picture "),
    ("title,description,image\n\"a,b,-\n", "line 2: unexpected end of data")])
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(text, said, tmp_path, capsys):
    path, to = tmp_path / "products.csv", tmp_path / "out.csv"
    path.write_text(text)
    words = ["predict", str(path), "--to", str(to), "--from-folder", str(tmp_path)]
    assert command_line.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said.replace("(", "") in error.replace("(row", ".row")
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_target_that_cannot_be_written_is_refused_first(file, tmp_path, capsys):
    for to, said in ((file, "would replace the products themselves"),
                     (tmp_path / "no" / "out.csv", "a file in a folder that is there"),
                     (tmp_path, "a file in a folder that is there")):
        words = ["predict", str(file), "--to", str(to), "--from-folder", "nowhere"]
        assert command_line.main(words) == 1 and said in capsys.readouterr().err
    assert command_line.main(["predict", str(file), "--from-folder", "nowhere"]) == 1
    assert "nowhere is no exported classifier" in capsys.readouterr().err


def test_export_writes_the_folder_of_the_run_that_is_named(run, tmp_path, capsys):
    folder = tmp_path / "classifier"
    assert command_line.main(["export", str(folder), *run.options]) == 0
    assert run.name in capsys.readouterr().out
    assert h.load_classifier(folder).run.profile.max_length == run.profile.max_length
    assert command_line.main(["export", str(folder), *run.options]) == 1
    assert "is there already" in capsys.readouterr().err


def test_an_absolute_picture_of_another_format_is_read(classifier, file, tmp_path, exported,
                                                       capsys):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    file.write_text(f"title,description,image\nun livre,,{tmp_path / 'red.png'}\n")
    assert command_line.main(["predict", str(file), "--from-folder", str(exported)]) == 0
    assert "no picture" not in capsys.readouterr().out
