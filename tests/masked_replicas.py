"""Masks and synchronized layers in replicas and in sharded models: scenarios for processes."""

import copy
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bnstats
from cases import FAMILIES
from replicated_layers import SHARES, make, options_of, own
from sharded_layers import whole

STEPS = 6


def network(family):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 3), make(family), nn.ReLU(), nn.Conv1d(4, 2, 1)).double()


def synchronized(model, family):
    return bnstats.convert_batchnorm(model, family.name, **options_of(family), sync=True)


def replicated(model, world):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it
        return DistributedDataParallel(model, broadcast_buffers=False)


def sharded(model, world):
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model[1], mesh=mesh)  # the layer by itself, as each block of a large model is
    return fully_shard(model, mesh=mesh)


def batches(total):
    """The same in every process: inputs, and masks of what the first convolution returns."""
    generator = torch.Generator().manual_seed(1)
    for t in range(STEPS):
        x = torch.randn(total, 3, 8, generator=generator).double() * (1 + t) + t
        yield x, torch.rand(total, 6, generator=generator) < 0.6


def step(model, net, optimizer, x, mask, checkpointed=False):
    """Take the loss of valid positions, of which each process adds its own."""
    optimizer.zero_grad()
    with bnstats.masked(model, mask):
        output = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
        (output * mask.unsqueeze(1)).square().sum().backward()
    optimizer.step()


def assert_same(ours, theirs):
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(whole(value), expected[name], msg=lambda m, n=name: f"{n}: {m}")


def train_masked_and_synchronized_as_one_process(family, wrap, checkpointed=False):
    """Shares of any size, none included, with any numbers of valid positions."""

    def scenario(rank, world):
        twin = network(family)
        model = synchronized(copy.deepcopy(twin), family)
        net = wrap(model, world)
        # Both average over processes the gradients that add up.
        rates = ((model, 0.001 * world), (twin, 0.001))
        ours, theirs = (torch.optim.SGD(m.parameters(), lr=rate) for m, rate in rates)
        for t, shares in enumerate(SHARES[world] * (STEPS // 2)):
            x, mask = list(batches(sum(shares)))[t]
            step(model, net, ours, *own(rank, shares, x, mask), checkpointed)
            step(twin, twin, theirs, x, mask)
        assert_same(model, twin)

    return scenario


def train_masked_as_each_process_by_itself(family, wrap):
    """Without sync, gradients are averaged, and statistics are each process's own."""

    def scenario(rank, world):
        twins = [network(family) for _ in range(world)]
        model = copy.deepcopy(twins[rank])
        net = wrap(model, world)
        ours = torch.optim.SGD(model.parameters(), lr=0.001)
        shares = [3 + r for r in range(world)]
        for x, mask in batches(sum(shares)):
            step(model, net, ours, *own(rank, shares, x, mask))
            for r, twin in enumerate(twins):
                unmoved = torch.optim.SGD(twin.parameters(), lr=0.0)
                step(twin, twin, unmoved, *own(r, shares, x, mask))
            with torch.no_grad():
                for parameters in zip(*(twin.parameters() for twin in twins), strict=True):
                    average = torch.stack([p.grad for p in parameters]).mean(0)
                    for p in parameters:
                        p.sub_(average, alpha=0.001)
        assert_same(model, twins[rank])

    return scenario


def train_sharded_in_mixed_precision_with_statistics_in_float32(family):
    """Parameters and inputs are bfloat16 in the forward, as large models are trained."""

    def scenario(rank, world):
        torch.manual_seed(rank)
        model = synchronized(network(family).float(), family)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        seen = []
        hook = model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        mask = torch.rand(4, 6) < 0.6
        step(model, model, optimizer, torch.randn(4, 3, 8) + 3 * rank, mask)
        hook.remove()
        (x,) = seen
        assert x.dtype == torch.bfloat16
        values = [torch.empty(0)] * world
        dist.all_gather_object(values, x.float().movedim(1, -1)[mask])
        values = torch.cat(values).double()
        layer = model[1]
        assert layer.running_mean.dtype == torch.float32
        if family.name in ("ema", "cumulative"):  # whose first batch is all that they know
            torch.testing.assert_close(layer.running_mean.double(), values.mean(0))
            torch.testing.assert_close(layer.running_var.double(), values.var(0))
        for _ in range(2):
            step(model, model, optimizer, torch.randn(4, 3, 8), mask)
        assert all(value.isfinite().all() for value in map(whole, model.state_dict().values()))
        return dict(model.named_buffers())

    return scenario


SCENARIOS = {
    f"masked.{scenario.__name__}[{family.name}{case}]": scenario(family, **options)
    for family in FAMILIES
    for scenario, case, options in (
        (train_masked_and_synchronized_as_one_process, "-replicated", {"wrap": replicated}),
        (
            train_masked_and_synchronized_as_one_process,
            "-sharded, checkpointed",
            {"wrap": sharded, "checkpointed": True},
        ),
        (train_masked_as_each_process_by_itself, "-sharded", {"wrap": sharded}),
        (train_sharded_in_mixed_precision_with_statistics_in_float32, "", {}),
    )
}
