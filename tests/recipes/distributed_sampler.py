"""DistributedSampler pads: where processes do not divide the data, it hands some samples out twice.

With 37 samples and 2 processes it gives 19 to each, so that a training step has one on each. A
measurement needs no equal shares, and every sample can count once.

    torchrun --nproc-per-node 2 tests/recipes/distributed_sampler.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import bnstats

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
model = nn.Sequential(nn.BatchNorm1d(4))
data = TensorDataset(torch.randn(37, 4, generator=torch.Generator().manual_seed(0)))

padded = DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=False))
stats = bnstats.measure_population_stats(model, padded)
assert stats["0"].count == -(-37 // world_size) * world_size

share = Subset(data, range(rank, len(data), world_size))
stats = bnstats.recompute_population_stats(model, DataLoader(share, 8)).after
assert stats["0"].count == 37
assert torch.allclose(model[0].running_mean, data.tensors[0].mean(0), atol=1e-6)
dist.destroy_process_group()
