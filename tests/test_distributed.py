"""Processes that measure together end with the same bits, or all with an error."""

from dataclasses import astuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import bnstats
import peers
import processes
from bnstats.distributed import Peers
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.moments import Moments
from bnstats.recomputation.estimators import Pooled, averaged, moving_average, pooled_state
from bnstats.recomputation.spread import state_of_units
from versions import SHARDS_ON_CPU

ESTIMATORS = {"pooled": Pooled, "batch_average": averaged, "ema": moving_average}


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def said(request, tmp_path_factory):
    """What every process said of every scenario; they run once for all tests."""
    folder = tmp_path_factory.mktemp("peers")
    processes.together(peers.run, request.param, request.param, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("scenario", peers.SCENARIOS)
def test_together(said, scenario):
    sharded = "shard" in scenario or "dtensor" in scenario
    if sharded and not SHARDS_ON_CPU:
        pytest.skip("this torch shards on accelerators only, and has no batch norm of DTensors")
    peers.assert_all_said_the_same([process[scenario] for process in said])


def moments_of(x):
    count = torch.full((x.shape[1],), float(len(x)), dtype=torch.float64)
    return Moments(count, x.mean(0), x.var(0, correction=0) * len(x))


@pytest.mark.parametrize("method", ["pooled", "batch_average"])
@pytest.mark.parametrize("cuts", [(0, 4), (5, 5), (3, 11), (12, 12)])
def test_estimators_merge_wherever_the_batches_are_cut(method, cuts):
    # The parts' spreads are about different first batches, far from each other.
    sizes = (5, 9, 2, 7) * 3
    batches = [torch.randn(n, 3).double() + 10 * i for i, n in enumerate(sizes)]

    def estimator():
        like = torch.zeros(3, dtype=torch.float64)
        return ESTIMATORS[method](torch.ones_like(like), like)

    def taken(part):
        one = estimator()
        for x in part:
            one.add(moments_of(x))
        return one

    merged = estimator()
    for a, b in zip((0, *cuts), (*cuts, len(batches)), strict=True):
        merged.merge_state(taken(batches[a:b]).state())
    for mine, whole in zip(merged.estimate(), taken(batches).estimate(), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=0, equal_nan=True)


@pytest.mark.parametrize("samples", [False, True], ids=["batches", "samples too"])
def test_batches_at_once_give_the_state_of_one_after_the_other(samples):
    batches = [torch.randn(n, 3).double() + 10 * i for i, n in enumerate((5, 0, 2, 7))]
    like = torch.zeros(3, dtype=torch.float64)
    one_by_one, at_once = (Pooled(torch.ones_like(like), like, samples=samples) for _ in range(2))
    moments = [moments_of(x) if len(x) else Moments(like, like, like) for x in batches]
    about = torch.full_like(like, 15.0)
    spreads = [state_of_units(x, torch.zeros_like(x), 1, about) for x in batches]
    for batch, spread in zip(moments, spreads, strict=True):
        one_by_one.add(batch, spread if samples else None)
    counts, means, m2s = (torch.stack(x) for x in zip(*map(astuple, moments), strict=True))
    at_once.merge_state(pooled_state(counts[:, :1], means, m2s, spreads if samples else None))
    for mine, whole in zip(at_once.estimate(), one_by_one.estimate(), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("method", ESTIMATORS)
def test_an_empty_estimator_takes_a_state_over_bit_for_bit(method):
    like = torch.zeros(3, dtype=torch.float64)
    one, other = (ESTIMATORS[method](torch.ones_like(like), like) for _ in range(2))
    for i in range(4):
        one.add(moments_of(torch.randn(5, 3).double() + i))
    other.merge_state(one.state())
    other.merge_state(ESTIMATORS["pooled" if method == "pooled" else "ema"](like, like).state())
    assert torch.equal(one.state(), other.state())


def test_sync_says_what_it_needs():
    data = [torch.randn(4, 3)]
    with pytest.raises(InvalidValueError, match=r"torch.distributed to be initialized"):
        bnstats.measure_population_stats(nn.BatchNorm1d(3), data, sync=True)
    with pytest.raises(InvalidTypeError, match="expected True, False, None or a process group"):
        bnstats.measure_population_stats(nn.BatchNorm1d(3), data, sync="all")
    assert Peers.of(None).size == Peers.of(False).size == 1


@pytest.mark.parametrize(
    ("backends", "common", "of_cuda"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cuda:nccl", "cuda", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu", "cuda"),
        ("cpu:gloo", "cpu", "cpu"),
        ("xpu:xccl", "xpu", "xpu"),
    ],
)
def test_messages_are_where_the_group_has_a_backend(monkeypatch, backends, common, of_cuda):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    peers = Peers(alone=True)
    assert peers.common_device == torch.device(common)
    assert peers._backend_device("cuda") == torch.device(of_cuda)


def test_nccl_merges_what_is_on_the_devices(cuda, tmp_path):
    # A group of one takes the same way through the collective as one of many.
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        model = peers.network().to(cuda)
        data = [batch for part in peers.shards(3) for batch in part]
        for method in peers.METHODS:
            together = bnstats.measure_population_stats(model, data, method=method, sync=True)
            alone = bnstats.measure_population_stats(model, data, method=method, sync=False)
            for name in alone:
                assert torch.equal(together[name].var, alone[name].var)
    finally:
        dist.destroy_process_group()
