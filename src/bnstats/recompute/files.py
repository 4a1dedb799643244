"""Statistics files: numpy's npz, versioned, without pickle."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnstats.errors import StatsFileError

_FORMAT = "bnstats population statistics"
_VERSION = 1
_DAMAGE = (
    AttributeError,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for files that are cut off, altered, or something else."""


def save(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a header and each layer's tensors and numbers, atomically."""
    header = {"format": _FORMAT, "version": _VERSION, "layers": list(layers), **header}
    arrays: dict[str, Any] = {"header": np.asarray(json.dumps(header))} | {
        f"{index}/{key}": value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for index, layer in enumerate(layers.values())
        for key, value in layer.items()
    }
    target = Path(path)
    # A neighbour that is moved over the target when it is whole: never half a file.
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], keys: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor | int]]]:
    """Return the header and each layer's values."""
    with (
        malformed(path),
        Path(path).open("rb") as file,  # np.load would leave a damaged one open
        np.load(file, allow_pickle=False) as archive,
    ):
        header = json.loads(str(archive["header"]))
        if header["format"] != _FORMAT or header["version"] != _VERSION:
            raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
        layers = {
            name: {key: _value(archive[f"{index}/{key}"]) for key in keys}
            for index, name in enumerate(header["layers"])
        }
        return header, layers


def _value(array: np.ndarray[Any, Any]) -> Tensor | int:
    return torch.from_numpy(array) if array.ndim else int(array)


@contextmanager
def malformed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what reading a damaged or foreign file raises into one error."""
    try:
        yield
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise StatsFileError(
            f"{os.fspath(path)}: expected a file that PopulationStats.save wrote (version "
            f"{_VERSION}), and could not read it as one: {error}"
        ) from error
