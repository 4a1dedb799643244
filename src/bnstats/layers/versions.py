"""Noticing that others have written to a layer's buffers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Versions:
    """Remembers tensors by identity and by autograd's count of the writes to them.

    Loading, trainers and averaging of weights write to buffers, or replace them, between two
    forwards. A write through ``.data`` or a numpy view is counted nowhere, and not noticed.
    A copy of this object remembers nothing.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Take these, as they are now, for known."""
        self._seen = _versions(tensors)

    def know(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors remembered, and nobody has written to them since."""
        return bool(self._seen) and self._seen == _versions(tensors)

    def __reduce__(self) -> tuple[type[Versions], tuple[()]]:
        return Versions, ()


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    # Inference tensors count no writes.
    if any(tensor.is_inference() for tensor in tensors):
        return []
    return [(id(tensor), tensor._version) for tensor in tensors]
