"""Training forwards that move no running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from bnstats.contexts import Context
from bnstats.errors import warn
from bnstats.private import (
    add_unnumbered_hooks,
    in_backward_pass,
    intercepted,
    may_be_checkpointed,
    remove_unnumbered_hooks,
    unseen,
)
from bnstats.traversal import Include, named_batchnorms, no_batchnorm


def hold_statistics(model: nn.Module, include: Include | None = None) -> Context[None]:
    """Run training forwards that normalize as they do, and move no running statistic.

    A step may run a training forward more than once: sharpness-aware minimization at perturbed
    weights, adversarial training on perturbed inputs, consistency losses, gradient penalties. The
    running statistics are to follow one of them. In this context no buffer of the chosen layers
    moves, counters and windows included, in layers of this package, of torch and of others that
    derive from torch's. Outputs and gradients are those of the same forward without the
    context. A layer in evaluation mode does what it does anyway.

    Contexts nest, may overlap in any order, and end with an error as without one. A layer is held
    in all threads, so that replicas of DataParallel are. The result may be entered again, in a
    step's second forward for one. It decorates functions too, but not generator and coroutine
    functions, whose body runs after the call: use ``with`` inside of those.

    Under activation checkpointing, the backward may run after the context is left: the forward
    that it runs again is held too, where it runs eagerly. A layer that is not this package's
    then keeps a forward hook until it next runs in evaluation mode. Compiled code makes a second
    version of itself for held forwards, once; where a compiled model with torch's layers is itself
    checkpointed, run its backward inside the context.

    Args:
        model: any Module; wrappers are seen through.
        include: ``include(name, module) -> bool`` chooses layers; by default all BatchNorm layers
            with running statistics. InstanceNorm is none.

    Returns:
        A context manager, whose value is None.

    Raises:
        InvalidTypeError: not a Module, or a lazy layer not yet materialized; as a decorator, of
            what runs after the call.

    Warns:
        BnstatsWarning: there is no such layer.

    Note:
        A layer of another package that does not ask ``track_running_stats``, as torch's do, is
        held where it runs eagerly, and not in compiled code. DistributedDataParallel, unless
        given ``broadcast_buffers=False``, copies the first process's buffers to the others before
        every training forward, held or not.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> with bnstats.hold_statistics(model):
        ...     output = model(torch.randn(8, 4))
        >>> int(model[1].num_batches_tracked), bool(output.mean().abs() < 1e-6)
        (0, True)

    References:
        Foret, Kleiner, Mobahi, Neyshabur (2021), "Sharpness-Aware Minimization for Efficiently
        Improving Generalization", arXiv:2010.01412.
    """
    layers = named_batchnorms(model, include)
    if not layers:
        warn(f"{no_batchnorm(model, include)}: nothing to hold")
    return Context("hold_statistics", partial(_hold, tuple(layers.values())))


@contextmanager
def _hold(layers: Iterable[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_release, layer)
            _take(layer)
        yield


_held: dict[nn.Module, list[Callable[[], None]]] = {}
"""For each layer that is held what ends it, once for each context."""

_lock = Lock()


def _take(layer: nn.Module) -> None:
    with _lock:
        ends = _held.setdefault(layer, [])
        ends.append(ends[0] if ends else _start(layer))


def _release(layer: nn.Module) -> None:
    with _lock:
        ends = _held.get(layer, [])
        if ends:  # else an interrupt came before the layer was taken
            end = ends.pop()
            if not ends:
                del _held[layer]
                end()


@contextmanager
def held_anew(layer: nn.Module) -> Iterator[None]:
    """Let a layer change its class: classes are held in different ways."""
    with _lock:
        ends = _held.get(layer, [])
        if ends:
            ends[0]()
        try:
            yield
        finally:
            if ends:
                ends[:] = [_start(layer)] * len(ends)


def _start(layer: nn.Module) -> Callable[[], None]:
    """Hold a layer, and return what ends it."""
    # Any layer may have the method; this package's have.
    if hasattr(layer, "hold_running_stats"):
        hold: Callable[[bool], None] = layer.hold_running_stats  # type: ignore[assignment]
        hold(True)
        return partial(hold, False)
    copies = _copies.get(layer) or BufferCopies(layer)
    copies.held = True
    tracks = getattr(layer, "track_running_stats", None)
    if tracks:
        layer.track_running_stats = _UNTRACKED  # type: ignore[assignment]

    def end() -> None:
        if tracks and getattr(layer, "track_running_stats", None) is _UNTRACKED:
            layer.track_running_stats = tracks
        copies.release()

    return end


class _Untracked:
    """False, to compiled code above all; in a copy of the layer True, for that is not held."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "False"

    def __reduce__(self) -> tuple[type[bool], tuple[bool]]:
        return bool, (True,)


_UNTRACKED = _Untracked()


class BufferCopies:
    """Lets a layer write to copies of its buffers while it runs.

    It runs the operators that it always runs: what checkpoints a forward counts them, and the
    tensors that autograd saves. Compiled code does not see it.

    A copy of the layer gets one that does nothing.

    Attributes:
        held: every training forward writes to copies; else those that are run again in a
            backward, if a held forward may have been checkpointed.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        self.held = False
        self._may_be_repeated = False
        self._last: tuple[dict[str, Tensor | None], dict[str, Tensor | None]] = {}, {}
        if layer is not None:
            _copies[layer] = self
            add_unnumbered_hooks(layer, _HOOK, self._before, self._after)

    def __reduce__(self) -> tuple[type[BufferCopies], tuple[()]]:
        return BufferCopies, ()

    def release(self) -> None:
        """End the hold; the hooks stay as long as a held forward may be run again."""
        self.held = False
        self._last = {}, {}
        if not self._may_be_repeated:
            self._remove()

    def _remove(self) -> None:
        for layer in [layer for layer, copies in _copies.items() if copies is self]:
            del _copies[layer]
            remove_unnumbered_hooks(layer, _HOOK)

    def _before(self, layer: nn.Module, _: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if not layer.training:
            if not self.held:  # a model that evaluates has no forward left to repeat
                self._remove()
            return
        repeated = in_backward_pass()
        if not self.held and not (repeated and self._may_be_repeated):
            return
        self._may_be_repeated |= not repeated and may_be_checkpointed()
        tracks = getattr(layer, "track_running_stats", None)
        vars(layer)["_set_aside"] = layer._buffers, tracks
        layer._buffers = self._copy(layer)
        if tracks is _UNTRACKED:
            layer.track_running_stats = True  # type: ignore[assignment]

    def _after(self, layer: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if (aside := vars(layer).pop("_set_aside", None)) is not None:
            layer._buffers, tracks = aside
            if tracks is not None:
                layer.track_running_stats = tracks

    def _copy(self, layer: nn.Module) -> dict[str, Tensor | None]:
        """Return copies of a layer's buffers; where none of them is read, the last ones."""
        source, (known, copies) = layer._buffers, self._last
        if source.keys() == known.keys() and all(source[key] is known[key] for key in source):
            return dict(copies)
        with unseen():
            copies = {key: None if x is None else x.detach().clone() for key, x in source.items()}
        if type(layer).forward in _READING_NONE and not intercepted():
            self._last = dict(source), copies
        return dict(copies)


_copies: WeakKeyDictionary[nn.Module, BufferCopies] = WeakKeyDictionary()

_HOOK: Any = "bnstats.hold_statistics"

_READING_NONE = (_BatchNorm.forward, SyncBatchNorm.forward)
"""The forwards that read no buffer in training mode, they only write to them."""
