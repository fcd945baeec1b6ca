"""Several processes: a stage made by two together, and stages side by side, come out as by one."""
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from pandas.testing import assert_frame_equal
from rich.console import Console
from threadpoolctl import threadpool_info, threadpool_limits

import elsewhere
import helpers as h
from commands import execute, workers
from commands.plan import (
    Job,
    Step,
    _state_of_stages,
    make_plan,
    notebook_of,
    notes_on_versions,
    stage_graph,
    stage_names,
    state,
    step_key,
)
from conftest import ROOT, SMALL, isolate, write_bert, write_ens
from engine.files import read_json, write_json
from engine.keys import folder_of, key_of, manifest_of, write_manifest
from engine.processes import processor
from engine.progress import BATCH, Progress, cores, in_threads
from engine.runs import runs_folder
from engine.variants import TRAINED_VARIANTS

pytestmark = pytest.mark.slow


def bert_folder(folder):
    """A small BERT without dropout: what is random in it would differ between processes."""
    return write_bert(folder, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0,
                      attention_probs_dropout_prob=0.0)


@pytest.fixture
def prepared(make_run, tmp_path):
    """prepared(**settings): a run on a local checkpoint, whose text is there."""
    def prepare(**settings):
        own = {"camembert": str(bert_folder(tmp_path / "bert")), "text_dropout": 0.0,
               "text_epochs": 3, "text_batch": 8}
        run = make_run(**{**own, **settings})
        h.stage(run, "splits")
        h.stage(run, "text")
        return run

    return prepare


def with_settings(run: h.Run, **settings: object) -> h.Run:
    return h.open_run("paper", run.split, run.seed, {**run.changed, **settings})


def made(run: h.Run) -> tuple[torch.Tensor, pd.DataFrame, dict]:
    folder = h.read_stage(run, "camembert_title")
    ids = h.read_split(run)["product_id"]
    features = h.load_tensors(folder / "features.safetensors", ids)["features"]
    return features, pd.read_csv(folder / "curve.csv"), h.read_manifest(run, "camembert_title")


def left_over() -> list:
    return list(runs_folder().glob("stages/*.partial"))


@contextmanager
def listeners():
    """Gives the addresses on which processes below this one listen meanwhile."""
    found, done = set(), threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    found.update(socket.laddr.ip for socket in child.net_connections("inet")
                                 if socket.status == psutil.CONN_LISTEN)

    watch = threading.Thread(target=look)
    watch.start()
    yield found
    done.set()
    watch.join()


# --- one stage together ---------------------------------------------------------------------------
def test_two_processes_make_the_stage_that_one_makes(prepared, monkeypatch, tmp_path):
    run = prepared(processes=2)
    with listeners() as addresses:
        folder = h.stage(run, "camembert_title")
    assert addresses == {"127.0.0.1"}  # nobody else can reach them
    together, curve, manifest = made(run)
    assert manifest["processes"] == 2 and left_over() == []
    folder.rename(folder.with_name(f"{folder.name}.partial"))  # as a kill before the renaming
    assert h.stage(run, "camembert_title") == folder
    assert made(run)[2] == manifest and left_over() == []  # it was not made again

    alone = with_settings(run, processes=1)
    assert h.stage(alone, "camembert_title") == folder
    assert made(alone)[2] == manifest  # the number of processes makes no other stage
    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "alone"))
    for name in ("splits", "text", "camembert_title"):
        h.stage(alone, name)
    features, one_curve, one = made(alone)
    assert one["processes"] == 1 and one["key"] == manifest["key"]
    assert_frame_equal(curve, one_curve, rtol=0, atol=1e-4)
    assert torch.allclose(together, features, atol=1e-4) and features.std() > 0.1


@pytest.mark.parametrize("name", ["image_whole", "image_regions"])
def test_two_processes_make_the_features_of_pictures_that_one_makes(make_run, tmp_path, name,
                                                                     monkeypatch):
    """Of a network as it is: batch normalisation would learn from the rows of one process alone."""
    found = []
    for processes in (2, 1):
        monkeypatch.setenv("STUDY_RUNS", str(tmp_path / f"{processes} processes"))
        run = make_run(cache_pictures=False, processes=processes, freeze_encoders=True,
                       image_weights="none", grid=8)
        vectors = f"vectors-{name}"
        folder = h.stage(run, vectors)
        h.stage(run, "splits")
        ids = h.read_split(run)["product_id"]
        found.append(h.load_tensors(folder / "features.safetensors", ids)["features"])
        assert h.read_manifest(run, vectors)["processes"] == processes
    assert torch.allclose(*found, atol=1e-5) and found[0].std() > 0.001


def test_a_stage_that_fails_in_several_processes_says_why(prepared, tmp_path):
    run = prepared(processes=2, max_length=64)
    (tmp_path / "bert" / "tokenizer.json").write_text("{}")
    with pytest.raises(ChildProcessError, match="stage camembert_title failed in 2 processes: "
                                                "error: text checkpoint .*bert' cannot be loaded"):
        h.stage(run, "camembert_title")
    with pytest.raises(FileNotFoundError, match="stage camembert_title of this run"):
        h.read_stage(run, "camembert_title")


def test_what_a_process_said_before_an_unforeseen_error_is_kept(prepared, tmp_path, monkeypatch):
    run = prepared(processes=2)
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'LOCAL_RANK' in os.environ:\n"
        "    import transformers\n"
        "    def train(*args, **more):\n"
        "        raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "    transformers.Trainer.train = train\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChildProcessError, match="RuntimeError: CUDA error: an illegal") as error:
        h.stage(run, "camembert_title")
    assert "in go_on" in str(error.value) and len(str(error.value).splitlines()) < 30


def test_a_process_ends_with_its_parent_though_nobody_asks_after_it(tmp_path):
    """A parent that was killed stays listed until its own parent has asked how it ended."""
    child = ("import os, time\nfrom engine.processes import end_with_parent\n"
             "end_with_parent()\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    parent = ("import os, subprocess, sys\nos.environ['STUDY_PARENT'] = str(os.getpid())\n"
              f"subprocess.run([sys.executable, '-c', {child!r}])")
    killed = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE)
    below = psutil.Process(int(killed.stdout.readline()))
    killed.kill()  # and no wait()
    _, alive = psutil.wait_procs([below], timeout=20)
    assert not alive and psutil.Process(killed.pid).status() == psutil.STATUS_ZOMBIE
    killed.communicate()


def test_processes_end_when_the_notebook_is_interrupted(prepared, monkeypatch):
    run, me = prepared(processes=2, text_epochs=500), psutil.Process()
    children, others = [], set(me.children(recursive=True))  # of earlier tests, which stay

    def interrupt(line, text):
        children.extend(set(me.children(recursive=True)) - others)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        h.stage(run, "camembert_title")
    assert len(children) >= 3 and not any(child.is_running() for child in children)


def train(run: h.Run) -> None:
    h.stage(run, "camembert_title")


def test_processes_end_with_the_one_that_started_them(prepared):
    run = prepared(processes=2, text_epochs=500)
    parent = elsewhere.start(train, run)
    trained = "stages/camembert_title-*.partial/checkpoints/*"
    elsewhere.wait_for(lambda: list(runs_folder().glob(trained)), parent)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 3  # the launcher and two workers
    parent.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_processors_with_the_same_instructions_are_told_apart(monkeypatch, tmp_path):
    listed, told = tmp_path / "cpuinfo", []
    monkeypatch.setattr("engine.processes.Path", lambda place: listed)
    for name in ("Intel(R) Xeon(R) Processor", "AMD EPYC"):
        listed.write_text(f"processor\t: 0\nmodel name\t: {name}\nmodel name\t: {name}\n")
        told.append(processor().rpartition(", ")[0])
    listed.write_text("processor\t: 0\nFeatures\t: fp asimd\n")  # ARM has no such name
    told.append(processor().rpartition(", ")[0])
    assert told[:2] == ["Intel(R) Xeon(R) Processor", "AMD EPYC"]
    assert told[2] == (platform.processor() or platform.machine())


def test_threads_keep_the_order_and_no_more_than_a_batch_ahead():
    begun, ahead = [], BATCH * cores()

    def double(thing):
        begun.append(thing)
        return 2 * thing

    things = range(2 * ahead + 1)
    assert list(in_threads(double, things)) == [2 * thing for thing in things]
    begun.clear()
    doubles = in_threads(double, things)
    assert next(doubles) == 0
    doubles.close()  # as Ctrl-C does
    assert 1 <= len(begun) <= ahead


# --- stages side by side --------------------------------------------------------------------------
def test_after_an_error_what_runs_goes_on_to_its_end(capsys):
    ended = []

    def work():
        time.sleep(0.3)
        ended.append("work")

    def fail():
        raise execute.StepFailed("no room on the disk \x1b[31m")

    with pytest.raises(execute.StepFailed, match="no room"), execute.side_by_side(2) as start:
        start(work)
        start(fail).result()
    assert ended == ["work"]
    assert capsys.readouterr().err == (
        "no room on the disk \\x1b[31m\nnothing more is started; what runs goes on to its end\n")


ALONE = {"cache_pictures": False, "threads": 1}
STAGES = ("splits", "text", "camembert_title", "seresnext", "image_whole")


def graph_of(run: h.Run) -> dict:
    plan = make_plan("paper", [run.split], [run.seed], run.changed)
    return {job: after for job, after in stage_graph(plan).items() if job.name in STAGES}


def contents(run: h.Run) -> dict:
    """Hashes of all that the stages hold, manifests (times, memory) apart."""
    return {name: h.read_manifest(run, name)["files"] for name in STAGES}


@pytest.fixture(scope="module")
def one_after_another(tmp_path_factory) -> dict:
    """What the stages hold when one process makes one after another."""
    folder = tmp_path_factory.mktemp("one after another")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder, write_ens(folder / "ens"))
        run = h.open_run("paper", "90-10", 0, {**SMALL, **ALONE})
        for name in STAGES:
            h.stage(run, name)
        return contents(run)


def test_the_graph_names_what_each_stage_reads():
    whole = stage_graph(make_plan("sample", ["90-10", "80-20"], [0, 1], {}))
    run = h.open_run("sample", "90-10", 0)
    fusions = len(TRAINED_VARIANTS)
    assert len(whole) == 4 * 11
    assert sum(len(job.stages) for job in whole) == 4 * (10 + fusions)
    for each in {job.run for job in whole}:
        stages = [name for job in whole if job.run == each for name in job.stages]
        assert stages == stage_names(run)
    assert all(job.run == other.run for job, after in whole.items() for other in after)
    fusion = next(job for job in whole if job.name == "fusion")
    assert len(fusion.stages) == fusions and "fusion-concat-add" in fusion.stages
    features = {*h.REPRESENTATIONS.values(), "image_whole"}
    assert {job.name for job in whole[fusion]} == {"splits", "text", "seresnext", *features}
    early = [job for job, after in whole.items() if {a.name for a in after} <= {"splits", "text"}]
    assert len(early) == 4 * 8
    frozen = h.open_run("paper", "90-10", 0, {"freeze_encoders": True})
    names = stage_names(frozen)
    assert len(names) == 10 + fusions + 6
    assert names.index("vectors-image_whole") < names.index("seresnext")
    assert notebook_of(frozen, "vectors-image_whole") == "05_finetune_seresnext"


def test_two_workers_make_what_is_made_one_after_another(make_run, one_after_another, monkeypatch):
    run = make_run(**ALONE)
    spans, run_job = {}, workers.run_job

    def timed(job: Job, environment: dict) -> tuple[float, str]:
        start = time.monotonic()
        result = run_job(job, environment)
        spans[job.name] = (start, time.monotonic())
        return result

    monkeypatch.setattr(workers, "run_job", timed)
    workers.make_stages(graph_of(run), 2, "here", Console())
    assert contents(run) == one_after_another
    assert spans["camembert_title"][0] > spans["text"][1]
    assert spans["image_whole"][0] > spans["seresnext"][1]
    (_, first_end), (second, _) = sorted(spans[name] for name in ("splits", "text"))
    assert second < first_end  # these two wait for nothing, so they run at the same time


def test_ray_makes_what_is_made_one_after_another(make_run, one_after_another):
    run = make_run(**ALONE)
    workers.make_stages(graph_of(run), 1, "ray", Console())
    assert contents(run) == one_after_another


@pytest.mark.parametrize("on", ["here", "ray"])
def test_a_failing_stage_stops_those_that_wait_for_it(make_run, on):
    run = make_run(camembert="nobody/nothing", cache_pictures=False)
    graph = {job: after for job, after in graph_of(run).items()
             if "image" not in job.name and job.name != "seresnext"}
    with pytest.raises(execute.StepFailed, match="exit code 1\n.*text checkpoint 'nobody/nothing' "
                                                 "cannot be loaded"):
        workers.make_stages(graph, 2, on, Console())
    assert h.read_stage(run, "text").exists()
    assert not list(runs_folder().glob("stages/camembert_*/manifest.json"))


# --- what a notebook has made ---------------------------------------------------------------------
def own_step(name: str, folder: Path, run: h.Run, monkeypatch, *cells: str) -> Step:
    """The step `name`, whose notebook has these cells instead of its own."""
    code = [nbformat.v4.new_code_cell("SETTINGS = {}", metadata={"tags": ["parameters"]}),
            *map(nbformat.v4.new_code_cell, cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=kernel), folder / "own.ipynb")
    monkeypatch.setattr(Step, "source", folder / "own.ipynb")
    return Step(name, run)


BOTH_SPLITS = """
import sys
sys.path.append({root!r})
import helpers as h
for split in h.SPLITS:
    h.stage(h.open_run("paper", split, 0, SETTINGS), "splits")
"""


def test_each_of_two_stages_of_one_name_is_looked_at(make_run, tmp_path, monkeypatch):
    """Notebook 08 reads the scores of both splits."""
    cell = BOTH_SPLITS.format(root=str(ROOT))
    step = own_step("08_result_tables", tmp_path, make_run(), monkeypatch, cell)
    board = execute.Board(Console())
    made = execute.execute_one(step, step_key(step), "both", "1", board)["stages"]
    assert sorted(made.values()) == ["splits", "splits"] and state(step) == "done"
    for key, name in made.items():
        path = folder_of(name, key) / "split.csv"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        _state_of_stages.cache_clear()  # a command looks once
        assert state(step) == "damaged"
        path.write_bytes(whole)
    key, name = made.popitem()
    manifest = manifest_of(folder_of(name, key))
    write_manifest(folder_of(name, key),
                   manifest | {"versions": manifest["versions"] | {"nltk": "1.0"}})
    (note,) = notes_on_versions([step])  # `status` says it
    assert note.startswith(f"splits-{key[:8]} was made with nltk 1.0 (here ")


def test_an_edit_while_a_notebook_runs_is_seen(make_run, tmp_path, monkeypatch):
    """What has run is not what is written: the notebook is not done."""
    for new, expected in (("SETTINGS = ", "done"), ("SETTINGS = MORE = ", "stale")):
        cell = (f"from pathlib import Path\nbook = Path({str(tmp_path / 'own.ipynb')!r})\n"
                f"book.write_text(book.read_text().replace('SETTINGS = ', {new!r}, 1))")
        step = own_step("01_data_exploration", tmp_path, make_run(), monkeypatch, cell)
        execute.execute({step: []}, {step: "own"}, 1, Console())
        assert state(step) == expected


# --- what a user's machine is like ----------------------------------------------------------------
FIGURE = """
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
plt.show()
"""


def executed(folder: Path, run: h.Run, monkeypatch, *cells: str) -> None:
    """Execute a notebook of these cells as run.py does."""
    step = own_step("01_data_exploration", folder, run, monkeypatch, *cells)
    execute.execute({step: []}, {step: "own"}, 1, Console())


def test_kernel_and_figures_do_not_depend_on_a_users_environment(make_run, tmp_path, monkeypatch):
    """Another kernel of the same name, Matplotlib without a screen, another helpers.py, settings of
    one's own for IPython and Matplotlib.
    """
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    write_json(other / "kernel.json", {"argv": ["/nowhere/python"], "display_name": "Python 3",
                                       "language": "python"})
    (tmp_path / "helpers.py").write_text("raise ImportError('another helpers.py')")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "own.py").write_text("mine = 1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "ipython" / "matplotlibrc").write_text("lines.linewidth: 7")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "ipython"))
    first = read_json(ROOT / "notebooks" / "01_data_exploration.ipynb")
    found = next(line for cell in first["cells"] for line in cell["source"]
                 if line.startswith("sys.path"))
    executed(tmp_path, make_run(), monkeypatch, FIGURE,
             "assert 'mine' not in globals()\nassert plt.rcParams['lines.linewidth'] == 1.5",
             f"import os, sys\nos.chdir({str(ROOT / 'notebooks')!r})\n{found}\nimport helpers")
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "jupyter")


@pytest.mark.parametrize("cell, said", [
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
     r"its process was killed, as the system does when memory runs out; it had taken \d\.\d GB"),
    ("import matplotlib\nmatplotlib.use('Agg')\n" + FIGURE, r"cell\(s\) \d of .* show no figure")])
def test_a_notebook_that_cannot_be_done_says_why(make_run, tmp_path, monkeypatch, cell, said):
    run = make_run()
    with pytest.raises(execute.StepFailed, match=said):
        executed(tmp_path, run, monkeypatch, cell)
    assert state(Step("01_data_exploration", run)) == "missing"


# --- what compares splits -------------------------------------------------------------------------
@pytest.mark.parametrize("notebook, compares", [("08_result_tables", True), ("09_analysis", True),
                                                ("11_classify_a_product", False)])
def test_what_compares_splits_is_stale_once_another_split_is_there(make_run, notebook, compares):
    """It would say "not scored yet" of a split that is."""
    run, other = make_run(), make_run(split="80-20")
    before, names = step_key(Step(notebook, run)), stage_names(other)
    folders = [folder_of(name, key_of(other, name)) for name in names]
    for folder in folders[:-1]:
        folder.mkdir(parents=True)
    assert step_key(Step(notebook, run)) == before
    folders[-1].mkdir()
    assert (step_key(Step(notebook, run)) != before) == compares


# --- threads --------------------------------------------------------------------------------------
def open_and_fit(usual: int, threads: int, place: Path) -> None:
    """Open a run where so many threads are usual; write how many there are then, and the weights
    of a head.
    """
    threadpool_limits(usual)
    torch.set_num_threads(usual)
    h.open_run("paper", "90-10", 0, {**SMALL, "threads": threads})
    random = torch.Generator().manual_seed(0)
    features, head = torch.randn(1000, 500, generator=random), torch.nn.Linear(500, 5)
    labels = torch.randint(0, 5, (1000,), generator=random)
    h.fit_head(head, features, labels, np.array(["train", "val"] * 500))
    pools = {pool["num_threads"] for pool in threadpool_info()}
    write_json(place, {"threads": [torch.get_num_threads(), *pools],
                       "weights": head.weight.tolist()})


@pytest.mark.slow
def test_all_of_a_process_computes_on_the_runs_threads(tmp_path):
    """PyTorch, and what is below NumPy and scikit-learn: a head's weights would differ."""
    said = []
    for usual, threads in ((1, 1), (2, 1), (2, 0)):
        place = tmp_path / f"{usual}-{threads}.json"
        assert elsewhere.ended(elsewhere.start(open_and_fit, usual, threads, place)) == 0
        said.append(read_json(place))
    assert [set(each["threads"]) for each in said] == [{1}, {1}, {2}]
    assert said[0]["weights"] == said[1]["weights"]
    assert np.allclose(said[0]["weights"], said[2]["weights"], atol=1e-3)
