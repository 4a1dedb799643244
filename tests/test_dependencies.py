"""Which tensors are computed from which: what decides the order of the sweeps."""

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnstats.recomputation.dependencies import Dataflow


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, y: x + y,
        lambda _, y: F.relu(y, inplace=True),
        lambda x, y: x.add_(y),
        lambda x, y: torch.cat([x, y])[:2].clone().view(-1),
        lambda _, y: y[0].clone().sum(),
        lambda x, y: torch.where(y > 0, x, 0),
        lambda x, y: x[y.argmax(0)],
        lambda x, y: torch.add(x, y, out=torch.empty(0)),
        lambda x, y: x.index_copy(0, torch.tensor([0]), y[:1]),
        lambda _, y: nn.Linear(3, 3)(F.conv1d(y[None], torch.ones(3, 3, 1))[0].T[:, :3]),
        lambda _, y: torch.sparse.mm(y.to_sparse(), torch.eye(3)),
        lambda _, y: torch.from_numpy(y.numpy() * 2) + 1,
        lambda _, y: torch.tensor(y.tolist()),
        lambda _, y: torch.tensor(y.sum().item()),
        lambda x, y: x * y.sum().item(),
        lambda x, y: x / float(y.numpy().std()),
        lambda x, y: x * np.asarray(y)[0, 0].item(),
        lambda x, y: x.clone() if y.sum() > 0 else x.clone().neg_(),
        lambda _, y: raw_kernel(y, torch.empty(3, 3)),
        lambda _, y: raw_kernel(y, torch.zeros(3, 3)),
    ],
)
def test_what_is_computed_from_a_marked_tensor_is_marked(compute):
    with torch.no_grad(), Dataflow() as flow:
        x, y = torch.randn(3, 3), torch.randn(3, 3)
        flow.mark(y, frozenset({"y"}))
        assert flow.sources(compute(x, y)) == {"y"}


def raw_kernel(x, out):
    """Writes where the dispatcher does not see it, as extensions without an operator do."""
    ctypes.memmove(out.data_ptr(), x.contiguous().data_ptr(), x.nbytes)
    return out.clone()


def test_what_comes_from_nowhere_depends_on_everything_before_and_nothing_after():
    with Dataflow() as flow:
        early = torch.from_numpy(np.ones(3)) + 1
        x, y = torch.randn(2, 3)
        flow.mark(x.clone(), frozenset({"x"}))
        flow.mark(y.clone(), frozenset({"y"}))
        late = torch.from_numpy(np.ones(3)) + 1
        assert flow.sources(early) == frozenset()
        assert flow.sources(late) == {"x", "y"}


def test_parameters_and_batches_depend_on_nothing_whenever_they_are_used():
    linear, batch = nn.Linear(3, 3), torch.randn(3, 3)
    with torch.no_grad(), Dataflow([linear.weight, linear.bias, batch]) as flow:
        flow.mark(torch.randn(3), frozenset({"x"}))
        assert flow.sources(linear(batch)) == frozenset()
        assert flow.sources(batch) == frozenset()


def test_what_is_not_is_not():
    with Dataflow() as flow:
        x, y = torch.randn(3, 3), torch.randn(3, 3)
        flow.mark(y, frozenset({"y"}))
        assert flow.sources(x) == flow.sources((x * 2).relu_()) == frozenset()


def test_sources_add_up():
    with Dataflow() as flow:
        x, y, z = torch.randn(3, 3, 3)
        x, y, z = x.clone(), y.clone(), z.clone()
        flow.mark(x, frozenset({"x"}))
        flow.mark(y, frozenset({"y"}))
        assert flow.sources(x @ y) == {"x", "y"}
        z.mul_(x)
        assert flow.sources(z - y) == {"x", "y"}


def test_an_address_used_again_keeps_no_old_mark():
    with Dataflow() as flow:
        addresses, again = set(), False
        for _ in range(50):
            x = torch.randn(1000)
            again = again or x.data_ptr() in addresses
            addresses.add(x.data_ptr())
            assert flow.sources(x) == frozenset()
            flow.mark(x, frozenset({"x"}))
            del x
    assert again
