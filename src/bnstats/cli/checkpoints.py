"""Checkpoints as files: state dicts, bare or inside a dict, read without running code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnstats import LayerStats, RunningStats
from bnstats.cli.unpickling import first_line, read
from bnstats.errors import InvalidValueError, LayerMismatchError, NonFiniteStatisticsError
from bnstats.recomputation.files import replacing
from bnstats.traversal import first_names, names_of_modules

_KEYS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")
"""Keys of a checkpoint's state dict: the first that is there is used, unless one is requested.
Lightning's, timm's and Hugging Face's scripts, torch's own tutorials, timm's averages."""

_MEAN, _VAR = ".running_mean", ".running_var"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file's content.

    Attributes:
        path: where it was read from.
        content: all of it.
        key: under which the state dict stands; None where it is all of the content.
        state: the state dict in it, the same object.
        prefix: what stands before the model's names; None before it is known.
    """

    path: Path
    content: Any
    key: str | None
    state: dict[str, Any]
    prefix: str | None = None

    @classmethod
    def load(cls, path: Path, key: str | None = None, prefix: str | None = None) -> Checkpoint:
        """Read a checkpoint, and nothing that could run code.

        Args:
            path: of the file.
            key: where in it the state dict is, nested keys joined by dots.
            prefix: what stands before the model's names; None to find it out.

        Raises:
            InvalidValueError: the file is damaged, or holds no state dict, or what could run code.
        """
        content = read(path)
        dicts = dict(_state_dicts(content))
        if key is None:
            key = next((known for known in (*_KEYS, "") if known in dicts), None)
        if key is None or key not in dicts:
            asked = (
                f"under {key!r}" if key else f"bare or under one of {', '.join(map(repr, _KEYS))}"
            )
            raise InvalidValueError(
                f"{path}: expected a state dict {asked}, got {_found(content, dicts)}"
            )
        if prefix and not prefix.endswith("."):
            prefix += "."
        return cls(path, content, key or None, dicts[key], prefix)

    @property
    def others(self) -> list[str]:
        """Keys of other state dicts in the file."""
        return [key for key, _ in _state_dicts(self.content) if key not in ("", self.key)]

    @property
    def unwrapped(self) -> dict[str, Any]:
        """The state dict under the model's names; what is not the model's is left out."""
        prefix = self.prefix or ""
        return {
            key.removeprefix(prefix): value
            for key, value in self.state.items()
            if key.startswith(prefix)
        }

    def of(self, names: Iterable[str], what: str) -> Checkpoint:
        """Return the same, with the prefix under which it has all of these names.

        Raises:
            LayerMismatchError: there is none, or there are several.
        """
        names = list(names)
        if self.prefix is not None or not names:
            prefixes = [self.prefix or ""]
        else:
            prefixes = common_prefixes(names, self.state)
        if len(prefixes) > 1:
            raise LayerMismatchError(
                f"{self._place} has the names of {what} under {len(prefixes)} prefixes: pass "
                f"--strip-prefix with one of {first_names(prefixes)}"
            )
        found = replace(self, prefix=prefixes[0] if prefixes else "")
        missing = [name for name in names if name not in found.unwrapped]
        if missing:
            raise LayerMismatchError(
                f"{self._place} lacks {first_names(missing)} of {what}; it has "
                f"{first_names(self.state)}: pass --strip-prefix for what stands before the names"
                + (f", or --key for one of {first_names(self.others)}" if self.others else "")
            )
        return found

    def load_into(self, model: nn.Module, where: str) -> Checkpoint:
        """Load a model with it, and return it with the prefix that this found.

        Raises:
            LayerMismatchError: it is of another model.
        """
        what = f"the model {where}"
        # Checkpoints of torch before 0.4.1, and converted ones, have no counters.
        names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
        found = self.of(names, what)
        try:
            model.load_state_dict(found.unwrapped)
        except Exception as error:  # of a damaged value, nearly anything
            reason = " ".join(str(error).split())
            raise LayerMismatchError(f"{self._place} is not of {what}: {reason[:300]}") from error
        return found

    def running_stats(self) -> dict[str, RunningStats]:
        """Return the running statistics of every layer that has them, by its name here."""
        stats = {}
        for key, mean in self.state.items():
            name, var = key.removesuffix(_MEAN[1:]), self.state.get(key[: -len("mean")] + "var")
            if f".{key}".endswith(_MEAN) and isinstance(mean, Tensor) and isinstance(var, Tensor):
                if mean.shape != var.shape or mean.dim() != 1 or not mean.is_floating_point():
                    raise InvalidValueError(
                        f"{self._place}: {key!r}: expected a mean and a variance of floating-point "
                        f"numbers per channel, got shapes {tuple(mean.shape)} and "
                        f"{tuple(var.shape)}, {mean.dtype} and {var.dtype}"
                    )
                stats[name.removesuffix(".")] = RunningStats(mean, var)
        return stats

    def replace(self, stats: Mapping[str, LayerStats], model: nn.Module) -> None:
        """Put population statistics in the place of the running ones; nothing else changes.

        A layer that the model has under several names is in the checkpoint under each.

        Raises:
            NonFiniteStatisticsError: the checkpoint's dtype cannot hold them.
        """
        new: dict[str, Tensor] = {}
        names = names_of_modules(model)
        places = [(place, name) for name in stats for place in names.get(name, [name])]
        for place, name in places:
            for suffix, value in ((_MEAN, stats[name].mean), (_VAR, stats[name].var)):
                key = (self.prefix or "") + (f"{place}{suffix}" if place else suffix[1:])
                dtype = self.state[key].dtype
                new[key] = value.to(dtype)
                if not dtype.is_floating_point or new[key].isinf().any():
                    raise NonFiniteStatisticsError(
                        f"{self._place}: {key!r} is of {dtype}, which cannot hold statistics up to "
                        f"{value.abs().max():g}"
                    )
        self.state.update(new)

    def save(self, path: Path, first: Callable[[], None] = lambda: None) -> None:
        """Write all of the content, whole or not at all, and through a link.

        Args:
            path: where to.
            first: runs when all is written, and before the file takes its place.

        Raises:
            OSError: the disk is full, for one.
        """
        with replacing(path) as file:
            try:
                torch.save(self.content, file)
            except RuntimeError as error:  # what torch's writer raises where the disk is full
                raise OSError(f"{path}: writing failed: {first_line(error)}") from error
            first()

    @property
    def _place(self) -> str:
        return f"{self.path}{f' (key {self.key!r})' if self.key else ''}"


def common_prefixes(names: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Return every prefix with which all of the names are among the keys."""
    names, keys = list(names), set(keys)
    first = names[0]
    prefixes = sorted({key[: -len(first)] for key in keys if f".{key}".endswith(f".{first}")})
    # "" names the root module: it stands for every prefix.
    return [prefix for prefix in prefixes if all(prefix + name in keys for name in names)]


def _state_dicts(content: object, path: str = "", depth: int = 3) -> Iterable[tuple[str, Any]]:
    """Yield every dict of named tensors, under its keys joined by dots."""
    if not isinstance(content, dict) or depth < 0:
        return
    if not all(isinstance(key, str) for key in content):
        return
    if any(isinstance(value, Tensor) for value in content.values()):
        yield path, content
    for key, value in content.items():
        yield from _state_dicts(value, f"{path}.{key}" if path else key, depth - 1)


def _found(content: object, dicts: Mapping[str, Any]) -> str:
    if named := [key for key in dicts if key]:
        return f"state dicts under {first_names(named)}: pass one of them as --key"
    if isinstance(content, dict):
        return f"a dict without one, with the keys {first_names(content)}"
    return f"a {type(content).__name__}"
