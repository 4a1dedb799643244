"""The windows of a moving-average layer: what one training forward does to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnstats.accumulators import window
from bnstats.accumulators.window import Step
from bnstats.errors import InvalidValueError
from bnstats.layers.base import on_host
from bnstats.layers.operators import register
from bnstats.private import in_backward_pass, recording
from bnstats.reduction import mean_square, mean_square_on_host

_SAME_BATCH = 0.01
"""Relative distance up to which two mean squares can be one batch's, computed twice. On most
devices they are equal to the bit; some kernels add up in an order that varies."""


class Schedule(NamedTuple):
    """The layer's options that its windows go by."""

    eps: float
    warmup: int
    renorm_warmup: int
    max_ratio: float

    def renormalizes(self, step: Step) -> Any:
        """Whether the running variance takes part in a step: a bool, or a tensor of one."""
        return step > max(self.renorm_warmup, self.warmup)


class Windows(NamedTuple):
    """The buffers, for a window of m steps and C channels.

    Attributes:
        mean_squares: of shape (m, C), the mean square of each step's input.
        scales: of shape (m, 2, C), the variance and the ratio that each step normalized with;
            the ratio has no meaning for a step that does not renormalize.
        gradients: of shape (m, C), the mean of gradient times normalized value of each step.
        gradient_steps: of shape (m,), the step that each slot of ``gradients`` belongs to.
        num_steps: of shape (), the steps so far.
    """

    mean_squares: Tensor
    scales: Tensor
    gradients: Tensor
    gradient_steps: Tensor
    num_steps: Tensor

    @classmethod
    def empty(cls, length: int, like: Tensor) -> Windows:
        """Return windows of no steps, for channels such as those of ``like``."""
        zeros, number = like.new_zeros(length, len(like)), like.new_zeros((), dtype=torch.int64)
        return cls(
            mean_squares=zeros,
            scales=like.new_zeros(length, 2, len(like)),
            gradients=zeros.clone(),
            gradient_steps=number.repeat(length),
            num_steps=number,
        )


class Scale(NamedTuple):
    """What a training forward normalizes with.

    Attributes:
        var: of shape (C,).
        ratio: of shape (C,), or None for 1.
        step: the forward's step, 0 for a batch that is not finite.
        counted: the same, but 0 for a forward that runs again.
    """

    var: Tensor
    ratio: Tensor | None
    step: Step
    counted: Step


def take_step(windows: Windows, running_var: Tensor, x: Tensor, schedule: Schedule) -> Scale:
    """Take a batch's mean square in, and return what the batch is normalized with.

    A batch that is not finite is normalized by itself, as ``nn.BatchNorm`` does, and does not
    count. A forward that runs inside a backward pass is one that activation checkpointing runs
    again: it gets what it got the first time, and changes nothing.
    """
    x = x.detach()
    if on_host(x) and not recording():
        return _take_step_on_host(windows, running_var, x, schedule)
    chi = mean_square(x).to(windows.mean_squares.dtype)
    step = torch.where(chi.sum().isfinite(), windows.num_steps + 1, 0)
    if torch.compiler.is_compiling():
        return _advance_compiled(windows, running_var, chi, step, schedule)
    if in_backward_pass():
        return _recall(windows, chi, step, schedule)
    return _advance(windows, running_var, chi, step, schedule)


def _advance(
    windows: Windows, running_var: Tensor, chi: Tensor, step: Tensor, schedule: Schedule
) -> Scale:
    window.write(windows.mean_squares, step, chi)
    var: Tensor = window.windowed(windows.mean_squares, step, chi, schedule.warmup)
    ratio = _ratio(var, running_var, step, schedule)
    window.write(windows.scales, step, torch.stack((var, ratio)))
    windows.num_steps.add_(step > 0)
    return Scale(var, ratio, step, step)


def _advance_compiled(
    windows: Windows, running_var: Tensor, chi: Tensor, step: Tensor, schedule: Schedule
) -> Scale:
    """Do the same in code for torch.compile.

    Its backward would compute from the buffers again what the forward had computed from them,
    and they have moved in between; not so what an operator returns. Whether a checkpoint runs
    all of it again can be asked from inside an operator only.
    """
    ring = window.written(windows.mean_squares, step, chi)
    var: Tensor = window.windowed(ring, step, chi, schedule.warmup)
    ratio = _ratio(var, running_var, step, schedule)
    var, ratio, step, counted = _SETTLE(var, ratio, step, *windows, chi, *schedule)
    window.write(windows.mean_squares, counted, chi)
    window.write(windows.scales, counted, torch.stack((var, ratio)))
    windows.num_steps.add_(counted > 0)
    return Scale(var, ratio, step, counted)


def _ratio(var: Tensor, running_var: Tensor, step: Tensor, schedule: Schedule) -> Tensor:
    ratio = ((var + schedule.eps) / (running_var + schedule.eps)).sqrt_()
    ratio = ratio.clamp_(1 / schedule.max_ratio, schedule.max_ratio)
    return torch.where(schedule.renormalizes(step), ratio, 1)


@np.errstate(all="ignore")  # torch does not warn of what is not finite either
def _take_step_on_host(
    windows: Windows, running_var: Tensor, x: Tensor, schedule: Schedule
) -> Scale:
    """Do the same with numbers and arrays: numpy's small operations cost a third of torch's."""
    ring, scales = windows.mean_squares.numpy(), windows.scales.numpy()
    chi = mean_square_on_host(x).astype(ring.dtype)
    step = int(windows.num_steps) + 1 if window.is_finite(chi) else 0
    if in_backward_pass():
        return _recall(windows, torch.from_numpy(chi), step, schedule)
    if not step:
        return Scale(torch.from_numpy(chi), None, 0, 0)
    windows.num_steps.fill_(step)
    window.write(ring, step, chi)
    var = window.windowed(ring, step, chi, schedule.warmup)
    window.write(scales[:, 0], step, var)
    if not schedule.renormalizes(step):
        return Scale(torch.from_numpy(var), None, step, step)
    before = running_var.to(windows.scales.dtype).numpy()
    ratio = np.sqrt((var + schedule.eps) / (before + schedule.eps))
    ratio = np.minimum(np.maximum(ratio, 1 / schedule.max_ratio), schedule.max_ratio)
    window.write(scales[:, 1], step, ratio)
    return Scale(torch.from_numpy(var), torch.from_numpy(ratio), step, step)


def _recall(windows: Windows, chi: Tensor, step: Step, schedule: Schedule) -> Scale:
    """Find the step that is run again, by its mean square; nothing else tells it apart.

    Where batches are alike it is the latest whose backward has not run yet.
    """
    if isinstance(step, int) and not step:
        return Scale(chi, None, 0, 0)
    slots = len(windows.mean_squares)
    steps = window.latest_steps(windows.num_steps, windows.mean_squares)
    distance = torch.linalg.vector_norm(windows.mean_squares - chi, dim=1)
    distance = torch.where(steps > 0, distance, torch.inf)
    nearest = distance.min()
    preference = steps + slots * (windows.gradient_steps != steps)
    slot = torch.where(distance == nearest, preference, 0).argmax().unsqueeze(0)
    found = nearest <= _SAME_BATCH * torch.linalg.vector_norm(chi)
    var, ratio = windows.scales.index_select(0, slot).squeeze(0).unbind()
    recalled = steps.index_select(0, slot).squeeze(0)
    if isinstance(step, Tensor):
        # The host does not know whether it was found: if not, NaN will tell.
        var = torch.where(found, var, torch.nan)
        counts = step > 0
        var = torch.where(counts, var, chi)
        ratio, recalled = torch.where(counts, ratio, 1), torch.where(counts, recalled, 0)
        return Scale(var, ratio, recalled, 0)
    if not found:
        raise InvalidValueError(
            "MovingAverageBatchNorm: a training forward inside a backward pass is taken for one "
            "that activation checkpointing runs again, but none of the last "
            f"{slots} had this input: expected at most window={slots} training forwards between "
            "a forward and its backward; choose a larger window, or run backward sooner"
        )
    step = int(recalled)
    return Scale(var, ratio if schedule.renormalizes(step) else None, step, 0)


def add_gradient(
    gradients: Tensor,
    gradient_steps: Tensor,
    step: Step,
    grad_z: Tensor,
    factor: Tensor | None,
    count: int,
    warmup: int,
) -> Tensor:
    """Take a backward's ``psi = factor grad_z / count`` in, and return the window's mean of it.

    Args:
        gradients: of the windows; written to.
        gradient_steps: of the windows; written to.
        step: the step of the forward.
        grad_z: sum of gradient times normalized value, of shape (C,).
        factor: what the normalized value is multiplied by, of shape (C,), or None for 1.
        count: values per channel.
        warmup: of the schedule.
    """
    if not isinstance(step, Tensor):
        arguments = (step, grad_z, factor, count, warmup)
        return _add_gradient_on_host(gradients, gradient_steps, *arguments)
    psi = (grad_z if factor is None else grad_z * factor) / count
    add = _ADD_GRADIENT if torch.compiler.is_compiling() else window.add
    mean: Tensor = add(gradients, gradient_steps, step, psi, warmup)
    return mean


@np.errstate(all="ignore")
def _add_gradient_on_host(
    gradients: Tensor,
    gradient_steps: Tensor,
    step: int,
    grad_z: Tensor,
    factor: Tensor | None,
    count: int,
    warmup: int,
) -> Tensor:
    ring, owners, psi = gradients.numpy(), gradient_steps.numpy(), grad_z.numpy()
    psi = (psi if factor is None else psi * factor.numpy()) / count
    return torch.from_numpy(window.add(ring, owners, step, psi, warmup))


def _settle(
    var: Tensor,
    ratio: Tensor,
    step: Tensor,
    mean_squares: Tensor,
    scales: Tensor,
    gradients: Tensor,
    gradient_steps: Tensor,
    num_steps: Tensor,
    chi: Tensor,
    eps: float,
    warmup: int,
    renorm_warmup: int,
    max_ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scale that was computed, or that of the forward which is run again."""
    if not in_backward_pass():
        return var.clone(), ratio.clone(), step.clone(), step.clone()
    windows = Windows(mean_squares, scales, gradients, gradient_steps, num_steps)
    schedule = Schedule(eps, warmup, renorm_warmup, max_ratio)
    known = int(step) if on_host(step) else step
    recalled = _recall(windows, chi, known, schedule)
    ratio = torch.ones_like(ratio) if recalled.ratio is None else recalled.ratio.clone()
    step = torch.as_tensor(recalled.step, device=step.device).clone()
    return recalled.var.clone(), ratio, step, torch.zeros_like(step)


def _settle_shapes(
    var: Tensor, ratio: Tensor, step: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(var), like(ratio), like(step), like(step)


def _add_gradient_compiled(
    gradients: Tensor, gradient_steps: Tensor, step: Tensor, psi: Tensor, warmup: int
) -> Tensor:
    if on_host(step):
        number = int(step)
        return _add_gradient_on_host(gradients, gradient_steps, number, psi, None, 1, warmup)
    mean: Tensor = window.add(gradients, gradient_steps, step, psi, warmup)
    return mean


def _add_gradient_shape(gradients: Tensor, *_: object) -> Tensor:
    return gradients.new_empty(gradients.shape[1])


_SETTLE = register("settle", _settle, _settle_shapes)
_ADD_GRADIENT = register(
    "add_gradient", _add_gradient_compiled, _add_gradient_shape, "gradients", "gradient_steps"
)
