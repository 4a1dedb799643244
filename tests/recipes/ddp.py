"""DistributedDataParallel: every process reads its share, and all end with the same statistics.

torchrun --nproc-per-node 2 tests/recipes/ddp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bnstats

dist.init_process_group("gloo")  # "nccl" on GPUs
model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
data = TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
loader = DataLoader(data, 8, sampler=DistributedSampler(data))

# Called in every process: they merge counts, means and squares, once.
result = bnstats.recompute_population_stats(model, loader)

assert result.after["1"].count == 64
with torch.no_grad():
    mean = model.module[0](data.tensors[0]).mean(0)
assert torch.allclose(model.module[1].running_mean, mean, atol=1e-5)
del model  # before its processes part: a DDP that outlives them can block torch for good
dist.destroy_process_group()
