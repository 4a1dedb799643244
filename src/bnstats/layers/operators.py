"""Operators of our own: what torch.compile is not to trace, and takes as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnstats.private import in_backward_pass

_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):
    # What is replayed does not ask again whether it is run in a backward.
    _TAGS.append(torch.Tag.cudagraph_unsafe)


def register(
    name: str, function: Callable[..., Any], shapes: Callable[..., Any], *mutates: str
) -> Callable[..., Any]:
    """Make a function the operator ``torch.ops.bnstats.name``, and return that.

    Not by torch.library.custom_op, whose wrapper costs 40 microseconds in a call.

    Args:
        name: of the operator.
        function: what it does, with annotations.
        shapes: returns empty tensors like those that the function returns.
        mutates: names of the arguments that the function writes to.
    """
    if not hasattr(torch.ops.bnstats, name):  # else the package is imported once more
        full_name = f"bnstats::{name}"
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(full_name, schema, tags=_TAGS)
        torch.library.impl(full_name, "default", function)
        torch.library.register_fake(full_name, shapes)
    operator: Callable[..., Any] = getattr(torch.ops.bnstats, name)
    return operator


def _counts(largest: Tensor) -> Tensor:
    """Whether a batch counts: it is finite, and no checkpoint runs its forward again."""
    return torch.zeros_like(largest).bool() if in_backward_pass() else largest.isfinite()


counts = register("counts", _counts, lambda largest: torch.empty_like(largest, dtype=torch.bool))
