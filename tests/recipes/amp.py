"""Mixed precision: measure under the autocast that the model runs under."""

import torch
from torch import nn

import bnstats

device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(device)
loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(10)]


def forward(model, batch):
    images, _ = batch  # on the model's device already
    with torch.autocast(device, dtype=torch.bfloat16):
        return model(images)


result = bnstats.recompute_population_stats(model, loader, forward=forward)

# The layers see bfloat16; what is measured is float64, what is written the buffers' float32.
assert model[1].running_mean.dtype == torch.float32
assert result.after["1"].count == 10 * 4 * 6 * 6
