"""Layers that are synchronized over processes: scenarios for several of them."""

import copy
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bnstats
from bnstats.distributed import Peers
from bnstats.errors import InvalidTypeError, InvalidValueError, PeerError
from cases import FAMILIES

SHORT = {"window": 3, "warmup": 2, "renorm_warmup": 4}
SHARES = {2: [(3, 13), (16, 0)], 3: [(3, 13, 5), (16, 0, 1)]}
STEPS = 6


def make(family, **options):
    torch.manual_seed(0)
    short = SHORT if family.name == "moving_average" else {}
    layer = family.make(1, 4, **short, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 2, 4))
    return layer


def batches(total, dtype=torch.float32):
    """The same in every process: whole batches, masks and what outputs are multiplied by."""
    generator = torch.Generator().manual_seed(1)
    for t in range(STEPS):
        x = torch.randn(total, 4, 6, generator=generator).to(dtype) * (1 + t) + t
        mask = torch.rand(total, 6, generator=generator) < 0.7
        yield x, mask, torch.randn(total, 4, 6, generator=generator).to(dtype)


def own(rank, shares, *tensors):
    start = sum(shares[:rank])
    return [tensor[start : start + shares[rank]] for tensor in tensors]


def run(layer, x, mask, weight, checkpointed):
    x = x.clone().requires_grad_()
    arguments = (x,) if mask is None else (x, mask)
    if checkpointed is None:
        y = layer(*arguments)
    else:
        y = checkpoint(layer, *arguments, use_reentrant=checkpointed)
    (y * weight).square().sum().backward()
    return y.detach(), x.grad


def close(ours, theirs, tolerance):
    """Differ by at most a part of the largest value."""
    largest = float(theirs.abs().max()) if theirs.numel() else 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest)


def equal_one_process(family, masked=False, checkpointed=None, dtype=torch.float32):
    """Outputs, gradients and state of any shares are those of the whole batch."""

    def scenario(rank, world):
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        for shares in SHARES[world]:
            layer, twin = make(family, sync=True, dtype=dtype), make(family, dtype=dtype)
            for x, mask, weight in batches(sum(shares), dtype):
                mask = mask if masked else None
                layer.zero_grad()
                twin.zero_grad()
                expected = run(twin, x, mask, weight, None)
                my_x, my_weight = own(rank, shares, x, weight)
                my_mask = None if mask is None else own(rank, shares, mask)[0]
                found = run(layer, my_x, my_mask, my_weight, checkpointed)
                for ours, theirs in zip(found, own(rank, shares, *expected), strict=True):
                    close(ours, theirs, tolerance)
                for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
                    total = ours.grad.clone()
                    dist.all_reduce(total)
                    close(total, theirs.grad, tolerance)
            for ours, theirs in zip(layer.buffers(), twin.buffers(), strict=True):
                close(ours, theirs, tolerance)
        return dict(layer.named_buffers())

    return scenario


def a_batch_that_is_not_finite_counts_nowhere(family):
    def scenario(rank, world):
        layer = make(family, sync=True)
        layer(torch.randn(3, 4, 6))
        before = copy.deepcopy(layer.state_dict())
        layer(torch.full((3, 4, 6), torch.nan if rank == 1 else 1.0))
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name
        return layer.state_dict()

    return scenario


def one_collective_forward_and_one_backward(family):
    def scenario(rank, world):
        layer, gather = make(family, sync=True), Peers.all_gather_into
        x = torch.randn(3, 4, 6, requires_grad=True)
        with mock.patch.object(Peers, "all_gather_into", autospec=True, side_effect=gather) as it:
            y = layer(x)
            forward = [call.args[2].numel() for call in it.call_args_list]
            y.sum().backward()
        assert forward == [9], forward
        assert it.call_count == 2

    return scenario


def distributed_data_parallel_trains_as_one_process(family, broadcast_buffers):
    def scenario(rank, world):
        torch.manual_seed(0)
        shares = [2 + r for r in range(world)]
        twin = nn.Sequential(
            nn.Conv1d(3, 4, 3), make(family), nn.ReLU(), nn.Conv1d(4, 2, 1)
        ).double()
        model = copy.deepcopy(twin)
        bnstats.convert_batchnorm(model, family.name, **options_of(family), sync=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it
            parallel = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
        # DDP takes the average over processes of gradients that add up.
        rates = ((model, 0.001 * world), (twin, 0.001))
        optimizers = [torch.optim.SGD(m.parameters(), lr=rate) for m, rate in rates]
        for _ in range(4):
            x = torch.randn(2, sum(shares), 3, 8).double()  # two parts: gradients accumulate
            for optimizer in optimizers:
                optimizer.zero_grad()
            mine = [own(rank, shares, part)[0] for part in x]
            with parallel.no_sync():
                parallel(mine[0]).square().sum().backward()
            parallel(mine[1]).square().sum().backward()
            for part in x:
                twin(part).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
        for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
        return model.state_dict()

    return scenario


def options_of(family):
    return {**SHORT, "center": False} if family.name == "moving_average" else family.options


def compiled_layers_exchange_too(family):
    def scenario(rank, world):
        torch._dynamo.reset()
        shares = SHARES[world][0]
        layer, twin = make(family, sync=True), make(family)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for x, _, weight in batches(sum(shares)):
            expected = run(twin, x, None, weight, None)
            found = run(compiled, *own(rank, shares, x), None, *own(rank, shares, weight), None)
            for ours, theirs in zip(found, own(rank, shares, *expected), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(layer.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    return scenario


def layers_compiled_one_by_one_share_their_code(rank, world):
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x = torch.randn(3, 4, requires_grad=True)
    for _ in range(10):  # more than torch.compile has versions of one code
        layer = bnstats.EMABatchNorm1d(4, sync=True)
        torch.compile(layer, backend=frames, fullgraph=True)(x).square().sum().backward()
    assert frames.frame_count == 1


def a_forward_that_fails_in_one_process_fails_in_all(family, what):
    """One process has a bad input or mask: no process is left waiting."""

    def scenario(rank, world):
        layer = make(family, sync=True)
        before = copy.deepcopy(layer.state_dict())
        x, mask = torch.randn(3, 4, 6), torch.ones(3, 6, dtype=torch.bool)
        bad = {
            "input": (torch.randn(3, 5, 6), mask),
            "dtype": (x.double(), mask),
            "integers": (x.long(), mask),
            "mask": (x, mask.float()),
            "device": (x.to("meta"), mask),
            "no tensor": (x.tolist(), mask),
        }[what]
        if rank == 1:
            with pytest.raises((InvalidValueError, InvalidTypeError)):
                layer(*bad)
        else:
            with pytest.raises(PeerError, match="rank 1"):
                layer(x, mask)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name

    return scenario


def without_a_valid_value_in_any_process_all_raise(family):
    def scenario(rank, world):
        layer = make(family, sync=True)
        with pytest.raises(InvalidValueError, match=r"no valid value.* in all processes"):
            layer(torch.randn(3, 4, 6), torch.zeros(3, 6, dtype=torch.bool))

    return scenario


def what_a_collective_has_no_rule_for_is_named(family):
    def scenario(rank, world):
        layer, x = make(family, sync=True), torch.randn(5, 4)
        if family.name != "moving_average":  # which has rules of its own
            for run in (
                lambda: torch.vmap(layer)(x.expand(2, 5, 4)),
                lambda: torch.func.grad(lambda x: layer(x).sum())(x),
                lambda: torch.func.jvp(layer, (x,), (x,)),
            ):
                with pytest.raises(InvalidValueError, match=f"{family.base.__name__}1d: sync"):
                    run()
        x.requires_grad_()
        with pytest.raises(InvalidValueError, match="create_graph: expected False"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)

    return scenario


def torch_func_has_the_gradient_of_moving_averages(rank, world):
    (family,) = (f for f in FAMILIES if f.name == "moving_average")
    layer = make(family, sync=True)
    twin = copy.deepcopy(layer)
    for x in torch.randn(4, 5, 4) * (1 + rank):
        found = torch.func.grad(lambda x: layer(x).pow(3).sum())(x)
        x.requires_grad_()
        (expected,) = torch.autograd.grad(twin(x).pow(3).sum(), x)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def groups_are_kept_apart(family):
    def scenario(rank, world):
        group = dist.new_group(list(range(world - 1)))  # the last is by itself
        if rank == world - 1:
            with pytest.raises(InvalidValueError, match="not a member"):
                family.make(1, 4, sync=group)
            return
        model = nn.Sequential(nn.SyncBatchNorm(4, process_group=group))
        layer = bnstats.convert_batchnorm(model, family.name, **options_of(family))[0]
        assert type(layer) is family.base
        assert layer.sync is group
        twin = copy.deepcopy(layer)
        assert twin.sync is group
        x = torch.arange(24.0).reshape(1, 4, 6) * (1 + rank) - 8
        layer(x)
        if family.batch_statistics:
            whole = torch.cat(
                [torch.arange(24.0).reshape(4, 6) * (1 + r) - 8 for r in range(world - 1)], 1
            )
            torch.testing.assert_close(layer.running_mean, whole.mean(1))
        bnstats.revert_batchnorm(model)
        assert type(model[0]) is nn.SyncBatchNorm
        assert model[0].process_group is group

    return scenario


def a_group_that_was_destroyed_is_named(rank, world):
    group = dist.new_group()
    layer, x = bnstats.EMABatchNorm1d(4, sync=group), torch.randn(3, 4)
    layer(x)
    dist.destroy_process_group(group)
    with pytest.raises(InvalidValueError, match=r"sync: .* was destroyed"):
        layer(x)
    with pytest.raises(InvalidValueError, match=r"sync: .* was destroyed"):
        bnstats.measure_population_stats(layer, [x], sync=group)
    layer.eval()(x)
    layer.sync = True
    layer.train()(x)
    assert layer.num_batches_tracked == 2


def too_long_ago_for_a_checkpoint(rank, world):
    layer = bnstats.EMABatchNorm1d(4, sync=True)
    xs = [torch.randn(3, 4, requires_grad=True) for _ in range(17)]
    losses = [checkpoint(layer, x, use_reentrant=False).square().sum() for x in xs]
    losses[-1].backward()
    with pytest.raises(InvalidValueError, match="at most 16 forwards later"):
        losses[0].backward()


SCENARIOS = {
    **{
        f"synchronized.{make_scenario.__name__}[{family.name}]": make_scenario(family)
        for family in FAMILIES
        for make_scenario in (
            equal_one_process,
            a_batch_that_is_not_finite_counts_nowhere,
            one_collective_forward_and_one_backward,
            compiled_layers_exchange_too,
            without_a_valid_value_in_any_process_all_raise,
            groups_are_kept_apart,
            what_a_collective_has_no_rule_for_is_named,
        )
    },
    **{
        f"synchronized.equal_one_process[{family.name}-{name}]": equal_one_process(
            family, **options
        )
        for family in FAMILIES
        for name, options in {
            "masked": {"masked": True},
            "float64": {"dtype": torch.float64},
            "masked float64": {"masked": True, "dtype": torch.float64},
            "checkpoint": {"masked": True, "checkpointed": False},
            "reentrant checkpoint": {"checkpointed": True},
        }.items()
    },
    **{
        f"synchronized.distributed_data_parallel[{family.name}-{broadcast}]": (
            distributed_data_parallel_trains_as_one_process(family, broadcast)
        )
        for family in FAMILIES
        for broadcast in (True, False)
    },
    **{
        f"synchronized.fails_in_all[{family.name}-{what}]": (
            a_forward_that_fails_in_one_process_fails_in_all(family, what)
        )
        for family in FAMILIES
        for what in ("input", "dtype", "integers", "mask", "device", "no tensor")
    },
    "synchronized.layers_compiled_one_by_one_share_their_code": (
        layers_compiled_one_by_one_share_their_code
    ),
    "synchronized.a_group_that_was_destroyed_is_named": a_group_that_was_destroyed_is_named,
    "synchronized.too_long_ago_for_a_checkpoint": too_long_ago_for_a_checkpoint,
    "synchronized.torch_func_has_the_gradient_of_moving_averages": (
        torch_func_has_the_gradient_of_moving_averages
    ),
}
