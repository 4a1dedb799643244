"""A synchronized layer in two gloo processes, beside the same layer alone and two all-reduces."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

import bnstats
from benchmarks import command
from benchmarks.rows import Row, Run, rows
from benchmarks.timing import Timing, compare
from benchmarks.workloads import Shape, Work, forward_backward

SHAPES: tuple[Shape, ...] = ((16, 64, 28, 28), (16, 256, 14, 14))
ALONE = "EMABatchNorm2d alone, and two all-reduces"
SYNCHRONIZED = "EMABatchNorm2d(sync=True)"
TORCH = "nn.BatchNorm2d alone"


def measure(run: Run) -> list[Row]:
    """Time a forward and backward in each of two processes on one machine; keep the first's."""
    rounds = 3 if run.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_time, (Path(folder), rounds), nprocs=2)
        measured: list[dict[str, Timing]] = torch.load(
            Path(folder) / "timings.pt", weights_only=False
        )
    found = []
    for shape, timings in zip(SHAPES, measured, strict=True):
        work = "forward and backward, 2 processes of one thread"
        found += rows(work, str(shape), timings, ALONE)
    return found


def _time(rank: int, folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    measured = []
    for shape in SHAPES:
        channels = shape[1]
        alone = forward_backward(bnstats.EMABatchNorm2d(channels), shape)
        message = torch.zeros(2 * channels + 1)
        functions = {
            TORCH: forward_backward(torch.nn.BatchNorm2d(channels), shape),
            ALONE: _with_all_reduces(alone, message),
            SYNCHRONIZED: forward_backward(bnstats.EMABatchNorm2d(channels, sync=True), shape),
        }
        measured.append(compare(functions, rounds=rounds, calls=1 if rounds == 3 else 10))
    if rank == 0:
        torch.save(measured, folder / "timings.pt")
    dist.barrier()
    dist.destroy_process_group()


def _with_all_reduces(work: Work, message: Tensor) -> Work:
    def run() -> None:
        work()
        for _ in range(2):
            dist.all_reduce(message)

    return run


if __name__ == "__main__":
    command.main("replicas")
