"""Photographs and weights, which are the reader's to get, and what stands in for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from bnstats.cli.photos import Photos, efficientnet_lite0, list_photos


def missing(photos: Path | None) -> str | None:
    """Return how to get what is missing, in one line; None where nothing is."""
    try:
        list_photos(photos)
        efficientnet_lite0()
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    return None


def say(quick: bool, what: str) -> None:
    """Say what is missing, and what is done without it."""
    print(f"{'a stand-in instead' if quick else 'nothing measured'}: {what}")


def synthetic_photos(size: int) -> Photos:
    """Return noise of two classes."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(40, 3, size, size, generator=generator), torch.arange(40) % 2
    parts = (TensorDataset(images[part], labels[part]) for part in (slice(32), slice(32, 40)))
    return Photos(*parts, ("even", "odd"))
