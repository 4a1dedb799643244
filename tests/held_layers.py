"""Held and frozen layers in replicas and in sharded models: scenarios for several processes."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bnstats
from cases import FAMILIES

SHORT = {"window": 3, "warmup": 2, "renorm_warmup": 4}
LAYERS = {
    "torch": nn.BatchNorm2d,
    **{f.name: f.layers[2] for f in FAMILIES},
    "moving_average": lambda channels: bnstats.MovingAverageBatchNorm2d(channels, **SHORT),
}


def network(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), LAYERS[name](4), nn.ReLU())


def buffers(model):
    return [buffer.clone() for buffer in model.buffers()]


def assert_stay(model, before):
    for buffer, value in zip(model.buffers(), before, strict=True):
        assert torch.equal(buffer, value)


def step(model, run=None):
    x = torch.randn(4, 3, 6, 6)
    (model(x) if run is None else run(model, x)).square().mean().backward()


def replicas_hold(name):
    def scenario(rank, world):
        model = DistributedDataParallel(network(name), broadcast_buffers=False)
        torch.manual_seed(rank)
        for _ in range(4):
            step(model)
            before = buffers(model)
            with bnstats.hold_statistics(model):
                step(model)
            assert_stay(model, before)
        step(model)
        assert not torch.equal(model.module[1].running_var, before[1])
        return [p.grad for p in model.parameters()]

    return scenario


def replicas_with_the_first_ones_buffers_hold(name):
    def scenario(rank, world):
        model, alone = DistributedDataParallel(network(name)), network(name)
        torch.manual_seed(rank)
        for _ in range(3):
            step(model)
            with bnstats.hold_statistics(model):
                step(model)
        torch.manual_seed(0)
        for _ in range(3):
            step(alone)
            torch.randn(4, 3, 6, 6)
        # Before each forward all have got those of the first process, after its first forwards.
        for mine, expected in zip(model.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(mine, expected)
        return list(model.module[1].buffers())[:3]

    return scenario


def replicas_stay_frozen(name):
    def scenario(rank, world):
        model = network(name)
        step(model)
        model = DistributedDataParallel(bnstats.freeze_statistics(model))
        before = buffers(model)
        torch.manual_seed(rank)
        for mode in (True, False, True):
            step(model.train(mode))
            assert not model.module[1].training
        assert_stay(model, before)
        bnstats.thaw_statistics(model)
        assert model.module[1].training
        return [p.grad for p in model.parameters()]

    return scenario


def sharded_models_hold_and_freeze(name):
    def scenario(rank, world):
        model, mesh = network(name), init_device_mesh("cpu", (world,))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(4):
            step(model)
            before = buffers(model)
            with bnstats.hold_statistics(model):
                step(model)
                output = checkpoint(model, torch.randn(4, 3, 6, 6), use_reentrant=False)
            output.square().mean().backward()
            assert_stay(model, before)
        step(model)
        assert not torch.equal(model[1].running_var, before[1])
        before = buffers(bnstats.freeze_statistics(model).train())
        step(model)
        assert_stay(model, before)

    return scenario


def a_cumulative_average_goes_on_from_what_a_collective_wrote(rank, world):
    """As timm's distribute_bn writes: into the buffers, which counts as no write of torch's."""
    layer = bnstats.CumulativeBatchNorm1d(3)
    for _ in range(4):
        layer(torch.randn(16, 3) + 10 * rank)
    for name, buffer in layer.named_buffers():
        if "running" in name:
            dist.broadcast(buffer, 0)
    first = layer.running_mean.clone()
    layer(torch.full((16, 3), 2.0))
    torch.testing.assert_close(layer.running_mean, (first * 4 + 2) / 5)
    layer.double()
    torch.testing.assert_close(layer.running_mean.float(), (first * 4 + 2) / 5)


SCENARIOS = {
    "a_cumulative_average_goes_on_from_what_a_collective_wrote": (
        a_cumulative_average_goes_on_from_what_a_collective_wrote
    ),
} | {
    f"{scenario.__name__}[{name}]": scenario(name)
    for scenario in (
        replicas_hold,
        replicas_with_the_first_ones_buffers_hold,
        replicas_stay_frozen,
        sharded_models_hold_and_freeze,
    )
    for name in LAYERS
}
