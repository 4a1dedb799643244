"""Devices without float64 are recognized by trying, not by name, and are served in float32."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bnstats
from bnstats import Moments, reduction
from bnstats.reduction import wide_dtype
from cases import each_family
from networks import trained, uneven

METHODS = ["pooled", "batch_average", "ema", "layerwise", "sweeps"]


@pytest.fixture
def unknown(substitute, monkeypatch):
    """A device that nobody has asked yet."""
    monkeypatch.setattr(reduction, "_has_float64", {"cpu": True, "meta": True})
    return substitute


@pytest.fixture
def narrow(unknown, substitute_module):
    """A device that refuses float64."""
    with substitute_module.without_float64():
        yield unknown


def test_a_device_is_asked_and_once(unknown, substitute_module):
    with substitute_module.counting() as first:
        assert wide_dtype(unknown) == torch.float64
    with substitute_module.counting() as again:
        assert wide_dtype(unknown) == torch.float64
    assert first.launches
    assert not again.launches


def test_a_device_that_refuses_float64_gets_float32(narrow):
    assert wide_dtype(narrow) == torch.float32
    assert wide_dtype(torch.device("cpu")) == wide_dtype(torch.device("meta")) == torch.float64


def test_a_device_without_memory_gives_no_answer(unknown, substitute_module):
    with substitute_module.without_memory(), pytest.raises(torch.OutOfMemoryError):
        wide_dtype(unknown)
    assert wide_dtype(unknown) == torch.float64


def test_the_answer_is_the_same_while_operators_run_without_values(narrow):
    with FakeTensorMode():
        assert wide_dtype(narrow) == torch.float32
    assert wide_dtype(narrow) == torch.float32


def test_compiled_code_goes_by_the_answer(narrow):
    wide_dtype(narrow)

    def of(x):
        return Moments.from_batch(x).mean

    x = torch.randn(8, 3).to(narrow)
    mean = torch.compile(of, backend="eager", fullgraph=True)(x)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.cpu(), x.cpu().mean(0))


@each_family
def test_layers_train_and_move_there(narrow, family):
    here = family.make(2)
    there = copy.deepcopy(here).to(narrow)
    for x in torch.randn(4, 4, 3, 5, 6):
        torch.testing.assert_close(there(x.to(narrow)).cpu(), here(x), rtol=1e-5, atol=1e-5)
    made = family.make(2, device=narrow)
    made.load_state_dict(there.state_dict())
    back = copy.deepcopy(made).cpu()
    for name, buffer in here.named_buffers():
        if name == "window_scales":  # no part of the state dict
            continue
        assert back.get_buffer(name).dtype == buffer.dtype
        torch.testing.assert_close(back.get_buffer(name), buffer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_models_are_measured_there(narrow, method):
    model, data = trained(), uneven()
    expected = bnstats.measure_population_stats(model, data, method=method)
    result = bnstats.recompute_population_stats(model.to(narrow), data, method=method)
    for name, stats in result.after.items():
        for field in ("mean", "var", "mean_stderr", "var_stderr", "mean_var_cov", "spread"):
            mine = getattr(stats, field)
            assert mine.dtype == torch.float64
            scale = getattr(expected[name], field).abs().max().item()
            torch.testing.assert_close(
                mine, getattr(expected[name], field), rtol=1e-3, atol=1e-4 * scale
            )
    assert result.after.merge(expected) if method == "pooled" else True


def test_a_model_half_on_cpu_is_measured_in_float32_there(narrow):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).to(narrow))
    data = list(torch.randn(4, 8, 3))

    def forward(model, x):
        model[1](model[0](x).to(narrow))

    stats = bnstats.measure_population_stats(model, data, forward=forward)
    reference = bnstats.measure_population_stats(copy.deepcopy(model).cpu(), data)
    for name in reference:
        torch.testing.assert_close(stats[name].var, reference[name].var, rtol=1e-5, atol=0)
