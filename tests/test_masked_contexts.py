"""What is masked is what ran inside of a context, in whatever order contexts and backwards end."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import bnstats
from bnstats.errors import InvalidValueError
from cases import each_family

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"window": 5, "warmup": 2, "renorm_warmup": 4}


def network(family):
    """Two layers, the second at fewer positions."""
    options = SHORT if family.name == "moving_average" else {}
    return nn.Sequential(
        nn.Conv1d(2, 3, 1), family.make(1, 3, **options), nn.ReLU(),
        nn.Conv1d(3, 4, 2, 2), family.make(1, 4, **options),
    ).double()  # fmt: skip


def save_convolutions(ctx, operator, *args, **kwargs):
    saved = operator == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, save_convolutions),
    ),
}
each_checkpoint = pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=CHECKPOINTS)


def batches(count):
    return [
        (torch.randn(4, 2, 8).double(), torch.rand(4, 8) < 0.5, torch.randn(4, 4, 4).double())
        for _ in range(count)
    ]


def masked_forward(model, x, mask, run=None):
    with bnstats.masked(model, mask, "any"):
        return model(x) if run is None else run(model, x)


def assert_same(ours, theirs):
    torch.testing.assert_close(
        [p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()]
    )
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@each_family
@each_checkpoint
def test_a_backward_after_the_context_runs_forwards_again_with_their_masks(family, run):
    model = network(family)
    twin = copy.deepcopy(model)
    for x, mask, weight in batches(6):
        x.requires_grad_()
        output = masked_forward(model, x, mask, run)
        (output * weight).sum().backward()
        (masked_forward(twin, x, mask) * weight).sum().backward()
    assert_same(model, twin)


@each_family
@each_checkpoint
def test_forwards_with_and_without_masks_wait_for_one_backward(family, run):
    """In a context with another mask: each has its own, or none."""
    model = network(family)
    twin = copy.deepcopy(model)
    losses, expected = [], []
    for i, (x, mask, weight) in enumerate(batches(4)):
        x.requires_grad_()
        if i == 2:
            mine, theirs = run(model, x), twin(x)
        else:
            mine, theirs = masked_forward(model, x, mask, run), masked_forward(twin, x, mask)
        losses.append((mine * weight).sum())
        expected.append((theirs * weight).sum())
    with bnstats.masked(model, torch.rand(4, 8) < 0.5, "any"):
        sum(losses).backward()
    sum(expected).backward()
    assert_same(model, twin)


@each_checkpoint
def test_one_input_with_several_masks_needs_its_context(run):
    model = nn.Sequential(bnstats.EMABatchNorm1d(2)).double()
    twin = copy.deepcopy(model)
    x, masks = torch.randn(4, 2, 8).double(), [torch.rand(4, 8) < 0.5 for _ in range(2)]
    weight = torch.randn(4, 2, 8).double()
    x[(~masks[0] & ~masks[1])[:, None].expand_as(x)] = torch.nan
    x.requires_grad_()

    def backward(output, mask):
        (output * weight).movedim(1, -1)[mask].square().sum().backward()

    for net, way in ((model, run), (twin, None)):
        with bnstats.masked(net, masks[0]):
            first = net(x) if way is None else way(net, x)
            second = masked_forward(net, x, masks[1], way)
            backward(first, masks[0])
        backward(second, masks[1])
    assert_same(model, twin)
    outputs = [masked_forward(model, x, mask, run) for mask in masks]
    with pytest.raises(InvalidValueError, match="run backward inside the context of its mask"):
        backward(outputs[0], masks[0])
    other = (x.detach() + 1).requires_grad_()
    same = [masked_forward(model, other, masks[0].clone(), run) for _ in range(2)]
    backward(same[0], masks[0])


def test_a_forward_too_long_ago_to_know_its_mask_is_an_error():
    model = nn.Sequential(bnstats.EMABatchNorm1d(2)).double()
    losses = [
        masked_forward(model, x.requires_grad_(), mask, CHECKPOINTS["reentrant"]).square().sum()
        for x, mask, _ in batches(17)
    ]
    losses[-1].backward()
    with pytest.raises(InvalidValueError, match="at most 16 forwards later"):
        losses[0].backward()


@each_family
def test_contexts_nest_and_end_in_any_order(family):
    model, masks = network(family), [torch.rand(4, 8) < 0.5 for _ in range(2)]
    first, second = (bnstats.masked(model, mask, "any") for mask in masks)
    layers = [layer for layer in model if isinstance(layer, family.base)]

    def now():
        (mask,) = {id(layer._mask and layer._mask.valid) for layer in layers}
        return mask

    first.__enter__()
    assert now() == id(masks[0])
    second.__enter__()
    assert now() == id(masks[1])
    first.__exit__(None, None, None)
    assert now() == id(masks[1])
    second.__exit__(None, None, None)
    assert now() == id(None)


@each_family
def test_a_copy_has_no_masks_to_recall(family):
    model = network(family)
    ((x, mask, _),) = batches(1)
    masked_forward(model, x.requires_grad_(), mask, CHECKPOINTS["reentrant"])
    twin = copy.deepcopy(model)
    assert all(getattr(module, "_masks", None) is None for module in twin.modules())
    CHECKPOINTS["not reentrant"](twin, x).square().sum().backward()
