"""Schedule-free optimizers: evaluation is at averaged weights, whose statistics training never saw.

In place of the optimizer's own recipe, a pass in training mode whose averages are those of the last
few batches: any pass at the averaged weights, observed. Training goes on with its own statistics.
"""

import copy

import torch
from schedulefree import SGDScheduleFree
from torch import nn

import bnstats

model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
optimizer = SGDScheduleFree(model.parameters(), lr=0.5)
loader = torch.randn(640, 4).split(32)


def train():
    optimizer.train()
    for x in loader:
        optimizer.zero_grad()
        (model.train()(x) - x[:, :2]).square().mean().backward()
        optimizer.step()


def evaluated():
    """Return the model as it is to be evaluated and saved."""
    optimizer.eval()
    with bnstats.observe(model) as seen, bnstats.hold_statistics(model), torch.no_grad():
        for x in loader:
            model.train()(x)
    average = copy.deepcopy(model).eval()
    seen.stats().apply_to(average)
    return average


train()
average = evaluated()
inputs = torch.cat(loader)
assert torch.allclose(average[1].running_mean, average[0](inputs).mean(0), atol=1e-5)
train()
