"""What the commands that run a model share: options, processes, the model."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bnstats import PopulationStats
from bnstats.cli.callables import find
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.recomputation.methods import METHODS

EPILOG = """\
MODEL and LOADER are called without arguments, and found from the current folder too:

  bnstats {command} train:make_model train:make_loader {options}
  torchrun --nproc-per-node 2 -m bnstats {command} train:make_model train:make_loader ...

Under torchrun LOADER is called in every process, with torch.distributed initialized, and gives each
its share of the data (a DistributedSampler does); the first process writes. A checkpoint is a state
dict, bare or under one of the usual keys, of the model itself or of a wrapper or average of it.
"""


KEY_HELP = (
    'where in the checkpoint the state dict is, "ema.model" for one in nested dicts; default: '
    "found by the usual names"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a measurement takes."""
    parser.add_argument("model", metavar="MODEL", help="module:callable that returns the model")
    parser.add_argument("loader", metavar="LOADER", help="module:callable that returns the batches")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that are there already"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help='how to measure; default: "pooled", or "layerwise" with a prior',
    )
    parser.add_argument(
        "--prior",
        type=Path,
        metavar="NPZ",
        help="statistics of the training data, written by bnstats measure, where LOADER has other "
        "data, and few",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="ERROR",
        help="stop reading once every layer's standard error is at most this, 0.01 for example",
    )
    parser.add_argument(
        "--memory-limit",
        type=int,
        metavar="BYTES",
        help='how much memory waiting activations may take, for "layerwise"',
    )
    parser.add_argument(
        "--skip-nonfinite",
        action="store_true",
        help="leave out batches with NaN or infinity, which are an error otherwise",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where to compute, and how much to read."""
    parser.add_argument("--device", help="where to compute; default: a GPU if there is one")
    parser.add_argument("--max-batches", type=int, metavar="N", help="read at most N batches")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where in a checkpoint the state dict is."""
    parser.add_argument("--key", help=KEY_HELP)
    parser.add_argument(
        "--strip-prefix",
        metavar="PREFIX",
        help='what stands before the model\'s names in the state dict, "module." for example',
    )


def measurement(options: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Return the keyword arguments of a measurement."""
    return {
        "method": options.method,
        "device": device_of(options),
        "max_batches": options.max_batches,
        "tolerance": options.tolerance,
        "on_nonfinite": "skip" if options.skip_nonfinite else "raise",
        "memory_limit": options.memory_limit,
        "prior": None if options.prior is None else PopulationStats.load(options.prior),
        "progress": rank == 0 and not options.no_progress,
    }


def make_model(options: argparse.Namespace) -> nn.Module:
    """Call MODEL.

    Raises:
        InvalidTypeError: it returns something else.
    """
    model = find(options.model, "MODEL")()
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            f"MODEL: expected {options.model} to return a torch.nn.Module, got "
            f"{type(model).__name__}"
        )
    return model


def check_targets(options: argparse.Namespace, *names: str, may_replace: str | None = None) -> None:
    """Refuse to write where something would be lost, or cannot be written, before any work.

    Args:
        options: with a path, or None, under each name.
        names: of the options that name files to be written.
        may_replace: which of them may be the checkpoint itself.

    Raises:
        InvalidValueError: two options name the same file.
        FileExistsError: a file is there, and ``--overwrite`` was not passed.
        OSError: a folder does not exist, or takes no new file.
    """
    paths: dict[str, Path] = {n: p for n in names if (p := getattr(options, n)) is not None}
    for name, path in paths.items():
        others = {**paths, "checkpoint": options.checkpoint, "prior": options.prior}
        for other, place in others.items():
            if other == name or place is None or (name, other) == (may_replace, "checkpoint"):
                continue
            if os.path.realpath(path) == os.path.realpath(place):
                raise InvalidValueError(f"--{name} and --{other} are the same file, {path}")
    for path in paths.values():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}, for {path.name}")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: expected the name of a file")
        if path.exists() and not options.overwrite:
            raise FileExistsError(f"{path} is there already; pass --overwrite to have it replaced")
        if path.is_file() or not path.exists():  # a device or a pipe is not replaced
            _check_writable(Path(os.path.realpath(path)))


def _check_writable(path: Path) -> None:
    """Refuse a folder that takes no new file: permissions alone do not tell."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = f"{error.strerror}, to write {path.name} into"
        raise OSError(error.errno, reason, str(path.parent)) from error


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the requested device, or the default.

    Raises:
        InvalidValueError: there is none of this name.
    """
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(options.device or default)
        torch.empty(0, device=device)
    except Exception as error:  # of a name, a backend or a driver
        reason = str(error).splitlines()[0]
        raise InvalidValueError(
            f"--device: cannot compute on {options.device or default!r}: {reason}"
        ) from error
    return device


@contextmanager
def processes(device: torch.device) -> Iterator[int]:
    """Join the processes that torchrun has started, and yield this one's rank; else 0."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
