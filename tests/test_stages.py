"""Stages: made once, found again by their key, never mixed, never half there, never silently
damaged.
"""
import errno
import json
import os
import re
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import elsewhere
import helpers as h
from commands import plan
from commands.doctor import refuse_fatal
from commands.importing import Columns, import_catalogue
from conftest import ROOT, SMALL, made_undisturbed, room_for, write_bert
from engine import catalogue, files, fingerprint, keys, progress, stages
from engine.files import lock_of, temporary_folder
from engine.looks import one_look
from engine.runs import runs_folder
from engine.settings import FROZEN_STAGES, SPEED_ONLY, STAGES, TABLE_FUSIONS, setting_names
from engine.stages import DamagedStage

FUSIONS = [f"fusion-{name}" for name in TABLE_FUSIONS]
EVERY_STAGE = [*(name for name in STAGES if name != "fusion"), *FUSIONS]


def one():
    def build(run, name, folder):
        """Write a number."""
        (folder / "number.txt").write_text(str(1))
        return {"number": 1, "clean": run.profile.clean}
    return build


def one_explained():
    def build(run, name, folder):
        """Another docstring."""
        (folder / "number.txt").write_text(str(1))  # a comment

        return {"number": 1, "clean": run.profile.clean}
    return build


def two():
    def build(run, name, folder):
        """Write a number."""
        (folder / "number.txt").write_text(str(2))
        return {"number": 1, "clean": run.profile.clean}
    return build


write_one, write_one_explained, write_two = one(), one_explained(), two()


def write_seed(run, name, folder):
    (folder / "number.txt").write_text(f"{run.split} {run.seed}")


def clean_something(run, name, folder):
    (folder / "number.txt").write_text(h.clean_text("<b>A</b>"))


def fail_halfway(run, name, folder):
    (folder / "half.txt").write_text("half")
    raise RuntimeError("the power went")


def kept() -> list[str]:
    """The names of the folders of stages, those of a stop included, locks apart."""
    return sorted(path.name for path in (runs_folder() / "stages").glob("[!.]*"))


def number(folder: Path) -> str:
    return (folder / "number.txt").read_text()


def refuse_to_make(monkeypatch) -> None:
    """From here on, a stage that is made fails the test."""
    monkeypatch.setattr("engine.stages._build", lambda *_: pytest.fail("made again"))


# --- made once ------------------------------------------------------------------------------------
def test_stage_is_built_once_and_its_manifest_says_how(run, fake_stage, monkeypatch):
    fake_stage("text", write_one)
    folder = h.stage(run, "text")
    refuse_to_make(monkeypatch)
    assert h.stage(run, "text") == folder
    manifest = h.read_manifest(run, "text")
    assert folder == runs_folder() / "stages" / f"text-{manifest['key'][:8]}"
    assert manifest["metrics"] == {"number": 1, "clean": "paper"}
    assert manifest["settings"] == {"clean": "paper"} and manifest["run"] == run.name
    assert list(manifest["files"]) == ["number.txt"] and manifest["seconds"] >= 0
    assert manifest["peak_memory_gb"] > 0.01
    assert manifest["processor"].endswith(f", {torch.backends.cpu.get_cpu_capability()}")
    torch_version = manifest["versions"]["torch"]
    assert torch_version.partition("+")[0] == torch.__version__.partition("+")[0]


def test_a_runs_own_folder_names_its_stages_and_holds_none(run, fake_stage):
    fake_stage("text", write_one)
    h.stage(run, "splits")
    h.stage(run, "text")
    stages = json.loads((run.folder / "stages.json").read_text())
    assert stages == {name: h.read_manifest(run, name)["key"] for name in ("splits", "text")}
    assert not [path for path in run.folder.iterdir() if path.is_dir()]


def test_finished_stage_is_reported_to_the_plan(run, fake_stage, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_EVENTS", str(tmp_path / "events"))
    fake_stage("text", write_one)
    h.stage(run, "text")
    event = json.loads((tmp_path / "events").read_text())
    assert event == {"stage": "text", "key": h.read_manifest(run, "text")["key"]}


def test_what_the_same_notebook_makes_is_made_on_the_way_and_nothing_else(run):
    h.stage(run, "splits")
    h.stage(run, "baselines")  # of notebook 02, as the text is
    assert {name.partition("-")[0] for name in kept()} == {"splits", "text", "baselines"}


def test_stage_that_another_notebook_makes_is_not_made_on_the_way(run):
    with pytest.raises(FileNotFoundError, match="stage splits of this run .* is missing: run "
                                                "notebook 01_data_exploration first"):
        h.stage(run, "baselines")


# --- what makes another stage ---------------------------------------------------------------------
def test_changed_code_builds_again(run, fake_stage):
    folders = []
    for build in (write_one, write_two):
        fake_stage("text", build)
        folders.append(h.stage(run, "text"))
    assert list(map(number, folders)) == ["1", "2"]  # and the first is still there


def test_comments_and_docstrings_do_not_count(run, fake_stage, monkeypatch):
    fake_stage("text", write_one)
    folder = h.stage(run, "text")
    fake_stage("text", write_one_explained)
    refuse_to_make(monkeypatch)
    assert h.stage(run, "text") == folder


def test_changed_helper_builds_again_even_if_it_is_called_by_another(run, fake_stage, monkeypatch):
    fake_stage("text", clean_something)
    folder = h.stage(run, "text")
    for room, function in (("engine.fusions", "def add(*x: Tensor) -> Tensor:\n"),
                           ("engine.texts", "def strip_html(text: str) -> str:\n")):
        assert h.read_stage(run, "text") == folder  # clean_text does not call fuse
        source = fingerprint.SOURCES[room]
        assert source.count(function) == 1
        changed = source.replace(function, f"{function}    changed = 1\n")
        monkeypatch.setitem(fingerprint.SOURCES, room, changed)
    with pytest.raises(FileNotFoundError, match="there is one with other code"):
        h.read_stage(run, "text")
    monkeypatch.setattr(fingerprint, "refuse_changed_code", lambda: None)  # as after a restart
    assert h.stage(run, "text") != folder


def test_setting_that_is_read_builds_again_and_another_does_not(make_run, fake_stage):
    fake_stage("text", write_one)
    folder = h.stage(make_run(), "text")
    assert h.stage(make_run(text_epochs=7), "text") == folder
    assert h.stage(make_run(clean="light"), "text") != folder
    assert h.read_manifest(make_run(), "text")["metrics"]["clean"] == "paper"
    assert h.read_manifest(make_run(clean="light"), "text")["metrics"]["clean"] == "light"


def test_seed_and_split_have_their_own_stages(make_run, fake_stage):
    fake_stage("text", write_one)
    fake_stage("splits", write_seed)
    runs = [make_run(), make_run(seed=1), make_run(split="80-20")]
    for name, folders in (("splits", 3), ("text", 1)):  # where they are read, and only there
        assert len({h.stage(run, name) for run in runs}) == folders
        assert len({h.read_manifest(run, name)["key"] for run in runs}) == folders
    found = [number(h.read_stage(run, "splits")) for run in runs]
    assert found == ["90-10 0", "90-10 1", "80-20 0"]


def test_changed_content_of_an_earlier_stage_or_an_input_builds_again(run, tiny_ens, fake_stage):
    fake_stage("camembert_title", write_one)
    found = []
    for earlier in (write_one, write_one_explained, write_two):
        fake_stage("splits", earlier)
        for name in ("splits", "text", "camembert_title"):
            folder = h.stage(run, name)
        found.append(folder)
    assert found[0] == found[1] != found[2]
    change_text_of_catalogue(tiny_ens)
    h.stage(run, "text")
    assert h.stage(run, "camembert_title") not in found


def change_text_of_catalogue(folder: Path) -> None:
    file = folder / "X_train_update.csv"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("Chaise scandinave", "Fauteuil danois"), encoding="utf-8")


def test_changed_text_of_the_catalogue_reaches_the_text_stage(run, tiny_ens):
    splits, text = h.stage(run, "splits"), h.stage(run, "text")
    change_text_of_catalogue(tiny_ens)
    assert h.stage(run, "splits") == splits  # which holds ids and labels
    assert h.stage(run, "text") != text
    titles = h.read_text(run)["title"]
    assert titles.str.contains("fauteuil danois").sum() == 1
    assert not titles.str.contains("scandinave").any()


def save_untrained(run, name, folder):
    torch.manual_seed(0)
    encoder = h.ImageEncoder("small")
    h.save_weights(folder / "encoder.safetensors", encoder.state_dict())


def test_changed_picture_reaches_the_image_features(run, tiny_ens, fake_stage):
    def features(folder):
        return h.load_tensors(folder / "features.safetensors", ids)["features"]

    fake_stage("seresnext", save_untrained)
    h.stage(run, "splits")
    h.stage(run, "seresnext")
    ids = h.read_split(run)["product_id"]
    before = features(h.stage(run, "image_whole"))
    products = h.load_catalogue(tiny_ens).set_index("product_id")
    picture = Path(products.loc[ids[7], "picture"])
    Image.new("RGB", (90, 70), (255, 0, 255)).save(picture)
    after = features(h.stage(run, "image_whole"))
    assert (before != after).any(1).nonzero().flatten().tolist() == [7]


# --- a store that cannot mix ----------------------------------------------------------------------
def write_titles(run, name, folder):
    """Stands for an encoder: what it has seen of the texts."""
    titles = h.read_text(run)["title"]
    (folder / "titles.txt").write_text("\n".join(titles))


def write_seen_titles(run, name, folder):
    """Stands for a fusion model: what its encoder has seen."""
    titles = (h.read_stage(run, "camembert_title") / "titles.txt").read_text()
    (folder / "titles.txt").write_text(titles)


def test_a_run_never_reads_what_another_setting_has_made(make_run, fake_stage, monkeypatch):
    """clean="light" in some notebooks only was read by later default runs without a word."""
    fake_stage("camembert_title", write_titles)
    fake_stage("fusion-concat-add", write_seen_titles)
    light, default = make_run(clean="light"), make_run()
    h.stage(light, "splits")
    theirs = {name: h.stage(light, name) for name in ("text", "camembert_title")}

    for name in ("text", "camembert_title"):
        with pytest.raises(FileNotFoundError,
                           match=r"is missing \(there is one with clean=light\): run notebook"):
            h.read_stage(default, name)
    with pytest.raises(FileNotFoundError, match="stage camembert_title of this run"):
        h.stage(default, "fusion-concat-add")

    ours = {name: h.stage(default, name) for name in theirs}
    assert all(theirs[name] != ours[name] for name in theirs)
    seen = (h.stage(default, "fusion-concat-add") / "titles.txt").read_text()
    assert "roman" in seen and seen == seen.lower()
    seen = (h.stage(light, "fusion-concat-add") / "titles.txt").read_text()
    assert "Racines" in seen and seen != seen.lower()

    refuse_to_make(monkeypatch)  # both are still there, and a setting changed back makes nothing
    for run, folders in ((light, theirs), (default, ours), (light, theirs)):
        assert {name: h.stage(run, name) for name in folders} == folders


def test_a_changed_setting_overwrites_nothing_and_shares_what_it_does_not_reach(make_run,
                                                                                fake_stage):
    def write_rate(run, name, folder):
        (folder / "rate.txt").write_text(str(run.profile.text_lr))

    fake_stage("camembert_title", write_rate)
    names, found = ("splits", "text", "camembert_title"), []
    for run in (make_run(), make_run(text_lr=0.5)):
        found.append([h.stage(run, name) for name in names])
        states = {path: path.stat() for folder in found[0] for path in folder.rglob("*")}
        if run == make_run():
            before = states
    assert found[0][:2] == found[1][:2] and found[0][2] != found[1][2]
    assert states == before  # no file was touched, not even read anew
    assert [(folder / "rate.txt").read_text() for folder in (found[0][2], found[1][2])] \
        == ["0.001", "0.5"]


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)


def test_swapped_folders_are_refused_by_name(make_run, fake_stage):
    fake_stage("text", write_one)
    light, default = make_run(clean="light"), make_run()
    folders = [h.stage(run, "text") for run in (light, default)]
    swap(*folders)
    for run, folder, held in ((light, folders[0], default), (default, folders[1], light)):
        for use in (h.read_stage, h.stage, h.read_manifest):
            with pytest.raises(DamagedStage) as error:
                use(run, "text")
            assert str(error.value) == (
                f"{folder} holds another stage (text of {held.name}) than its name says; delete "
                f"the folder {folder} and run notebook 02_text_preprocessing again")
    swap(*folders)
    splits = h.stage(default, "splits")
    swap(folders[1], splits)
    with pytest.raises(DamagedStage, match=r"holds another stage \(splits of .*notebook 02"):
        h.read_stage(default, "text")


def test_a_build_reads_only_what_the_table_of_stages_lists(run, fake_stage):
    def read_in_secret(run, name, folder):
        h.read_stage(run, "splits")

    h.stage(run, "splits")
    fake_stage("text", read_in_secret)
    with pytest.raises(AssertionError, match="a stage reads splits; its entry in STAGES lacks it"):
        h.stage(run, "text")
    assert not list((runs_folder() / "stages").glob("text-????????"))
    fake_stage("text", write_one)
    fake_stage("camembert_title", read_in_secret)  # whose entry has it
    h.stage(run, "text")
    h.stage(run, "camembert_title")
    h.read_stage(run, "splits")  # and outside of a build all may be read


# --- after a stop ---------------------------------------------------------------------------------
def test_failed_build_leaves_only_the_partial_folder_and_the_old_stage(run, fake_stage):
    fake_stage("text", fail_halfway)
    with pytest.raises(RuntimeError, match="power"):
        h.stage(run, "text")
    (partial,) = kept()
    assert re.fullmatch(r"text-[0-9a-f]{8}\.partial", partial)
    with pytest.raises(FileNotFoundError):
        h.read_stage(run, "text")
    fake_stage("text", write_one)
    folder = h.stage(run, "text")
    assert kept() == sorted([partial, folder.name])
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "number.txt"]
    fake_stage("text", fail_halfway)
    with pytest.raises(RuntimeError, match="power"):
        h.stage(run, "text")
    fake_stage("text", write_one)
    assert h.read_stage(run, "text") == folder and number(folder) == "1"


def test_build_that_goes_on_finds_what_it_left(run, fake_stage):
    def build(run, name, folder):
        found.append((folder / "begun.txt").exists())
        (folder / "begun.txt").write_text("")
        (folder / "features.partial").write_text("of a file that is being written")
        if len(found) == 1:
            raise KeyboardInterrupt

    found = []
    fake_stage("text", build)
    with pytest.raises(KeyboardInterrupt):
        h.stage(run, "text")
    folder = h.stage(run, "text")
    assert found == [False, True] and kept() == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["begun.txt", "manifest.json"]


@pytest.mark.parametrize("write, folder", [
    (lambda run, place: h.save_figure(run, h.figure(2, 2)[0], "x", pd.DataFrame()), "figures"),
    (lambda run, place: import_catalogue(place / "own.csv", place / "own" / "shop",
                                         Columns("name", "kind", image="photo")), "own"),
    (lambda run, place: catalogue.catalogue_folder(h.open_run("sample", "90-10", 0)),
     r"test_what_a_full_disk\w+")])
def test_what_a_full_disk_stops_names_the_folder_and_leaves_nothing(run, tmp_path, write, folder):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "own.csv").write_text("name,kind,photo\nune table,a,a.png\nun livre,b,a.png\n")
    with room_for(100), pytest.raises(OSError, match=f"no room is left for a file in .*{folder}:"):
        write(run, tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "own" / "shop").exists() and not (tmp_path / "sample").exists()


def test_a_full_disk_of_the_temporary_folder_is_named_and_none_is_named_twice():
    with (room_for(10), pytest.raises(OSError, match="in .*inner: make some"),
          temporary_folder() as place, files.put_in_place(place / "inner" / "a") as path):
        path.parent.mkdir()
        path.write_text("words" * 10)
    with (room_for(10), pytest.raises(OSError, match=f"in .*{files.TEMPORARY}[^/]*: make some"),
          temporary_folder() as place):
        (place / "a").write_text("words" * 10)
    assert not place.exists()


def write_weights(run, name, folder):
    h.save_weights(folder / "data", {"weight": torch.ones(100_000)})


def write_table(run, name, folder):
    h.save_table(folder / "data", pd.DataFrame({"number": range(100_000)}))


def write_texts(run, name, folder):
    files.write_text(folder / "data", "words" * 100_000)


@pytest.mark.parametrize("maker", [write_weights, write_table, write_texts])
def test_want_of_room_is_named_and_the_stage_is_made_once_there_is_some(run, fake_stage, maker):
    """Each library says it in its own way: SafetensorError, or [Errno 28] without a name."""
    fake_stage("text", maker)
    with room_for(20_000), pytest.raises(OSError, match="no room is left for a file in .*text-.*: "
                                         "make some, and start again; what is whole is kept"):
        h.stage(run, "text")
    assert kept() == [] or kept()[0].endswith(".partial")
    folder = h.stage(run, "text")
    assert sorted(path.name for path in folder.iterdir()) == ["data", "manifest.json"]


def test_a_manifest_that_finds_no_room_poisons_nothing(run, fake_stage):
    fake_stage("text", write_one)
    with room_for(100), pytest.raises(OSError, match="no room is left for a file in"):
        h.stage(run, "text")
    with pytest.raises(FileNotFoundError, match="is missing"):
        h.read_stage(run, "text")
    assert number(h.stage(run, "text")) == "1"


def test_determinism_is_asked_of_torch_and_told_in_the_manifest(make_run, fake_stage):
    def build(run, name, folder):
        (folder / "asked.txt").write_text(str(torch.are_deterministic_algorithms_enabled()))

    fake_stage("text", build)
    for deterministic in (True, False):
        run = make_run(deterministic=deterministic)
        folder = h.stage(run, "text")
        assert (folder / "asked.txt").read_text() == str(deterministic)
        assert h.read_manifest(run, "text")["deterministic"] == deterministic
        shutil.rmtree(folder)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("variable", ["STUDY_RUNS", "STUDY_CACHE"])
def test_a_place_where_nothing_can_be_written_is_named_at_once(run, tmp_path, monkeypatch,
                                                               variable):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "place"))
    with pytest.raises(ValueError, match=f"nothing can be written below .*place.*; name another "
                                         f"folder in {variable}"):
        refuse_fatal(run)
    with pytest.raises(OSError, match=f"cannot be made .*; name another folder in {variable}"):
        h.stage(run, "splits") if variable == "STUDY_RUNS" else h.cached_pictures(run, 16)


MOMENTS = ("before the manifest", "while it is written", "before the renaming", "after it")


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_until(moment: str, run: h.Run) -> None:
    """Make the stage camembert_title, and kill this process at a moment of its end."""
    write_json, rename, replace = keys.write_json, Path.rename, Path.replace

    def write_or_kill(path, value):
        kill() if moment == MOMENTS[0] and path.name == "manifest.json" else write_json(path, value)

    def replace_or_kill(self, target):
        kill() if moment == MOMENTS[1] and target.name == "manifest.json" else None
        replace(self, target)

    def rename_or_kill(self, target):
        if self.is_file():
            return rename(self, target)
        kill() if moment == MOMENTS[2] else rename(self, target)
        kill()

    keys.write_json, Path.rename, Path.replace = write_or_kill, rename_or_kill, replace_or_kill
    h.stage(run, "camembert_title")


def hashes(run: h.Run) -> dict[str, str]:
    return h.read_manifest(run, "camembert_title")["files"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, str]:
    """What the stage camembert_title holds when nothing stops it."""
    names = ("splits", "text", "camembert_title")
    return made_undisturbed(tmp_path_factory.mktemp("uninterrupted"), SMALL, names)[names[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_the_end_of_a_stage_costs_nothing_and_changes_no_byte(run, uninterrupted,
                                                                        monkeypatch, moment):
    before = [h.stage(run, name).name for name in ("splits", "text")]
    assert elsewhere.ended(elsewhere.start(make_until, moment, run)) == -signal.SIGKILL
    (left,) = {*kept()} - {*before}
    left = runs_folder() / "stages" / left
    assert (left.suffix == ".partial") == (moment != "after it")
    assert (left / "manifest.json").exists() == (moment in MOMENTS[2:])
    assert (left / "manifest.json.partial").exists() == (moment == MOMENTS[1])
    assert (left / "trained.safetensors").exists()

    monkeypatch.setattr(h, "StudyTrainer", lambda *_, **__: pytest.fail("trained again"))
    if moment in MOMENTS[2:]:
        refuse_to_make(monkeypatch)
    folder = h.stage(run, "camembert_title")
    assert hashes(run) == uninterrupted
    assert kept() == sorted([*before, folder.name])
    assert not list(folder.rglob("*.partial")) and not (folder / "trained.safetensors").exists()
    refuse_to_make(monkeypatch)
    assert h.stage(run, "camembert_title") == folder == h.read_stage(run, "camembert_title")


@pytest.mark.parametrize("damage", [
    lambda manifest: manifest.write_text('{"key": "'),
    lambda manifest: manifest.write_text("{}"),
    lambda manifest: (manifest.parent / "number.txt").write_text("7"),
    lambda manifest: (manifest.parent / "number.txt").unlink()])
def test_what_a_stop_left_and_was_damaged_since_is_made_again(run, fake_stage, damage):
    """Never refused for ever: nothing but the final name says that a stage is whole."""
    fake_stage("text", write_one)
    folder = h.stage(run, "text")
    folder.rename(folder.with_name(f"{folder.name}.partial"))
    damage(folder.with_name(f"{folder.name}.partial") / "manifest.json")
    assert h.stage(run, "text") == folder and number(folder) == "1"
    assert kept() == [folder.name]


# --- two processes --------------------------------------------------------------------------------
def make_and_tell(run: h.Run, place: Path, hangs: bool = False,
                  names: tuple[str, ...] = ("camembert_title",)) -> None:
    """Make stages; tell below `place` who waits, who makes which, and what it got at last."""
    build, me = stages._build, os.getpid()

    def tell_and_build(run, name, *arguments):
        (place / f"{me} makes {name}").touch()
        while hangs:
            time.sleep(1)
        build(run, name, *arguments)

    def tell(line, text):
        if "is being made by another process; waiting for it" in text:
            (place / f"{me} waits").touch()

    stages._build, progress.Progress.show = tell_and_build, tell
    folders = [h.stage(run, name).name for name in names]
    (place / f"{me} got it").write_text(" ".join(folders))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "told").mkdir()
    return tmp_path / "told"


@pytest.mark.slow
def test_four_processes_that_ask_for_two_stages_at_once_get_the_same_made_once(run, place):
    names = ("camembert_title", "flaubert_title")
    for name in ("splits", "text"):
        h.stage(run, name)
    four = [elsewhere.start(make_and_tell, run, place, False, names) for _ in range(4)]
    assert [elsewhere.ended(process) for process in four] == [0] * 4
    for name in names:
        assert len(list(place.glob(f"* makes {name}"))) == 1
    got = [(place / f"{process.pid} got it").read_text() for process in four]
    assert got == [" ".join(h.read_stage(run, name).name for name in names)] * 4
    assert json.loads((run.folder / "stages.json").read_text()).keys() == {"splits", "text", *names}


@pytest.mark.slow
def test_a_killed_process_frees_the_stage_for_the_one_that_waits(run, place):
    for name in ("splits", "text"):
        h.stage(run, name)
    maker = elsewhere.start(make_and_tell, run, place, True)
    elsewhere.wait_for((place / f"{maker.pid} makes camembert_title").exists, maker)
    other = elsewhere.start(make_and_tell, run, place)
    elsewhere.wait_for((place / f"{other.pid} waits").exists, other)
    assert not (place / f"{other.pid} makes camembert_title").exists()
    maker.kill()
    assert elsewhere.ended(other) == 0
    assert (place / f"{other.pid} got it").read_text() == h.read_stage(run, "camembert_title").name


# --- damage ---------------------------------------------------------------------------------------
def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


DAMAGES = {"flipped": flip_a_bit, "cut": lambda path: os.truncate(path, 0), "gone": Path.unlink}


def read_text_of(run, name, folder):
    (folder / "number.txt").write_text(number(h.read_stage(run, "text")))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named_and_refused(run, fake_stage, damage):
    fake_stage("text", write_one)
    fake_stage("camembert_title", read_text_of)
    h.stage(run, "splits")
    folder = h.stage(run, "text")
    DAMAGES[damage](folder / "number.txt")
    for use, name in ((h.read_stage, "text"), (h.read_manifest, "text"), (h.stage, "text"),
                      (h.stage, "baselines"), (h.stage, "camembert_title"),
                      (h.describe_stages, "text")):
        with pytest.raises(DamagedStage) as error:
            use(run, name)
        assert str(error.value) == (
            f"{folder / 'number.txt'} is damaged or missing; delete the folder {folder} and run "
            "notebook 02_text_preprocessing again")
    shutil.rmtree(folder)  # as it says
    assert h.stage(run, "text") == folder and number(h.stage(run, "camembert_title")) == "1"


def read_elsewhere(run: h.Run, place: Path) -> None:
    """What an open of the stage text says, in this new process."""
    try:
        place.write_text(str(h.read_stage(run, "text")))
    except DamagedStage as error:
        place.write_text(f"damaged: {error}")


@pytest.mark.slow
def test_damage_that_neither_size_nor_time_shows_is_found_by_the_next_process(run, tmp_path):
    """As a failing disk makes it. A process reads each file once, not at each use."""
    folder = h.stage(run, "text")
    file, answer = folder / "text.csv", tmp_path / "answer"
    state = file.stat()
    for said in (str(folder), f"damaged: {file} is damaged or missing; delete the folder"):
        assert elsewhere.ended(elsewhere.start(read_elsewhere, run, answer)) == 0
        assert answer.read_text().startswith(said)
        flip_a_bit(file)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_text('{"key": "'), lambda path: path.write_text("[1, 2]"),
    lambda path: path.write_text("{}"), lambda path: path.write_bytes(b"\xff\xfe"), Path.unlink,
    lambda path: path.write_text(re.sub(r'"seconds": \S+', '"seconds": 1.5,', path.read_text())),
    lambda path: path.write_text(path.read_text().replace('"settings"', '"settinks"')),
    lambda path: path.write_text(path.read_text().replace('"device": "c', '"device": "d'))])
def test_damaged_manifest_is_named_and_refused(run, fake_stage, monkeypatch, damage):
    fake_stage("text", write_one)
    folder = h.stage(run, "text")
    damage(folder / "manifest.json")
    refuse_to_make(monkeypatch)
    for use in (h.read_stage, h.stage):
        with pytest.raises(DamagedStage) as error:
            use(run, "text")
        assert str(folder / "manifest.json") in str(error.value)
        assert f"delete the folder {folder} and run notebook 02" in str(error.value)


def test_other_versions_of_libraries_are_named_and_nothing_is_made_again(run, fake_stage):
    fake_stage("text", write_one)
    folder = h.stage(run, "text")
    manifest = keys.manifest_of(folder)
    ours = manifest["versions"]["torch"]
    manifest["versions"] |= {"torch": "1.13.0", "timm": "0.9.2"}
    keys.write_manifest(folder, manifest)
    with pytest.warns(UserWarning, match=rf"{folder.name} was made with torch 1\.13\.0 \(here "
                                         rf"{re.escape(ours)}\), timm 0\.9\.2 \(here .*\); "
                                         "numbers may differ by rounding"):
        assert h.read_stage(run, "text") == folder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert h.stage(run, "text") == folder  # said once in a process


# --- missing --------------------------------------------------------------------------------------
def test_missing_stage_names_notebook_and_command(make_run):
    with pytest.raises(FileNotFoundError) as error:
        h.read_stage(make_run(split="80-20", seed=3), "fusion-average-average")
    message = str(error.value)
    assert "fusion-average-average" in message and "07_hierarchical_fusion" in message
    command = "python run.py study --profile paper --split 80-20 --seed 3"
    assert command in message and "--only 07" in message


def test_command_for_a_missing_stage_repeats_the_changed_settings(make_run):
    """Without them the command makes the stage of another run."""
    with pytest.raises(FileNotFoundError, match=r"--set '?text_epochs=1"):
        h.read_stage(make_run(), "text")


def test_missing_stage_says_how_the_nearest_one_that_is_there_differs(make_run, fake_stage):
    fake_stage("splits", write_seed)
    for seed in (1, 2):
        h.stage(make_run(split="80-20", seed=seed), "splits")
    h.stage(make_run(seed=1), "splits")
    with pytest.raises(FileNotFoundError, match=r"missing \(there is one with seed=1\): run"):
        h.read_stage(make_run(), "splits")
    fake_stage("splits", write_one)
    with pytest.raises(FileNotFoundError, match=r"missing \(there is one with other code\): run"):
        h.read_stage(make_run(), "splits")


# --- the study's own stages -----------------------------------------------------------------------
@pytest.fixture
def recipes(run):
    """{stage: its recipe} of all stages, without making them."""
    with one_look():
        return {name: keys.recipe_of(run, name) for name in EVERY_STAGE}


def test_every_stage_has_a_maker_and_every_maker_a_stage():
    assert keys.MAKERS.keys() == STAGES.keys() | FROZEN_STAGES.keys()


def test_stages_depend_on_the_settings_that_decide_them(recipes):
    text = {"max_length", "pooling", "text_epochs", "text_batch", "text_lr", "text_width",
            "text_layers", "vocabulary", "seed"}
    needed = {
        "splits": {"split", "seed"}, "text": {"clean"}, "camembert_title": text,
        "flaubert_description": text,
        "seresnext": {"seresnext", "image_size", "image_epochs", "image_batch", "image_lr", "seed"},
        "image_regions": {"seresnext", "regions", "region_size", "grid"},
        "image_whole": {"image_size"},
        "fusion-concat-add": {"fusion_epochs", "fusion_batch", "fusion_lr", "dropout", "project",
                              "seed"},
        "scores": {"bootstrap"}}
    for name, settings in needed.items():
        assert settings <= recipes[name]["settings"].keys(), name
    training = {"freeze_encoders", "precision", "compile", "early_stopping", "device_batch"}
    for name in ("camembert_title", "seresnext"):
        assert training <= recipes[name]["settings"].keys(), name
    for name in ("camembert_title", "flaubert_description"):  # its own checkpoint, no other
        assert "text_source" in recipes[name]["contents"]
        assert not recipes[name]["settings"].keys() & {"camembert", "flaubert"}
    assert "image_weights" in recipes["seresnext"]["contents"]


def test_stages_do_not_depend_on_other_encoders_settings(recipes):
    for name, recipe in recipes.items():
        settings, kind = recipe["settings"].keys(), re.split("[_-]", name)[0]
        if kind in h.TEXT_ENCODERS:
            other = {"camembert": "flaubert", "flaubert": "camembert"}[kind]
            assert not settings & {other, "seresnext", "image_size", "image_lr", "grid",
                                   "fusion_lr"}, name
        elif kind in ("seresnext", "image"):
            assert not settings & {"camembert", "flaubert", "text_lr", "max_length", "clean",
                                   "fusion_lr"}, name
            assert "chosen_texts" not in recipe["contents"], name
        elif kind == "fusion":
            assert not settings & {"text_lr", "text_epochs", "image_lr", "clean",
                                   "bootstrap"}, name
    assert not recipes["text"]["reads"] and recipes["text"]["contents"].keys() == {"chosen_texts"}


ALL = {*EVERY_STAGE}
ON_FUSION = {*FUSIONS, "scores", "claims"}
ON_IMAGES = {"seresnext", "image_regions", "image_whole"} | ON_FUSION
ON_TEXT_ENCODERS = {*h.TEXT_STAGES} | ON_FUSION
ON_ENCODERS = ON_IMAGES | ON_TEXT_ENCODERS
REACH = [  # (settings, what is made again)
    ({"rows": "all"}, ALL), ({"limit": 50}, ALL), ({"grouped": True}, ALL - {"text"}),
    ({"fusion_rows": "held-out"}, ALL - {"text"}),
    ({"data": "elsewhere"}, set()),  # where the same catalogue lies: by content, not by name
    ({"clean": "light"}, {"text", "baselines"} | ON_TEXT_ENCODERS),
    ({"camembert": "nobody/x"}, {"camembert_title", "camembert_description"} | ON_FUSION),
    ({"flaubert": "nobody/x"}, {"flaubert_title", "flaubert_description"} | ON_FUSION),
    ({"freeze_encoders": True}, ON_ENCODERS), ({"early_stopping": 3}, ON_ENCODERS),
    ({"precision": "bf16"}, ON_ENCODERS), ({"compile": "eager"}, ON_ENCODERS),
    ({"device_batch": 4}, ON_ENCODERS),
    *(({name: value}, ON_TEXT_ENCODERS) for name, value in {
        "text_width": 32, "text_layers": 2, "vocabulary": 300, "max_length": 40, "pooling": "mean",
        "text_epochs": 2, "text_batch": 16, "text_lr": 0.1, "text_dropout": 0.2,
        "texts": "joined"}.items()),
    *(({name: value}, ON_IMAGES) for name, value in {
        "seresnext": "timm/resnet18", "image_weights": "helpers.py", "image_size": 65,
        "image_epochs": 2, "image_batch": 16, "image_lr": 0.1}.items()),
    *(({name: value}, {"image_regions"} | ON_FUSION) for name, value in {
        "region_size": 128, "grid": 8, "regions": "feature_map"}.items()),
    *(({name: value}, ON_FUSION) for name, value in {
        "standardise": False, "project": True, "dropout": 0.1, "fusion_epochs": 3,
        "fusion_batch": 8, "fusion_lr": 0.1, "fusion_seeds": 3,
        "encoder_mode": "train", "modality_dropout": 0.1}.items()),
    ({"bootstrap": 60}, {"scores", "claims"}),
    ({"fusions": "tests/own_fusions.py"}, {"scores", "claims"}), ({"bad_rows": "set_aside"}, set()),
    ({"as_released": True}, set()), ({"image_weights": "none"}, set()),  # the small one has none
    ({"gradient_checkpointing": True, "checkpoint_steps": 1, "processes": 3, "loader_workers": 2,
      "cache_pictures": False, "threads": 2, "deterministic": True, "region_batch": 2,
      "report_to": "tensorboard"}, set())]


def test_a_setting_reaches_what_stands_on_it_and_nothing_else(make_run, recipes):
    assert {name for settings, _ in REACH for name in settings} == {*setting_names()}
    for settings, expected in REACH:
        here = {"data": os.environ["RAKUTEN_DATA"]} if "data" in settings else {}
        other = make_run(**settings | here)  # the same catalogue by another name
        with one_look():
            changed = {name for name in EVERY_STAGE
                       if keys.recipe_of(other, name) != recipes[name]}
        assert changed == expected, settings
    assert {*SPEED_ONLY} == {*REACH[-1][0]}


def test_every_setting_is_read_somewhere():
    places = [ROOT / "helpers.py", *(ROOT / "engine").glob("*.py"),
              *(ROOT / "commands").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in places)
    # text_source reads the setting of a text encoder by its encoder's name.
    unread = {*setting_names()} - {*re.findall(r"profile\.(\w+)", text)} - {*h.TEXT_ENCODERS}
    assert unread == set()


@pytest.mark.slow
def test_frozen_encoders_are_read_once_for_all_splits_and_seeds(make_run, tmp_path):
    """Their vectors depend on products and checkpoint alone; only heads are a run's own."""
    bert = str(write_bert(tmp_path / "bert", hidden_size=24, num_hidden_layers=1,
                          num_attention_heads=2, intermediate_size=48))
    runs = [make_run(split, seed, camembert=bert, freeze_encoders=True,
                     image_size=32, region_size=32, grid=2)
            for split in ("90-10", "80-20") for seed in (0, 1)]
    names = ("splits", "text", "camembert_title", "seresnext", "image_whole", "image_regions")
    made = [{name: h.stage(run, name) for name in names} for run in runs]
    count = {name: len({each[name] for each in made}) for name in names}
    assert count == {"splits": 4, "text": 1, "camembert_title": 4, "seresnext": 4,
                     "image_whole": 1, "image_regions": 1}
    vectors = [name for name in kept() if name.startswith("vectors-")]
    assert [name.rpartition("-")[0] for name in vectors] == [
        "vectors-camembert_title", "vectors-image_regions", "vectors-image_whole"]
    text, regions, whole = (runs_folder() / "stages" / name for name in vectors)
    for name, source, file in (
            ("camembert_title", text, "features.safetensors"),
            ("camembert_title", text, "encoder/model.safetensors"),
            ("seresnext", whole, "encoder.safetensors"),
            ("image_whole", whole, "features.safetensors"),
            ("image_regions", regions, "features.safetensors")):
        places = [source / file, *(each[name] / file for each in made)]
        assert len({path.stat().st_ino for path in places}) == 1  # one copy on the disk
    for name in ("camembert_title", "seresnext"):
        heads = [h.load_file(each[name] / "head.safetensors")["weight"] for each in made]
        assert all(not torch.equal(heads[0], other) for other in heads[1:])
    (text / "features.safetensors").write_bytes(b"")
    with pytest.raises(DamagedStage, match="vectors-camembert_title|camembert_title"):
        h.read_stage(runs[3], "camembert_title")


# --- tensors keyed by product id ------------------------------------------------------------------
def test_tensors_come_back_in_the_order_that_is_asked_for(tmp_path):
    ids = [30, 10, 20]
    h.save_tensors(tmp_path / "x.safetensors", ids, a=np.array([[3.0], [1.0], [2.0]], np.float32),
                   b=torch.tensor([300, 100, 200]))
    found = h.load_tensors(tmp_path / "x.safetensors", [10, 20, 30, 10])
    assert found.keys() == {"a", "b"}
    assert found["a"].tolist() == [[1], [2], [3], [1]]
    assert found["b"].tolist() == [100, 200, 300, 100]
    assert found["a"].dtype == torch.float32 and found["b"].dtype == torch.int64


def test_order_of_saving_does_not_matter(tmp_path):
    table = pd.DataFrame({"id": np.random.default_rng(0).permutation(50), "x": np.arange(50.0)})
    for name, rows in (("a", table), ("b", table.sample(frac=1, random_state=2))):
        h.save_tensors(tmp_path / name, rows["id"], x=rows["x"].to_numpy())
    a, b = (h.load_tensors(tmp_path / name, np.arange(50))["x"] for name in "ab")
    assert torch.equal(a, b)


def test_view_that_is_not_contiguous_is_saved_right(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    h.save_tensors(tmp_path / "x", [1, 2, 3], x=x.T)
    assert torch.equal(h.load_tensors(tmp_path / "x", [1, 2, 3])["x"], x.T)


def test_missing_id_is_named_with_the_number_of_missing_ones(tmp_path):
    h.save_tensors(tmp_path / "x.safetensors", [1, 2], x=torch.zeros(2))
    with pytest.raises(ValueError, match=r"x\.safetensors.*product 77.*2 of 3"):
        h.load_tensors(tmp_path / "x.safetensors", [1, 77, 78])


def test_mismatched_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"2 product ids.*'x': 3"):
        h.save_tensors(tmp_path / "x", [1, 2], x=torch.zeros(3), y=torch.zeros(2))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_gone_on_with(run, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.tempdir", str(run.folder.parent))  # other processes have locks
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="on a file system without locks; the file .*-soft stands"):
        folder = h.stage(run, "splits")
    assert (folder / "split.csv").exists() and not list(runs_folder().rglob("*-soft"))
    with pytest.warns(UserWarning, match="without locks"), temporary_folder() as place:
        (place / "kept").touch()
        with temporary_folder():  # of another process; it removes what is left
            assert (place / "kept").exists()
    assert not place.exists()
    inside, most = [], []

    def enter(_):
        with lock_of(run.folder / "a.lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    with pytest.warns(UserWarning, match="without locks"), ThreadPoolExecutor(3) as pool:
        list(pool.map(enter, range(3)))
    assert most == [1, 1, 1]


def test_the_table_of_classes_counts_in_a_notebooks_key(run, tmp_path, monkeypatch):
    before = plan.catalogue_hash(run)
    (tmp_path / "classes.csv").write_text(catalogue.CLASSES.read_text() + " ")
    monkeypatch.setattr(catalogue, "CLASSES", tmp_path / "classes.csv")
    plan.catalogue_hash.cache_clear()
    assert plan.catalogue_hash(run) != before
    plan.catalogue_hash.cache_clear()
