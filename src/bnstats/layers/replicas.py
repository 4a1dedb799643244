"""The processes that share a layer's batch: one exchange in a forward, one in its backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnstats.distributed import Peers, check_group
from bnstats.errors import InvalidTypeError, InvalidValueError, PeerError
from bnstats.layers.operators import Referable, opaque, referred, register
from bnstats.layers.recall import Recall
from bnstats.private import in_backward_pass, on_host, only_reverse_mode, unseen
from bnstats.reduction import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Replicas(Referable):
    """What a ``sync`` option means, and what its processes sent each other lately.

    A copy has the same processes and remembers nothing. Without initialized processes, or with
    one alone, there is nobody to exchange with.

    Args:
        sync: True for all processes, or a group.
        where: names the option in messages.
    """

    def __init__(self, sync: ProcessGroup | bool, where: str = "sync") -> None:
        super().__init__()
        if sync is not True:
            check_group(where, sync, "None, True or a process group")
        self.sync: ProcessGroup | bool = sync
        self._group = None if isinstance(sync, bool) else sync
        self._exchanges = Recall()

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return Replicas(self.sync)  # a process group cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        if self.sync is not True:
            raise InvalidTypeError(
                "sync: a layer that is synchronized over a process group cannot be pickled, "
                "groups are those of one run; save its state_dict, or use sync=True"
            )
        return Replicas, (True,)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to exchange with."""
        if not (dist.is_available() and dist.is_initialized()):
            return True
        return self._peers().size == 1

    def _peers(self) -> Peers:
        return Peers(self._group)

    def gather(self, message: Tensor) -> Tensor:
        """Return the messages of all, stacked in rank order.

        A forward that activation checkpointing runs again finds what came the first time: the
        others need not run theirs again.

        Raises:
            PeerError: another process sent that it failed; where the host does not wait for the
                device, NaN comes of it.
            InvalidValueError: the forward to be run again is too long ago.
        """
        with unseen():
            gather = opaque(_GATHER, _gather)
            messages: Tensor = gather(message, self.reference, self._peers().size)
        return messages

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all processes."""
        with unseen():
            total: Tensor = opaque(_SUM, _sum)(x, self.reference)
        return total

    def tell_of_failure(self, channels: int, device: torch.device | None) -> None:
        """Send an error to the others, who wait for this process's moments.

        (No context around what may fail: torch 2.6 compiles none that is made of a generator.)
        """
        if not self.alone and not in_backward_pass():
            device = device or self._peers().common_device
            size, dtype = 1 + 2 * channels, wide_dtype(device)
            self._peers().all_gather(torch.full((size,), torch.nan, dtype=dtype, device=device))

    def exchange(self, message: Tensor) -> Tensor:
        """Send a message and receive the others', or find those of a forward that is repeated."""
        if in_backward_pass():
            return self._exchanges.find(message)
        messages = self._peers().all_gather(message)
        if on_host(messages):
            failed = messages[:, 0].isnan().nonzero().flatten().tolist()
            if failed:
                raise PeerError(
                    f"the forward failed in the process of rank {', '.join(map(str, failed))} "
                    "of a synchronized layer's group (see its own error)"
                )
        # Copies: compiled code may reuse the memory of both.
        self._exchanges.remember(message.clone(), messages.clone())
        return messages

    def total(self, x: Tensor) -> Tensor:
        """Add up over the processes, in rank order: the same bits for all."""
        return self._peers().all_gather(x).sum(0)


def check_reverse_mode(layer: str) -> None:
    """Refuse what asks a synchronized layer for more than its reverse-mode gradient."""
    if not only_reverse_mode():
        raise InvalidValueError(
            f"{layer}: sync: expected None under torch.func's transforms and forward-mode "
            "differentiation: no rule of theirs knows a collective"
        )


def check_tensor(where: str, input: Any, device: torch.device | None) -> None:
    """Refuse what is no tensor, or one that the layer cannot work on with its own."""
    if not isinstance(input, Tensor):
        raise InvalidTypeError(f"{where}: expected a tensor, got {type(input).__name__}")
    if device is not None and input.device != device:
        raise InvalidValueError(
            f"{where}: expected an input on the layer's device {device}, got one on "
            f"{input.device}: pass input.to({str(device)!r})"
        )


def _replicas(reference: Tensor) -> Replicas:
    replicas: Replicas = referred(reference)
    return replicas


def _gather(message: Tensor, reference: Tensor, size: int) -> Tensor:  # noqa: ARG001
    return _replicas(reference).exchange(message)


def _gathered(message: Tensor, reference: Tensor, size: int) -> Tensor:  # noqa: ARG001
    return message.new_empty(size, *message.shape)


def _sum(x: Tensor, reference: Tensor) -> Tensor:
    return _replicas(reference).total(x)


def _summed(x: Tensor, reference: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


# Operators, since nothing that traces or transforms knows a collective from arithmetic.
_GATHER = register("gather_moments", _gather, _gathered)
_SUM = register("sum_over_replicas", _sum, _summed)
