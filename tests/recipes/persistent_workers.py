"""Persistent workers: recalibrate from the training's own loader, in the middle of an epoch too.

A DataLoader with persistent workers has one iterator, and a second loop over it ends the first
(torch.optim.swa_utils.update_bn does that). A measurement reads with workers of its own meanwhile.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnstats

if __name__ == "__main__":  # workers may import this file
    model = nn.Sequential(nn.BatchNorm1d(1))
    data = TensorDataset(torch.arange(24.0)[:, None])
    loader = DataLoader(data, 2, num_workers=2, persistent_workers=True)

    seen = 0
    for step, (x,) in enumerate(loader):
        seen += len(x)
        if step == 5:
            bnstats.recompute_population_stats(model, loader)

    assert seen == 24
    assert model[0].running_mean.item() == 11.5
