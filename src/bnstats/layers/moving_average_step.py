"""One training forward of a moving-average layer: from state and batch to what normalizes it.

:func:`advance` is the step, a pure function. :func:`take_step` decides whether it counts, and
writes it. The host has a faster version of both in numbers and numpy's arrays, whose small
operations cost a third of torch's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnstats.accumulators import ring_buffer
from bnstats.layers.batch import Batch, batch_variance
from bnstats.layers.moving_average_recall import Scale, recall_if_repeated, remember_held
from bnstats.layers.operators import opaque, register
from bnstats.layers.tracking import replace_where
from bnstats.moments import Number
from bnstats.private import in_backward_pass, on_host, unseen
from bnstats.reduction import mean_square, mean_square_on_host


class Options(NamedTuple):
    """The layer's options that a step goes by, and whether it is held."""

    eps: float
    momentum: float | None
    warmup: int
    renorm_warmup: int
    max_ratio: float
    held: bool = False

    # Methods, not properties: torch 2.6 compiles a tuple's only where all of it is constant,
    # and takes an option for a number of the graph once a second layer had another value.

    def moves(self) -> bool:
        """Whether a step may move anything."""
        return self.momentum != 0 and not self.held

    def size(self, num_batches: Number) -> Number:
        """Return 1 over the weight of the batch after this many others in running_var."""
        return num_batches + 1 if self.momentum is None else 1 / max(self.momentum, 1e-30)

    def renorm_after(self) -> int:
        """The last step that does not renormalize."""
        return max(self.renorm_warmup, self.warmup)


class State(NamedTuple):
    """The buffers that a step moves, for a window of m steps and C channels.

    Attributes:
        running_var: of shape (C,), about zero.
        num_batches: of shape (), or None.
        mean_squares: of shape (m, C), the mean square of each step's input.
        scales: of shape (m, 2, C), the variance and the ratio that each step normalized with.
        gradient_steps: of shape (m,), the step whose backward came last to each slot.
        num_steps: of shape (), the steps so far.
        held_scales: of shape (m, 3, C), what held forwards normalized with: no part of the
            layer's buffers, and None for a layer that has never been held.
        held_steps: of shape (m,), their steps; see :func:`remember_held`.
    """

    running_var: Tensor
    num_batches: Tensor | None
    mean_squares: Tensor
    scales: Tensor
    gradient_steps: Tensor
    num_steps: Tensor
    held_scales: Tensor | None = None
    held_steps: Tensor | None = None


def take_step(
    state: State, x: Tensor, options: Options, batch: Batch | None = None
) -> tuple[Scale, Tensor | None]:
    """Take a batch in; return what it is normalized with, and its number of values if not x's own.

    A batch that is not finite, or would make the state so, is normalized by itself and does not
    count. With momentum 0, and where the layer is held, nothing moves. A forward that runs inside
    a backward pass is one that activation checkpointing runs again: it gets what it got the first
    time, and moves nothing.
    """
    x, dtype = x.detach(), state.mean_squares.dtype
    if batch is None and on_host(x) and not in_backward_pass():
        return _take_step_on_host(state, mean_square_on_host(x), options), None
    count = None
    if batch is not None:
        count, _, squares = batch.moments(x, about_zero=True)
        if on_host(count):
            batch.check_count(x, int(count), 1)
        # What is not finite does not count.
        chi = batch_variance(squares, count, of_none=math.inf).to(dtype)
    with unseen():
        if batch is None:
            chi = mean_square(x).to(dtype)
        if torch.compiler.is_compiling():
            scale = _take_step_on_device(state, chi, options)
        else:
            scale = Scale(*opaque(_STEP, _take_step)(*state, chi, *options))
        if count is not None:
            scale = Scale(torch.where(count > 0, scale.var, 1), scale.ratio, scale.step)
        return scale, count


def _take_step(
    running_var: Tensor,
    num_batches: Tensor | None,
    mean_squares: Tensor,
    scales: Tensor,
    gradient_steps: Tensor,
    num_steps: Tensor,
    held_scales: Tensor | None,
    held_steps: Tensor | None,
    chi: Tensor,
    eps: float,
    momentum: float | None,
    warmup: int,
    renorm_warmup: int,
    max_ratio: float,
    held: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a step where what sees operators would not see what Python decides."""
    history = mean_squares, scales, gradient_steps, num_steps, held_scales, held_steps
    state = State(running_var, num_batches, *history)
    options = Options(eps, momentum, warmup, renorm_warmup, max_ratio, held)
    if on_host(chi) and not (in_backward_pass() and momentum != 0):
        # A trace of torch 2.14 keeps no detach, and numpy takes nothing that requires a gradient.
        return _take_step_on_host(state, chi.detach().numpy(), options)
    return _take_step_on_device(state, chi, options)


def _take_step_on_device(state: State, chi: Tensor, options: Options) -> Scale:
    """Decide whether a step counts, and write it, by tensors alone."""
    new, (var, ratio, step) = advance(state, chi, options)
    running = new.running_var.to(state.running_var.dtype)
    counted = torch.maximum(chi.max(), running.max()) < torch.inf
    var, ratio = torch.where(counted, var, chi), torch.where(counted, ratio, 1)
    step = step * counted
    if options.momentum == 0:
        return Scale(var, ratio, step)
    held = state.held_scales, state.held_steps
    history = state.mean_squares, state.scales, state.gradient_steps, state.num_steps, *held
    var, ratio, step, counted = recall_if_repeated(var, ratio, step, counted, chi, *history)
    if options.held:
        remember_held(*held, chi, Scale(var, ratio, step), counted)
        return Scale(var, ratio, step)
    for buffer, value in zip(state, new, strict=True):
        if buffer is not None and value is not None and value is not buffer:
            replace_where(buffer, counted, value)
    return Scale(var, ratio, step)


def advance(state: State, chi: Tensor, options: Options) -> tuple[State, Scale]:
    """Return the state after a batch of these mean squares, and what normalizes it."""
    length, eps = len(state.mean_squares), options.eps
    step = state.num_steps + 1
    slot = ring_buffer.slots(state.gradient_steps) == step % length
    ring = torch.where(slot[:, None], chi, state.mean_squares)
    var = torch.where(ring_buffer.is_warm(step, length, options.warmup), ring.mean(0), chi)
    running_var = state.running_var.to(chi.dtype)
    ratio = ((var + eps) / (running_var + eps)).sqrt_()
    ratio = ratio.clamp_(1 / options.max_ratio, options.max_ratio)
    ratio = torch.where(step > options.renorm_after(), ratio, 1)
    num_batches = state.num_batches
    size = options.size(math.inf if num_batches is None else num_batches)
    following = running_var + (var - running_var) / size
    if isinstance(size, Tensor):
        following = torch.where(size == 1, var, following)
    elif size == 1:
        following = var
    new = State(  # (Not by _replace: torch 2.6 does not compile that.)
        running_var=following,
        num_batches=None if num_batches is None else num_batches + 1,
        mean_squares=ring,
        scales=torch.where(slot[:, None, None], torch.stack((var, ratio)), state.scales),
        gradient_steps=state.gradient_steps,
        num_steps=step,
        held_scales=state.held_scales,
        held_steps=state.held_steps,
    )
    return new, Scale(var, ratio, step if options.moves() else -step)


@np.errstate(all="ignore")  # torch does not warn of what is not finite either
def _take_step_on_host(state: State, chi: NDArray[Any], options: Options) -> Scale:
    ring, scales, moves = state.mean_squares.numpy(), state.scales.numpy(), options.moves()
    chi = chi.astype(ring.dtype, copy=False)
    if not math.isfinite(chi.sum()):
        return _itself(state, chi)
    length, step = len(ring), int(state.num_steps) + 1
    slot = step % length
    if not moves:
        ring = ring.copy()
    before, ring[slot] = ring[slot].copy(), chi
    # A mean takes twice as long as a sum.
    warm = ring_buffer.is_warm(step, length, options.warmup)
    var = ring.sum(0) / length if warm else chi.copy()
    if step > options.renorm_after():
        ratio = var + options.eps
        ratio /= state.running_var.to(state.scales.dtype).numpy() + options.eps
        np.sqrt(ratio, out=ratio)
        np.maximum(ratio, 1 / options.max_ratio, out=ratio)
        np.minimum(ratio, options.max_ratio, out=ratio)
    else:
        ratio = np.ones_like(var)
    scale = Scale(torch.from_numpy(var), torch.from_numpy(ratio), state.num_steps + 1)
    if not moves:
        scale = scale._replace(step=-scale.step)
        if options.momentum != 0:
            held = state.held_scales, state.held_steps
            remember_held(*held, torch.from_numpy(chi), scale)
        return scale
    if not _follow_on_host(state, scale.var, options):
        ring[slot] = before
        return _itself(state, chi)
    scales[slot, 0], scales[slot, 1] = var, ratio
    state.num_steps.copy_(scale.step)
    return scale


def _itself(state: State, chi: NDArray[Any]) -> Scale:
    """Return what normalizes a batch that does not count."""
    var = torch.from_numpy(chi.copy())
    return Scale(var, torch.ones_like(var), torch.zeros_like(state.num_steps))


def _follow_on_host(state: State, var: Tensor, options: Options) -> bool:
    """Move running_var, and count the batch; return False where half cannot hold what comes."""
    running_var, num_batches = state.running_var, state.num_batches
    count = math.inf if num_batches is None else int(num_batches)
    weight = 1 / float(options.size(count))
    if weight == 1:
        following = var
    elif running_var.dtype == var.dtype:
        following = running_var.lerp_(var, weight)
    else:
        following = running_var.to(var.dtype).lerp(var, weight)
    if following is not running_var:
        rounded = following.to(running_var.dtype)
        if not math.isfinite(rounded.max()):
            return False
        running_var.copy_(rounded)
    if num_batches is not None:
        num_batches.fill_(count + 1)
    return True


def _step_shapes(*state_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_steps, chi = state_and_options[5], state_and_options[8]
    return torch.empty_like(chi), torch.empty_like(chi), torch.empty_like(num_steps)


_STEP = register(
    "moving_average_step",
    _take_step,
    _step_shapes,
    *("running_var", "num_batches", "mean_squares", "scales", "num_steps"),
    *("held_scales", "held_steps"),
)
