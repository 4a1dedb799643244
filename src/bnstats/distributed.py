"""Processes that measure together: collectives that carry results, or the failure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnstats.errors import InvalidTypeError, InvalidValueError, PeerError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

Sync: TypeAlias = "bool | ProcessGroup | None"
"""With whom to merge: a group, all processes (True), nobody (False), all if several (None)."""


class Peers:
    """The processes of a group, each of which makes the same exchanges in the same order.

    Args:
        group: the group; None for all processes.
        alone: there is nobody to exchange with.

    Attributes:
        alone: there is only this process, and nothing to exchange.
        size: number of processes.
    """

    def __init__(self, group: ProcessGroup | None = None, *, alone: bool = False) -> None:
        self._group = group
        self.alone = alone
        self.size = 1 if alone else dist.get_world_size(group)

    @classmethod
    def of(cls, sync: Sync) -> Peers:
        """Return the processes that a ``sync`` argument means.

        Raises:
            InvalidValueError: True without initialized processes, or a group without this one.
            InvalidTypeError: something else.
        """
        initialized = dist.is_available() and dist.is_initialized()
        if sync is None:
            return cls(alone=not initialized or dist.get_world_size() == 1)
        if sync is False:
            return cls(alone=True)
        if sync is True:
            if not initialized:
                raise InvalidValueError(
                    "sync: expected torch.distributed to be initialized for sync=True; call "
                    "torch.distributed.init_process_group first, or pass sync=None"
                )
            return cls()
        check_group("sync", sync, "True, False, None or a process group")
        _backend_config(sync)
        return cls(sync)

    def agreement(self) -> Agreement:
        """Return a context in which every process prepares, and finds that all do the same."""
        return Agreement(self)

    def exchange(self, like: Tensor) -> Exchange:
        """Return a context in which every process does its part of a step.

        Args:
            like: a tensor of the shape and dtype of every process's result.
        """
        return Exchange(self, like)

    def all_gather_objects(self, value: T) -> list[T]:
        """Return the values of all processes, in rank order, by pickle."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def all_gather(self, message: Tensor) -> Tensor:
        """Return the messages of all processes, stacked in rank order, where this one's is."""
        device = self._backend_device(message.device.type)
        sent = message if device.type == message.device.type else message.to(device)
        received = sent.new_empty(self.size, *sent.shape)
        self.all_gather_into(received, sent)
        return received.to(message.device)

    def all_gather_into(self, received: Tensor, message: Tensor) -> None:
        """Do it without new memory: NCCL allocates for a list of tensors, and not for one."""
        gather = getattr(dist, "all_gather_single", None)  # its name since torch 2.13
        gather = dist.all_gather_into_tensor if gather is None else gather
        gather(received.flatten(), message.flatten(), group=self._group)

    @property
    def common_device(self) -> torch.device:
        """Where every process may have its messages, wherever it has its model."""
        return self._backend_device("cpu")

    def _backend_device(self, kind: str) -> torch.device:
        """Return where the group takes messages of devices of a kind.

        Without an index, as torch's own collectives of objects: on the current device, which
        with nccl the caller has set by ``torch.cuda.set_device``.
        """
        config = _backend_config(self._group)
        backends = dict(pair.split(":") for pair in config.split(","))
        if backends.get(kind, "gloo") == "gloo":  # which gathers on CPU only
            kind = "cpu" if "cpu" in backends else next(iter(backends))
        return torch.device(kind)


def _backend_config(group: ProcessGroup | None) -> str:
    """Return where a group exchanges tensors of each device, "cpu:gloo,cuda:nccl" for example."""
    try:
        return dist.get_backend_config(group)
    except TypeError:  # torch has forgotten the group
        raise InvalidValueError(
            "sync: expected a process group that can be used, got one that was destroyed by "
            "torch.distributed.destroy_process_group: pass one made since, for a layer as "
            "layer.sync = group"
        ) from None


def is_group(value: object) -> TypeGuard[ProcessGroup]:
    """Whether a value is a process group."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def check_group(where: str, value: object, expected: str) -> None:
    """Refuse what is no process group, or one that this process is not a member of.

    Args:
        where: the option's name.
        value: what came.
        expected: the values that the option has.
    """
    if is_group(value):
        return
    if isinstance(value, int):  # what new_group returns in a process that it leaves out
        raise InvalidValueError(f"{where}: this process is not a member of the group")
    raise InvalidTypeError(f"{where}: expected {expected}, got {type(value).__name__}")


def communicates(model: nn.Module) -> bool:
    """Whether a model's forward has collectives of its own: it is sharded, or its parameters are.

    What is sharded has imported the modules that it needs: bnstats need not.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    classes = tuple(
        getattr(fsdp, name)
        for name in ("FSDPModule", "FullyShardedDataParallel")
        if hasattr(fsdp, name)
    )
    if any(isinstance(module, classes) for module in model.modules()):
        return True
    return any(is_dtensor(parameter) for parameter in model.parameters())


def is_dtensor(value: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class Agreement:
    """The first step of every process, of which each describes what it is about to do.

    Raises:
        PeerError: the step failed in another process.
        InvalidValueError: the processes are about to do different things.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._description: Mapping[str, object] = {}

    def send(self, description: Mapping[str, object]) -> None:
        """Describe what has to be the same in every process."""
        self._description = description

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._peers.alone:
            return
        failure = None if error is None else f"{type(error).__name__}: {error}"
        said = self._peers.all_gather_objects((failure, dict(self._description)))
        if error is not None:
            return
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(said) if text]
        if failures:
            raise PeerError(f"the measurement did not begin, it failed in {'; '.join(failures)}")
        for rank, (_, theirs) in enumerate(said):
            for key, value in said[0][1].items():
                if theirs[key] != value:
                    raise InvalidValueError(
                        f"sync: the processes do not measure the same thing: {key} is "
                        f"{_difference(value, theirs[key])} in the process of rank 0, and "
                        f"{_difference(theirs[key], value)} in that of rank {rank}"
                    )


def _difference(value: object, other: object) -> str:
    """Return a value; for a sequence, an item that the other lacks."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        own = [item for item in value if item not in other]
        return f"{len(value)} with {own[0]!r}" if own else f"{len(value)}"
    return repr(value)


class Exchange:
    """One step of every process, and one collective at its end.

    An error inside the context is raised there after the other processes were informed. They
    raise too, so none is left waiting, and none goes on.

    Attributes:
        results: what every process has sent, stacked in rank order; after the context, and on
            CPU: all processes compute what follows in the same way, on any device.

    Raises:
        PeerError: the step failed in another process.
    """

    def __init__(self, peers: Peers, like: Tensor) -> None:
        self._peers = peers
        self._shape = (peers.size, *like.shape)
        self.results: Tensor
        if not peers.alone:
            # Made before the step: a device that runs out of memory can still inform the others.
            shape, device = (peers.size, 1 + like.numel()), peers.common_device
            self._received = torch.zeros(shape, dtype=like.dtype, device=device)
            self._message = torch.zeros_like(self._received[0])

    def send(self, result: Tensor) -> None:
        """Give this process's result of the step."""
        if self._peers.alone:
            self.results = result[None]
        else:
            self._message[1:] = result.flatten()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._peers.alone:
            return
        self._message[0] = error is not None
        self._peers.all_gather_into(self._received, self._message)
        if error is not None:
            return
        messages = self._received.cpu()
        failed = messages[:, 0].nonzero().flatten().tolist()
        if failed:
            raise PeerError(
                f"the measurement failed in the process of rank {', '.join(map(str, failed))} "
                "(see its own error); nothing was written in any process"
            )
        self.results = messages[:, 1:].view(self._shape)
