"""Selective activation checkpointing hands out saved tensors by the count of each operator.

A forward that runs again must show the dispatcher the same operators as the first time, and
whatever of it a policy saves, outputs, gradients and buffers are those without a checkpoint.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cases import FAMILIES, each_family

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"window": 3, "warmup": 2, "renorm_warmup": 5}


class Overloads(TorchDispatchMode):
    """Collects the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func] = None
        return func(*args, **(kwargs or {}))


def network(layer):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 3, 3), layer, nn.ReLU(), nn.Conv2d(3, 3, 1))


def make(family):
    return network(family.make(2, **(SHORT if family.name == "moving_average" else {})))


def overloads(model, dtype=torch.float32):
    model, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6, dtype=dtype)
    with Overloads() as mode:
        model(x)
    return list(mode.seen)


def selectively(model, x, saved):
    def policy(ctx, op, *args, **kwargs):
        save = op in saved
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(model, x, use_reentrant=False, context_fn=contexts)


def train(model, steps, saved=None, together=1):
    """Train with several forwards before their backwards; return outputs and gradients."""
    generator, results = torch.Generator().manual_seed(2), []
    dtype = model[0].weight.dtype
    for _ in range(steps):
        xs = [torch.randn(2, 3, 6, 6, generator=generator).to(dtype) for _ in range(together)]
        xs = [x.requires_grad_() for x in xs]
        model.zero_grad()
        outputs = [model(x) if saved is None else selectively(model, x, saved) for x in xs]
        for output in outputs[::-1]:
            output.square().sum().backward()
        results += [*outputs, *(x.grad for x in xs), *(p.grad.clone() for p in model.parameters())]
    return results


def same_as_without(model, saves, together=1):
    """Train with each set of saved operators, and compare to training without a checkpoint."""
    plain = copy.deepcopy(model)
    expected = train(plain, 8, together=together)
    for saved in saves:
        checked = copy.deepcopy(model)
        actual = train(checked, 8, {*saved}, together)
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(dict(plain.named_buffers()), dict(checked.named_buffers()))


@each_family
def test_saving_any_one_operator_changes_nothing(family):
    model = make(family)
    found = overloads(model)
    assert len(found) > 3
    same_as_without(model, [[op] for op in found])


@each_family
@pytest.mark.parametrize("together", [1, 2])
def test_saving_nothing_or_several_operators_changes_nothing(family, together):
    model = make(family)
    found = [op for op in overloads(model) if not op._schema.is_mutable]
    same_as_without(model, [[], found[::2], found[1::2], found], together)


OPTIONS = {
    "no parameters": {"affine": False},
    "weight alone": {"bias": False},
    "per batch": {"momentum": None},
    "latest batch alone": {"momentum": 1.0},
    "nothing moves": {"momentum": 0.0},
    "bfloat16": {"dtype": torch.bfloat16},
}


@each_family
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_layers_in_one_checkpoint_are_as_without_it_whatever_is_saved(family, options):
    torch.manual_seed(1)
    short = SHORT if family.name == "moving_average" else {}
    layers = [family.make(2, **short, **options) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 3, 3), layers[0], nn.ReLU(), layers[1])
    model.to(options.get("dtype"))
    found = overloads(model, model[0].weight.dtype)
    same_as_without(model, [[], *([op] for op in found), found], together=2)


def test_the_bookkeeping_shows_no_operators_that_a_second_run_lacks():
    # gradients were silently wrong where aten.sub was saved
    for family in FAMILIES:
        model = make(family)
        same_as_without(model, [[torch.ops.aten.sub.Tensor]])
