"""The rehearsal: the real functions for a few steps, and what their speed says of a whole study."""
import time

import pytest
import torch

import helpers as h
import run as command_line
from commands import costs, hours, measuring, rehearse
from commands.hours import hours_of
from commands.measuring import seconds_a_step
from commands.rehearse import Rehearsed
from engine.runs import Run, runs_folder
from engine.settings import PROFILES, make_profile
from engine.variants import TRAINED_VARIANTS


def test_a_steps_seconds_are_counted_without_their_start(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(steps: int) -> None:
        now[0] += 7.0 + 0.25 * steps

    assert seconds_a_step(work) == pytest.approx(0.25)


def test_few_quick_steps_are_not_trusted(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(steps: int) -> None:
        asked.append(steps)
        now[0] += 0.01 * steps

    assert seconds_a_step(work) == pytest.approx(0.01)
    assert max(asked) == measuring.MOST_STEPS


def test_hours_are_worked_by_hand():
    profile = PROFILES["paper"]
    train = 1000 * 0.9 * 0.9
    each = Rehearsed("camembert_title", training=0.5, reading=0.1, flop=1.0, memory=1.0)
    assert hours_of(each, profile, "90-10", 1000) == pytest.approx(
        (profile.text_epochs * train * 0.5 + 1000 * 0.1) / 3600)
    each = Rehearsed("fusion", training=0.5, reading=0.0, flop=1.0, memory=1.0)
    often = profile.fusion_epochs * profile.fusion_seeds * len(TRAINED_VARIANTS)
    assert hours_of(each, profile, "90-10", 1000) == pytest.approx(often * train * 0.5 / 3600)
    each = Rehearsed("image_regions", training=0.0, reading=0.2, flop=1.0, memory=1.0)
    assert hours_of(each, profile, "80-20", 1000) == pytest.approx(1000 * 0.2 / 3600)


def test_padding_is_masked():
    batch = rehearse.pad([{"input_ids": [5, 6, 7], "labels": 0}, {"input_ids": [8], "labels": 1}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"][1].tolist() == [8, 1, 1] and batch["labels"].tolist() == [0, 1]


def test_drawn_texts_are_as_long_as_the_public_ones(make_run, monkeypatch, tmp_path):
    run = make_run(max_length=256)
    sizes = costs.Sizes(100, {"title": 22, "description": 141}, "")
    real = rehearse.text_lengths(run, "title", sizes)
    words = h.usable_products(run)["title"].str.split().str.len()
    assert abs(real.mean() - (costs.TOKENS_PER_WORD * words.mean() + 2)) < 2
    monkeypatch.setenv("RAKUTEN_DATA", str(tmp_path / "nothing"))
    drawn = rehearse.text_lengths(run, "title", sizes)
    assert abs(drawn.mean() - 22) < 1 and drawn.max() <= 256


@pytest.mark.slow
def test_all_heavy_stages_are_run_for_a_few_steps(make_run, monkeypatch):
    monkeypatch.setattr(measuring, "LEAST", 0.0)
    run = make_run()
    found = list(rehearse.rehearse(run, costs.find_sizes(run.profile)))
    assert [each.stage for each in found] == [
        "camembert_title", "camembert_description", "flaubert_title", "flaubert_description",
        "seresnext", "image_regions", "image_whole", "fusion"]
    for each in found:
        assert each.training + each.reading > 0 and each.flop > 0 and each.memory > 0
    tried = {each.stage: each.fastest for each in found if each.fastest}
    assert tried.keys() == {"seresnext", "image_regions"}
    assert tried["seresnext"]["loader_workers"] in rehearse.LOADERS
    assert tried["image_regions"]["region_batch"] in rehearse.REGION_BATCHES["cpu"]
    assert measuring.matrix_peak(torch.float32) > 1e8


# --- beside the estimate on paper -----------------------------------------------------------------
SIZES = costs.Sizes(1000, {"title": 22, "description": 141}, "")


def test_on_paper_a_known_gpu_has_the_hours_of_a_dry_run_and_another_device_its_peak(monkeypatch):
    runs = [Run(PROFILES["paper"], split, seed) for split in ("90-10", "80-20") for seed in (0, 1)]
    table = costs.cost_table(PROFILES["paper"], ["90-10", "80-20"], [0, 1], SIZES)
    h100 = table[table["gpu"] == "H100"]
    monkeypatch.setattr(hours, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(hours, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    found, at = hours.paper_hours(runs, SIZES, peak=1.0)
    assert found == pytest.approx((h100["hours"] * h100["runs"]).sum()) and at == "H100"
    monkeypatch.undo()
    found, at = hours.paper_hours(runs, SIZES, peak=2e12)
    assert at == "the measured peak"
    work = [each for run in runs for each in costs.stage_work(run.profile, run.split, SIZES)]
    by_hand = sum(each.flop / (2e12 * costs.UTILISATION[each.kind]) for each in work) / 3600
    assert found == pytest.approx(by_hand)


def test_what_frozen_encoders_give_counts_once_and_fusion_for_each_run():
    profile = make_profile("paper", {"freeze_encoders": True})
    runs = [Run(profile, split, seed) for split in ("90-10", "80-20") for seed in (0, 1)]
    reading = Rehearsed("image_regions", training=0.0, reading=0.5, flop=1.0, memory=1.0)
    assert hours.study_hours(reading, runs, 1000) == pytest.approx(1000 * 0.5 / 3600)
    fusion = Rehearsed("fusion", training=0.5, reading=0.0, flop=1.0, memory=1.0)
    assert hours.study_hours(fusion, runs, 1000) == pytest.approx(
        sum(hours_of(fusion, profile, run.split, 1000) for run in runs))


# --- what is fastest, what does not fit -----------------------------------------------------------
def test_the_fastest_settings_are_a_file_for_config(make_run):
    found = [Rehearsed("seresnext", 1.0, 0.0, 1.0, 1.0, {"loader_workers": 2}),
             Rehearsed("image_regions", 0.0, 1.0, 1.0, 1.0, {"region_batch": 8})]
    path = hours.write_fastest(found)
    assert path == runs_folder() / "rehearsed.toml"
    words = command_line.parser().parse_args(["status", "--config", str(path)])
    profile = command_line.make_plan(words)[0].run.profile
    assert (profile.loader_workers, profile.region_batch) == (2, 8)


def test_the_fastest_number_of_pictures_is_chosen(make_run, monkeypatch):
    run, seconds = make_run(), {1: 3.0, 2: 5.0, 4: 4.0, 8: 10.0}  # for a step of so many pictures
    asked = iter(rehearse.REGION_BATCHES["cpu"])
    monkeypatch.setattr(rehearse, "seconds_a_step", lambda work: seconds[next(asked)])
    found = rehearse.rehearse_reading(run, h.ImageEncoder("small"), "image_regions")
    assert found.fastest == {"region_batch": 4} and found.reading == 1.0


def test_a_network_that_is_larger_than_memory_is_refused_before_it_is_made(capsys):
    assert command_line.main(["rehearse", "--set", "text_width=16384", "--set", "text_layers=96"])
    told = " ".join(capsys.readouterr().err.split())
    assert "stage camembert_title does not fit this machine: 309," in told
    assert "million parameters take 4,9" in told and "take a smaller encoder" in told


def test_memory_that_runs_out_is_said_with_the_stage_and_the_remedy():
    told = "stage image_regions does not fit this machine: .*can't allocate memory.*; set a smaller"
    with pytest.raises(ValueError, match=told), rehearse.fitting("image_regions"):
        torch.empty(10 ** 15)
    with pytest.raises(ValueError, match="^another fault$"), rehearse.fitting("image_regions"):
        raise ValueError("another fault")
