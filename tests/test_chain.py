"""The chain as a user runs it: run.py in a process of its own, with other parameters than the default."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file

import helpers as h

SETTINGS = {"text_epochs": 1, "image_epochs": 1, "image_size": 48, "fusion_epochs": 2, "bootstrap": 50}
SMALL = ["--split", "80-20", "--seed", "3", *(f"--set={key}={value}" for key, value in SETTINGS.items())]
SPY = """
import os, socket
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and str(address[0]) not in ("127.0.0.1", "::1", "localhost"):
        with open(os.environ["STUDY_TEST_CONNECTIONS"], "a") as file:
            file.write(f"{address}\\n")
        raise OSError("no network in this test")
    return real(self, address)
socket.socket.connect = connect
look_up = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    if host not in (None, "", "127.0.0.1", "::1", "localhost"):
        with open(os.environ["STUDY_TEST_CONNECTIONS"], "a") as file:
            file.write(f"{host}\\n")
        raise OSError("no network in this test")
    return look_up(host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for runs, with a space in its name, and an environment in which every connection is written down."""
    folder = tmp_path_factory.mktemp("a place")
    (folder / "spy").mkdir()
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    return folder


def command(place: Path, *words: str) -> tuple[list[str], dict]:
    ours = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # the chain may not need it
    environment = {**ours, "STUDY_RUNS": str(place / "runs"), "PYTHONPATH": str(place / "spy"),
                   "STUDY_TEST_CONNECTIONS": str(place / "connections"), "COLUMNS": "200"}
    return [sys.executable, str(h.ROOT / "run.py"), *words], environment


def run(place: Path, *words: str) -> subprocess.CompletedProcess:
    words, environment = command(place, *words)
    return subprocess.run(words, env=environment, cwd=place, capture_output=True, text=True)


def seed_folder(place: Path) -> Path:
    return place / "runs" / "sample" / "described" / "80-20" / "seed3"


@pytest.fixture(scope="module")
def studied(place):
    """The chain, killed once while an encoder is being fine-tuned, then run again to its end."""
    words, environment = command(place, "study", *SMALL)
    first = subprocess.Popen(words, env=environment, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (seed_folder(place) / "camembert_title.partial").exists(), 240)
    kernels = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    gone, alive = psutil.wait_procs(kernels, timeout=30)
    whole = [path.parent.name for path in seed_folder(place).glob("*/manifest.json")]
    return {"left": whole, "alive": alive, "second": run(place, "study", *SMALL)}


def stage_keys(place: Path) -> dict[str, str]:
    return {path.parent.name: h.read_json(path)["key"] for path in seed_folder(place).glob("*/manifest.json")}


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.2)


def test_a_kill_leaves_whole_stages_only_and_no_process(studied):
    assert set(studied["left"]) == {"splits", "text", "baselines"}
    assert studied["alive"] == []


def test_the_second_start_goes_on_where_the_first_was_killed(studied):
    output = studied["second"].stdout
    assert studied["second"].returncode == 0, studied["second"].stderr
    assert "01_data_exploration  80-20  seed 3  already done" in output
    assert "03_finetune_camembert  80-20  seed 3  already done" not in output


def test_tables_are_printed_and_name_what_is_missing(studied):
    output = studied["second"].stdout
    assert "Table V, split 80-20, seed 3" in output and "synthetic sample" in output
    assert "Table I, split 90-10, seed 3: not scored yet" in output


def test_stages_hold_what_they_promise(studied, place):
    folder = seed_folder(place)
    split = pd.read_csv(folder / "splits" / "split.csv")
    for stage in h.REPRESENTATIONS.values():
        tensors = load_file(folder / stage / "features.safetensors")
        assert sorted(tensors["product_id"].tolist()) == sorted(split["product_id"])
        assert tensors["features"].std() > 0 and bool(tensors["features"].isfinite().all())
    manifest = h.read_json(folder / "camembert_title" / "manifest.json")
    assert manifest["settings"]["text_epochs"] == 1 and manifest["seed"] == 3
    assert len(pd.read_csv(folder / "camembert_title" / "curve.csv")) == 1
    predictions = load_file(folder / "scores" / "predictions.safetensors")
    assert sorted(predictions["product_id"].tolist()) == sorted(split.query("part == 'test'")["product_id"])


def test_the_table_can_be_computed_from_the_predictions(studied, place):
    predictions = load_file(seed_folder(place) / "scores" / "predictions.safetensors")
    table = pd.read_csv(seed_folder(place) / "scores" / "table_V.csv")
    right = (predictions["concat-add"].argmax(-1) == predictions["label_id"]).float().mean().item()
    assert table["accuracy"].iloc[0] == pytest.approx(100 * right)
    assert table["paper_accuracy"].tolist() == [91.97, 92.36, 92.86, 92.25]


def test_the_report_links_every_notebook(studied, place):
    page = (place / "runs" / "sample" / "described" / "report" / "index.html").read_text(encoding="utf-8")
    for name in (path.stem for path in (h.ROOT / "notebooks").glob("*.ipynb")):
        assert f'href="{name}-80-20-seed3.html"' in page
        assert (place / "runs" / "sample" / "described" / "report" / f"{name}-80-20-seed3.html").stat().st_size > 10_000
    assert "Table IV, split 80-20" in page and "08_scores" in page


def test_nothing_is_done_twice(studied, place):
    before = {path: path.stat().st_mtime_ns for path in seed_folder(place).rglob("*") if path.is_file()}
    again = run(place, "study", *SMALL)
    assert again.returncode == 0 and again.stdout.count("already done") == 8
    assert {path: path.stat().st_mtime_ns for path in seed_folder(place).rglob("*") if path.is_file()} == before


def test_a_changed_setting_redoes_only_what_reads_it(studied, place):
    before = stage_keys(place)
    run(place, "study", *SMALL, "--set", "fusion_lr=0.01", "--only", "07")
    after = stage_keys(place)
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(name.startswith("fusion-") for name in changed)


def test_no_connection_was_tried(studied, place):
    assert not (place / "connections").exists(), (place / "connections").read_text()


def test_a_damaged_stage_stops_the_chain_with_the_cell_and_the_remedy(studied, place):
    features = seed_folder(place) / "camembert_title" / "features.safetensors"
    features.write_bytes(features.read_bytes()[:-8])
    failed = run(place, "study", *SMALL, "--only", "07")
    assert failed.returncode == 1
    assert "07_hierarchical_fusion  80-20  seed 3 failed in cell [" in failed.stderr
    assert "DamagedStage" in failed.stderr and "features.safetensors is damaged" in failed.stderr
    executed = seed_folder(place) / "notebooks" / "07_hierarchical_fusion.ipynb"
    assert str(executed) in failed.stderr and executed.exists()
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("words, said", [
    (["--set", "text_epoch=3"], "unknown setting 'text_epoch'"),
    (["--set", "text_epochs=many"], "setting text_epochs must be int, got 'many'"),
    (["--set", "text_epochs=-1"], "setting text_epochs must be above 0 and finite, got -1"),
    (["--set", "rows"], "--set wants name=value, got 'rows'"),
    (["--split", "70-30"], "unknown split '70-30'"),
    (["--profile", "tiny"], "unknown profile 'tiny'"),
    (["--only", "99"], "unknown notebook number '99'"),
])
def test_a_wrong_parameter_is_refused_before_anything_starts(tmp_path, words, said):
    (tmp_path / "spy").mkdir()
    refused = run(tmp_path, "study", *words)
    assert refused.returncode == 1 and said in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "runs").exists()
