"""Observed, held and frozen forwards on a second device; steps that a CUDA graph replays."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import bnstats
from bnstats.layers import cumulative
from cases import FAMILIES, assert_state, each_family, state
from moving_average import SHORT
from networks import trained, uneven

IMAGES = (4, 3, 6, 5)
each_layer = pytest.mark.parametrize(
    "family", [None, *FAMILIES], ids=lambda f: f.name if f else "torch's"
)


def make(family):
    if family is None:
        return nn.BatchNorm2d(3)
    return family.make(2, **(SHORT if family.name == "moving_average" else {}))


def step(model, x):
    x = x.to(next(model.parameters()).device).detach().requires_grad_()
    model(x).square().mean().backward()
    return x.grad.cpu()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_layers_were_given_there_is_observed(device, training):
    here, data = trained(), uneven()
    here[3] = nn.Identity()  # dropout draws other numbers on each device
    there = copy.deepcopy(here).to(device)
    found = []
    for model in (here, there):
        with bnstats.observe(model.train(training)) as seen:
            for x in data:
                model(x.to(next(model.parameters()).device))
        found.append(seen.stats())
    for name, expected in found[0].items():
        for field in ("mean", "var", "mean_stderr", "var_stderr"):
            mine = getattr(found[1][name], field)
            assert (mine.device.type, mine.dtype) == ("cpu", torch.float64)
            torch.testing.assert_close(mine, getattr(expected, field), rtol=1e-4, atol=1e-6)


def test_observing_a_forward_waits_for_the_device_at_most_once(substitute, substitute_module):
    waits = []
    for depth in (2, 6):
        model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(depth)]).to(substitute)
        x = torch.randn(8, 3).to(substitute)
        with bnstats.observe(model):
            model(x)
            with substitute_module.counting() as counts:
                model(x)
        waits.append(sum(counts.waits.values()))
        assert not counts.copies
    assert waits[0] == waits[1] <= 1


@each_layer
def test_held_forwards_move_nothing_there_and_wait_for_nothing(device, no_waits, family):
    here = make(family)
    there = copy.deepcopy(here).to(device)
    for held in (False, True, False, True):
        for x in torch.randn(6, *IMAGES):
            contexts = [
                bnstats.hold_statistics(m) if held else nullcontext() for m in (here, there)
            ]
            before = state(there)
            with contexts[0], contexts[1]:
                torch.testing.assert_close(step(there, x), step(here, x), rtol=1e-4, atol=1e-5)
            if held:
                assert_state(there, before)
    x = torch.randn(IMAGES).to(device).requires_grad_()
    grad = torch.ones_like(x)
    with bnstats.hold_statistics(there), no_waits():
        there(x).backward(grad)


@each_layer
def test_frozen_layers_learn_there(device, no_waits, family):
    here = make(family)
    for x in torch.randn(4, *IMAGES):
        here(x)
    there = bnstats.freeze_statistics(copy.deepcopy(here).to(device)).train()
    bnstats.freeze_statistics(here).train()
    before, x = state(there), torch.randn(IMAGES)
    torch.testing.assert_close(step(there, x), step(here, x), rtol=1e-4, atol=1e-5)
    assert_state(there, before)
    torch.testing.assert_close(there.weight.grad.cpu(), here.weight.grad, rtol=1e-4, atol=1e-5)
    x = x.to(device)
    with no_waits():
        there(x).sum().backward()


def test_a_captured_step_goes_on_from_what_others_wrote_between_replays(monkeypatch):
    """What Python looks at is looked at once, when the step is captured."""
    layer = bnstats.CumulativeBatchNorm1d(2)
    layer(torch.randn(4, 2))
    monkeypatch.setattr(cumulative, "is_captured", lambda tensor: True)
    layer.running_mean.data.fill_(5)  # in a replay nobody counts the writes
    layer.num_batches_tracked.data.zero_()
    x = torch.randn(4, 2)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    layer.running_mean.data.fill_(5)
    layer(x)
    torch.testing.assert_close(layer.running_mean, (5 + x.mean(0)) / 2)


ASKING = {
    "counts",
    "moving_average_step",
    "moving_average_recall",
    "recall",
    "gather_moments",
    "sum_over_replicas",
}
"""Operators that ask Python for more than their tensors."""


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch has no such tag")
def test_only_operators_that_ask_python_split_what_is_made_a_cuda_graph():
    for name in (*ASKING, "moving_average_gradient"):
        tags = getattr(torch.ops.bnstats, name).default.tags
        assert (torch.Tag.cudagraph_unsafe in tags) == (name in ASKING), name


class TestCuda:
    @each_family
    def test_a_replayed_step_is_the_eager_one(self, cuda, family):
        eager = make(family).to(cuda)
        layer = copy.deepcopy(eager)
        x, grad = torch.randn(2, *IMAGES, device=cuda).unbind()
        x.requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(x).backward(grad)
        torch.cuda.current_stream().wait_stream(stream)
        for _ in range(3):
            eager(x).backward(grad)
        x.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)
            output.backward(grad)
        for i in range(40):
            if i == 30:  # a trainer writes statistics
                for one in (layer, eager):
                    one.running_var.fill_(2.0)
            y = torch.randn(IMAGES, device=cuda)
            with torch.no_grad():
                x.copy_(y)
            y.requires_grad_()
            graph.replay()
            expected = eager(y)
            expected.backward(grad)
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(x.grad, y.grad)
            for name, buffer in layer.named_buffers():
                torch.testing.assert_close(buffer, eager.get_buffer(name))

    @each_family
    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_compiled_with_reduced_overhead_it_trains_as_eagerly(self, cuda, family, checkpointed):
        eager = make(family).to(cuda)
        layer = copy.deepcopy(eager)
        compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
        for _ in range(40):
            x = torch.randn(IMAGES, device=cuda)
            grads = []
            for run in (compiled, eager):
                y = x.clone().requires_grad_()
                if checkpointed:
                    output = torch.utils.checkpoint.checkpoint(run, y, use_reentrant=False)
                else:
                    output = run(y)
                output.square().mean().backward()
                grads.append(y.grad)
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
            for name, buffer in eager.named_buffers():
                torch.testing.assert_close(layer.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
