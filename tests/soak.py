"""`make soak`: a study is killed at random moments, again and again, and goes on each time.

Its stages must end in the bytes of a study that nothing has stopped. Kills hit run.py, a notebook's
kernel or any process below, by SIGKILL, SIGTERM or SIGINT. Prints what was hit and when.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"text_epochs": 3, "image_epochs": 3, "fusion_epochs": 4, "checkpoint_steps": 2,
            "bootstrap": 100}
KINDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST = 30  # seconds that a start may live before it is hit


def start(place: Path, workers: int) -> psutil.Popen:
    """A study of the sample in this place, 90-10; with workers its stages are made side by side."""
    words = [sys.executable, str(ROOT / "run.py"), "study", "--split", "90-10",
             "--workers", str(workers), *(f"--set={name}={value}"
                                          for name, value in SETTINGS.items())]
    (place / "temporary").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "STUDY_RUNS": str(place / "runs"),
                   "STUDY_CACHE": str(place / "cache"), "TMPDIR": str(place / "temporary")}
    with (place / "log").open("a") as log:
        return psutil.Popen(words, env=environment, stdout=log, stderr=log)


def kill_one(study: psutil.Popen, chance: random.Random) -> str:
    """Hit the study or a process below it; what was hit."""
    family = [study, *study.children(recursive=True)]
    victim, kind = chance.choice(family), chance.choice(KINDS)
    try:
        told = " ".join(victim.cmdline())[-60:]
        victim.send_signal(kind)
    except psutil.NoSuchProcess:
        return "it had just ended"
    return f"{kind.name} to {told}"


def contents(place: Path) -> dict[str, dict]:
    """{stage's folder: the hashes of its files}."""
    manifests = sorted((place / "runs" / "stages").glob("*/manifest.json"))
    return {path.parent.name: json.loads(path.read_text())["files"] for path in manifests}


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--kills", type=int, default=30)
    words.add_argument("--seed", type=int, default=0)
    chosen = words.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    chance, begin, kills = random.Random(chosen.seed), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        calm, rough = Path(folder) / "calm", Path(folder) / "rough"
        assert start(calm, 1).wait() == 0, (calm / "log").read_text()[-3000:]
        print(f"undisturbed: {time.monotonic() - begin:.0f} s", flush=True)
        while True:
            study = start(rough, 1 + kills % 2)
            below = []
            try:
                code = study.wait(chance.uniform(2, LONGEST) if kills < chosen.kills else None)
            except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
                below = study.children(recursive=True)
                kills += 1
                print(f"{kills:3}  {kill_one(study, chance)}", flush=True)
                code = study.wait()
            _, alive = psutil.wait_procs(below, timeout=60)
            assert not alive, f"left: {[child.cmdline() for child in alive]}"
            if code == 0 and kills >= chosen.kills:
                break
            if code == 0:  # it came to its end: begin again, from nothing
                assert contents(rough) == contents(calm)
                rough = rough.with_name(f"rough{kills}")
        assert contents(rough) == contents(calm), "other bytes"
        assert not list((rough / "runs").rglob("*.partial")), "something is left"
        left = [path.name for path in (rough / "temporary").iterdir()
                if not path.name.startswith("torchinductor_")]  # PyTorch's own, one for each user
        assert not left, f"left in the temporary folder: {left}"
        print(f"{kills} kills, and the same bytes in all {len(contents(calm))} stages; "
              f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
