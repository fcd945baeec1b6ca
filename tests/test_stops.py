"""Kills of each process of a study, at a moment of its training: no process is left, nothing in the
temporary folder, and the next start ends in the same bytes.
"""
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

import elsewhere
import helpers as h
from commands import execute
from conftest import ROOT, SMALL, isolate, made_undisturbed
from engine.files import temporary_folder
from engine.runs import runs_folder

pytestmark = pytest.mark.slow
SETTINGS = {**SMALL, "text_epochs": 4, "image_epochs": 4, "text_batch": 8, "image_batch": 8,
            "checkpoint_steps": 1, "cache_pictures": False, "threads": 1}
STAGES = ("splits", "text", "camembert_title", "seresnext")


def study_of(*words: str) -> list[str]:
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    return [sys.executable, str(ROOT / "run.py"), "study", *words, "--profile", "paper",
            "--split", "90-10", *settings]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    """What the stages hold if nothing stops them."""
    return made_undisturbed(tmp_path_factory.mktemp("uninterrupted"), SETTINGS, STAGES)


def make(*names: str) -> h.Run:
    """Make stages in this process."""
    run = h.open_run("paper", "90-10", 0, SETTINGS)
    for name in names:
        h.stage(run, name)
    return run


def contents(run: h.Run) -> dict:
    return {name: h.read_manifest(run, name)["files"] for name in STAGES}


def child_with(words: str, process: psutil.Process) -> psutil.Process | None:
    """The process below this one whose command line holds these words."""
    for child in process.children(recursive=True):
        if words in " ".join(child.cmdline()):
            return child
    return None


ON_BOTH = ("--only", "03", "--only", "05", "--workers", "2")
KILLS = {
    "a notebook's kernel": (("--only", "03"), "ipykernel_launcher", signal.SIGKILL,
                            "its process was killed, as the system does when memory runs out"),
    "run.py with a notebook": (("--only", "03"), "", signal.SIGKILL, ""),
    "run.py with two workers": (ON_BOTH, "", signal.SIGKILL, ""),
    "run.py with two workers, by SIGTERM": (ON_BOTH, "", signal.SIGTERM, ""),
    "run.py with a notebook, by Ctrl-C": (("--only", "03"), "", signal.SIGINT,
                                          "interrupted: what is whole is kept"),
    "run.py with two workers, by Ctrl-C": (ON_BOTH, "", signal.SIGINT,
                                           "interrupted: what is whole is kept"),
    "a worker, by SIGTERM": (ON_BOTH, "stage camembert_title", signal.SIGTERM,
                             "failed, exit code -15"),
    "a worker": (ON_BOTH, "stage camembert_title", signal.SIGKILL, "failed, exit code -9"),
    "Ray's worker": (("--only", "03", "--on", "ray"), "ray::make", signal.SIGKILL,
                     "Ray could not end a stage: "),
    "run.py with Ray, by Ctrl-C": (("--only", "03", "--on", "ray"), "", signal.SIGINT,
                                   "interrupted: what is whole is kept"),
}


@pytest.mark.parametrize("victim", KILLS)
def test_a_killed_process_leaves_nothing_and_the_next_start_goes_on(
        victim, tiny_ens, tmp_path, monkeypatch, uninterrupted):
    words, name, kind, said = KILLS[victim]
    isolate(monkeypatch, tmp_path, tiny_ens)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # its sockets need a short path
    make("splits", "text")
    study = psutil.Popen(study_of(*words), stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
    try:
        trained = "stages/camembert_title-*.partial/checkpoints/checkpoint-*/hashes.json"
        end = time.monotonic() + 180
        while not list(runs_folder().glob(trained)):
            assert study.poll() is None and time.monotonic() < end, study.stderr.read()
            time.sleep(0.02)
        below = study.children(recursive=True)
        found = child_with(name, study) if name else study
        os.kill(found.pid, kind)
        _, errors = study.communicate(timeout=180)
        assert study.returncode not in (0, None)
        assert said in errors and "Traceback" not in errors, errors
        _, alive = psutil.wait_procs(below, timeout=30)
        assert alive == []
        if kind == signal.SIGINT:  # a notebook and a stage may take hours: it waits for neither
            assert list(runs_folder().glob(trained))
    finally:
        for left in (study, *study.children(recursive=True)) if study.is_running() else ():
            left.kill()

    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with execute.at_work([h.open_run("paper", "90-10", 0, SETTINGS)]):  # as the next start does
        assert contents(make(*STAGES)) == uninterrupted
    left = {path.name.partition("-")[0] for path in runs_folder().glob("stages/*.partial")}
    assert not left & {*STAGES}  # other stages may wait for their next start
    assert [*temporary.iterdir()] == []


def test_two_studies_of_one_run_at_once_are_refused(make_run):
    run, other = make_run(), make_run(split="80-20")
    with execute.at_work([run]):
        said = "another process is at work on .*seed0.*: wait for its end"
        with pytest.raises(execute.StepFailed, match=said), execute.at_work([other, run]):
            pytest.fail("both are at work")
        with execute.at_work([other]):  # it was given back
            pass
    with execute.at_work([run, other]):
        pass


def use_folders(place: Path, begin: float, told: Path) -> None:
    """From this time on, make one temporary folder after another and use each; tell how many."""
    tempfile.tempdir = str(place)
    time.sleep(max(0, begin - time.time()))
    for _ in range(40):
        with temporary_folder() as folder:
            (folder / "words.txt").write_text("here")
            time.sleep(0.001)
            assert (folder / "words.txt").read_text() == "here"
    told.write_text("40")


@pytest.mark.parametrize("seconds", [1, 2, 3, 4])
def test_ctrl_c_ends_a_study_that_has_just_begun(seconds, tmp_path, monkeypatch):
    """While it imports the libraries and makes the sample."""
    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    words = [sys.executable, str(ROOT / "run.py"), "study", "--split", "90-10"]
    study = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(seconds)
        study.send_signal(signal.SIGINT)
        _, errors = study.communicate(timeout=60)
    finally:
        study.kill()
    assert study.returncode == 130 and "interrupted: what is whole is kept" in errors


def test_no_process_takes_anothers_new_folder_for_one_that_was_left(tmp_path):
    """Eight at once; between its making and its lock a folder looks as if nobody had it."""
    place, begin = tmp_path / "temporary", time.time() + 2
    place.mkdir()
    told = [tmp_path / str(i) for i in range(8)]
    processes = [elsewhere.start(use_folders, place, begin, each) for each in told]
    assert [elsewhere.ended(process) for process in processes] == [0] * 8
    assert [each.read_text() for each in told] == ["40"] * 8
    assert [*place.iterdir()] == []


def hold(place: Path) -> None:
    """Make a temporary folder in `place`, and wait to be killed."""
    tempfile.tempdir = str(place)
    with temporary_folder() as folder:
        (folder / "words.txt").write_text("here")
        time.sleep(600)


def test_only_folders_whose_owner_has_ended_are_removed(tmp_path, monkeypatch):
    owner = elsewhere.start(hold, tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder() as ours:
        other = tmp_path / "of another program"
        other.mkdir()
        place = elsewhere.wait_for(lambda: [*tmp_path.glob("*/words.txt")], owner)[0].parent
        with temporary_folder() as second:
            assert {*tmp_path.iterdir()} == {ours, second, other, place}
        owner.kill()
        assert elsewhere.ended(owner) == -signal.SIGKILL and place.exists()
        with temporary_folder() as second:
            assert {*tmp_path.iterdir()} == {ours, second, other}
    assert [*tmp_path.iterdir()] == [other]
