"""The mask of a forward that activation checkpointing runs again, which a context gave it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bnstats.errors import InvalidValueError
from bnstats.layers.recall import REMEDY, REMEMBERED, SAME, too_long_ago
from bnstats.masks import Mask
from bnstats.private import in_backward_pass, intercepted, may_be_checkpointed, unseen


class MaskRecall:
    """The masks of a layer's last forwards, by some values of each one's input.

    The backward that runs a forward again may come after the context was left, or in one with
    another mask. No checkpoint lets a layer send anything along to its second forward.
    """

    def __init__(self) -> None:
        self._forwards: deque[_Forward] = deque(maxlen=REMEMBERED)

    def remember(self, input: Tensor, mask: Mask | None) -> None:
        """Keep the mask of a forward."""
        self._forwards.append(_Forward(input.shape, _key(input), mask))

    def find(self, input: Tensor, given: Mask | None) -> Mask | None:
        """Return the mask of the forward with this input; the host waits for the device.

        A forward before all that are remembered had none.

        Args:
            input: the layer's, once more.
            given: the mask of the context that the backward runs in.

        Raises:
            InvalidValueError: the forward is too long ago, or several had this input, other masks
                each, and their backward is still to come.
        """
        key = _key(input)
        known = [own for own in reversed(self._forwards) if own.shape == input.shape]
        keys = torch.stack([key, *(own.key for own in known)])
        distances: list[float] = torch.linalg.vector_norm(keys[1:] - key, dim=1).tolist()
        nearest = min(distances, default=torch.inf)
        if nearest > SAME * float(torch.linalg.vector_norm(key)):
            if len(self._forwards) < REMEMBERED:
                return None
            raise too_long_ago(REMEMBERED, REMEDY)
        alike = [own for own, far in zip(known, distances, strict=True) if far == nearest]
        waiting = [own for own in alike if not own.repeated] or alike[:1]
        found = next((own for own in waiting if own.mask is given), waiting[0])
        if found.mask is not given and not all(_same(own.mask, found.mask) for own in waiting):
            raise InvalidValueError(
                "activation checkpointing runs a forward again, and several with this input had "
                "different masks: run backward inside the context of its mask, or call the layer "
                "with mask="
            )
        found.repeated = True
        return found.mask


@dataclass
class _Forward:
    shape: torch.Size
    key: Tensor
    mask: Mask | None
    repeated: bool = False


def _same(one: Mask | None, other: Mask | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.downsample == other.downsample and torch.equal(one.valid, other.valid)


def _key(input: Tensor) -> Tensor:
    """Return up to four values along each axis, those that are not finite as 0."""
    local = getattr(input, "to_local", None)  # of a DTensor
    x: Tensor = input.detach() if local is None else local().detach()
    some = x[tuple(slice(None, None, max(1, -(-size // 4))) for size in x.shape)]
    return some.flatten().to(torch.float32).nan_to_num(0, 0, 0)


class MaskedLayer(Protocol):
    """A layer that contexts give masks.

    Attributes:
        _mask: what it has from a context now.
        _mask_recall: what it had from others, once one of its forwards was checkpointed.
    """

    _mask: Mask | None
    _mask_recall: MaskRecall | None


def mask_of_forward(layer: MaskedLayer, input: Tensor) -> Mask | None:
    """Return the mask that a context gives a forward, or gave it when it ran first."""
    given, recall = layer._mask, layer._mask_recall
    # Compiled code runs parts of itself again, not the layer.
    if torch.compiler.is_compiling() or intercepted():
        return given
    with unseen():
        if in_backward_pass():
            return given if recall is None else recall.find(input, given)
        if (given is not None or recall is not None) and may_be_checkpointed():
            if recall is None:
                recall = layer._mask_recall = MaskRecall()
            recall.remember(input, given)
    return given
