"""Buffers that stay float32 or wider when their layer becomes half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.reduction import wide_dtype


class WideBuffersBatchNorm(_BatchNorm):
    """BatchNorm of which some buffers keep their precision."""

    _wide_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that keep their precision when the layer becomes half."""

    def _wide_dtype(self, running: Tensor) -> torch.dtype:
        """Return the dtype of the wide buffers beside these running statistics."""
        return torch.promote_types(running.dtype, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        order = list(self._buffers)
        popped = {name: self._buffers.pop(name) for name in self._wide_buffers}
        module: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        running = self._buffers["running_mean"]
        for name, buffer in popped.items():
            if buffer is not None and running is not None:
                # Before and after fn: a device may not have this dtype, half has too few digits.
                wide = self._wide_dtype(running)
                source = buffer.to(wide_dtype(buffer.device) if wide == torch.float64 else wide)
                buffer = fn(source)
                if buffer.dtype != wide:
                    lost = source.is_meta and not buffer.is_meta
                    buffer = (buffer if lost else source).to(buffer.device, wide)
            self._buffers[name] = buffer
        for name in order:
            self._buffers[name] = self._buffers.pop(name)
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        self._widen()  # assigned as the checkpoint has them

    def _widen(self) -> None:
        """Give the wide buffers their precision again where others have taken it.

        Not all ask the layer: FSDP's mixed precision casts the data of every buffer.
        """
        running = self._buffers["running_mean"]
        for name in self._wide_buffers:
            buffer = self._buffers[name]
            if buffer is not None and running is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(self._wide_dtype(running))
