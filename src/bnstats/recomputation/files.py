"""Statistics files: numpy's npz, versioned, without pickle; written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER

from bnstats.errors import InvalidTypeError, StatsFileError

_FORMAT = "bnstats population statistics"
_VERSION = 1

Values: TypeAlias = dict[str, Tensor | int | float]
"""What a layer has, by the names of its fields."""


def save(
    path: str | os.PathLike[str], header: Mapping[str, Any], layers: Mapping[str, Values]
) -> None:
    """Write a header and each layer's tensors and numbers, atomically."""
    every = list(layers.values())
    described = {"format": _FORMAT, "version": _VERSION, "layers": list(layers)}
    header = {**described, "fields": list(every[0]) if every else [], **header}
    arrays: dict[str, Any] = {"header": np.asarray(json.dumps(header))} | {
        f"{index}/{key}": np.asarray(
            value.cpu().contiguous() if isinstance(value, Tensor) else value
        )
        for index, layer in enumerate(every)
        for key, value in layer.items()
    }
    with replacing(path) as file:
        np.savez(file, **arrays)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a new file that takes the place of the path's when the block ends without an error.

    A link stays; the file that it points to is replaced. A pipe or a device (/dev/stdout)
    cannot be replaced, and is written to directly.
    """
    target = _path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file to write, got a folder", str(target))
    if target.exists() and not target.is_file():
        with _naming(target, target), target.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(target))
    # A unique name: several threads and processes may write to one path.
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with _naming(target, part):
            with part.open("xb") as file:
                yield file
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
    finally:
        with suppress(OSError):  # it was moved, or never created
            part.unlink()


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidTypeError(f"path: expected a str or a path, got {type(path).__name__}")
    return Path(path)


@contextmanager
def _naming(target: Path, written: Path) -> Iterator[None]:
    """Let errors of writing name the caller's file, not a temporary one, and not none at all."""
    try:
        yield
    except OSError as error:
        # A write to a file that is open, to a full disk for one, has an error without a name.
        if error.errno is None or error.filename not in (None, str(written)):
            raise
        reason = f"{error.strerror}, to write {target.name} into"
        raise OSError(error.errno, reason, str(target.parent)) from error


def load(
    path: str | os.PathLike[str], required: Iterable[str], optional: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Values]]:
    """Return the header and each layer's values, of the optional ones those that were saved."""
    with _path(path).open("rb") as file, malformed(path), zipfile.ZipFile(file) as archive:
        # Sizes that the file only claims are not allocated.
        if sum(info.file_size for info in archive.infolist()) > os.fstat(file.fileno()).st_size:
            raise ValueError("it claims to hold more than its own size")
        header = json.loads(str(_read(archive, "header")))
        if header["format"] != _FORMAT or header["version"] != _VERSION:
            raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
        names = header["layers"]
        if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError("its layers' names are not different strings")
        saved = header.get("fields", ())  # early files have no optional fields
        keys = [*required, *(key for key in optional if key in saved)]
        layers = {
            name: {key: _value(_read(archive, f"{index}/{key}")) for key in keys}
            for index, name in enumerate(names)
        }
        return header, layers


def is_stats_file(path: str | os.PathLike[str]) -> bool:
    """Whether it is numpy's kind of archive; torch's checkpoints are archives too."""
    with Path(path).open("rb") as file:
        try:
            return "header.npy" in zipfile.ZipFile(file).namelist()
        except Exception:  # damaged; reading it will raise the error
            return False


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """Return an array of numbers, or of a string, as ``np.savez`` writes it."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    whole = archive.read(info)
    file = io.BytesIO(whole)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{name} is an array of version {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "iufU" or fortran_order:
        raise ValueError(f"{name} is an array of {dtype}")
    # A view of the bytes: a BytesIO must not go, in a failure's frames, before views of itself.
    content = memoryview(whole)[file.tell() :]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{name} has {len(content)} bytes for {shape} of {dtype}")
    return np.frombuffer(content, dtype).reshape(shape)


def _value(array: np.ndarray[Any, Any]) -> Tensor | int | float:
    if array.dtype.kind == "U":
        raise ValueError("a number is a string")
    # A copy, that can be written to, in the machine's own byte order.
    if array.ndim:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    number: int | float = array.item()
    return number


@contextmanager
def malformed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what reading a damaged or foreign file raises into one error."""
    try:
        yield
    # zipfile, zlib, numpy's header parser and json raise a dozen kinds of errors, RecursionError
    # and MemoryError among them: no list of them would be complete.
    except Exception as error:
        if _is_torchs(path):
            raise StatsFileError(
                f"{os.fspath(path)}: expected a file that PopulationStats.save wrote, got a file "
                "of torch.save's: bnstats measure, or measure_population_stats, makes statistics "
                "of a model and its data"
            ) from error
        raise StatsFileError(
            f"{os.fspath(path)}: expected a file that PopulationStats.save wrote (version "
            f"{_VERSION}), and could not read it as one: {type(error).__name__}: {error}"
        ) from error


def _is_torchs(path: str | os.PathLike[str]) -> bool:
    """Whether ``torch.save`` wrote a file, an archive or, before torch 1.6, a row of pickles."""
    with Path(path).open("rb") as file:
        if file.read(14) == b"\x80\x02\x8a\n" + MAGIC_NUMBER.to_bytes(10, "little"):
            return True
        try:
            return any(n.endswith("/data.pkl") for n in zipfile.ZipFile(file).namelist())
        except Exception:  # damaged, or another kind of file
            return False
