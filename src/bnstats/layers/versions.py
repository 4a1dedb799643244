"""Noticing that others have written to a layer's buffers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from bnstats.private import version


class Versions:
    """Remembers tensors by identity and by autograd's count of the writes to them.

    Loading, trainers and averaging of weights write to buffers, or replace them, between two
    forwards. A write through ``.data`` or a numpy view is counted nowhere, and not noticed.
    A copy of this object remembers nothing.
    """

    def __init__(self) -> None:
        self._seen: list[float] = []

    def remember(self, tensors: Iterable[Tensor | None]) -> None:
        """Take these, as they are now, for known."""
        self._seen = _versions(tensors)

    def know(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether these are the tensors remembered, and nobody has written to them since."""
        return self._seen == _versions(tensors)

    def __reduce__(self) -> tuple[type[Versions], tuple[()]]:
        return Versions, ()


def _versions(tensors: Iterable[Tensor | None]) -> list[float]:
    versions: list[float] = []
    for tensor in tensors:
        if tensor is not None:
            versions += (id(tensor), version(tensor))
    return versions
