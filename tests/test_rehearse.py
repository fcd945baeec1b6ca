"""The rehearsal: the real functions for a few steps, and what their speed says of a whole study."""
import time

import pytest
import torch

import helpers as h
from commands import costs, rehearse
from commands.rehearse import Rehearsed, hours_of, seconds_a_step
from engine.settings import PROFILES
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
    assert max(asked) == rehearse.MOST_STEPS


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
    monkeypatch.setattr(rehearse, "LEAST", 0.0)
    run = make_run()
    found = rehearse.rehearse(run, costs.find_sizes(run.profile))
    assert [each.stage for each in found] == [
        "camembert_title", "camembert_description", "flaubert_title", "flaubert_description",
        "seresnext", "image_regions", "image_whole", "fusion"]
    for each in found:
        assert each.training + each.reading > 0 and each.flop > 0 and each.memory > 0
    assert rehearse.matrix_peak(torch.float32) > 1e8
