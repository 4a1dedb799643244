"""From a loader's batches to forwards of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bnstats.errors import InvalidTypeError, InvalidValueError


def read_batches(
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    progress: bool,
    device: torch.device | str | None,
) -> Generator[Any, None, None]:
    """Yield the loader's batches, at most so many, on the device."""
    total = len(loader) if isinstance(loader, Sized) else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    with tqdm(total=total, desc="batch-norm statistics", disable=not progress) as bar:
        for batch in islice(loader, max_batches):
            yield move_to(batch, device)
            bar.update()


class Reader:
    """Gives out a loader's batches, and keeps count.

    Args:
        loader: an iterable of batches.
        max_batches: stop after so many.
        progress: show a progress bar.
        device: where batches go.

    Attributes:
        num_read: batches given out so far.
        exhausted: there are no more.
        length: how many batches the loader says it has; None where it does not say.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        max_batches: int | None,
        progress: bool,
        device: torch.device | str | None,
    ) -> None:
        self.num_read = 0
        self.exhausted = False
        self.length = len(loader) if isinstance(loader, Sized) else None
        self._batches = read_batches(
            loader, max_batches=max_batches, progress=progress, device=device
        )

    def read(self, until: float = math.inf) -> Iterator[Any]:
        """Yield batches until so many have been read in all, or there are no more."""
        while self.num_read < until:
            batch = next(self._batches, _NO_MORE)
            if batch is _NO_MORE:
                self.exhausted = True
                return
            self.num_read += 1
            yield batch

    def close(self) -> None:
        """Stop reading, and take the progress bar away."""
        self._batches.close()


_NO_MORE = object()


def default_device(model: nn.Module) -> torch.device | None:
    """Return where the model's first parameter is, or its first buffer."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), None)


def move_to(batch: Any, device: torch.device | str | None) -> Any:
    """Return the batch with the tensors at any depth of mappings and sequences on the device."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move_to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(move_to(value, device) for value in batch)
    return batch


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on a tensor, on the first element of a sequence, or on keyword arguments."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise InvalidValueError("a batch is an empty sequence: expected its input first")
        return default_forward(model, batch[0])
    raise InvalidTypeError(
        "expected a batch to be a tensor, a sequence that begins with one, or a mapping of "
        f"keyword arguments, got {type(batch).__name__}; pass forward=lambda model, batch: ..."
    )


Forward = Callable[[nn.Module, Any], Any]
