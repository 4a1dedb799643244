"""The one place for torch's private names, each with the reason why no public one serves."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def in_backward_pass() -> bool:
    """Whether this thread is inside a backward pass of autograd.

    Activation checkpointing runs the forward again from there, for both of its kinds, and no
    public name tells so: ``torch.utils.checkpoint`` lets a caller pass contexts, but a layer
    is not its caller. torch.compile cannot trace the question. It does not rerun the updates of
    buffers in a checkpoint inside compiled code; one around it is what operators ask for
    (:mod:`bnstats.layers.operators`).
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def only_reverse_mode() -> bool:
    """Whether reverse-mode autograd is all that looks on: no torch.func, no forward mode.

    An autograd function serves neither without rules of its own, and there is no public way to
    ask whether one of them is at work.
    """
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def recording() -> bool:
    """Whether make_fx or torch.jit.trace records the operators that run.

    What numpy does would be a constant in the record. There is no public way to ask the first.
    """
    proxy = torch._C._TorchDispatchModeKey.PROXY
    return torch._C._get_dispatch_mode(proxy) is not None or torch._C._is_tracing()
