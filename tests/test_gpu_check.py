"""The GPU check's own code, on small networks and this device: it finds what differs."""
import pandas as pd
import pytest
import torch

import gpu_check
from commands import measuring

pytestmark = pytest.mark.slow


@pytest.fixture
def quick(monkeypatch):
    """No step is waited for."""
    monkeypatch.setattr(measuring, "LEAST", 0.0)


def test_all_is_met_by_the_reference_itself(quick, tmp_path):
    """Resume is test_stops.py's here; memory that runs out needs a GPU."""
    checks = [name for name in gpu_check.CHECKS if name != "resume"]
    table = tmp_path / "gpu_check.csv"
    assert gpu_check.main([*checks, "--small", "--to", str(table)]) == 0
    found = pd.read_csv(table)
    exact = found[found["check"].isin(["features", "losses"])]
    assert exact["met"].all() and exact["demanded"].all()
    networks = {"camembert", "flaubert", "seresnext", "regions"}
    for kind in gpu_check.TOLERANCES:
        vectors = exact[(exact["check"] == "features") & (exact["precision"] == kind)]
        assert set(vectors["what"]) == networks
        half = kind != "float32"
        assert (vectors["value"] > 0).eq(half).all()  # half precision is another number
    assert {"speed", "share of the peak", "whole grid", "loading"} <= set(found["check"])
    gpu_check.main(["loading", "--small", "--to", str(table)])
    assert set(pd.read_csv(table)["check"]) == set(found["check"])  # the others' lines stay


def test_a_device_that_computes_something_else_fails(quick, tmp_path, monkeypatch):
    right = gpu_check.encode

    def wrong(encoder, batch, dtype):
        return right(encoder, batch, dtype) * (1.2 if dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(gpu_check, "encode", wrong)
    table = tmp_path / "gpu_check.csv"
    assert gpu_check.main(["features", "--small", "--to", str(table)]) == 1
    found = pd.read_csv(table)
    assert set(found.loc[~found["met"], "precision"]) == {"bf16"}


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "device", lambda: torch.device("cpu"))
    assert gpu_check.main([]) == 1 and "no CUDA GPU is here" in capsys.readouterr().err
