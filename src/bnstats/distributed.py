"""Processes that measure together: collectives that carry results, or the failure."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from bnstats.errors import InvalidTypeError, InvalidValueError, PeerError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
        if not dist.is_available() or not isinstance(sync, dist.ProcessGroup):
            # What new_group returns in a process that it leaves out.
            if dist.is_available() and isinstance(sync, int):
                raise InvalidValueError("sync: this process is not a member of the group")
            raise InvalidTypeError(
                f"sync: expected True, False, None or a process group, got {type(sync).__name__}"
            )
        return cls(sync)

    def exchange(self, like: Tensor) -> Exchange:
        """Return a context in which every process does its part of a step.

        Args:
            like: a tensor of the shape, dtype and device of every process's result.
        """
        return Exchange(self, like)

    def all_gather(self, message: Tensor) -> Tensor:
        """Return the messages of all processes, stacked in rank order."""
        sent = message.to(self._backend_device(message.device))
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self._group)
        return torch.stack(received).to(message.device)

    def _backend_device(self, device: torch.device) -> torch.device:
        """Return where the backend takes its tensors from."""
        backend = dist.get_backend(self._group)
        if backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu") if backend == "gloo" else device


class Exchange:
    """One step of every process, and one collective at its end.

    An error inside the context is raised there once the others know of it, and they raise too:
    no process is left waiting, and none goes on.

    Attributes:
        results: what every process has sent, stacked in rank order; after the context.

    Raises:
        PeerError: the step failed in another process.
    """

    def __init__(self, peers: Peers, like: Tensor) -> None:
        self._peers = peers
        self._shape = (peers.size, *like.shape)
        # Made before the step: a device that has no memory left can still say so.
        self._message = None if peers.alone else like.new_zeros(1 + like.numel())
        self.results: Tensor

    def send(self, result: Tensor) -> None:
        """Give this process's result of the step."""
        if self._message is None:
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
        if self._message is None:
            return
        self._message[0] = error is not None
        messages = self._peers.all_gather(self._message)
        if error is not None:
            return
        failed = messages[:, 0].nonzero().flatten().tolist()
        if failed:
            raise PeerError(
                f"the measurement failed in the process of rank {', '.join(map(str, failed))} "
                "(see its own error); nothing was written in any process"
            )
        self.results = messages[:, 1:].view(self._shape)
