"""The windows of a layer as its buffers: reset, moved, loaded from a plain checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from bnstats.errors import warn
from bnstats.layers.about_zero import HALF, far_from_zero
from bnstats.layers.base import RunningStatsBatchNorm
from bnstats.layers.windows import Windows

_WINDOWS = (
    "window_mean_squares",
    "window_scales",
    "window_gradients",
    "window_gradient_steps",
    "num_steps_tracked",
)
"""The buffers of Windows, in its order."""


class WindowedBatchNorm(RunningStatsBatchNorm):
    """BatchNorm about zero with windows, of float32 or wider, among its buffers."""

    window_mean_squares: Tensor
    window_scales: Tensor
    window_gradients: Tensor
    window_gradient_steps: Tensor
    num_steps_tracked: Tensor

    def statistics_about_zero(self) -> bool:
        """Say that running_mean is 0 and running_var is about zero."""
        return True

    def _register_windows(self, length: int) -> None:
        assert self.running_var is not None
        wide = torch.promote_types(self.running_var.dtype, torch.float32)
        windows = Windows.empty(length, self.running_var.to(wide))
        for name, buffer in zip(_WINDOWS, windows, strict=True):
            # Scales serve from a forward to its backward: no checkpoint falls in between.
            self.register_buffer(name, buffer, persistent=name != "window_scales")

    def _windows(self) -> Windows:
        return Windows(*itemgetter(*_WINDOWS)(self._buffers))

    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, variance 1, empty windows, counters 0."""
        super().reset_running_stats()
        # nn.BatchNorm resets in its constructor, before these buffers are there.
        if hasattr(self, "num_steps_tracked"):
            for buffer in self._windows():
                buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self._windows()
        module: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._widen(self._windows() if before.num_steps.is_meta else before)
        return module

    def _widen(self, sources: Windows) -> None:
        """Let what became half be float32 again, from these windows."""
        for name, source, window in zip(_WINDOWS, sources, self._windows(), strict=True):
            # Half is too coarse to average in, and a mean square soon overflows it.
            if window.dtype in HALF:
                setattr(self, name, source.to(window.device, torch.float32))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # torch passes a copy of the caller's mapping, and completes it in the same way.
        if prefix + "num_steps_tracked" not in state_dict and prefix + "running_mean" in state_dict:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self._complete(state_dict, prefix, assign)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._widen(self._windows())
        scales, loaded = self.window_scales, self.window_mean_squares
        if (scales.device, scales.dtype) != (loaded.device, loaded.dtype):  # by assign=True
            self.window_scales = loaded.new_zeros(scales.shape)

    def _complete(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> None:
        """Make a plain checkpoint one about zero, with empty windows."""
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.shape != var.shape:
            return  # torch says what is wrong
        wide = torch.promote_types(var.dtype, torch.float32)
        for name in _WINDOWS:
            if name not in self._non_persistent_buffers_set:
                own = getattr(self, name)
                dtype = wide if own.is_floating_point() else own.dtype
                state_dict[prefix + name] = torch.zeros_like(own, dtype=dtype, device=var.device)
        wide_mean, wide_var = mean.to(wide), var.to(wide)
        if far_from_zero(wide_mean, wide_var, self.eps):
            warn(
                f"layer '{prefix.removesuffix('.')}' ({type(self).__name__}): the checkpoint's "
                "running_mean is not near zero, and this layer has no mean: it starts from "
                "running_var + running_mean^2 and evaluates differently; train on, with "
                "centered layers before it, or use another layer"
            )
        state_dict[prefix + "running_mean"] = torch.zeros_like(mean)
        about = wide_var + wide_mean.square()
        # What is assigned keeps the checkpoint's dtype; what is copied takes the layer's.
        state_dict[prefix + "running_var"] = about.to(var.dtype) if assign else about
