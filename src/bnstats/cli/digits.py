"""The demo's data, network and training: scikit-learn's 1,797 handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Digits:
    """Images of shape (N, 1, 8, 8), scaled to [-1, 1], and their labels: 1,200 to train on."""

    train: TensorDataset
    test: TensorDataset

    @classmethod
    def load(cls, seed: int) -> Digits:
        """Split the digits at random, the same way for the same seed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "the digits come with scikit-learn: pip install scikit-learn"
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
        targets = torch.from_numpy(labels).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, test = (TensorDataset(images[part], targets[part]) for part in order.split(1200))
        return cls(train, test)


def convolutional_net() -> nn.Sequential:
    """Return three convolutions with batch norm, and a linear layer."""
    net = nn.Sequential()
    for index, (inputs, outputs) in enumerate([(1, 16), (16, 32), (32, 64)], start=1):
        net.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        net.add_module(f"bn{index}", nn.BatchNorm2d(outputs))
        net.add_module(f"relu{index}", nn.ReLU())
        net.add_module(f"pool{index}", nn.MaxPool2d(2))
    net.add_module("flatten", nn.Flatten())
    net.add_module("classifier", nn.Linear(64, 10))
    return net


def multilayer_perceptron(
    norm: Callable[[int], nn.Module], linear: type[nn.Linear]
) -> nn.Sequential:
    """Return a 64-128-128-128-128-10 net, normalized before each ReLU."""
    net = nn.Sequential()
    net.add_module("flatten", nn.Flatten())
    for index, inputs in enumerate([64, 128, 128, 128], start=1):
        net.add_module(f"linear{index}", linear(inputs, 128, bias=False))
        net.add_module(f"norm{index}", norm(128))
        net.add_module(f"relu{index}", nn.ReLU())
    net.add_module("classifier", nn.Linear(128, 10))
    return net


def train(
    model: nn.Module,
    data: TensorDataset,
    *,
    title: str,
    epochs: int,
    seed: int,
    normalization_batch: int = 32,
    after_epoch: Callable[[int], None] = lambda _: None,
) -> None:
    """Train by SGD on batches of 32, the learning rate falling from 0.1 along a cosine to 0.

    A batch is normalized in parts of the normalization batch, each with a forward and a
    backward of its own, whose gradients add up to one step.
    """
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, 32, shuffle=True, drop_last=True, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = CosineAnnealingLR(optimizer, epochs * len(loader))
    with tqdm(total=epochs * len(loader), desc=title) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            for batch in loader:
                optimizer.zero_grad()
                for images, labels in zip(
                    *(part.split(normalization_batch) for part in batch), strict=True
                ):
                    loss = F.cross_entropy(model(images), labels, reduction="sum") / 32
                    loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            after_epoch(epoch)


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Return the mean cross entropy and the error rate in evaluation mode."""
    images, labels = data.tensors
    logits: Tensor = model.eval()(images)
    loss = F.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) != labels).float().mean().item()
