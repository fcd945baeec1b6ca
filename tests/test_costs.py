"""The costs on paper follow from FLOPs that agree with closed formulas."""
import dataclasses

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import costs
import helpers as h
import run as study
from conftest import isolate, tiny_products

PAPER = h.make_profile("paper")
PUBLIC = costs.Sizes(55_116, {"title": 22, "description": 141}, "public")


@pytest.mark.parametrize("encoder, parameters", [("camembert", 110.6), ("flaubert", 138.2)])
def test_the_base_configurations_are_the_papers_models(encoder, parameters):
    network = costs.text_network(PAPER, encoder, 22)
    assert round(network.parameters / 1e6, 1) == parameters and network.width == 768


@pytest.mark.parametrize("encoder", h.TEXT_ENCODERS)
def test_flops_of_a_text_encoder_follow_the_formula_of_its_layers(encoder):
    s, width = 128, 768
    network = costs.text_network(PAPER, encoder, s)
    layers = 12 * (24 * s * width ** 2 + 4 * s ** 2 * width)
    assert network.forward == pytest.approx(layers, rel=1e-3)
    assert network.training == pytest.approx(3 * layers, rel=1e-3)
    kept = 12 * 256 * width * (34 + 5 * 12 * 256 / width)  # bytes in half precision, with attention matrices
    assert network.kept == pytest.approx(kept, rel=0.25)


def test_flops_of_se_resnext():
    whole, regions = costs.image_networks(costs.architecture(PAPER))
    assert 2 * 4.2e9 < whole.forward < 2 * 4.3e9
    assert whole.training == pytest.approx(3 * whole.forward, rel=0.02)  # but for the first layer's input
    assert whole.width == 2048 and 1 < regions.forward / whole.forward < 2.2


def test_a_step_on_grouped_convolutions_counts_each_group_once():
    with torch.device("meta"):
        layer = torch.nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
        forward, training, kept = costs.measure(layer, {"input": torch.empty(2, 8, 5, 5, requires_grad=True)})
    assert forward == 2 * 2 * 25 * 16 * (8 // 4) * 9 and training == 3 * forward
    assert kept == 2 * 2 * 8 * 25  # its input, in half precision


def test_costs_follow_rows_epochs_seeds_and_frozen_encoders():
    def pflop(**settings):
        table = costs.cost_table(dataclasses.replace(PAPER, **settings), ["90-10"], [0], PUBLIC)
        return table.drop_duplicates("stage").set_index("stage")["pflop"]

    base, frozen = pflop(), pflop(freeze_encoders=True)
    network = costs.text_network(PAPER, "camembert", 22)
    by_hand = (10 * 55_116 * 0.9 * (0.9 * network.training + 0.1 * network.forward) + 55_116 * network.forward) / 1e15
    assert base["camembert_title"] == pytest.approx(by_hand)
    assert frozen["camembert_title"] == pytest.approx(55_116 * network.forward / 1e15) and frozen["seresnext"] == 0
    assert pflop(image_epochs=40)["seresnext"] == pytest.approx(2 * base["seresnext"])


def test_hours_are_flops_over_the_rate_and_the_longest_path_is_that_of_the_graph():
    table = costs.cost_table(PAPER, ["90-10", "80-20"], [0, 1], PUBLIC)
    row = table.query("stage == 'flaubert_description' and gpu == 'A100' and split == '90-10'").iloc[0]
    assert row["runs"] == 2
    steps = 10 * 55_116 * 0.9 * (0.9 + 0.1 / 2) / 32 + 55_116 / 128
    arithmetic = row["pflop"] * 1e15 / (312e12 * 0.40)
    assert row["hours"] == pytest.approx(max(arithmetic, 0.03 * steps) / 3600)
    slow = table.query("stage == 'flaubert_description' and gpu == 'T4' and split == '90-10'").iloc[0]
    assert slow["hours"] == pytest.approx(row["pflop"] * 1e15 / (65e12 * 0.40 * 3600))
    hours = table.query("gpu == 'T4' and split == '90-10'").set_index("stage")["hours"]
    images = hours["seresnext"] + hours["image_regions"]
    slowest = max(images, *(hours[f"{encoder}_{field}"] for encoder in h.TEXT_ENCODERS for field in h.FIELDS))
    assert costs.longest_path(table, "T4") == pytest.approx(slowest + hours["fusion"])
    readable = costs.readable_costs(table, 8.3).set_index("stage")
    total = (table.query("gpu == 'T4'")["hours"] * 2).sum()
    assert float(readable.loc["all, one after another", "T4 16 GB"]) == pytest.approx(total, abs=0.06)


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    table = costs.cost_table(dataclasses.replace(PAPER, text_batch=256), ["90-10"], [0], PUBLIC)
    rows = table.query("stage == 'camembert_description'").set_index("gpu")
    network = costs.text_network(PAPER, "camembert", 141)
    assert 0 < rows.loc["T4", "device_batch"] < 256 == rows.loc["H100", "device_batch"]
    batch = rows.loc["T4", "device_batch"]
    assert 256 % batch == 0
    assert costs.memory_gb(network, batch) <= 0.9 * 16 < costs.memory_gb(network, 2 * batch)
    assert f"({batch})" in costs.readable_costs(table, 0).set_index("stage").loc["camembert_description", "T4 16 GB"]


def test_sizes_come_from_the_catalogue_where_it_is_there(tmp_path, tiny_ens, monkeypatch):
    isolate(monkeypatch, tmp_path, tiny_ens)
    sizes = costs.find_sizes(h.make_profile("paper", {"rows": "all"}))
    words = [len(h.clean_text(text).split()) for text in tiny_products()["title"]]
    assert sizes.rows == 60 and sizes.tokens["title"] == int(np.ceil(1.8 * np.mean(words) + 2))
    assert costs.find_sizes(h.make_profile("paper", {"rows": "all", "limit": 20})).rows == 20
    monkeypatch.setenv("RAKUTEN_DATA", str(tiny_ens / "nowhere"))
    assert costs.find_sizes(PAPER).rows == 55_116
    assert costs.find_sizes(h.make_profile("paper", {"rows": "all"})).tokens["description"] == 92


def test_a_dry_run_prints_all_gpus_and_starts_nothing(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path, tmp_path)
    words = ["study", "--profile", "paper", "--dry-run"]
    shown = CliRunner().invoke(study.app, [*words, "--seed", "0", "--seed", "1"])
    assert shown.exit_code == 0 and "4 run(s)" in shown.output and "55,116 rows" in shown.output
    for name in (*costs.GPUS, *h.REPRESENTATIONS.values(), "seresnext", "fusion", "picture cache", "text 40%"):
        assert name in shown.output
    assert max(map(len, shown.output.splitlines())) <= 150
    tiles = CliRunner().invoke(study.app, [*words, "--set", "seresnext=timm/vit_tiny_patch16_224"])
    assert tiles.exit_code == 1 and "set regions=feature_map" in str(tiles.exception)
    refused = CliRunner().invoke(study.app, [*words, "--set", "text_epochs=many"])
    assert refused.exit_code == 1 and "setting text_epochs must be int" in str(refused.exception)
    assert list(tmp_path.iterdir()) == []
