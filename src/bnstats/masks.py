"""Masks over the positions of a batch, at the size that a layer's input has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnstats.errors import InvalidTypeError, InvalidValueError

Downsample: TypeAlias = "Literal['any', 'all'] | Callable[[Tensor, torch.Size], Tensor] | None"
"""How a mask follows to fewer positions; None: it does not."""


class Mask(NamedTuple):
    """A mask for one layer.

    Attributes:
        valid: boolean, of the shape of some layer's input without its channel axis, or
            broadcastable to it; True for positions that count.
        downsample: for inputs with fewer positions.
        where: names the layer, or the argument, in messages.
    """

    valid: Tensor
    downsample: Downsample = None
    where: str = "mask"

    def fit(self, x: Tensor) -> Tensor:
        """Return the mask for an input of shape (N, C, ...): broadcastable to it, C being 1.

        Raises:
            InvalidTypeError: not a boolean tensor.
            InvalidValueError: it does not fit, or lies on another device.
        """
        check_mask(self.valid, self.where)
        if self.valid.device != x.device:
            raise InvalidValueError(
                f"{self.where}: expected a mask on the input's device {x.device}, got one on "
                f"{self.valid.device}: pass mask.to({str(x.device)!r})"
            )
        positions = (x.shape[0], *x.shape[2:])
        valid = self.valid
        if not _broadcasts(valid.shape, positions):
            valid = self._downsampled(torch.Size(positions[1:]), positions, x.shape[1])
        return valid.reshape(*[1] * (len(positions) - valid.dim()), *valid.shape).unsqueeze(1)

    def _downsampled(self, size: torch.Size, positions: Sequence[int], channels: int) -> Tensor:
        valid, downsample = self.valid, self.downsample
        message = (
            f"{self.where}: expected a mask that broadcasts to {tuple(positions)}, the input's "
            f"shape without its channel axis, got {tuple(valid.shape)}"
        )
        if callable(downsample):
            valid = downsample(valid, size)
            check_mask(valid, f"{self.where}: downsample's result")
        elif not _can_shrink(valid.shape, positions):
            raise InvalidValueError(message + _remedy(valid.shape, positions, channels))
        elif downsample is not None:
            valid = _shrink(valid, size, every=downsample == "all")
        elif valid.shape[1:].numel() == 1:  # nothing to choose between
            valid = valid.reshape(-1, *[1] * len(size))
        else:
            raise InvalidValueError(
                f"{message}: let it follow by downsample='any', 'all' or a function "
                "(mask, size) -> mask, which bnstats.masked and the recalibration take"
            )
        if not _broadcasts(valid.shape, positions):
            raise InvalidValueError(f"{message}, and {tuple(valid.shape)} from downsample")
        return valid


def given_mask(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mask | None:
    """Return the mask that a forward of a layer is called with, or was given before."""
    mask = args[1] if len(args) > 1 else kwargs.get("mask")
    if mask is not None:
        return Mask(mask, where=f"{type(module).__name__}: mask")
    given: Mask | None = getattr(module, "_mask", None)
    return given


def check_mask(mask: Any, where: str) -> None:
    """Refuse what is no boolean tensor; ``where`` begins the message."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = isinstance(mask, Tensor)
        got = mask.dtype if given else type(mask).__name__
        # Zeros mean padding in some libraries' masks, and what counts in those that are added.
        remedy = "mask != 0 or mask == 0, whichever is" if given else "a tensor that is"
        raise InvalidTypeError(
            f"{where}: expected a mask of torch.bool, got {got}: pass {remedy} True for the "
            "positions that count"
        )


def check_downsample(downsample: Any) -> None:
    """Refuse what is no way to downsample."""
    known = isinstance(downsample, str) and downsample in ("any", "all")
    if downsample is not None and not known and not callable(downsample):
        raise InvalidValueError(
            "downsample: expected None, 'any', 'all' or a function (mask, size) -> mask, got "
            f"{downsample!r}"
        )


def _broadcasts(shape: Sequence[int], positions: Sequence[int]) -> bool:
    if len(shape) > len(positions):
        return False
    pairs = zip(reversed(shape), reversed(positions), strict=False)
    return all(own == 1 or own == theirs for own, theirs in pairs)  # not in a tuple: SymInts


def _remedy(shape: Sequence[int], positions: Sequence[int], channels: int) -> str:
    """Say, for the end of a message, what to do about a mask that cannot shrink."""
    if len(shape) == len(positions) + 1 and shape[1] in (1, channels):
        return ": leave its channel axis out, mask[:, 0] for one of shape (N, 1, ...)"
    if len(shape) == len(positions) and shape[0] in (1, positions[0]):
        return (
            ": where a layer has more positions than the mask, let it follow by "
            "downsample=f, a function (mask, size) -> mask, which bnstats.masked and the "
            "recalibration take"
        )
    return ""


def _can_shrink(shape: Sequence[int], positions: Sequence[int]) -> bool:
    """Whether there are as many samples, and no more positions on any axis than in the mask."""
    if not shape or shape[0] not in (1, positions[0]):
        return False
    own, size = shape[1:], positions[1:]
    if not size:  # one value for each sample: an average over all positions came before
        return True
    return len(own) == len(size) and all(a == 1 or a >= b for a, b in zip(own, size, strict=True))


def _shrink(valid: Tensor, size: torch.Size, *, every: bool) -> Tensor:
    """Ask of each block of positions whether any, or every one, is valid."""
    valid = ~valid if every else valid
    if not size:
        shrunk = valid.flatten(1).any(1)
    else:
        pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
        fewer = [min(pair) for pair in zip(valid.shape[1:], size, strict=True)]
        pooled: Tensor = pool[len(size) - 1](valid.unsqueeze(1).float(), fewer)
        shrunk = pooled.squeeze(1) > 0
    return ~shrunk if every else shrunk
