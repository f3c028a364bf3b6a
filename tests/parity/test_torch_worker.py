"""The benchmarks' competitors in torch, in bfloat16 and with the options for GPUs."""

import functools

import numpy as np
import pytest
import torch

from benchmarks import gpu_short, torch_network, torch_worker
from benchmarks.cases import Case, Job

OPERATION = Case("operation", "embedded_gaussian", 7, 5, 3, "", batch=2)
BLOCK = Case("block", "embedded_gaussian", 16, 4, 5, "", (1, 4, 4), 2)
CLIPS = Case("network", "embedded_gaussian", 3136, 784, 256, "", (4, 32, 32), batch=2)


def logits(competitor, direction, dtype="bfloat16", runs=1):
    run = torch_worker.Torch().prepare(Job(CLIPS, competitor, direction, dtype))
    return [run()[0].float().numpy() for _ in range(runs)]


@pytest.fixture
def shallow(monkeypatch):
    """One residual block in each stage, and one non-local block."""
    monkeypatch.setitem(torch_network.BLOCKS, 50, (1, 1, 1, 1))
    monkeypatch.setattr(torch_worker, "NONLOCAL_BLOCKS", {"res3": (0,)})
    # Without a compiler of C++.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_jax_and_torch_are_measured_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_short, "run_tests", lambda tests: {})
    competitors = ("auto", "torch pairs", "torch sdpa")
    rows = [
        gpu_short.Row(case.section, gpu_short.jobs(case, competitors, ("both",)), 0.1)
        for case in (OPERATION, BLOCK)
    ]
    results = gpu_short.run(rows, tmp_path / "gpu-short.json", 100.0, backend="cpu")
    assert results["environment"]["torch backend"] == "cpu"
    for records in results["rows"].values():
        assert [(record.competitor, record.failure) for record in records] == [
            (competitor, None) for competitor in competitors
        ]
        assert all(record.seconds > 0 for record in records)


@pytest.mark.parametrize("competitor", ["torch channels_last", "torch sdpa", "torch compiled"])
def test_networks_in_mixed_precision(competitor, shallow):
    (expected,) = logits("torch contiguous", "forward", "float32")
    (y,) = logits(competitor, "forward")
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.03  # about 6e-7 in float32


def test_a_compiled_network_trains_in_mixed_precision(shallow):
    first, second = logits("torch compiled", "both", runs=2)
    assert first.shape == second.shape == (2, 400)
    assert not np.allclose(first, second)  # the step has moved the weights
