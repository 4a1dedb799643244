"""Layers whose parameters are sharded or distributed: scenarios for several processes."""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.utils.checkpoint import checkpoint

from cases import FAMILIES

SHORT = {"window": 3, "warmup": 2, "renorm_warmup": 4}


def layer_of(family):
    return family.make(2, 4, **(SHORT if family.name == "moving_average" else {}))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(ours, theirs):
    expected = dict(theirs.state_dict())
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(whole(value), expected[name], msg=name)


def train_as_without_fully_shard(family, checkpointed=False):
    def scenario(rank, world):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), layer_of(family), nn.ReLU())
        twin, mesh = copy.deepcopy(model), init_device_mesh("cpu", (world,))
        if checkpointed:  # and the layer sharded by itself, as each block of a large model is
            fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
        for _ in range(8):
            x = torch.randn(4, 3, 6, 6)  # the same on every rank: gradients are averaged
            for net, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.zero_grad()
                again = checkpointed and net is model
                output = checkpoint(net, x, use_reentrant=False) if again else net(x)
                output.square().mean().backward()
                optimizer.step()
        assert_same(model, twin)

    return scenario


def train_as_without_dtensors(family, checkpointed=False, placement=None):
    def scenario(rank, world):
        torch.manual_seed(0)
        layer, mesh = layer_of(family), init_device_mesh("cpu", (world,))
        twin = copy.deepcopy(layer)
        distribute_module(layer, mesh)
        for _ in range(8):
            x = torch.randn(4, 4, 6, 6)
            distributed = distribute_tensor(x, mesh, [placement or Replicate()])
            if checkpointed:
                output = checkpoint(layer, distributed, use_reentrant=False)
            else:
                output = layer(distributed)
            output.square().sum().backward()
            twin(x).square().sum().backward()
        assert_same(layer, twin)
        for mine, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(whole(mine.grad), theirs.grad)

    return scenario


SCENARIOS = {
    f"{what.__name__}[{case}{family.name}]": what(family, **options)
    for what, case, options in (
        (train_as_without_fully_shard, "", {}),
        (train_as_without_fully_shard, "checkpointed-", {"checkpointed": True}),
        (train_as_without_dtensors, "", {}),
        (train_as_without_dtensors, "checkpointed-", {"checkpointed": True}),
        (train_as_without_dtensors, "sharded batch-", {"placement": Shard(0)}),
    )
    for family in FAMILIES
}
