"""From a loader's batches to forwards of the model."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bnstats.arguments import describe_channels_last
from bnstats.errors import BnstatsError, InvalidTypeError, InvalidValueError
from bnstats.masks import Downsample, Mask, check_mask
from bnstats.private import apart_from_other_readers
from bnstats.recomputation.observer import use_mask

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""


class Reader:
    """Gives out a loader's batches on a device, and keeps count.

    The loader is not touched before the first batch is read.

    Args:
        loader: an iterable of batches.
        max_batches: stop after so many.
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
        """Yield batches until so many have been read in all, or there are no more."""
        while self.num_read < until:
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
        if reader.reached_end:  # whatever its length was said to be
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
    """Return where the model's first parameter is, or its first buffer."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), None)


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


class MaskedForward:
    """Runs a forward under the mask of its batch.

    Args:
        forward: from a batch to a forward of the model.
        mask: from a batch to its mask.
        downsample: how the mask follows to fewer positions.
    """

    def __init__(
        self,
        forward: Callable[[Any], Any],
        mask: Callable[[Any], Tensor],
        downsample: Downsample,
    ) -> None:
        self._forward, self._mask, self._downsample = forward, mask, downsample

    def __call__(self, batch: Any) -> None:
        """Run the model on a batch."""
        mask = self._mask(batch)
        check_mask(mask, "mask: the function's result")
        with use_mask(Mask(mask, self._downsample)):
            self._forward(batch)


class DefaultForward:
    """Calls a model on a tensor, on the first element of a sequence, or on keyword arguments.

    An error of the model is given a note on how it was called, until a call succeeds.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._has_succeeded = False

    def __call__(self, batch: Any) -> None:
        """Run the model on a batch."""
        positional, keywords = _arguments(batch)
        try:
            self._model(*positional, **keywords)
        except BnstatsError:
            raise
        except Exception as error:
            if not self._has_succeeded:
                _add_note(error, self._note(positional, keywords))
            raise
        self._has_succeeded = True

    def _note(self, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> str:
        shapes = [tuple(x.shape) for x in positional if isinstance(x, Tensor)]
        hint = "".join(map(describe_channels_last, shapes[:1]))
        named = (f"{key}={_describe(value)}" for key, value in keywords.items())
        arguments = ", ".join([*map(_describe, positional), *named])
        return (
            f"bnstats called {type(self._model).__name__}({arguments}) on a batch of the loader; "
            f"if that is not how the model takes it, pass forward=lambda model, batch: ...{hint}"
        )


def _arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), batch
    if not _is_sequence(batch):
        remedy = "pass forward=lambda model, batch: ..."
        if isinstance(batch, np.ndarray):
            hint = describe_channels_last(batch.shape)
            remedy = f"make it a tensor, torch.from_numpy(batch), or {remedy}{hint}"
        raise InvalidTypeError(
            "expected a batch to be a tensor, a sequence that begins with one, or a mapping of "
            f"keyword arguments, got {type(batch).__name__}; {remedy}"
        )
    if not batch:
        raise InvalidValueError("a batch is an empty sequence: expected its input first")
    first = batch[0]
    if _is_sequence(first):
        inputs = [x for x in first if isinstance(x, Tensor) and x.is_floating_point()]
        if len(inputs) > 1:
            raise InvalidTypeError(
                f"a batch begins with a {type(first).__name__} of {len(inputs)} floating-point "
                "tensors, and which of them the model takes is not known; pass "
                "forward=lambda model, batch: ..., for example model(batch[0]) or "
                "[model(view) for view in batch[0]]"
            )
    return _arguments(first)


def _is_sequence(value: Any) -> bool:
    # What can move itself (PackedSequence) has more to it than its elements.
    return isinstance(value, (tuple, list)) and not hasattr(value, "to")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _add_note(error: Exception, note: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10, where pytest and IPython show it all the same
        error.__notes__ = [*getattr(error, "__notes__", []), note]
