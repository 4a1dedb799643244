"""Memory: the peak of what a run allocates, and how fast it can be moved."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import device


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors alive at once, of those that are made during a run."""
    if device().type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        # line by line: the trace of ten thousand batches is larger than most memories
        with trace.open() as lines:
            found = (re.search(r'"Total Allocated": (\d+)', line) for line in lines)
            return max(int(match[1]) for match in found if match)


def copies(shapes: Iterable[tuple[int, ...]], *, times: int = 1) -> Callable[[], None]:
    """Return what copies a float32 tensor of every shape into another: one read, one write.

    Half its time is one pass over these tensors at the bandwidth that this machine reaches for
    them, whichever cache or memory they are in.
    """
    pairs = [(torch.randn(shape, device=device()), _empty(shape)) for shape in shapes]

    def run() -> None:
        for _ in range(times):
            for source, target in pairs:
                target.copy_(source)

    return run


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, device=device())  # written, so that its pages are there
