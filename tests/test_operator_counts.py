"""How many operators a training step issues on a device: no more than when this was written.

It guards against going back. The goals are lower, and stand in ``benchmarks/bench_operators.py``,
which shows those that are missed.
"""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEASURED = {
    "nn.BatchNorm2d": (2, 1),
    "EMABatchNorm2d": (21, 1),
    "CumulativeBatchNorm2d": (24, 1),
    "MovingAverageBatchNorm2d": (41, 43),
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.bench_operators")


@pytest.mark.parametrize("name", MEASURED)
def test_forward_and_backward_issue_no_more_operators_than_measured(bench, substitute_module, name):
    counts = bench.count(bench.LAYERS[name](8), substitute_module.counting)
    forward, backward = MEASURED[name]
    assert counts.forward <= forward
    assert counts.backward <= backward
