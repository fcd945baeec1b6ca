"""Every kind of stage, stopped at the moments at which it touches the disk, by SIGKILL, SIGTERM and
SIGINT in turn: made again it holds the same bytes, and nothing half-written is left.
"""
import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import elsewhere
import helpers as h
from commands.plan import stage_names
from conftest import SMALL, isolate, made_undisturbed
from engine.runs import cache_folder, runs_folder

pytestmark = pytest.mark.slow
SETTINGS = {**SMALL, "threads": 1, "image_size": 32, "region_size": 32, "grid": 8, "text_batch": 16,
            "image_batch": 16, "text_epochs": 2, "image_epochs": 2, "checkpoint_steps": 1}
KINDS = ("splits", "text", "baselines", "flaubert_description", "seresnext", "image_whole",
         "image_regions", "fusion-average-average", "scores")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = 9  # of each kind: the first, the last, and others evenly between them
TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def make_until(run: h.Run, name: str, moment: int, kind: int, told: Path) -> None:
    """Make a stage. At this moment, counted in touches of runs and cache, send a signal to this
    process; without one, tell how many moments there were.
    """
    ours, seen = (str(runs_folder()), str(cache_folder())), []

    def count(event: str, arguments: tuple) -> None:
        if event in TOUCHES and str(arguments[0]).startswith(ours):
            seen.append(event)
            if len(seen) == moment:
                os.kill(os.getpid(), kind)

    sys.addaudithook(count)
    h.stage(run, name)
    told.write_text(str(len(seen)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """The place of a chain that nothing has stopped, and {stage: the hashes of its files}."""
    place = tmp_path_factory.mktemp("whole")
    return place, made_undisturbed(place, SETTINGS, every_stage())


def every_stage() -> list[str]:
    return [*stage_names(h.open_run("paper", "90-10", 0, SETTINGS)), "scores"]


def refuse_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.filterwarnings("ignore:.*on a file system without locks")
def test_a_chain_in_a_new_folder_ends_in_the_same_bytes(locks, whole, tmp_path, monkeypatch):
    """Its predictions too; also where the file system has no locks."""
    if not locks:
        (tmp_path / "temporary").mkdir()  # other processes have locks in the system's
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        monkeypatch.setattr("fcntl.flock", refuse_locks)
    assert made_undisturbed(tmp_path, SETTINGS, every_stage()) == whole[1]


@pytest.mark.parametrize("name", KINDS)
def test_a_stage_stopped_at_any_moment_ends_in_the_same_bytes(name, whole, tmp_path, monkeypatch):
    place, expected = whole
    for folder in ("runs", "cache"):
        shutil.copytree(place / folder, tmp_path / folder)
    isolate(monkeypatch, tmp_path, place / "ens")
    run = h.open_run("paper", "90-10", 0, SETTINGS)

    def remove() -> None:
        shutil.rmtree(h.read_stage(run, name))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    def stopped(moment: int, kind: int) -> int | None:
        return elsewhere.ended(elsewhere.start(make_until, run, name, moment, kind, told))

    told = tmp_path / "moments"
    remove()
    assert stopped(0, 0) == 0
    last = int(told.read_text())
    for i, moment in enumerate(np.unique(np.linspace(1, last, MOMENTS).astype(int)).tolist()):
        remove()
        kind = SIGNALS[i % len(SIGNALS)]
        assert stopped(moment, kind) == (1 if kind == signal.SIGINT else -kind), moment
        h.stage(run, name)
        assert h.read_manifest(run, name)["files"] == expected[name], (moment, kind)
        assert list(tmp_path.rglob("*.partial")) == [], (moment, kind)
