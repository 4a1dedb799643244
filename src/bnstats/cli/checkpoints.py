"""Checkpoints as files: state dicts, bare or inside a dict, read without running code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnstats import LayerStats, RunningStats
from bnstats.errors import InvalidValueError, LayerMismatchError
from bnstats.recompute.files import replacing

_KEYS = ("state_dict", "model")
"""Under which a checkpoint may keep its state dict."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file's content.

    Attributes:
        path: where it was read from.
        content: all of it.
        state: the state dict in it, the same object.
        prefix: what stands before the unwrapped model's names.
    """

    path: Path
    content: Any
    state: dict[str, Any]
    prefix: str

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint's tensors, and nothing that could run code.

        Raises:
            InvalidValueError: the file is damaged, or holds more than tensors or no state dict.
        """
        with path.open("rb") as file:
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file raises nearly anything
                raise InvalidValueError(
                    f"{path}: expected a checkpoint that torch.load(weights_only=True) reads: "
                    f"{error}"
                ) from error
        state = content
        if isinstance(content, dict):
            state = next(
                (content[key] for key in _KEYS if isinstance(content.get(key), dict)), content
            )
        if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
            raise InvalidValueError(
                f'{path}: expected a state dict, bare or under "state_dict" or "model", got '
                f"{type(content).__name__}"
            )
        return cls(path, content, state, _common_prefix(state))

    @property
    def unwrapped(self) -> dict[str, Any]:
        """The state dict under the unwrapped model's names."""
        return {key.removeprefix(self.prefix): value for key, value in self.state.items()}

    def running_stats(self, names: Iterable[str]) -> dict[str, RunningStats]:
        """Return the running statistics of these layers.

        Raises:
            LayerMismatchError: it does not have them.
        """
        state, names = self.unwrapped, list(names)
        missing = [name for name in names if _key(name, "running_mean") not in state]
        if missing:
            raise LayerMismatchError(
                f"{self.path}: has no running statistics of these layers: "
                + ", ".join(map(repr, missing))
            )
        return {
            name: RunningStats(state[_key(name, "running_mean")], state[_key(name, "running_var")])
            for name in names
        }

    def replace(self, stats: Mapping[str, LayerStats]) -> None:
        """Put population statistics in the place of the running ones; nothing else changes."""
        before = self.running_stats(stats)
        for name, layer in stats.items():
            new = RunningStats(layer.mean, layer.var)
            for key, old, value in zip(
                ("running_mean", "running_var"), before[name], new, strict=True
            ):
                self.state[self.prefix + _key(name, key)] = value.to(old.dtype)

    def save(self, path: Path) -> None:
        """Write all of the content, whole or not at all, and through a link."""
        with replacing(path) as file:
            torch.save(self.content, file)


def _key(layer: str, statistic: str) -> str:
    return f"{layer}.{statistic}" if layer else statistic


def _common_prefix(state: Mapping[str, Any]) -> str:
    prefix = ""
    while True:
        longer = next(
            (prefix + w for w in _WRAPPERS if all(k.startswith(prefix + w) for k in state)), None
        )
        if longer is None:
            return prefix
        prefix = longer
