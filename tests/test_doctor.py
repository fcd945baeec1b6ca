"""The doctor names what is missing and says what to do; a study stops at what is fatal."""
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import helpers as h
import run as study
from commands import doctor, inputs, networks
from conftest import isolate, tiny_products
from engine.catalogue import CLASSES
from engine.files import write_json
from engine.image_models import PAPER_WEIGHTS
from engine.keys import folder_of
from engine.picture_cache import cache_bytes
from engine.runs import cache_folder, runs_folder

TEXTS = tiny_products()["title"].tolist()
SMALL_TEXT = {"camembert": "small", "flaubert": "small", "text_width": 64, "text_layers": 1}
SMALL_ENCODERS = {**SMALL_TEXT, "seresnext": "small"}


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


def checked(name: str, checks: list) -> inputs.Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def paper_run(**settings) -> h.Run:
    return h.open_run("paper", "90-10", 0, settings)


def examine(**settings) -> list[inputs.Check]:
    """The checks of catalogue and pictures."""
    run = paper_run(image_size=64, region_size=64, **settings)
    looks = (inputs.check_catalogue, inputs.check_counts, inputs.check_pictures,
             inputs.decode_some)
    return [check for look in looks for check in look(run)]


def examine_weights(encoder: str, **settings) -> inputs.Check:
    """The check of an encoder's weights, wherever they may be."""
    run = paper_run(**settings)
    return checked(encoder, networks.check_weights_here(run) + networks.check_weights_on_hub(run))


def pictures(catalogue: Path) -> list[Path]:
    """Pictures of rows that have a description, in order of product id."""
    rows = h.select_rows(h.load_catalogue(catalogue), "described").sort_values("product_id")
    return [Path(path) for path in rows["picture"]]


# --- catalogue and pictures -----------------------------------------------------------------------
def test_a_whole_fixture_is_found_and_differs_from_the_public_counts(catalogue):
    checks = examine(rows="all")
    assert [check.name for check in checks if check.state == "fatal"] == []
    layout = "ENS" if catalogue.name == "ens" else "SIGIR"
    assert checked("catalogue", checks).found.startswith(layout)
    assert checked("tables", checks).state == "warning"
    assert "60 labelled rows" in checked("tables", checks).found
    filled = int((tiny_products()["description"] != "").sum())
    descriptions = checked("descriptions", checks).found
    assert f"{filled} not missing" in descriptions
    assert "55,116" in descriptions
    assert "55,025" in descriptions
    absent = checked("codes", checks).found
    assert absent.startswith("5 of 27")
    assert "2403" in absent
    assert "2583" not in absent
    assert checked("pictures", checks).found.startswith("60 of 60")
    assert checked("decoding", checks).found.startswith("60 of 60")


def test_public_counts_are_ok():
    classes = pd.read_csv(CLASSES)
    codes = np.resize(classes["prdtypecode"], 84_916)
    products = pd.DataFrame({"prdtypecode": codes, "description": "x"})
    products.loc[55_116:, "description"] = ""
    products.loc[:90, "description"] = "<br />"  # 91 descriptions are there and say nothing
    checks = inputs.check_rows(products, classes, public=True)
    assert {check.state for check in checks} == {"ok"}
    assert "55,116 not missing, 55,025 with words" in checks[1].found
    assert inputs.check_rows(products[1:], classes, public=True)[0].state == "warning"


def test_the_class_table_holds_the_public_counts():
    classes = pd.read_csv(CLASSES)
    assert classes["train_rows"].sum() == inputs.LABELLED
    assert classes["rows_with_description"].sum() == inputs.NOT_BLANK


def test_an_absent_and_a_truncated_picture_are_named(catalogue):
    gone, torn = pictures(catalogue)[:2]
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:-200])
    checks = examine()
    absent, decoding = checked("pictures", checks), checked("decoding", checks)
    assert absent.state == decoding.state == "fatal"
    assert gone.name in absent.found
    assert torn.name not in absent.found
    assert torn.name in decoding.found
    assert gone.name not in decoding.found


def test_many_absent_pictures_are_listed_in_a_file(catalogue):
    gone = pictures(catalogue)[:12]
    for path in gone:
        path.unlink()
    gone[3].touch()  # an empty file is no picture
    found = checked("pictures", examine()).found
    assert sum(path.name in found for path in gone) == 10
    assert "12 of 55 pictures are absent, empty or links" in found
    listing = runs_folder() / "pictures-absent.txt"
    assert str(listing) in found
    assert listing.read_text().split() == [str(path) for path in gone]


def test_pictures_of_rows_that_the_run_leaves_out_are_not_needed(catalogue):
    products = h.load_catalogue(catalogue)
    Path(products.loc[products["description"] == "", "picture"].iloc[0]).unlink()
    assert checked("pictures", examine()).state == "ok"
    assert checked("pictures", examine(rows="all")).state == "fatal"


def test_a_choice_of_pictures_is_decoded_unless_all_are_asked_for(catalogue, monkeypatch):
    monkeypatch.setattr(inputs, "PICTURES_DECODED", 7)
    run = paper_run(rows="all", image_size=64)
    assert "7 of 7 decode (a random choice of 60" in inputs.decode_some(run)[0].found
    assert inputs.decode_all(run)[0].found == "60 of 60 decode"
    monkeypatch.setattr(doctor, "CHECKS", {inputs.decode_some: "doctor"})
    assert doctor.check_up(run) == inputs.decode_some(run)
    assert doctor.check_up(run, all_pictures=True) == inputs.decode_all(run)


def test_no_folder_and_a_missing_column_are_said(catalogue, monkeypatch):
    table = catalogue / h.LAYOUTS[h.find_layout(catalogue)]["x"]
    header, rest = table.read_text(encoding="utf-8").split("\n", 1)
    header = header.replace("escription", "escribed")
    table.write_text(f"{header}\n{rest}", encoding="utf-8")
    checks = examine()
    assert checked("tables", checks).state == "fatal"
    assert "has no column" in checked("tables", checks).found
    monkeypatch.setenv("RAKUTEN_DATA", str(catalogue / "nowhere"))
    (check,) = examine()
    assert check.state == "fatal"
    assert "nowhere" in check.found
    assert "data/README.md" in check.found


def test_the_unlabelled_table_is_optional_and_counted(catalogue):
    assert checked("unlabelled table", examine()).state == "warning"
    layout = h.find_layout(catalogue)
    name = "X_test_update.csv" if layout == "ENS" else "x_test_task1_phase1.tsv"
    (catalogue / name).write_bytes((catalogue / h.LAYOUTS[layout]["x"]).read_bytes())
    public = "13,812" if layout == "ENS" else "937"
    assert f"{name}: 60 rows (public: {public})" in checked("unlabelled table", examine()).found


def test_pictures_of_the_unlabelled_products_are_counted(tiny_ens, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    monkeypatch.setattr(inputs, "UNLABELLED", {"X_test_update.csv": 60})
    table = (tiny_ens / "X_train_update.csv").read_bytes()
    (tiny_ens / "X_test_update.csv").write_bytes(table)
    found = checked("unlabelled table", examine())
    assert found.state == "warning"
    assert "60 rows (public: 60), 0 pictures" in found.found
    shutil.copytree(tiny_ens / "images" / "image_train", tiny_ens / "images" / "image_test")
    assert checked("unlabelled table", examine()).state == "ok"


def test_no_pictures_at_all_says_where_they_are_looked_for(tiny_ens, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    shutil.rmtree(tiny_ens / "images")
    todo = checked("pictures", examine()).todo
    assert todo == "unpack them into one of images/image_train, image_train"


# --- settings, machine, versions ------------------------------------------------------------------
def without_descriptions(catalogue: Path) -> None:
    table = catalogue / "X_train_update.csv"
    pd.read_csv(table, index_col=0, keep_default_na=False).assign(description="").to_csv(table)


@pytest.mark.parametrize("settings, name, found", [
    ({"grid": 5}, "networks",
     "pictures of 224 x 224 pixels cannot be cut into 5 x 5 equal regions"),
    ({"seresnext": "timm/vit_tiny_patch16_224"}, "networks", "cannot take 14 x 14 tiles"),
    ({"text_width": 66}, "networks", "is not a multiple of 4 channels"),
    ({"rows": "described"}, "rows", "no row is left by rows='described'")])
def test_settings_that_are_refused_leave_the_other_checks(
        tiny_ens, tmp_path, monkeypatch, settings, name, found):
    isolate(monkeypatch, tmp_path, tiny_ens)
    if "rows" in settings:
        without_descriptions(tiny_ens)
    run = paper_run(**{**SMALL_TEXT, **settings})
    checks = doctor.check_up(run)
    assert checked(name, checks).state == "fatal"
    assert found in checked(name, checks).found
    assert checked("disk", checks).state == "warning"
    assert checked("versions", checks).state == "ok"
    assert checked("camembert", checks).state == "ok"


def test_text_encoders_of_different_widths_are_refused_before_hours(checkpoints, tmp_path):
    tokenizer = h.train_tokenizer("flaubert", TEXTS, 200, tmp_path)
    h.small_text_model("flaubert", tokenizer, 32, 1, 32).save_pretrained(tmp_path)
    settings = {"camembert": str(checkpoints["camembert"]), "flaubert": str(tmp_path)}
    (check,) = networks.check_networks(paper_run(**settings))
    assert check.state == "fatal"
    assert "differ in width" in check.found
    assert "set project=True" in check.found
    (check,) = networks.check_networks(paper_run(**settings, project=True))
    assert check.state == "ok"


def test_other_files_in_the_cache_are_not_taken_for_this_runs(make_run):
    run, cache = make_run(image_size=2000, region_size=2000), cache_folder()
    cache.mkdir(parents=True)
    own = cache_bytes((55, 3, 2000, 2000))
    for name, size, used in (("other", 10 ** 9, "0.0"), ("own", own, "0.7")):
        with (cache / f"pictures-{name}.bin").open("wb") as file:
            file.truncate(size)
        found = checked("disk, data/cache", doctor.check_disk(run)).found
        assert f"need 0.7 GB, {used} GB of it are used" in found


def test_the_stages_that_a_run_stands_on_are_counted_as_used(make_run):
    run = make_run(text_width=768, vocabulary=10 ** 6)  # some GB
    other = make_run("80-20", text_width=768, vocabulary=10 ** 6)
    for name, key, runs in (("text", "1" * 64, [run]), ("splits", "2" * 64, [other]),
                            ("splits", "3" * 64, [])):
        folder_of(name, key).mkdir(parents=True)
        with (folder_of(name, key) / "file").open("wb") as file:
            file.truncate(10 ** 9)
        for owner in runs:
            owner.folder.mkdir(parents=True)
            write_json(owner.folder / "stages.json", {name: key})
    assert "2.0 GB of it are used" in checked("disk, runs", doctor.check_disk(run)).found


def test_a_full_disk_is_missing_and_other_versions_are_a_warning(catalogue, monkeypatch):
    run = paper_run(**SMALL_ENCODERS)
    assert {check.state for check in doctor.check_disk(run)} == {"ok"}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert {check.state for check in doctor.check_disk(run)} == {"fatal"}
    assert checked("versions", doctor.check_versions(run)).state == "ok"
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version",
                        lambda name: "0.1" if name == "six" else real(name))
    (check,) = doctor.check_versions(run)
    assert check.state == "warning"
    assert "six 0.1 instead of" in check.found


def test_no_gpu_is_a_warning_for_the_paper_profile_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    gpu = checked("GPU", doctor.check_machine(paper_run()))
    assert gpu.state == "warning"
    assert "limit=300" in gpu.todo
    assert "freeze_encoders=True" in gpu.todo
    sample = h.open_run("sample", "90-10", 0)
    assert checked("GPU", doctor.check_machine(sample)).state == "ok"


# --- weights --------------------------------------------------------------------------------------
TOKENIZER_IS_MISSING = "its tokenizer 8; the tokenizer's files are missing"


@pytest.mark.parametrize("encoder, needed, found", [
    ("camembert", "tokenizer.json", "cannot be loaded"),
    ("flaubert", "merges.txt", "cannot be loaded"),
    ("flaubert", "config.json", "config.json"),
    ("camembert", "model.safetensors", "lacks weights (model.safetensors or ")])
def test_a_folder_is_a_checkpoint_only_if_it_is_whole(checkpoints, tmp_path, encoder, needed,
                                                      found):
    folder = shutil.copytree(checkpoints[encoder], tmp_path / "copy")
    settings = {encoder: str(folder), "max_length": 32}
    assert examine_weights(encoder, **settings).state == "ok"
    (folder / needed).unlink()
    check = examine_weights(encoder, **settings)
    assert check.state == "fatal"
    assert found in check.found
    assert str(folder) in check.found
    assert needed in check.todo or needed in check.found


def test_a_tokenizer_that_the_library_makes_empty_is_seen(checkpoints, tmp_path):
    """Of CamemBERT's own class, without a file: a tokenizer of no piece, without a word."""
    folder = shutil.copytree(checkpoints["camembert"], tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CamembertTokenizer"}')
    assert examine_weights("camembert", camembert=str(folder), max_length=32).state == "ok"
    (folder / "tokenizer.json").unlink()
    check = examine_weights("camembert", camembert=str(folder), max_length=32)
    assert check.state == "fatal" and TOKENIZER_IS_MISSING in check.found
    assert "tokenizer.json" in check.todo


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_file_of_a_checkpoint_is_named(checkpoints, tmp_path, file):
    folder = shutil.copytree(checkpoints["camembert"], tmp_path / "copy")
    (folder / file).write_bytes((folder / file).read_bytes()[:-20])
    check = examine_weights("camembert", camembert=str(folder), max_length=32)
    assert check.state == "fatal"
    assert file in check.found


def cache_on_hub(folder: Path, hub: Path, name: str) -> Path:
    """A repository's files as the hub's local cache holds them, of one snapshot."""
    place = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    return place / "snapshots" / "abc"


def test_a_checkpoint_in_the_hubs_cache_is_found_and_another_is_not(checkpoints, tmp_path,
                                                                    monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "almanach/camembert-base"
    snapshot = cache_on_hub(checkpoints["camembert"], tmp_path, name)
    whole = examine_weights("camembert", max_length=32)
    assert whole.state == "ok"
    assert "local cache" in whole.found
    assert networks.check_weights_on_hub(paper_run(max_length=32, flaubert="small",
                                                 seresnext="small")) == []
    long = examine_weights("camembert", max_length=33)
    assert long.state == "fatal"
    assert "reads at most 32 tokens; set max_length=32 or less" in long.found
    (snapshot / "tokenizer.json").unlink()  # a download was stopped: the hub may have the rest
    torn = examine_weights("camembert", max_length=32)
    assert torn.state == "fatal"
    assert "not whole in the hub's local cache" in torn.found
    other = examine_weights("flaubert")
    assert other.state == "fatal"
    assert "HF_HUB_OFFLINE" in other.found
    assert "--set flaubert=" in other.todo
    nowhere = examine_weights("flaubert", flaubert="/no/such/folder")
    assert nowhere.state == "fatal"
    assert "neither a folder nor a name on the hub" in nowhere.found


def test_what_the_hub_has_is_ok(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(networks, "why_unreachable", lambda url: "")
    checks = networks.check_weights_on_hub(paper_run())
    assert [check.name for check in checks] == [*h.TEXT_ENCODERS, "seresnext"]
    assert all(check.state == "ok" and "on the hub" in check.found for check in checks)


def test_image_weights_are_looked_for_in_each_place(tmp_path, monkeypatch, make_run):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert examine_weights("seresnext").state == "fatal"
    assert PAPER_WEIGHTS in examine_weights("seresnext").found
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.safetensors").touch()
    cache_on_hub(tmp_path / "files", tmp_path / "hub", PAPER_WEIGHTS)
    assert examine_weights("seresnext").state == "ok"
    assert "local cache" in examine_weights("seresnext").found
    for settings in ({"seresnext": "small"}, {"image_weights": "none"}):
        assert "random weights" in examine_weights("seresnext", **settings).found
    unknown = examine_weights("seresnext", seresnext="timm/resnet5")
    assert unknown.state == "fatal"
    assert "close names" in unknown.found
    vit = make_run(seresnext="timm/vit_tiny_patch16_224", image_size=224, region_size=224)
    (refused,) = networks.check_networks(vit)
    assert refused.state == "fatal"
    assert "cannot take 14 x 14 tiles" in refused.found


def test_a_weight_file_fits_the_run_s_pictures(tmp_path):
    """A transformer is made for one size of pictures."""
    vit = "timm/vit_tiny_patch16_224"
    settings = {"seresnext": vit, "image_size": 96, "region_size": 96, "regions": "feature_map"}
    for size, state in ((96, "ok"), (224, "fatal")):
        file = tmp_path / f"{size}.safetensors"
        save_file(h.ImageEncoder(vit, size=size).model.state_dict(), file)
        assert examine_weights("seresnext", image_weights=str(file), **settings).state == state


def test_a_weight_file_is_there_and_fits_or_is_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    settings = {"seresnext": "small", "image_weights": str(file)}
    absent = examine_weights("seresnext", **settings)
    assert absent.state == "fatal"
    assert f"there is no file {file}" in absent.found
    save_file(h.ImageEncoder("small").model.state_dict(), file)
    whole = examine_weights("seresnext", **settings)
    assert whole.state == "ok"
    assert str(file) in whole.found
    other = examine_weights("seresnext", image_weights=str(file))  # of the paper's network
    assert other.state == "fatal"
    assert "the weights do not fit se_resnext50_32x4d" in other.found
    file.write_bytes(file.read_bytes()[:-100])
    torn = examine_weights("seresnext", **settings)
    assert torn.state == "fatal"
    assert "damaged" in torn.found


def test_frozen_encoders_need_a_checkpoint():
    check = examine_weights("camembert", camembert="small", freeze_encoders=True)
    assert check.state == "fatal"
    assert "freeze_encoders=True needs a checkpoint" in check.found
    assert check.todo == "set camembert=<checkpoint>"
    assert examine_weights("camembert", camembert="small").state == "ok"


def test_an_address_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    url = "http://127.0.0.1:9/"
    assert f"no answer from {url}" in networks.why_unreachable(url)


# --- what a study asks ----------------------------------------------------------------------------
def refusal(run: h.Run, **more) -> str:
    with pytest.raises(ValueError) as error:
        doctor.refuse_fatal(run, **more)
    return str(error.value)


def test_a_study_stops_at_the_first_fatal_check_with_its_remedy(catalogue, monkeypatch):
    doctor.refuse_fatal(paper_run(**SMALL_ENCODERS))
    grid = {"grid": 5, "limit": 4}
    assert "cannot be cut into 5 x 5" in refusal(paper_run(**SMALL_ENCODERS, **grid))
    told = refusal(paper_run(**SMALL_ENCODERS, limit=4))
    assert "limit=4 is too small for 5 classes; set it to at least 15" in told
    gone = pictures(catalogue)[0]
    gone.unlink()
    told = refusal(paper_run(**SMALL_ENCODERS))
    assert f"1 of 55 pictures are absent, empty or links out of {gone.parent}: {gone.name}" in told
    assert told.endswith("get them again, or remove their rows from both tables")
    monkeypatch.setenv("RAKUTEN_DATA", str(catalogue / "nowhere"))
    assert "no catalogue in" in refusal(paper_run(**SMALL_ENCODERS))


def test_a_report_to_a_package_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="no package wandb is installed; .*pip install wandb"):
        doctor.refuse_fatal(paper_run(**SMALL_ENCODERS, report_to="wandb"), needs_catalogue=False)
    doctor.refuse_fatal(paper_run(**SMALL_ENCODERS, report_to="tensorboard"), needs_catalogue=False)


def test_a_class_of_too_few_rows_is_refused_at_once(tiny_ens, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    table, codes = tiny_ens / "X_train_update.csv", tiny_ens / "Y_train_CVw08PX.csv"
    rows, labels = (pd.read_csv(path, index_col=0, keep_default_na=False)
                    for path in (table, codes))
    few = labels.index[labels["prdtypecode"] == 40][2:]
    rows.drop(few).to_csv(table)
    labels.drop(few).to_csv(codes)
    told = refusal(paper_run(**SMALL_ENCODERS, rows="all"))
    assert "a stratified split needs 3 rows of each class" in told and "{40: 2}" in told
    held_out = refusal(paper_run(**SMALL_ENCODERS, rows="all", fusion_rows="held-out"))
    assert "a stratified split needs 4 rows of each class" in held_out


def test_what_needs_no_catalogue_is_asked_without_one(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, tmp_path)
    doctor.refuse_fatal(paper_run(), needs_catalogue=False)
    told = refusal(paper_run(image_weights="/nowhere/w.pth"), needs_catalogue=False)
    assert "there is no file /nowhere/w.pth" in told


def test_a_study_asks_neither_the_hub_nor_the_disk(catalogue, monkeypatch):
    monkeypatch.setattr(networks, "why_unreachable", lambda url: pytest.fail("the hub was asked"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: pytest.fail("of the disk"))
    monkeypatch.setattr(inputs, "decode_picture", lambda *_: pytest.fail("a picture was decoded"))
    doctor.refuse_fatal(paper_run())


def test_the_command_fails_exactly_if_something_is_missing(catalogue, checkpoints, capsys):
    words = ["doctor", "--profile", "paper", "--set", "seresnext=small", "--set", "image_size=64",
             "--set", "max_length=32"]
    for encoder, folder in checkpoints.items():
        words += ["--set", f"{encoder}={folder}"]
    assert study.main(words) == 0, capsys.readouterr().out
    pictures(catalogue)[0].unlink()
    assert study.main(words) == 1
    assert "fatal" in capsys.readouterr().out
