"""The doctor names what is missing and says what to do."""
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

import costs
import doctor
import helpers as h
import run as study
from conftest import isolate, tiny_products

TEXTS = tiny_products()["title"].tolist()


@pytest.fixture(params=["tiny_ens", "tiny_sigir"])
def catalogue(request, tmp_path, monkeypatch):
    """The folder of the 60 products in either layout, as the paper profile's catalogue."""
    folder = request.getfixturevalue(request.param)
    isolate(monkeypatch, tmp_path, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{encoder: folder} of whole checkpoints of small models."""
    folders = {}
    for encoder in h.TEXT_ENCODERS:
        folders[encoder] = tmp_path_factory.mktemp(encoder)
        tokenizer = h.train_tokenizer(encoder, TEXTS, 200, folders[encoder])
        h.small_text_model(encoder, tokenizer, 16, 1, 32).save_pretrained(folders[encoder])
    return folders


def checked(name: str, checks: list) -> doctor.Check:
    return next(check for check in checks if check.name == name)


def examine(**settings) -> list[doctor.Check]:
    """The checks of catalogue and pictures."""
    run = h.open_run("paper", "90-10", 0, {"image_size": 64, "region_size": 64, **settings})
    checks, products = doctor.check_catalogue(run)
    return checks + (doctor.check_pictures(run, products, False) if products is not None else [])


def pictures(catalogue):
    """Pictures of rows that have a description."""
    return [doctor.Path(path) for path in h.select_rows(h.load_catalogue(catalogue), "described")["picture"]]


# --- catalogue and pictures ---------------------------------------------------------------------------
def test_a_whole_fixture_is_found_and_differs_from_the_public_counts(catalogue):
    checks = examine(rows="all")
    assert [check.name for check in checks if check.state == "missing"] == []
    assert checked("catalogue", checks).found.startswith("ENS" if catalogue.name == "ens" else "SIGIR")
    assert checked("tables", checks).state == "warning" and "60 labelled rows" in checked("tables", checks).found
    filled = int((tiny_products()["description"] != "").sum())
    assert f"{filled} not missing" in checked("descriptions", checks).found
    assert "55,116" in checked("descriptions", checks).found and "55,025" in checked("descriptions", checks).found
    absent = checked("codes", checks).found
    assert absent.startswith("5 of 27") and "2403" in absent and "2583" not in absent
    assert checked("pictures", checks).found.startswith("60 of 60")
    assert checked("decoding", checks).found.startswith("60 of 60")


def test_public_counts_are_ok():
    codes = h.load_classes()["prdtypecode"]
    products = pd.DataFrame({"prdtypecode": np.resize(codes, 84_916), "description": "x"})
    products.loc[55_116:, "description"] = ""
    products.loc[:90, "description"] = " "  # 91 descriptions are there and blank
    assert {check.state for check in doctor.check_rows(products, public=True)} == {"ok"}
    assert "55,116 not missing, 55,025 not blank" in doctor.check_rows(products, public=True)[1].found
    assert doctor.check_rows(products[1:], public=True)[0].state == "warning"


def test_the_class_table_holds_the_public_counts():
    classes = h.load_classes()
    assert classes["train_rows"].sum() == doctor.LABELLED
    assert classes["rows_with_description"].sum() == doctor.NOT_BLANK


def test_an_absent_and_a_truncated_picture_are_named(catalogue):
    gone, torn = pictures(catalogue)[:2]
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:-200])
    checks = examine()
    assert checked("pictures", checks).state == checked("decoding", checks).state == "missing"
    assert gone.name in checked("pictures", checks).found and torn.name not in checked("pictures", checks).found
    assert torn.name in checked("decoding", checks).found and gone.name not in checked("decoding", checks).found


def test_many_absent_pictures_are_listed_in_a_file(catalogue):
    gone = pictures(catalogue)[:12]
    for path in gone:
        path.unlink()
    gone[3].touch()  # an empty file is no picture
    found = checked("pictures", examine()).found
    assert sum(path.name in found for path in gone) == 10 and "12 absent" in found
    listing = h.runs_folder() / "pictures-absent.txt"
    assert str(listing) in found and listing.read_text().split() == [str(path) for path in gone]


def test_pictures_of_rows_that_the_run_leaves_out_are_not_needed(catalogue):
    products = h.load_catalogue(catalogue)
    doctor.Path(products.loc[products["description"] == "", "picture"].iloc[0]).unlink()
    assert checked("pictures", examine()).state == "ok"
    assert checked("pictures", examine(rows="all")).state == "missing"


def test_a_choice_of_pictures_is_decoded_unless_all_are_asked_for(catalogue, monkeypatch):
    monkeypatch.setattr(doctor, "PICTURES_DECODED", 7)
    run = h.open_run("paper", "90-10", 0, {"rows": "all", "image_size": 64})
    products = h.load_catalogue(catalogue)
    assert "7 of 7 decode (a random choice of 60" in doctor.check_pictures(run, products, False)[1].found
    assert doctor.check_pictures(run, products, True)[1].found == "60 of 60 decode"


def test_no_folder_and_a_missing_column_are_said(catalogue, monkeypatch):
    table = catalogue / h.LAYOUTS[h.find_layout(catalogue)]["x"]
    header, rest = table.read_text(encoding="utf-8").split("\n", 1)
    table.write_text(header.replace("escription", "escribed") + "\n" + rest, encoding="utf-8")
    checks = examine()
    assert checked("tables", checks).state == "missing" and "has no column" in checked("tables", checks).found
    monkeypatch.setenv("RAKUTEN_DATA", str(catalogue / "nowhere"))
    checks = examine()
    assert [check.state for check in checks] == ["missing"] and "nowhere" in checks[0].found
    assert "data/README.md" in checks[0].todo


def test_the_unlabelled_table_is_optional_and_counted(catalogue):
    assert checked("unlabelled table", examine()).state == "warning"
    layout = h.find_layout(catalogue)
    name = "X_test_update.csv" if layout == "ENS" else "x_test_task1_phase1.tsv"
    (catalogue / name).write_bytes((catalogue / h.LAYOUTS[layout]["x"]).read_bytes())
    public = "13,812" if layout == "ENS" else "937"
    assert f"{name}: 60 rows (public: {public})" in checked("unlabelled table", examine()).found


def test_pictures_of_the_unlabelled_products_are_counted(tiny_ens, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    monkeypatch.setattr(doctor, "UNLABELLED", {"X_test_update.csv": 60})
    (tiny_ens / "X_test_update.csv").write_bytes((tiny_ens / "X_train_update.csv").read_bytes())
    found = checked("unlabelled table", examine())
    assert found.state == "warning" and "60 rows (public: 60), 0 pictures" in found.found
    shutil.copytree(tiny_ens / "images" / "image_train", tiny_ens / "images" / "image_test")
    assert checked("unlabelled table", examine()).state == "ok"


def test_no_pictures_at_all_says_where_they_are_looked_for(tiny_ens, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    shutil.rmtree(tiny_ens / "images")
    assert checked("pictures", examine()).todo == "unpack them into one of images/image_train, image_train"


# --- machine, versions, weights -----------------------------------------------------------------------
@pytest.mark.parametrize("settings, found", [
    ({"grid": 5}, "pictures of 224 x 224 pixels cannot be cut into 5 x 5 equal regions"),
    ({"seresnext": "timm/vit_tiny_patch16_224"}, "cannot take 14 x 14 tiles"),
    ({"rows": "described"}, "no row is left by rows='described'")])
def test_settings_that_are_refused_leave_the_other_checks(tiny_ens, tmp_path, monkeypatch, settings, found):
    isolate(monkeypatch, tmp_path, tiny_ens)
    if "rows" in settings:
        table = tiny_ens / "X_train_update.csv"
        pd.read_csv(table, index_col=0).assign(description="").to_csv(table)
    run = h.open_run("paper", "90-10", 0, {"camembert": "small", "flaubert": "small", **settings})
    checks = doctor.check_up(run)
    assert found in checked("disk", checks).found and checked("versions", checks).state == "ok"


def test_other_files_in_the_cache_are_not_taken_for_this_runs(make_run, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 4), dtype=np.uint8))
    assert (tmp_path / "a.npy").stat().st_size - doctor.NPY_HEADER == costs.cache_bytes(2, 4)
    run, cache = make_run(image_size=2000, region_size=2000), tmp_path / "data" / "cache"
    cache.mkdir(parents=True)
    for name, size, used in (("other", 10 ** 9, "0.0"), ("own", costs.cache_bytes(55, 2000) + doctor.NPY_HEADER, "0.7")):
        with (cache / f"pictures-{name}.npy").open("wb") as file:
            file.truncate(size)
        assert f"need 0.7 GB, {used} GB of it are used" in checked("disk, data/cache", doctor.check_disk(run)).found


def test_a_full_disk_is_missing_and_other_versions_are_a_warning(catalogue, monkeypatch):
    run = h.open_run("paper", "90-10", 0, {"camembert": "small", "flaubert": "small", "seresnext": "small"})
    assert {check.state for check in doctor.check_disk(run)} == {"ok"}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert {check.state for check in doctor.check_disk(run)} == {"missing"}
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.1" if name == "six" else real(name))
    assert doctor.check_versions().state == "warning" and "six 0.1 instead of" in doctor.check_versions().found


def test_no_gpu_is_a_warning_for_the_paper_profile_only():
    if not torch.cuda.is_available():
        gpu = checked("GPU", doctor.check_machine(h.make_profile("paper")))
        assert gpu.state == "warning" and "limit=300" in gpu.todo and "freeze_encoders=True" in gpu.todo
        assert checked("GPU", doctor.check_machine(h.make_profile("sample"))).state == "ok"


@pytest.mark.parametrize("encoder, needed", [("camembert", "tokenizer.json"), ("flaubert", "merges.txt"),
                                             ("flaubert", "config.json"), ("camembert", "model.safetensors")])
def test_a_folder_is_a_checkpoint_only_if_it_is_whole(checkpoints, tmp_path, encoder, needed):
    folder = doctor.shutil.copytree(checkpoints[encoder], tmp_path / "copy")
    for other in ("tokenizer.json",) if needed == "merges.txt" else ():
        (folder / other).unlink(missing_ok=True)
    assert doctor.check_text_weights(encoder, str(folder), 32).state == "ok"
    (folder / needed).unlink()
    check = doctor.check_text_weights(encoder, str(folder), 32)
    assert check.state == "missing" and needed in check.found and str(folder) in check.found and check.todo


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_file_of_a_checkpoint_is_named(checkpoints, tmp_path, file):
    folder = doctor.shutil.copytree(checkpoints["camembert"], tmp_path / "copy")
    (folder / file).write_bytes((folder / file).read_bytes()[:-20])
    check = doctor.check_text_weights("camembert", str(folder), 32)
    assert check.state == "missing" and file in check.found


def test_a_checkpoint_in_the_hubs_cache_is_found_and_another_is_not(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--almanach--camembert-base"
    doctor.shutil.copytree(checkpoints["camembert"], place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    assert "local cache" in doctor.check_text_weights("camembert", "almanach/camembert-base", 256).found
    check = doctor.check_text_weights("flaubert", "flaubert/flaubert_base_cased", 256)
    assert check.state == "missing" and "HF_HUB_OFFLINE" in check.found and "--set flaubert=" in check.todo
    assert doctor.check_text_weights("flaubert", "/no/such/folder", 256).state == "missing"


def test_image_weights_are_looked_for_in_each_place(tmp_path, monkeypatch, make_run):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = "se_resnext50_32x4d"
    state, found = doctor.find_image_weights(name, "imagenet")
    assert state == "missing" and "se_resnext50_32x4d-a260b3a4.pth" in found
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "se_resnext50_32x4d-a260b3a4.pth").touch()
    assert doctor.find_image_weights(name, "imagenet")[0] == "ok"
    assert doctor.find_image_weights(name, str(tmp_path / "none.pth"))[0] == "missing"
    assert doctor.find_image_weights("small", "imagenet")[0] == doctor.find_image_weights(name, "none")[0] == "ok"
    run = make_run()
    (run.folder / "seresnext").mkdir(parents=True)
    h.write_json(run.folder / "seresnext" / "manifest.json", {"metrics": {"weights_from": "a mirror"}})
    assert "a mirror" in doctor.check_image_weights(run).found
    refused = doctor.check_image_weights(make_run(seresnext="torchvision/vit_b_16", image_size=224, region_size=224))
    assert refused.state == "missing" and "cannot take 14 x 14 tiles" in refused.found


def test_an_address_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "no answer from http://127.0.0.1:9/" in doctor.why_unreachable("http://127.0.0.1:9/")


def test_the_command_fails_exactly_if_something_is_missing(catalogue, checkpoints):
    words = ["doctor", "--profile", "paper", "--set", "seresnext=small", "--set", "image_size=64",
             "--set", "max_length=32", *(word for encoder, folder in checkpoints.items() for word in ("--set", f"{encoder}={folder}"))]
    whole = CliRunner().invoke(study.app, words)
    assert whole.exit_code == 0, whole.output
    pictures(catalogue)[0].unlink()
    assert CliRunner().invoke(study.app, words).exit_code == 1
