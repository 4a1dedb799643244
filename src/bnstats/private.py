"""The one place for torch's private names, each with the reason why no public one serves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_backward_pass() -> bool:
    """Whether this thread is inside a backward pass of autograd.

    Activation checkpointing runs the forward again from there, for both of its kinds, and no
    public name says so: ``torch.utils.checkpoint`` lets a caller pass contexts, but a layer
    is not its caller. torch.compile cannot trace the question. It does not rerun the updates of
    buffers in a checkpoint inside compiled code; one around it is what operators ask for
    (:mod:`bnstats.layers.operators`).
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def only_reverse_mode() -> bool:
    """Whether reverse-mode autograd is the only differentiation: no torch.func, no forward mode.

    An autograd function serves neither without rules of its own, and there is no public way to
    ask whether one of them is active.
    """
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def intercepted() -> bool:
    """Whether something sees each operator before it runs, or runs it in another way.

    Dispatch modes (selective checkpointing, make_fx, fake tensors, counters of operations),
    function transforms (vmap, grad) and torch.jit.trace. What Python or numpy computes from a
    tensor's values escapes them. None of the three can be asked for by a public name.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def on_host(tensor: Tensor) -> bool:
    """Whether Python may read a tensor's values at no cost: on CPU, and nothing intercepts."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not intercepted()
    )


def version(tensor: Tensor) -> float:
    """Return autograd's count of the writes to a tensor, which has no public reader.

    Inference tensors count none: NaN, which equals no other.
    """
    return float("nan") if tensor.is_inference() else tensor._version
