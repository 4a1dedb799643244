"""Standing statistics of a generator (GAN): the loader hands out latents in place of data.

Sampling one image at a time then looks as sampling a batch did. Draw the latents as you will draw
them for sampling (truncated, of one class, ...): the statistics are of that distribution.
"""

import torch
from torch import nn

import bnstats


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, z, label):
        return self.net(z * self.embedding(label))


def latents(batches, size=64, truncation=2.0):
    """A dict is a batch of keyword arguments."""
    for _ in range(batches):
        z = nn.init.trunc_normal_(torch.empty(size, 16), a=-truncation, b=truncation)
        yield {"z": z, "label": torch.randint(10, (size,))}


generator = Generator()
result = bnstats.recompute_population_stats(generator, latents(100), tolerance=0.02)
print(result)

# As many batches as it takes for a standard error of a fiftieth.
assert result.after["net.1"].num_batches <= 100
assert generator.eval()(torch.randn(1, 16), torch.tensor([3])).shape == (1, 3)
