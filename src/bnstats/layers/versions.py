"""Noticing that others have written to a layer's buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from bnstats.private import version


class Versions:
    """Remembers tensors by identity and by autograd's count of the writes to them.

    Loading, trainers and averaging of weights write to buffers, or replace them, between two
    forwards. A write through ``.data`` or a numpy view is counted nowhere, and not noticed. Nor
    are those of collectives (timm's ``distribute_bn`` broadcasts buffers): where there are
    processes, nothing is known. A copy of this object remembers nothing.
    """

    def __init__(self) -> None:
        # Not weak references: torch.utils.swap_tensors refuses tensors that have some.
        self._seen: list[tuple[Tensor, float]] = []

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Take these, as they are now, for known."""
        self._seen = [(tensor, version(tensor)) for tensor in tensors]

    def know(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors remembered, and nobody has written to them since."""
        if dist.is_available() and dist.is_initialized():
            return False
        return len(self._seen) == len(tensors) and all(
            seen is tensor and written == version(tensor)
            for (seen, written), tensor in zip(self._seen, tensors, strict=True)
        )

    def __reduce__(self) -> tuple[type[Versions], tuple[()]]:
        return Versions, ()
