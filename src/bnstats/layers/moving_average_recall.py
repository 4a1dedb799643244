"""Forwards that activation checkpointing runs again, and what they normalized with before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnstats.accumulators import ring_buffer
from bnstats.errors import InvalidValueError
from bnstats.layers.operators import opaque, register
from bnstats.private import in_backward_pass, on_host

_SAME_BATCH = 0.01
"""Relative distance up to which two mean squares can be one batch's, computed twice. On most
devices they are equal to the bit; some kernels add up in an order that varies."""


class Scale(NamedTuple):
    """What a training forward normalizes with.

    Attributes:
        var: of shape (C,).
        ratio: of shape (C,).
        step: of shape (), the forward's step: 0 for a batch that is not finite, negative for
            one that belongs there and moves nothing.
    """

    var: Tensor
    ratio: Tensor
    step: Tensor


def recall_if_repeated(*arguments: Tensor) -> tuple[Tensor, ...]:
    """Return a forward's scale and whether it counts; of one that runs again, the first's scale.

    Args:
        arguments: var, ratio, step, and whether the batch counts; its mean squares; and the
            history to search: mean_squares, scales, gradient_steps, num_steps.
    """
    return opaque(_OPERATOR, _recall_if_repeated)(*arguments)  # type: ignore[no-any-return]


def _recall_if_repeated(*arguments: Tensor) -> tuple[Tensor, ...]:
    var, ratio, step, counted, *history = arguments
    if not in_backward_pass():
        return var, ratio, step, counted
    return *_recall(*history), torch.zeros_like(counted)


def _recall(
    chi: Tensor, mean_squares: Tensor, scales: Tensor, gradient_steps: Tensor, num_steps: Tensor
) -> Scale:
    """Find the step that is run again, by its mean square; nothing else tells it apart.

    Where batches are alike it is the latest whose backward has not run yet.
    """
    length, norm = len(mean_squares), torch.linalg.vector_norm
    steps = ring_buffer.latest_steps(num_steps, gradient_steps)
    distance = torch.where(steps > 0, norm(mean_squares - chi, dim=1), torch.inf)
    nearest = distance.min()
    preference = steps + length * (gradient_steps != steps)
    slot = torch.where(distance == nearest, preference, 0).argmax().view(1)
    found, finite = nearest <= _SAME_BATCH * norm(chi), chi.sum().isfinite()
    if on_host(chi) and finite and not found:
        raise InvalidValueError(
            "MovingAverageBatchNorm: a training forward inside a backward pass is taken for one "
            "that activation checkpointing runs again, but none of the last "
            f"{length} had this input: expected at most window={length} training forwards between "
            "a forward and its backward; choose a larger window, or run backward sooner"
        )
    var, ratio = scales.index_select(0, slot).squeeze(0).unbind()
    var = torch.where(found, var, torch.nan)  # where the host cannot raise, NaN shows it
    step = steps.index_select(0, slot).squeeze(0)
    return Scale(
        torch.where(finite, var, chi),
        torch.where(finite, ratio, 1),
        torch.where(finite, step, 0),
    )


def _operator(
    var: Tensor,
    ratio: Tensor,
    step: Tensor,
    counted: Tensor,
    chi: Tensor,
    mean_squares: Tensor,
    scales: Tensor,
    gradient_steps: Tensor,
    num_steps: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    history = chi, mean_squares, scales, gradient_steps, num_steps
    resolved = _recall_if_repeated(var, ratio, step, counted, *history)
    # What an operator returns may be no argument of its.
    return tuple(x.clone() for x in resolved)  # type: ignore[return-value]


def _shapes(*arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in arguments[:4])


# Compiled code would compute a scale for the backward again, from buffers that have moved since;
# not so what an operator returns. And only an operator can ask whether it is in a backward.
_OPERATOR = register("moving_average_recall", _operator, _shapes)
