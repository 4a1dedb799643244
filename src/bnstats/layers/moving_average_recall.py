"""Forwards that activation checkpointing runs again, and what they normalized with before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnstats.accumulators import ring_buffer
from bnstats.layers.operators import opaque, register
from bnstats.layers.recall import SAME, too_long_ago
from bnstats.private import in_backward_pass, on_host

_BEFORE_ALL_OTHERS = 2**40
"""More than any step counts."""


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


def remember_held(
    held_scales: Tensor | None,
    held_steps: Tensor | None,
    chi: Tensor,
    scale: Scale,
    counted: Tensor | None = None,
) -> None:
    """Keep what a held forward normalized with, the newest first.

    The window does not know of it, and activation checkpointing may run it again after buffers
    have moved. Its step is that of the forward which it stands for, negative once it was
    recalled, 0 where there is none.
    """
    if held_scales is None or held_steps is None:
        return
    new = torch.stack((chi, scale.var, scale.ratio))[None]
    new, steps = torch.cat((new, held_scales[:-1])), scale.step.abs().view(1)
    steps = torch.cat((steps, held_steps[:-1]))
    if counted is not None:
        new, steps = torch.where(counted, new, held_scales), torch.where(counted, steps, held_steps)
    held_scales.copy_(new)
    held_steps.copy_(steps)


def recall_if_repeated(*arguments: Tensor | None) -> tuple[Tensor, ...]:
    """Return a forward's scale and whether it counts; of one that runs again, the first's scale.

    Args:
        arguments: var, ratio, step, and whether the batch counts; its mean squares; and the
            history to search: mean_squares, scales, gradient_steps, num_steps, held_scales,
            held_steps.
    """
    return opaque(_OPERATOR, _recall_if_repeated)(*arguments)  # type: ignore[no-any-return]


def _recall_if_repeated(*arguments: Any) -> tuple[Tensor, ...]:
    var, ratio, step, counted, *history = arguments
    if not in_backward_pass():
        return var, ratio, step, counted
    return *_recall(*history), torch.zeros_like(counted)


def _recall(
    chi: Tensor,
    mean_squares: Tensor,
    scales: Tensor,
    gradient_steps: Tensor,
    num_steps: Tensor,
    held_scales: Tensor | None,
    held_steps: Tensor | None,
) -> Scale:
    """Find the step that is run again by its mean square, the only thing that identifies it.

    Where batches are alike, take the latest step whose backward is still to come.
    """
    length, norm = len(mean_squares), torch.linalg.vector_norm
    steps = ring_buffer.latest_steps(num_steps, gradient_steps)
    # Between one step and the next there is room for all held forwards that are kept.
    order, waits = steps * (length + 1), gradient_steps != steps
    if held_scales is not None and held_steps is not None:
        newest_first = held_steps.abs() * (length + 1) - 1 - ring_buffer.slots(held_steps)
        order, waits = torch.cat((order, newest_first)), torch.cat((waits, held_steps > 0))
        # A step that moves nothing is negative.
        steps = torch.cat((steps, -held_steps.abs()))
        mean_squares = torch.cat((mean_squares, held_scales[:, 0]))
        scales = torch.cat((scales, held_scales[:, 1:]))
    there = torch.cat((steps[:length] > 0, steps[length:] != 0))
    distance = torch.where(there, norm(mean_squares - chi, dim=1), torch.inf)
    nearest = distance.min()
    preference = order + waits * _BEFORE_ALL_OTHERS
    slot = torch.where(distance == nearest, preference, 0).argmax().view(1)
    if held_steps is not None:
        recalled = ring_buffer.slots(held_steps) + length == slot
        held_steps.copy_(torch.where(recalled, -held_steps.abs(), held_steps))
    found, finite = nearest <= SAME * norm(chi), chi.sum().isfinite()
    if on_host(chi) and finite and not found:
        remedy = (
            f"expected at most window={length} training forwards between a forward and its "
            "backward; choose a larger window, or run backward sooner"
        )
        raise too_long_ago(length, remedy, where="MovingAverageBatchNorm")
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
    held_scales: Tensor | None,
    held_steps: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    history = chi, mean_squares, scales, gradient_steps, num_steps, held_scales, held_steps
    resolved = _recall_if_repeated(var, ratio, step, counted, *history)
    # What an operator returns may be no argument of its.
    return tuple(x.clone() for x in resolved)  # type: ignore[return-value]


def _shapes(*arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in arguments[:4])


# Compiled code would compute a scale for the backward again, from buffers that have moved since;
# not so what an operator returns. And only an operator can ask whether it is in a backward.
_OPERATOR = register("moving_average_recall", _operator, _shapes, "held_steps")
