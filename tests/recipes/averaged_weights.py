"""Averaged weights (EMA, SWA): an average of weights needs statistics of its own.

Averaging the running statistics too (``use_buffers=True``) gives those of no network.
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bnstats

model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.randn(640, 4).split(32)

for x in loader:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update_parameters(model)

# In place of torch.optim.swa_utils.update_bn(loader, average).
bnstats.recompute_population_stats(average, loader)

inputs = torch.cat(loader)
assert torch.allclose(average.module[1].running_mean, average.module[0](inputs).mean(0), atol=1e-5)
