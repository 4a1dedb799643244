"""A loader whose batches are on the GPU already: as bytes, in a dict, to be normalized there."""

import torch
from torch import nn

import bnstats

device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(device)


class Prefetcher:
    """Stands for DALI, FFCV or a prefetcher of your own; any iterable of batches is a loader."""

    def __iter__(self):
        for _ in range(5):
            yield {"data": torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, device=device)}

    def __len__(self):
        return 5


def forward(model, batch):
    return model(batch["data"].float() / 127.5 - 1)


result = bnstats.recompute_population_stats(model, Prefetcher(), forward=forward)

# Batches stay where they are, and so do the statistics until they are handed out.
assert result.after["1"].count == 5 * 4 * 6 * 6
assert model[1].running_mean.device.type == device
