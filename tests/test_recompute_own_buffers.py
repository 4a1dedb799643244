"""What a model writes to its own buffers in evaluation mode: undone by a failure, else kept."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

import bnstats
from bnstats.errors import PeerError, TooFewValuesError
from networks import METHODS, assert_untouched, snapshot

ALL_METHODS = [*METHODS, "layerwise", "sweeps"]


class Counter(nn.Module):
    """Counts forwards in a buffer, in its own way."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("n", torch.zeros(1, 3, dtype=torch.int64))
        if how == "expanded":
            self.n = torch.zeros(1, 1, dtype=torch.int64).expand(1, 3)

    def forward(self, x):
        if self.how == "in place":
            self.n += 1
        elif self.how == "by data":
            self.n.data.add_(1)
        elif self.how == "replaced":
            self.n = self.n + 1
        elif self.how == "both":
            self.n += 1
            self.n = self.n + 1
        elif self.how == "expanded":
            self.n[:, :1] += 1
        elif self.how == "deleted":
            self._buffers.pop("n", None)
        elif self.how == "cleared":
            self.n = None
        return x


class Failing(nn.Module):
    """Raises in its last call."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x):
        self.calls += 1
        if self.error is not None and self.calls == 4:
            raise self.error
        return x


def model_of(part, error=None):
    return nn.Sequential(
        part, nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), Failing(error)
    )


@pytest.mark.parametrize(
    "make",
    [
        *(lambda how=how: Counter(how) for how in ["in place", "by data", "replaced", "both"]),
        *(lambda how=how: Counter(how) for how in ["expanded", "deleted", "cleared"]),
        MinMaxObserver,
        lambda: PerChannelMinMaxObserver(ch_axis=1),  # it resizes its buffers in place
        lambda: torch.jit.script(Scripted()),
    ],
)
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt("bad")])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_after_a_failure_the_models_own_buffers_are_as_they_were(method, error, make):
    model = model_of(make(), error).eval()
    before = snapshot(model)
    with pytest.raises(type(error), match="bad"):
        bnstats.recompute_population_stats(model, list(torch.randn(4, 8, 3)), method=method)
    assert_untouched(model, before)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: torch.Tensor):
        self.n.add_(1)
        return x


@pytest.mark.parametrize("method", ALL_METHODS)
def test_so_they_are_where_the_statistics_fail_after_all_forwards(method):
    model = model_of(Counter("in place"))
    before = snapshot(model)
    with pytest.raises(TooFewValuesError):
        bnstats.measure_population_stats(model, [torch.randn(1, 3)], method=method)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_so_they_are_where_writing_fails(method, monkeypatch):
    def failing(*_):
        raise PeerError("another process")

    model = model_of(Counter("in place"))
    before = snapshot(model)
    monkeypatch.setattr("bnstats.recomputation.run.write_all", failing)
    with pytest.raises(PeerError):
        bnstats.recompute_population_stats(model, list(torch.randn(4, 8, 3)), method=method)
    assert_untouched(model, before)


def test_a_graph_from_before_a_failure_can_still_be_run_backward():
    # Autograd refuses tensors that were written to since.
    model = model_of(Counter("other"), ValueError("bad"))
    model[0].n += 1
    x = torch.randn(8, 3, requires_grad=True)
    loss = (x * model[0].n).sum()
    with pytest.raises(ValueError, match="bad"):
        bnstats.recompute_population_stats(model, list(torch.randn(4, 8, 3)))
    loss.backward()
    assert x.grad.eq(1).all()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_after_success_they_stay_as_the_model_has_left_them(method, how):
    model = model_of(Counter(how))
    bnstats.recompute_population_stats(model, list(torch.randn(4, 8, 3)), method=method)
    assert model[0].n.min() >= 4
