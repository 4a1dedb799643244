"""Loaders that a caller passes, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from bnstats.errors import InvalidTypeError, InvalidValueError


def check_loader(loader: object, method: str, *, rereads: bool, argument: str = "loader") -> None:
    """Refuse what is no iterable of batches, or cannot be read as often as the method needs."""
    if _is_map_style_dataset(loader):
        raise InvalidTypeError(
            f"{argument}: expected an iterable of batches, got {type(loader).__name__}, a dataset "
            "whose samples would count as batches; pass DataLoader(dataset, batch_size=...)"
        )
    # A loader may be iterable by __getitem__ alone.
    iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, (Tensor, Mapping, str)):
        remedy = "call it" if callable(loader) else "one batch by itself goes in as [batch]"
        raise InvalidTypeError(
            f"{argument}: expected an iterable of batches, for example a DataLoader or a list, "
            f"got {type(loader).__name__}; {remedy}"
        )
    if rereads and isinstance(loader, Iterator):
        raise InvalidValueError(
            f'{argument}: method="{method}" reads it again and again, and an iterator '
            f"({type(loader).__name__}) can be read once; pass a DataLoader or a list, or "
            'method="layerwise"'
        )


def _is_map_style_dataset(loader: object) -> bool:
    # __getitems__ is what a DataLoader fetches from, also where a dataset is no torch class.
    is_dataset = isinstance(loader, Dataset) or hasattr(type(loader), "__getitems__")
    return is_dataset and not isinstance(loader, IterableDataset)
