"""What a model's forwards ask of a second device: no waits, no copies, no sums in any order."""

import copy

import pytest
import torch
from torch import nn

import bnstats
from cases import FAMILIES, each_family
from moving_average import SHORT
from networks import trained, uneven

METHODS = ["pooled", "batch_average", "ema", "layerwise", "sweeps"]
ATOMIC = (
    *("index_add", "index_put", "index_reduce", "scatter_add", "scatter_reduce", "put_"),
    *("bincount", "histc", "kthvalue", "embedding_dense_backward"),
)
"""Operators that CUDA adds up with atomics, in another order at each call."""


def network(family):
    short = SHORT if family.name == "moving_average" else {}
    layers = nn.Conv2d(2, 3, 1), family.make(2, **short), nn.MaxPool2d(2), family.make(2, **short)
    return nn.Sequential(*layers)


@each_family
@pytest.mark.parametrize("downsample", ["any", "all"])
def test_masked_models_train_as_on_cpu_and_wait_for_nothing(device, no_waits, family, downsample):
    here = network(family)
    there = copy.deepcopy(here).to(device)
    mask = torch.ones(4, 6, 4, dtype=torch.bool)
    mask[1, 4:], mask[3, :, 2:] = False, False
    for x in torch.randn(30, 4, 2, 6, 4):
        outputs = []
        for model, where in ((here, "cpu"), (there, device)):
            model.zero_grad()
            with bnstats.masked(model, mask.to(where), downsample=downsample):
                output = model(x.to(where))
            output.square().mean().backward()
            outputs.append([output.cpu(), *(p.grad.cpu() for p in model.parameters())])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for name, buffer in there.named_buffers():
        torch.testing.assert_close(buffer.cpu(), here.get_buffer(name), rtol=1e-4, atol=1e-5)
    x, mask, grad = x.to(device), mask.to(device), torch.ones_like(output)
    with no_waits(), bnstats.masked(there, mask, downsample=downsample):
        there(x).backward(grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("downsample", ["any", "all"])
def test_a_recalibration_of_masked_data_is_that_on_cpu(device, method, downsample):
    here = trained()
    there = copy.deepcopy(here).to(device)
    data = []
    for x in uneven():
        mask = torch.ones(len(x), *x.shape[2:], dtype=torch.bool)
        mask[1::2, -3:] = False  # whole samples stay, down to one position each
        data.append({"input": x, "mask": mask})

    def forward(model, batch):
        model(batch["input"])

    options = {"mask": lambda batch: batch["mask"], "downsample": downsample, "forward": forward}
    found, expected = (
        bnstats.measure_population_stats(model, data, method=method, **options)
        for model in (there, here)
    )
    for name, stats in expected.items():
        assert found[name].count == stats.count
        for field in ("mean", "var", "mean_stderr", "var_stderr"):
            mine, theirs = getattr(found[name], field), getattr(stats, field)
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_recalibration_with_a_prior_is_that_on_cpu(device):
    here = trained()
    there = copy.deepcopy(here).to(device)
    source = bnstats.measure_population_stats(here, uneven())
    few = [1.5 * x + 0.2 for x in uneven()[:2]]
    found, expected = (
        bnstats.recompute_population_stats(model, few, prior=source).after
        for model in (there, here)
    )
    for name, stats in expected.items():
        for field in ("mean", "var", "mean_weight", "var_weight"):
            mine, theirs = getattr(found[name], field), getattr(stats, field)
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_diagnosis_of_a_model_there_is_that_on_cpu(device):
    here = trained()
    there = copy.deepcopy(here).to(device)
    found, expected = (bnstats.diagnose(model, uneven()) for model in (there, here))
    assert found.verdict == expected.verdict


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tolerance", [None, 0.3])
def test_nothing_is_measured_by_sums_in_any_order(substitute, substitute_module, method, tolerance):
    # Ranks would stop at different batches, and two calls give different bits.
    model = trained().to(substitute)
    with substitute_module.counting() as counts:
        bnstats.measure_population_stats(model, uneven(), method=method, tolerance=tolerance)
    assert not atomic(counts)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_no_step_takes_sums_in_any_order(substitute, substitute_module, family):
    model = network(family).to(substitute)
    model[2] = nn.Identity()  # torch's own pooling may
    x = torch.randn(4, 2, 6, 4).to(substitute)
    with substitute_module.counting() as counts:
        model(x).square().mean().backward()
    assert not atomic(counts)


def atomic(counts):
    assert counts.launches
    names = {name.removeprefix("op:aten::").strip("_") for name in counts}
    return names & {name.strip("_") for name in ATOMIC}
