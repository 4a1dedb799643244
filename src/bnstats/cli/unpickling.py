"""Reading checkpoint files without running code: tensors, and what trainers save beside them."""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from bnstats.errors import InvalidValueError
from bnstats.recomputation.files import is_stats_file

_REFUSED = re.compile(
    r"GLOBAL (\S+) (?:was not an allowed global|whose module)|but got <class '([^']+)'>"
)
"""Where torch's messages name an object, in the midst of advice to trust the file."""

_UNPICKLER = re.compile(r"WeightsUnpickler error: (.+)")
"""Where they say what could not be read, behind the same advice."""


def read(path: Path) -> Any:
    """Return a checkpoint's content.

    Beside what ``torch.load(weights_only=True)`` reads, it may have paths, numpy's numbers and
    arrays, and an ``argparse.Namespace``, as timm's and Lightning's have: making one of these runs
    no code of the file's.

    Raises:
        InvalidValueError: the file is damaged, or holds any other object.
    """
    expected = f"{path}: expected a checkpoint that torch.load(weights_only=True) reads"
    with path.open("rb") as file:
        try:
            with safe_globals([*_harmless()]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises nearly anything
            if refused := _REFUSED.search(str(error)):
                raise InvalidValueError(
                    f"{expected}, or with paths, numpy's numbers and arrays or an "
                    f"argparse.Namespace, got an object of {refused[1] or refused[2]}, and reading "
                    "it could run code: save the checkpoint again without it"
                ) from error
            raise InvalidValueError(f"{expected}, got {_instead(path, error)}") from error


def _instead(path: Path, error: Exception) -> str:
    """Describe a file that is damaged, or no checkpoint of torch.save's at all."""
    if path.suffix == ".safetensors":
        return "one of safetensors: torch.save(safetensors.torch.load_file(path), ...) makes one"
    if is_stats_file(path):
        return (
            "a statistics file, as bnstats measure writes it: bnstats compare takes it, and --prior"
        )
    found = _UNPICKLER.search(str(error))
    # torch's first line is its advice to trust the file, or a key of no meaning.
    reason = found[1] if found else first_line(error).partition(". ")[0]
    return f"a file that is damaged or of another kind ({type(error).__name__}: {reason})"


def first_line(error: BaseException) -> str:
    """Return an error's message as far as it goes in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _harmless() -> Iterator[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Yield what may be called to make an object, with a name under which files know it."""
    yield argparse.Namespace
    for path in (
        pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath,
    ):  # fmt: skip
        for module in ("pathlib", "pathlib._local"):  # the second in Python 3.13
            yield path, f"{module}.{path.__name__}"
    yield np.ndarray
    yield np.dtype
    yield bytes  # the content of an empty array
    # Each kind of number, but not the one of objects.
    for kind in (*np.typecodes["All"].replace("O", ""),):
        yield type(np.dtype(kind))
    number: Any = np.float64().__reduce__()[0]
    array: Any = np.empty(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        yield number, f"{module}.scalar"
        yield array, f"{module}._reconstruct"
