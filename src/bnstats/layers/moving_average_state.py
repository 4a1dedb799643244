"""The buffers of a moving-average layer: made, reset, loaded from a plain checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnstats.errors import warn
from bnstats.layers.base import RunningStatsBatchNorm
from bnstats.layers.moving_average_step import State

_NEAR_ZERO = 1e-3
"""Mean, in standard deviations, that a layer without a mean need not mention."""


def far_from_zero(mean: Tensor, var: Tensor, eps: float) -> bool:
    """Whether a layer without a mean evaluates differently from one with these statistics."""
    return not mean.is_meta and bool((mean.square() > _NEAR_ZERO**2 * (var + eps)).any())


class MovingAverageState(RunningStatsBatchNorm):
    """BatchNorm about zero with ring buffers, of float32 or wider, among its buffers."""

    _wide_buffers = ("window_mean_squares", "window_scales", "window_gradients")
    _ring_buffers = (*_wide_buffers, "window_gradient_steps", "num_steps_tracked")

    _transient = (*RunningStatsBatchNorm._transient, "_held_scales", "_held_steps")

    # What checkpointing needs of held forwards; no buffers, for in those nothing moves.
    _held_scales: Tensor | None = None
    _held_steps: Tensor | None = None

    window_mean_squares: Tensor
    window_scales: Tensor
    window_gradients: Tensor
    window_gradient_steps: Tensor
    num_steps_tracked: Tensor

    def statistics_about_zero(self) -> bool:
        """Say that running_mean is 0 and running_var is about zero."""
        return True

    def _register_ring_buffers(self, length: int) -> None:
        running_var = self.running_var
        assert running_var is not None
        like = running_var.to(self._wide_dtype(running_var))
        number = like.new_zeros((), dtype=torch.int64)
        # Scales serve from a forward to its backward: no checkpoint falls in between.
        scales = like.new_zeros(length, 2, len(like))
        self.register_buffer("window_mean_squares", like.new_zeros(length, len(like)))
        self.register_buffer("window_scales", scales, persistent=False)
        self.register_buffer("window_gradients", like.new_zeros(length, len(like)))
        self.register_buffer("window_gradient_steps", number.new_zeros(length))
        self.register_buffer("num_steps_tracked", number)

    def _step_state(self) -> State:
        buffers = self._buffers
        return State(
            buffers["running_var"],  # type: ignore[arg-type]
            buffers["num_batches_tracked"],
            self.window_mean_squares,
            self.window_scales,
            self.window_gradient_steps,
            self.num_steps_tracked,
            self._held_scales,
            self._held_steps,
        )

    def hold_running_stats(self, held: bool) -> None:
        """Let training forwards move no buffer, or let them again."""
        super().hold_running_stats(held)
        scales, known = self.window_scales, self._held_scales
        if held and (known is None or known.shape[::2] != scales.shape[::2]):
            self._held_scales = scales.new_zeros(len(scales), 3, self.num_features)
            self._held_steps = torch.zeros_like(self.window_gradient_steps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name in ("_held_scales", "_held_steps"):  # on a device that they do not follow to
            vars(self).pop(name, None)
        module = super()._apply(fn, recurse)
        self.hold_running_stats(self._held)
        return module

    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, variance 1, empty ring buffers, counters 0."""
        super().reset_running_stats()
        # nn.BatchNorm resets in its constructor, before these buffers are there.
        if hasattr(self, "num_steps_tracked"):
            for name in self._ring_buffers:
                getattr(self, name).zero_()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # torch passes a copy of the caller's mapping, and completes it in the same way.
        rings = self._ring_buffers
        own = any(prefix + name in state_dict for name in rings) or self._assigned_before()
        if not own and prefix + "running_mean" in state_dict:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self._complete(state_dict, prefix, assign)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        mean, var = self.running_mean, self.running_var
        empty = all(getattr(self, name).is_meta for name in rings)
        if empty and mean is not None and var is not None and not (mean.is_meta or var.is_meta):
            self._start_from(prefix, mean, var)  # a plain checkpoint's, one by one
        scales, loaded = self.window_scales, self.window_mean_squares
        if (scales.device, scales.dtype) != (loaded.device, loaded.dtype):  # by assign=True
            self.window_scales = loaded.new_zeros(scales.shape)

    def _assigned_before(self) -> bool:
        """Whether a part of this layer's own checkpoint was assigned, on meta, before the rest."""
        rings = [getattr(self, name) for name in self._ring_buffers]
        mean = self.running_mean
        return mean is not None and mean.is_meta and not all(ring.is_meta for ring in rings)

    def _start_from(self, prefix: str, mean: Tensor, var: Tensor) -> None:
        """Go on from assigned statistics, which stay the caller's, with empty ring buffers."""
        wide = self._wide_dtype(var)
        wide_mean, wide_var = mean.to(wide), var.to(wide)
        self._warn_if_far(prefix, wide_mean, wide_var)
        self.running_mean = torch.zeros_like(mean)
        self.running_var = (wide_var + wide_mean.square()).to(var.dtype)
        self._register_ring_buffers(len(self.window_mean_squares))

    def _complete(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> None:
        """Make a plain checkpoint one about zero, with empty ring buffers."""
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.shape != var.shape:
            return  # torch says what is wrong
        wide = self._wide_dtype(var)
        for name in self._ring_buffers:
            if name not in self._non_persistent_buffers_set:
                own = getattr(self, name)
                dtype = wide if own.is_floating_point() else own.dtype
                state_dict[prefix + name] = torch.zeros_like(own, dtype=dtype, device=var.device)
        wide_mean, wide_var = mean.to(wide), var.to(wide)
        self._warn_if_far(prefix, wide_mean, wide_var)
        state_dict[prefix + "running_mean"] = torch.zeros_like(mean)
        about = wide_var + wide_mean.square()
        # What is assigned keeps the checkpoint's dtype; what is copied takes the layer's.
        state_dict[prefix + "running_var"] = about.to(var.dtype) if assign else about

    def _warn_if_far(self, prefix: str, mean: Tensor, var: Tensor) -> None:
        if far_from_zero(mean, var, self.eps):
            warn(
                f"layer '{prefix.removesuffix('.')}' ({type(self).__name__}): the checkpoint's "
                "running_mean is not near zero, and this layer has no mean: it starts from "
                "running_var + running_mean^2 and evaluates differently; train on, with "
                "centered layers before it, or use another layer"
            )
