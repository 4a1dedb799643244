"""FSDP2 (``fully_shard``): forwards wait for each other, so all processes need as many batches.

torchrun --nproc-per-node 2 tests/recipes/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bnstats

dist.init_process_group("gloo")  # "nccl" on GPUs
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda"
for module in (model[0], model[3], model):
    fully_shard(module, mesh=mesh)
data = TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
loader = DataLoader(data, 8, sampler=DistributedSampler(data, drop_last=True))

# "pooled" and "sweeps"; "layerwise" holds forwards back, and is refused.
result = bnstats.recompute_population_stats(model, loader)

assert result.after["1"].count == 64
dist.destroy_process_group()
