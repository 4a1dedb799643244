"""From batches to forwards of the model."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnstats.arguments import describe_channels_last
from bnstats.errors import BnstatsError, InvalidTypeError, InvalidValueError
from bnstats.masks import Downsample, Mask, check_mask
from bnstats.recomputation.observer import use_mask

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""


class BatchForward:
    """Runs a forward, and remembers results that have yet to run.

    Args:
        forward: from a batch to what a forward of the model returns.

    Attributes:
        unrun: the last result of a kind that runs nothing by itself, in words; else empty.
    """

    def __init__(self, forward: Callable[[Any], Any]) -> None:
        self._forward = forward
        self.unrun = ""

    def __call__(self, batch: Any) -> None:
        """Run the model on a batch."""
        result = self._forward(batch)
        if isinstance(result, (Generator, map)):
            self.unrun = (
                f"a {type(result).__name__}, which runs as it is iterated over: return list"
            )
        elif isinstance(result, Coroutine):
            self.unrun = "a coroutine, which runs as it is awaited: return asyncio.run"
            result.close()


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

    def __call__(self, batch: Any) -> Any:
        """Return what the model returns for a batch."""
        positional, keywords = _arguments(batch)
        try:
            result = self._model(*positional, **keywords)
        except BnstatsError:
            raise
        except Exception as error:
            if not self._has_succeeded:
                _add_note(error, self._note(positional, keywords))
            raise
        self._has_succeeded = True
        return result

    def _note(self, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> str:
        shapes = [_shape(x) for x in positional if isinstance(x, Tensor)]
        hint = "".join(describe_channels_last(x) for x in shapes[:1] if x is not None)
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
        inputs = [x for x in first if isinstance(x, Tensor) and _is_input(x)]
        if len(inputs) > 1:
            raise InvalidTypeError(
                f"a batch begins with a {type(first).__name__} of {len(inputs)} floating-point "
                "tensors, or tensors of several axes, and which of them the model takes is not "
                "known; pass "
                "forward=lambda model, batch: ..., for example model(batch[0]) or "
                "[model(view) for view in batch[0]]"
            )
    return _arguments(first)


def _is_input(tensor: Tensor) -> bool:
    # Not labels, lengths or indices: one whole number for each sample.
    return tensor.is_floating_point() or tensor.dim() > 1


def _is_sequence(value: Any) -> bool:
    # What can move itself (PackedSequence) has more to it than its elements.
    return isinstance(value, (tuple, list)) and not hasattr(value, "to")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = _shape(value)
        described = "of no single shape" if shape is None else str(shape)
        return f"{str(value.dtype).removeprefix('torch.')} {described}"
    return type(value).__name__


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    """Return a tensor's shape; None where it has none, as a nested one."""
    if tensor.is_nested:
        return None
    return tuple(tensor.shape)


def _add_note(error: Exception, note: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10, where pytest and IPython show it all the same
        error.__notes__ = [*getattr(error, "__notes__", []), note]
