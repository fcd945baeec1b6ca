"""Several processes: one stage made by two together, and several stages side by side, come out as made by one."""
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from pandas.testing import assert_frame_equal

import helpers as h
import run as study
from conftest import ROOT, make_bert


def bert_folder(folder):
    """A small BERT without dropout: what is random in it would differ between processes."""
    folder.mkdir()
    torch.manual_seed(0)
    for part in make_bert(folder, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                          max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def prepared(make_run, tmp_path):
    """prepared(**settings): a run on a local checkpoint, whose text is there."""
    def prepare(**settings):
        run = make_run(**{"camembert": str(bert_folder(tmp_path / "bert")), "text_dropout": 0.0, "text_epochs": 3,
                          "text_batch": 8, **settings})
        h.split_stage(run)
        h.text_stage(run)
        return run
    return prepare


def made(run, name="camembert_title"):
    folder = h.read_stage(run, name)
    ids = h.read_split(run)["product_id"]
    return (h.load_tensors(folder / "features.safetensors", ids)["features"], pd.read_csv(folder / "curve.csv"),
            h.read_manifest(run, name))


def test_two_processes_make_the_stage_that_one_makes(prepared, monkeypatch, tmp_path):
    run = prepared(processes=2)
    h.text_encoder_stage(run, "camembert", "title")
    together, curve, manifest = made(run)
    assert manifest["processes"] == 2 and not list(run.folder.glob("*.partial"))

    alone = h.Run(h.dataclasses.replace(run.profile, processes=1), run.split, run.seed)
    assert h.text_encoder_stage(alone, "camembert", "title") == run.folder / "camembert_title"
    assert h.read_manifest(run, "camembert_title") == manifest  # the number of processes does not make it stale
    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "alone"))
    h.split_stage(alone)
    h.text_stage(alone)
    h.text_encoder_stage(alone, "camembert", "title")
    features, one_curve, one = made(alone)
    assert one["processes"] == 1 and one["key"] == manifest["key"]
    assert_frame_equal(curve, one_curve, rtol=0, atol=1e-4)
    assert torch.allclose(together, features, atol=1e-4) and features.std() > 0.1


@pytest.mark.parametrize("name", ["image_whole", "image_regions"])
def test_two_processes_make_the_features_of_pictures_that_one_makes(make_run, tmp_path, monkeypatch, name):
    """The features alone: batch normalisation learns from the rows of one process, unless they are on GPUs."""
    found = []
    for processes in (2, 1):
        monkeypatch.setenv("STUDY_RUNS", str(tmp_path / f"{processes} processes"))
        run = make_run(cache_pictures=False, processes=processes)
        h.split_stage(run)
        torch.manual_seed(0)
        h.stage(run, "seresnext", lambda out: h.save_file(h.ImageEncoder("small").state_dict(),
                                                          out / "encoder.safetensors"))
        h.image_features_stage(run, name)
        ids = h.read_split(run)["product_id"]
        found.append(h.load_tensors(run.folder / name / "features.safetensors", ids)["features"])
        assert h.read_manifest(run, name)["processes"] == processes
    assert torch.allclose(*found, atol=1e-5) and found[0].std() > 0.001


def test_a_stage_that_fails_in_several_processes_says_why(prepared, tmp_path):
    run = prepared(processes=2, max_length=64)
    (tmp_path / "bert" / "tokenizer.json").write_text("{}")
    with pytest.raises(ChildProcessError, match="stage camembert_title failed in 2 processes: error: text checkpoint "
                                                ".*bert' cannot be loaded"):
        h.text_encoder_stage(run, "camembert", "title")
    assert not (run.folder / "camembert_title").exists()


def test_what_a_process_said_before_an_unforeseen_error_is_kept(prepared, tmp_path, monkeypatch):
    run = prepared(processes=2)
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'LOCAL_RANK' in os.environ:\n"
        "    import transformers\n"
        "    def train(*args, **more): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "    transformers.Trainer.train = train\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChildProcessError, match="RuntimeError: CUDA error: an illegal memory access") as error:
        h.text_encoder_stage(run, "camembert", "title")
    assert "in finetune" in str(error.value) and len(str(error.value).splitlines()) < 30


def test_processes_end_when_the_notebook_is_interrupted(prepared, monkeypatch):
    run, me = prepared(processes=2, text_epochs=500), psutil.Process()
    children = []

    def interrupt(line, text):
        children.extend(me.children(recursive=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(h.Progress, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        h.text_encoder_stage(run, "camembert", "title")
    assert len(children) >= 3 and not any(child.is_running() for child in children)


def training_elsewhere(run) -> subprocess.Popen:
    """Another process that trains the stage camembert_title and has a checkpoint already."""
    code = ("import helpers as h\n"
            f"h.text_encoder_stage(h.open_run('paper', '90-10', 0, {settings_of(run)}), 'camembert', 'title')")
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list(run.folder.glob("camembert_title.partial/checkpoints/*")):
        assert time.monotonic() < end and other.poll() is None
        time.sleep(0.1)
    return other


def test_a_stage_is_made_by_one_process_at_a_time(prepared):
    run = prepared(text_epochs=500)
    other = training_elsewhere(run)
    with pytest.raises(ValueError, match="stage camembert_title is being made by another process"):
        h.text_encoder_stage(run, "camembert", "title")
    assert other.poll() is None
    other.kill()
    other.wait()


def test_processes_end_with_the_one_that_started_them(prepared):
    run = prepared(processes=2, text_epochs=500)
    parent = training_elsewhere(run)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 3  # the launcher and two workers
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def settings_of(run) -> dict:
    base = h.PROFILES["paper"]
    return {name: value for name, value in vars(run.profile).items() if value != getattr(base, name)}


# --- stages side by side ------------------------------------------------------------------------------
STAGES = ("splits", "text", "camembert_title", "camembert_description", "seresnext", "image_whole")


def graph_of(run) -> dict:
    plan = study.make_plan("paper", [run.split], [run.seed], settings_of(run))
    whole = study.stage_graph(plan)
    return {job: after for job, after in whole.items() if job.name in STAGES}


def contents(run) -> dict:
    """Hashes of all that the stages hold, manifests (times, memory) apart."""
    return {name: h.read_manifest(run, name)["files"] for name in STAGES}


@pytest.fixture
def reference(make_run, tmp_path):
    """(a run, what its stages hold when one process makes one after another)."""
    run = make_run(cache_pictures=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_RUNS", str(tmp_path / "one after another"))
        for name in STAGES:
            study.make_stage(run, name)
        return run, contents(run)


def test_the_graph_names_what_the_manifests_say_was_read(reference, make_run):
    whole = study.stage_graph(study.make_plan("sample", ["90-10", "80-20"], [0, 1], {}))
    assert len(whole) == 4 * len(study.stage_names()) == 4 * 20
    assert all(job.run == other.run for job, after in whole.items() for other in after)
    fusion = next(job for job in whole if job.name == "fusion-concat-add")
    assert {job.name for job in whole[fusion]} == {"splits", *h.REPRESENTATIONS.values()}
    assert len([job for job, after in whole.items() if {a.name for a in after} <= {"splits", "text"}]) == 4 * 8


def test_two_workers_make_what_is_made_one_after_another(reference, monkeypatch):
    run, expected = reference
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many as conftest gives the reference
    spans, run_job = {}, study.run_job

    def timed(job, environment):
        start = time.monotonic()
        found = run_job(job, environment)
        spans[job.name] = (start, time.monotonic())
        return found

    monkeypatch.setattr(study, "run_job", timed)
    study.side_by_side(graph_of(run), 2)
    assert contents(run) == expected
    assert spans["camembert_title"][0] > spans["text"][1] and spans["image_whole"][0] > spans["seresnext"][1]
    (_, first_end), (second, _) = sorted(spans[name] for name in ("text", "seresnext"))
    assert second < first_end  # these two wait for the splits alone, so they run at the same time


def test_ray_makes_what_is_made_one_after_another(reference, monkeypatch):
    run, expected = reference
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study.on_ray(graph_of(run))
    assert contents(run) == expected


def test_a_failing_stage_stops_those_that_wait_for_it(make_run):
    run = make_run(camembert="nobody/nothing", cache_pictures=False)
    with pytest.raises(study.StepFailed, match="exit code 1\n.*text checkpoint 'nobody/nothing' cannot be loaded"):
        study.side_by_side(graph_of(run), 2)
    assert (run.folder / "text").exists() and not (run.folder / "camembert_title").exists()
