"""The costs on paper follow from FLOPs that agree with closed formulas."""
import dataclasses

import numpy as np
import pytest
import torch

import helpers as h
import run as study
from commands import costs
from conftest import isolate, tiny_products
from engine.settings import make_profile

PAPER = make_profile("paper")
SMALL = {"camembert": "small", "flaubert": "small", "seresnext": "small", "text_width": 64,
         "text_layers": 1}
PUBLIC = costs.Sizes(55_116, {"title": 22, "description": 141}, "public")


@pytest.mark.parametrize("encoder, parameters", [("camembert", 110.6), ("flaubert", 138.2)])
def test_the_base_configurations_are_the_papers_models(encoder, parameters):
    network = costs.text_network(PAPER, encoder, 22)
    assert round(network.parameters / 1e6, 1) == parameters
    assert network.width == 768


@pytest.mark.parametrize("encoder", h.TEXT_ENCODERS)
def test_flops_of_a_text_encoder_follow_the_formula_of_its_layers(encoder):
    s, width = 128, 768
    network = costs.text_network(PAPER, encoder, s)
    layers = 12 * (24 * s * width ** 2 + 4 * s ** 2 * width)
    assert network.forward == pytest.approx(layers, rel=1e-3)
    assert network.training == pytest.approx(3 * layers, rel=1e-3)


@pytest.mark.parametrize("encoder", h.TEXT_ENCODERS)
def test_a_small_encoder_costs_what_it_is_made_of(encoder):
    profile = make_profile("paper", {**SMALL, "text_layers": 2, "vocabulary": 500,
                                     "max_length": 32})
    network, s = costs.text_network(profile, encoder, 20), 20
    assert network.forward == pytest.approx(2 * (24 * s * 64 ** 2 + 4 * s ** 2 * 64), rel=1e-2)
    assert network.width == 64
    weights = 2 * 12 * 64 ** 2 + 64 * (500 + 34)
    assert network.parameters == pytest.approx(weights, rel=0.1)


def test_flops_of_se_resnext():
    whole, regions = costs.image_networks(PAPER)
    assert 2 * 4.2e9 < whole.forward < 2 * 4.3e9
    assert whole.training == 3 * whole.forward
    assert whole.width == 2048
    assert 1 < regions.forward / whole.forward < 2.2


def test_a_step_on_grouped_convolutions_counts_each_group_once():
    with torch.device("meta"):
        layer = torch.nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
        forward = costs.flops(layer, torch.empty(2, 8, 5, 5))
    assert forward == 2 * 2 * 25 * 16 * (8 // 4) * 9


def pflop(**settings):
    """10^15 FLOPs of each stage, with small encoders."""
    profile = make_profile("paper", {**SMALL, **settings})
    table = costs.cost_table(profile, ["90-10"], [0], PUBLIC)
    return table.drop_duplicates("stage").set_index("stage")["pflop"]


def test_costs_follow_rows_epochs_seeds_and_frozen_encoders():
    base, frozen = pflop(), pflop(freeze_encoders=True)
    network = costs.text_network(make_profile("paper", SMALL), "camembert", 22)
    features = 55_116 * network.forward / 1e15
    an_epoch = 55_116 * 0.9 * (0.9 * network.training + 0.1 * network.forward) / 1e15
    assert base["camembert_title"] == pytest.approx(10 * an_epoch + features)
    assert frozen["camembert_title"] == pytest.approx(features)
    assert frozen["seresnext"] == 0
    assert pflop(image_epochs=40)["seresnext"] == pytest.approx(2 * base["seresnext"])


def test_what_frozen_encoders_make_is_counted_once():
    small = make_profile("paper", SMALL)
    frozen = dataclasses.replace(small, freeze_encoders=True)
    table = costs.cost_table(frozen, list(h.SPLITS), [0, 1, 2], PUBLIC).query("gpu == 'T4'")
    runs = table.set_index(["split", "stage"])["runs"]
    assert runs["all", "camembert_title"] == runs["all", "image_regions"] == 1
    assert runs["90-10", "fusion"] == runs["80-20", "fusion"] == 3
    limited = dataclasses.replace(frozen, limit=1000)
    table = costs.cost_table(limited, list(h.SPLITS), [0, 1, 2], PUBLIC).query("gpu == 'T4'")
    assert table.set_index("stage")["runs"]["camembert_title"] == 3  # each seed has its own rows
    trained = costs.cost_table(small, list(h.SPLITS), [0, 1, 2], PUBLIC).query("gpu == 'T4'")
    assert (trained.groupby("split")["runs"].unique().str[0] == 3).all()
    assert "all" not in set(trained["split"])


def test_hours_are_flops_over_the_rate():
    table = costs.cost_table(PAPER, ["90-10", "80-20"], [0, 1], PUBLIC)
    chosen = table.query("stage == 'flaubert_description' and split == '90-10'").set_index("gpu")
    row, slow = chosen.loc["A100"], chosen.loc["T4"]
    assert row["runs"] == 2
    steps = 10 * 55_116 * 0.9 * (0.9 + 0.1 / 2) / 32 + 55_116 / 128
    arithmetic = row["pflop"] * 1e15 / (312e12 * 0.40)
    assert row["hours"] == pytest.approx(max(arithmetic, 0.03 * steps) / 3600)
    assert slow["hours"] == pytest.approx(row["pflop"] * 1e15 / (65e12 * 0.40 * 3600))


def test_totals_are_those_of_all_runs():
    table = costs.cost_table(PAPER, ["90-10", "80-20"], [0, 1], PUBLIC)
    readable = costs.readable_costs(table, 8.3).set_index("stage")
    total = readable.loc["all, one after another"]
    on_t4 = table.query("gpu == 'T4'")
    assert float(total["T4"]) == pytest.approx((on_t4["hours"] * 2).sum(), abs=0.06)
    assert float(total["PFLOP"]) == pytest.approx((on_t4["pflop"] * 2).sum(), abs=0.6)
    assert float(total["disk (GB)"]) == pytest.approx(costs.disk_gb(table) + 8.3, abs=0.6)
    weights = 4 * costs.text_network(PAPER, "camembert", 22).parameters / 1e9
    features = 4 * 55_116 * 768 / 1e9
    title = float(readable.loc["camembert_title", "disk (GB)"])
    assert title == pytest.approx(4 * (weights + features), abs=0.006)


def test_sizes_come_from_the_catalogue_where_it_is_there(tmp_path, tiny_ens, monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    sizes = costs.find_sizes(make_profile("paper", {"rows": "all"}))
    words = [len(h.clean_text(text).split()) for text in tiny_products()["title"]]
    assert sizes.rows == 60
    assert sizes.tokens["title"] == int(np.ceil(1.8 * np.mean(words) + 2))
    assert costs.find_sizes(make_profile("paper", {"rows": "all", "limit": 20})).rows == 20
    monkeypatch.setenv("RAKUTEN_DATA", str(tiny_ens / "nowhere"))
    assert costs.find_sizes(PAPER).rows == 55_116
    assert costs.find_sizes(make_profile("paper", {"rows": "all"})).tokens["description"] == 92


def test_a_dry_run_prints_all_gpus_and_starts_nothing(tmp_path, monkeypatch, capsys):
    isolate(monkeypatch, tmp_path, tmp_path)
    words = ["study", "--profile", "paper", "--dry-run"]
    assert study.main([*words, "--seed", "0", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "4 run(s)" in printed
    assert "55,116 rows" in printed
    for name in (*costs.GPUS, *h.REPRESENTATIONS.values(), "seresnext", "fusion", "picture cache",
                 "text 40%"):
        assert name in printed
    assert max(map(len, printed.splitlines())) <= 150
    assert study.main([*words, "--set", "seresnext=timm/vit_tiny_patch16_224"]) == 1
    assert "set regions=feature_map" in capsys.readouterr().err
    assert study.main([*words, "--set", "text_epochs=many"]) == 1
    assert "setting text_epochs must be int" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
