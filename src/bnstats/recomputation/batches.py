"""Reading a loader's batches."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bnstats.private import apart_from_other_readers
from bnstats.recomputation.exclusive import reading


class Reader:
    """Gives out a loader's batches on a device, and keeps count.

    The loader is not touched before the first batch is read.

    Args:
        loader: an iterable of batches.
        max_batches: stop after this many batches.
        progress: show a progress bar.
        device: where batches go.
        call: calls what is the loader's.

    Attributes:
        num_read: batches given out so far.
        exhausted: there are no more, of the loader's or of ``max_batches``.
        reached_end: there are no more of the loader's.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        max_batches: int | None,
        progress: bool,
        device: torch.device | str | None,
        call: Callable[..., Any],
    ) -> None:
        self.num_read = 0
        self.exhausted = self.reached_end = False
        self._loader = loader
        self._max_batches = max_batches
        self._progress = progress
        self._device = device
        self._call = call
        self._batches = self._iterate()

    @cached_property
    def length(self) -> int | None:
        """The length of the loader; None where it has none."""
        try:
            return len(self._loader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            # A DataLoader over an IterableDataset has a __len__, which raises.
            return None

    def read(self, until: float = math.inf) -> Iterator[Any]:
        """Yield batches until this many have been read in all, or there are no more."""
        while self.num_read < until:
            with reading():
                batch = self._call(next, self._batches, _NO_MORE)
            if batch is _NO_MORE:
                self.exhausted = True
                return
            self.num_read += 1
            yield batch

    def close(self) -> None:
        """Stop reading, and close the progress bar."""
        self._batches.close()

    def _iterate(self) -> Generator[Any, None, None]:
        known = [x for x in (self.length, self._max_batches) if x is not None]
        total = min(known, default=None)
        bar = tqdm(total=total, desc="batch-norm statistics", disable=not self._progress)
        loader = apart_from_other_readers(self._loader)
        with bar:
            for batch in islice(loader, self._max_batches):
                yield move_to(batch, self._device)
                bar.update()
        self.reached_end = self._max_batches is None or self.num_read < self._max_batches


class BatchCounts(NamedTuple):
    """How many batches were read; over all processes, once their counts are summed.

    Attributes:
        num_read: batches read.
        num_skipped: of these, left out because their statistics were not finite.
        length: number of batches in all; NaN where a loader has no length.
        num_exhausted: processes that have no more.
    """

    num_read: float
    num_skipped: float
    length: float
    num_exhausted: float

    @classmethod
    def of(cls, reader: Reader, num_skipped: int) -> BatchCounts:
        """Return what one process has read."""
        length = math.nan if reader.length is None else reader.length
        if reader.reached_end:  # a stated length may be wrong
            length = reader.num_read
        return cls(reader.num_read, num_skipped, length, reader.exhausted)

    @property
    def fraction(self) -> float:
        """The share of a finite population that was sampled; 0 where that is not known.

        A loader that was read whole is not a sample of itself: standard errors then refer to
        the distribution that its data were drawn from.
        """
        return self.num_read / self.length if self.num_read < self.length else 0


_NO_MORE = object()


def default_device(model: nn.Module) -> torch.device | None:
    """Return where the model's first parameter is, or its first buffer.

    What is on the meta device may be offloaded, and counts only where all is.
    """
    devices = [t.device for t in chain(model.parameters(), model.buffers())]
    return next((x for x in devices if x.type != "meta"), devices[0] if devices else None)


def move_to(batch: Any, device: torch.device | str | None) -> Any:
    """Return the batch with the tensors at any depth of mappings and sequences on the device."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        # From a device to the host it would not be safe: the host could read too early.
        return batch.to(device, non_blocking=batch.device.type == "cpu")
    if isinstance(batch, (dict, UserDict)):
        return _like(batch, {key: move_to(value, device) for key, value in batch.items()})
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move_to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return _like(batch, [move_to(value, device) for value in batch])
    return batch


def _like(batch: Any, moved: Any) -> Any:
    """Return what was moved as a batch of the same kind, with the attributes that it has.

    Of a class whose copies cannot be changed, or whose constructor takes something else, it is a
    plain dict, list or tuple, as where torch pins a batch's memory.
    """
    try:
        if isinstance(batch, tuple):
            return type(batch)(moved)
        same = copy.copy(batch)
        if isinstance(batch, list):
            same[:] = moved
        else:
            same.update(moved)
        return same
    except Exception:  # it is the class's own code that runs
        return tuple(moved) if isinstance(batch, tuple) else moved
