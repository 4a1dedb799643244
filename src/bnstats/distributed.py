"""Processes that measure together: one collective that carries results, or the failure."""

from __future__ import annotations

from collections.abc import Callable
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
    """The processes of a group, each of which makes the same calls in the same order.

    Args:
        group: the group; None for all processes.
        alone: there is only this process, and nothing to exchange.

    Attributes:
        size: number of processes.
    """

    def __init__(self, group: ProcessGroup | None = None, *, alone: bool = False) -> None:
        self._group = group
        self._alone = alone
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

    def gather(self, produce: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Run ``produce`` in every process and return every result, stacked in rank order.

        One collective. What ``produce`` raises in one process is raised there once the others
        know of it, and they raise too: nobody is left waiting, and nobody goes on.

        Args:
            produce: returns a tensor.
            like: a tensor of the result's shape, dtype and device, the same in every process.

        Raises:
            PeerError: it raised in another process.
        """
        if self._alone:
            return produce()[None]
        failure: BaseException | None = None
        message = like.new_zeros(1 + like.numel())
        try:
            message[1:] = produce().flatten()
        except BaseException as error:  # raised again below
            failure = error
            message[0] = 1
        message = message.to(self._wire_device(message.device))
        messages = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(messages, message, group=self._group)
        if failure is not None:
            raise failure
        together = torch.stack(messages).to(like.device)
        failed = together[:, 0].nonzero().flatten().tolist()
        if failed:
            raise PeerError(
                f"the measurement failed in the process of rank {', '.join(map(str, failed))} "
                "(see its own error); nothing was written in any process"
            )
        return together[:, 1:].view(self.size, *like.shape)

    def _wire_device(self, device: torch.device) -> torch.device:
        """Return where the backend takes its tensors from."""
        backend = dist.get_backend(self._group)
        if backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu") if backend == "gloo" else device
