"""Layers on a device: the CPU's numbers, without a wait of the host or a copy in a step."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
from cases import FAMILIES, SHAPES, each_family

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import bench_operators

SHORT = {"window": 4, "warmup": 5, "renorm_warmup": 8, "max_ratio": 1.2}
MEASURED = {
    "EMABatchNorm2d": (22, 1),
    "CumulativeBatchNorm2d": (23, 1),
    "MovingAverageBatchNorm2d": (42, 48),
}
"""Operators today; the goals are in benchmarks/bench_operators.py, and missed."""


@pytest.fixture(params=["substitute", "cuda"])
def device(request):
    return request.getfixturevalue(request.param)


def make(family, dims=2, **options):
    short = SHORT if family.name == "moving_average" else {}
    return family.make(dims, **{**short, **options})


def step(layer, x):
    x = x.detach().requires_grad_()
    output = layer(x)
    output.square().sum().backward()
    return output.detach(), x.grad


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True, **tolerance)


def assert_same_buffers(ours, theirs):
    for (name, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_same(mine, other, msg=lambda message, name=name: f"{name}: {message}")


def assert_trains_as_on_cpu(layer, device, shape, dtype=torch.float32, steps=20):
    twin = copy.deepcopy(layer)
    layer.to(device)
    for t in range(steps):
        x = (torch.randn(shape) * (1 + t % 3)).to(dtype)
        if t in (0, 9):  # not finite: such a batch changes nothing
            x[0, 0] = torch.nan
        ours, theirs = step(layer, x.to(device)), step(twin, x)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
        assert_same_buffers(layer, twin)
        layer.zero_grad()
        twin.zero_grad()


@each_family
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_training_on_a_device_is_that_on_cpu(family, device, shape):
    dims, size = shape
    assert_trains_as_on_cpu(make(family, dims), device, size)


@each_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_dtype_trains_on_a_device_as_on_cpu(family, device, dtype):
    assert_trains_as_on_cpu(make(family, dtype=dtype), device, (4, 3, 5, 6), dtype)


OPTIONS = [
    {"momentum": None},
    {"momentum": 1.0},
    {"momentum": 0.0},
    {"affine": False},
    {"bias": False},
]


@each_family
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_any_option_trains_on_a_device_as_on_cpu(family, device, options):
    assert_trains_as_on_cpu(make(family, **options), device, (4, 3, 5, 6))


@pytest.mark.parametrize("options", [{"debias": False}, {"pooled": False}], ids=str)
def test_any_average_trains_on_a_device_as_on_cpu(device, options):
    assert_trains_as_on_cpu(bnstats.EMABatchNorm2d(3, **options), device, (4, 3, 5, 6))


@each_family
def test_evaluation_on_a_device_is_that_on_cpu(family, device):
    layer, x = make(family), torch.randn(4, 3, 5, 6)
    layer(x)
    expected = layer.eval()(x)
    assert_same(layer.to(device)(x.to(device)), expected)


@each_family
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "nonreentrant"])
def test_a_checkpoint_on_a_device_moves_the_statistics_once(family, device, use_reentrant):
    layer, twin = make(family).to(device), make(family)
    for _ in range(12):
        x = torch.randn(4, 3, 5, 6)
        checked = step(lambda y: checkpoint(layer, y, use_reentrant=use_reentrant), x.to(device))
        for mine, other in zip(checked, step(twin, x), strict=True):
            assert_same(mine, other)
        assert_same_buffers(layer, twin)


@each_family
def test_a_state_dict_goes_on_on_another_device(family, device):
    there, here = make(family).to(device), make(family)
    for t in range(12):
        x = torch.randn(4, 3, 5, 6)
        step(there, x.to(device))
        if t == 5:
            here.load_state_dict(there.state_dict())
        if t > 5:
            step(here, x)
    assert_same_buffers(there, here)


@each_family
def test_conversion_and_back_on_a_device(family, device):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to(device)
    bnstats.convert_batchnorm(model, family.name)
    for _ in range(3):
        step(model, torch.randn(4, 3, 5, 6).to(device))
    assert all(b.device.type == device.type for b in model.buffers())
    model.eval()
    x = torch.randn(4, 3, 5, 6).to(device)
    expected = model(x)
    bnstats.revert_batchnorm(model)
    torch.testing.assert_close(model(x).cpu(), expected.cpu())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_layer_on_the_second_device_stays_there(family, substitute_module):
    layer = make(family).to("substitute:1")
    x = torch.randn(4, 3, 5, 6).to("substitute:1")
    with substitute_module.counting() as counts:
        for _ in range(10):
            step(layer, x)
    assert {index for index, _ in counts.streams} == {1}


@pytest.mark.parametrize("name", MEASURED)
def test_a_training_step_neither_waits_nor_copies_and_issues_no_more_operators_than_measured(
    name, substitute_module
):
    make = bench_operators.LAYERS[name]
    counts = bench_operators.count(make(bench_operators.SHAPE[1]), substitute_module.counting)
    assert (counts.waits, counts.copies) == (0, 0)
    forward, backward = MEASURED[name]
    assert counts.forward <= forward
    assert counts.backward <= backward


@each_family
def test_a_cuda_step_does_not_wait_for_the_device(family, cuda):
    layer, x = make(family).to(cuda), torch.randn(4, 3, 5, 6, device=cuda)
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
