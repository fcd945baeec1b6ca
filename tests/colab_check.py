"""`make colab-check`: the sample's notebooks on the versions that Colab has published.

    python3.12 tests/colab_check.py                   make build/colab, then run the notebooks
    python3.12 tests/colab_check.py --only 01 --only 02

In build/colab: the libraries of data/colab_versions.txt; then, without dependencies,
requirements-elsewhere.txt, as docs/anywhere.md says. It needs the network, and no module but
Python's own.
"""
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "colab"
VERSIONS = ROOT / "data" / "colab_versions.txt"
ELSEWHERE = ROOT / "requirements-elsewhere.txt"
# Not for notebooks: tests, the linter, JupyterLab; tensorboardX, as Colab has TensorBoard itself.
APART = {"jupyterlab", "tensorboardx", "pytest", "pytest-xdist", "hypothesis", "nbval", "ruff",
         "playwright", "axe-playwright-python"}


def pins(path: Path) -> dict[str, str]:
    """{name: version} of a file's lines `name==version`; names as pip compares them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = (line.partition("#")[0].strip().split("==") for line in lines)
    return {plain(pair[0]): pair[1] for pair in found if len(pair) == 2}


def plain(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lacking() -> set[str]:
    """What the notebooks need of requirements.txt and Colab does not have."""
    return set(pins(ROOT / "requirements.txt")) - APART - set(pins(VERSIONS))


def python(*words: str, **named: object) -> subprocess.CompletedProcess:
    """Run build/colab's Python."""
    return subprocess.run([PLACE / "bin" / "python", *words], check=True, text=True, **named)


def installed() -> list[str]:
    """What is installed there, a line each."""
    return python("-m", "pip", "freeze", stdout=subprocess.PIPE).stdout.splitlines()


def install() -> None:
    """Make build/colab; RuntimeError if adding what Colab lacks has changed what it has."""
    venv.create(PLACE, with_pip=True, clear=True)
    python("-m", "pip", "install", "--quiet", "--requirement", str(VERSIONS))
    before = installed()
    python("-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(ELSEWHERE))
    if changed := set(before) - set(installed()):
        raise RuntimeError(f"requirements-elsewhere.txt changes what is there: {changed}")
    (PLACE / "installed").touch()


def main(words: list[str]) -> None:
    """Install unless that is done, then run the notebooks of split 90-10."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NN")
    only = [word for number in parser.parse_args(words).only for word in ("--only", number)]
    if sys.version_info[:2] != (3, 12):
        print(f"Colab has Python 3.12; this is {sys.version.split()[0]}", flush=True)
    if not (PLACE / "installed").exists():
        print("Installing Colab's versions into build/colab, which takes some minutes", flush=True)
        install()
    runs = {"STUDY_RUNS": str(ROOT / "build" / "colab-runs")}
    study = ["run.py", "study", "--split", "90-10", *only]
    sys.exit(subprocess.run([PLACE / "bin" / "python", *study], cwd=ROOT,
                            env={**os.environ, **runs}).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
