"""The chain as a user runs it: run.py in a process of its own, killed once, looked at after it.

It is run once, on the sample's 90-10 split; the committed notebooks, which pytest executes after
these tests in the same process, find its stages.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import psutil
import pytest
from bs4 import BeautifulSoup
from safetensors.torch import load_file

import helpers as h
from browsing import barriers, browsing, complaints, dead_links
from commands.plan import NOTEBOOKS
from conftest import ROOT
from engine.files import read_json
from engine.keys import folder_of
from engine.variants import TRAINED_VARIANTS

pytestmark = pytest.mark.slow
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
STUDY = ["study", "--split", "90-10"]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder for runs, with a space in its name, where every connection is written down.

    The notebooks' kernels, which this process starts afterwards, find the runs there.
    """
    folder = tmp_path_factory.mktemp("a place")
    (folder / "spy").mkdir()
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    os.environ["STUDY_RUNS"] = str(folder / "runs")
    return folder


def command(place: Path, *words: str) -> tuple[list[str], dict]:
    # The chain may not need HF_HUB_OFFLINE, which conftest.py sets.
    ours = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment = {**ours, "STUDY_RUNS": str(place / "runs"), "PYTHONPATH": str(place / "spy"),
                   "STUDY_TEST_CONNECTIONS": str(place / "connections"), "COLUMNS": "200",
                   "STUDY_CORES": "1"}  # the other one is another test process's
    return [sys.executable, str(ROOT / "run.py"), *words], environment


def run(place: Path, *words: str, runs: Path | None = None) -> subprocess.CompletedProcess:
    """Run run.py, with another folder for runs than that of `place` if one is named."""
    words, environment = command(place, *words)
    environment |= {"STUDY_RUNS": str(runs)} if runs else {}
    return subprocess.run(words, env=environment, cwd=place, capture_output=True, text=True)


def seed_folder(place: Path) -> Path:
    return place / "runs" / "sample" / "described" / "90-10" / "seed0"


def stage_folders(place: Path) -> dict[str, Path]:
    """{stage: folder} of the stages that the run stands on, as its stages.json says."""
    stages = read_json(seed_folder(place) / "stages.json")
    return {name: place / "runs" / "stages" / f"{name}-{key[:8]}" for name, key in stages.items()}


@pytest.fixture(scope="session")
def studied(place):
    """The chain, killed once while an encoder is being fine-tuned, then run again to its end."""
    words, environment = command(place, *STUDY)
    first = subprocess.Popen(words, env=environment, cwd=place, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    stages = place / "runs" / "stages"
    wait_for(lambda: list(stages.glob("camembert_title-*.partial/checkpoints/*")), 300)
    kernels = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(kernels, timeout=30)
    whole = {path.parent.name.partition("-")[0] for path in stages.glob("*/manifest.json")}
    return {"left": whole, "alive": alive, "second": run(place, *STUDY)}


FUSIONS = len(TRAINED_VARIANTS)


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.2)


def test_a_kill_leaves_whole_stages_only_and_no_process(studied):
    assert studied["left"] == {"splits", "text", "baselines"}
    assert studied["alive"] == []


def test_the_second_start_goes_on_where_the_first_was_killed(studied):
    output = studied["second"].stdout
    assert studied["second"].returncode == 0, studied["second"].stderr
    assert "01_data_exploration  90-10  seed 0  already done" in output
    assert "03_finetune_camembert  90-10  seed 0  already done" not in output


def test_tables_are_printed_and_name_what_is_missing(studied):
    output = studied["second"].stdout
    assert "Table I, split 90-10, seed 0" in output and "synthetic sample" in output
    assert "Table V, split 80-20, seed 0: not scored yet" in output


def test_stages_hold_what_they_promise(studied, place):
    folders = stage_folders(place)
    split = pd.read_csv(folders["splits"] / "split.csv")
    for stage in h.REPRESENTATIONS.values():
        tensors = load_file(folders[stage] / "features.safetensors")
        assert sorted(tensors["product_id"].tolist()) == sorted(split["product_id"])
        assert tensors["features"].std() > 0 and bool(tensors["features"].isfinite().all())
    manifest = read_json(folders["camembert_title"] / "manifest.json")
    assert manifest["settings"]["text_epochs"] == 10 and manifest["settings"]["seed"] == 0
    assert manifest["threads"] == 1  # so that the sample's numbers do not depend on the machine
    assert len(pd.read_csv(folders["camembert_title"] / "curve.csv")) == 10
    predictions = load_file(folders["scores"] / "predictions.safetensors")
    test = split.query("part == 'test'")["product_id"]
    assert sorted(predictions["product_id"].tolist()) == sorted(test)
    suffixes = {path.suffix for path in (place / "runs" / "stages").rglob("*") if path.is_file()}
    assert suffixes <= {".csv", ".json", ".lock", ".safetensors", ".txt"}  # nothing is pickled


def test_the_table_can_be_computed_from_the_predictions(studied, place):
    scores = stage_folders(place)["scores"]
    predictions = load_file(scores / "predictions.safetensors")
    table = pd.read_csv(scores / "table_II.csv")
    right = predictions["concat-add"].argmax(-1) == predictions["label_id"][:, None]
    assert table["accuracy"].iloc[1] == pytest.approx(100 * right.float().mean().item())
    published = pd.read_csv(ROOT / "data" / "published_results.csv").query(
        "source == 'paper' and reference == 'Table II'")
    assert table["paper_accuracy"].tolist() == published["accuracy"].tolist()


def test_the_report_links_every_notebook(studied, place):
    folder = place / "runs" / "sample" / "described" / "report"
    page = (folder / "index.html").read_text(encoding="utf-8")
    for name in (path.stem for path in (ROOT / "notebooks").glob("*.ipynb")):
        assert f'href="90-10-seed0/{name}.html"' in page
        assert (folder / "90-10-seed0" / f"{name}.html").stat().st_size > 10_000
    assert "Table II, split 90-10" in page
    assert not (folder / "warnings.txt").exists()
    figures = BeautifulSoup((folder / "90-10-seed0" / "figures.html").read_text(), "html.parser")
    drawn = [path.stem for path in (seed_folder(place) / "figures").glob("*.png")]
    assert len(drawn) > 20
    for name in drawn:
        picture = figures.find("img", src=re.compile(rf"{name}\.png$"))
        assert picture and len(picture["alt"]) > 40, name
    assert page.index("fusion is better than the best single encoder") < page.index("Table I,")


def test_the_report_says_where_each_stage_was_made(studied, place):
    page = (place / "runs" / "sample" / "described" / "report" / "facts.html").read_text("utf-8")
    for folder in stage_folders(place).values():
        made = read_json(folder / "manifest.json")
        (row,) = (line for line in BeautifulSoup(page, "html.parser").find_all("tr")
                  if made["key"][:8] in line.text)
        told = [cell.text for cell in row.find_all("td")]
        wanted = [made["stage"], made["device"], made["processor"], str(made["threads"])]
        assert set(wanted) <= set(told)


@pytest.mark.parametrize("width, dark", [(390, False), (1280, True)])
def test_a_browser_has_nothing_against_the_report(studied, place, width, dark):
    folder = place / "runs" / "sample" / "described" / "report"
    pages = sorted(folder.rglob("*.html"))
    assert len(pages) > len(NOTEBOOKS) + 5
    with browsing(width, dark) as page:
        for path in pages:
            assert complaints(page, path, folder) == [], path
            assert dead_links(page, folder) == [], path
            assert barriers(page) == [], path


def test_nothing_is_done_twice(studied, place):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("*")
                if path.is_file() and "report" not in path.parts}

    before = times()
    again = run(place, *STUDY)
    assert again.returncode == 0 and again.stdout.count("already done") == len(NOTEBOOKS)
    assert times() == before


def test_a_changed_setting_makes_only_what_reads_it_and_overwrites_nothing(studied, place):
    """With a setting given by a file, which papermill hands to the notebook."""
    (place / "mine.toml").write_text("fusion_lr = 0.01\nfusion_epochs = 2\nfusion_seeds = 1\n")
    before, others = stage_folders(place), set((place / "runs" / "stages").iterdir())
    changed = run(place, *STUDY, "--config", str(place / "mine.toml"), "--only", "07")
    assert changed.returncode == 0, changed.stderr
    assert stage_folders(place) == before
    made = {path.name for path in (place / "runs" / "stages").iterdir() if path.is_dir()} \
        - {path.name for path in others}
    assert len(made) == FUSIONS and all(name.startswith("fusion-") for name in made)
    own = seed_folder(place).with_name("seed0+fusion_epochs=2+fusion_lr=0.01+fusion_seeds=1")
    assert (own / "notebooks" / "07_hierarchical_fusion.ipynb").exists()
    assert "not scored yet" in changed.stdout  # not the tables of the other settings


def test_a_report_shows_no_tables_of_other_settings(studied, place):
    """Those of exactly the run that is asked for, or a sentence that it is not made."""
    of_default = place / "runs" / "sample" / "described" / "report" / "index.html"
    before = of_default.read_bytes()
    asked = run(place, "report", "--split", "90-10", "--set", "fusion_epochs=7")
    assert asked.returncode == 0, asked.stderr
    folder, = of_default.parents[1].glob("report+fusion_epochs=7*")
    page = BeautifulSoup((folder / "index.html").read_text(), "html.parser").get_text()
    assert "Table II, split 90-10, seed 0: not scored yet" in " ".join(page.split())
    scored = pd.read_csv(stage_folders(place)["scores"] / "table_II.csv")["accuracy"]
    assert not [value for value in scored if f"{value:.1f}" in page]
    assert of_default.read_bytes() == before


def test_a_report_that_finds_no_room_leaves_the_old_one(studied, place):
    folder = place / "runs" / "sample" / "described" / "report"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words, environment = command(place, "report", "--split", "90-10")
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *words]  # in KiB, for each file
    ended = subprocess.run(limited, env=environment, cwd=place, capture_output=True, text=True)
    assert ended.returncode == 1 and "no room is left for a file in" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(folder.parent.glob("*.partial"))


def test_what_no_run_names_is_deleted_and_nothing_else(studied, place):
    own = seed_folder(place).with_name("seed0+fusion_epochs=2+fusion_lr=0.01+fusion_seeds=1")
    stages = place / "runs" / "stages"
    before = {path.name for path in stages.iterdir() if path.is_dir()}
    shutil.rmtree(own)
    listed = run(place, "status", "--disk")
    unused = re.findall(r"(fusion-\S+) .* no ", listed.stdout)
    assert len(unused) == FUSIONS
    cleaned = run(place, "clean", "--unused")
    assert all(name in cleaned.stdout for name in unused)
    assert f"{FUSIONS} stages deleted" in cleaned.stdout
    kept = {path.name for path in stages.iterdir() if path.is_dir()}
    assert kept == before - {*unused}
    assert {path.name for path in stage_folders(place).values()} <= kept


def test_a_class_kit_unpacked_elsewhere_has_six_notebooks_done(studied, place, tmp_path):
    kit = run(place, "kit", "--to", str(tmp_path / "kit.zip"))
    assert kit.returncode == 0, kit.stderr
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        archive.extractall(tmp_path)
    states = run(place, "status", "--split", "90-10", runs=tmp_path / "runs").stdout
    done = re.findall(r"(\d\d)_\w+ .* (done|missing)", states)
    assert [state for _, state in done] == ["done"] * 6 + ["missing"] * (len(NOTEBOOKS) - 6)


def test_no_connection_was_tried(studied, place):
    assert not (place / "connections").exists(), (place / "connections").read_text()


def test_a_damaged_stage_is_seen_by_status_and_stops_the_chain_with_the_remedy(studied, place):
    features = stage_folders(place)["camembert_title"] / "features.safetensors"
    whole = features.read_bytes()
    features.write_bytes(whole[:-8])
    try:
        assert " damaged " in run(place, "status", "--split", "90-10").stdout
        failed = run(place, *STUDY, "--only", "07")
    finally:
        features.write_bytes(whole)
    assert failed.returncode == 1
    assert "07_hierarchical_fusion  90-10  seed 0 failed in cell [" in failed.stderr
    assert "DamagedStage" in failed.stderr and "features.safetensors is damaged" in failed.stderr
    executed = seed_folder(place) / "notebooks" / "07_hierarchical_fusion.ipynb"
    assert str(executed) in failed.stderr and executed.exists()
    assert "Traceback" not in failed.stderr
    assert run(place, *STUDY, "--only", "07").returncode == 0


@pytest.mark.parametrize("words, said", [
    (["--set", "text_epoch=3"], "unknown setting 'text_epoch'"),
    (["--set", "text_epochs=many"], "setting text_epochs must be int, got 'many'"),
    (["--set", "text_epochs=-1"], "setting text_epochs must be above 0 and finite, got -1"),
    (["--set", "rows"], "--set wants name=value, got 'rows'"),
    (["--set", "text_lr=-1", "--set", "clean=much"],
     "unknown setting clean 'much'; choose from: paper, light; setting text_lr must be above 0"),
    (["--config", "nowhere.toml"], "--config nowhere.toml cannot be read as TOML"),
    (["--split", "70-30"], "unknown split '70-30'"),
    (["--profile", "tiny"], "unknown profile 'tiny'"),
    (["--only", "99"], "unknown notebook number '99'"),
])
def test_a_wrong_parameter_is_refused_before_anything_starts(tmp_path, words, said):
    (tmp_path / "spy").mkdir()
    refused = run(tmp_path, "study", *words)
    assert refused.returncode == 1 and said in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["--help"], ["status"], ["study", "--set", "text_epoch=3"],
                                   ["settings"]])
def test_help_status_and_refusals_import_nothing_heavy(tmp_path, words):
    """So they come at once: most of the seconds of a command are imports."""
    code = ("import runpy, sys; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: print({'torch', 'pandas', 'helpers'} & set(sys.modules))")
    ended = subprocess.run([sys.executable, "-c", code, str(ROOT / "run.py"), *words], text=True,
                           capture_output=True, env={**os.environ, "STUDY_RUNS": str(tmp_path)})
    assert ended.stdout.splitlines()[-1] == "set()", ended.stdout + ended.stderr


def test_every_setting_is_printed_with_default_unit_and_source():
    shown = run(Path(ROOT), "settings").stdout
    for name in ("text_lr", "checkpoint_steps", "camembert", "threads"):
        assert name in shown
    assert re.search(r"text_epochs\s.*10.*10.*epochs.*section IV\.B", shown)
    assert re.search(r"image_size\s.*80.*224.*pixels", shown)


def test_a_stage_lies_where_its_key_says(studied, place, monkeypatch):
    monkeypatch.setenv("STUDY_RUNS", str(place / "runs"))
    from engine.keys import key_of

    sample = h.open_run("sample", "90-10", 0)
    for name, folder in stage_folders(place).items():
        assert folder == folder_of(name, key_of(sample, name))
