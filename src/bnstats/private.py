"""All uses of torch's private names, each with the reason why no public one serves.

Elsewhere there are only the names that every subclass meets: a Module's dicts of parameters,
buffers and submodules, and the base classes ``_BatchNorm`` and ``_InstanceNorm``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

# Public names of modules that are private.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils.data import DataLoader


def in_backward_pass() -> bool:
    """Whether this thread is inside a backward pass of autograd.

    Activation checkpointing runs the forward again from there, for both of its kinds, and no
    public name shows it: ``torch.utils.checkpoint`` lets a caller pass contexts, but a layer
    is not its caller. torch.compile cannot trace the question. It does not rerun the updates of
    buffers in a checkpoint inside compiled code; one around it is what operators ask for
    (:mod:`bnstats.layers.operators`).
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_checkpointed() -> bool:
    """Whether a forward may be one that activation checkpointing will run again.

    One kind runs it without gradients, the other with hooks for what autograd saves, which have
    no public reader. Other things do so too.
    """
    if not torch.is_grad_enabled():
        return True
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return _has_saving_hooks() if top is None else top(True) is not None


def _has_saving_hooks() -> bool:
    """Whether there are hooks for what autograd saves, in torch 2.6, which has no reader.

    It refuses to disable hooks that are there.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("asking for hooks"):
            return False
    except RuntimeError:
        return True


def only_reverse_mode() -> bool:
    """Whether reverse-mode autograd is the only differentiation: no torch.func, no forward mode.

    An autograd function serves neither without rules of its own, and there is no public way to
    ask whether one of them is active.
    """
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation follows one of these.

    Outside of it the public way to ask would cost every forward some microseconds.
    """
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level >= 0
        and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    )


def is_batch_of_gradients(grad: Tensor) -> bool:
    """Whether a backward gets many gradients at once, by ``is_grads_batched``.

    It says so to no one: the tensor looks like one gradient.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def intercepted() -> bool:
    """Whether operators are recorded, transformed or run without values.

    By function transforms (vmap, grad), torch.jit.trace, make_fx and fake tensors. What Python
    computes from a tensor's values escapes them. None can be asked for by a public name.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch._C._is_tracing() or recorded()
    )


def recorded() -> bool:
    """Whether make_fx, fake tensors or functionalization are among the dispatch modes."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(
        torch._C._get_dispatch_mode(key) is not None
        for key in (keys.PROXY, keys.FAKE, keys.FUNCTIONAL)
    )


def functionalized() -> bool:
    """Whether torch.func.functionalize is among the transforms, which have no public list.

    It takes no operator that writes to its arguments, but for torch's own.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(layer.key() == functorch.TransformType.Functionalize for layer in stack)


def functionalized_around(tensor: Tensor) -> Any | None:
    """Return torch's interface to functionalize where it runs this and does not follow a tensor.

    It follows the function's arguments alone, and the function may not write to other tensors. The
    interface goes below: unwrap_tensors, redispatch_to_next, wrap_tensors.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return None
    functorch = torch._C._functorch
    top = functorch.peek_interpreter_stack()
    if top.key() != functorch.TransformType.Functionalize:
        return None
    if functorch.maybe_get_level(tensor) == top.level():
        return None
    from torch._functorch.pyfunctorch import FunctionalizeInterpreter
    from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

    return FunctorchFunctionalizeAPI(FunctionalizeInterpreter(top))


def differentiated(operator: Callable[..., Any], rules: type[Function]) -> Callable[..., Any]:
    """Return a kernel for the dispatcher that gives an operator the backward of a function.

    torch calls it once for each level of derivatives, torch.func's among them. The kernel of
    torch.library.register_autograd is for a single one, and torch.func refuses it; an autograd
    function by itself is refused by torch.func.functionalize.

    Args:
        operator: takes and returns tensors, or a tensor.
        rules: its setup_context and backward are used.
    """
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    class OneLevel(_SingleLevelFunction):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)

        setup_context = staticmethod(rules.setup_context)
        backward = staticmethod(rules.backward)

    def kernel(*arguments: Any) -> Any:
        with enable_single_level_autograd_function():
            return OneLevel.apply(*arguments)  # type: ignore[attr-defined]

    return kernel


def constant(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel for the dispatcher that runs an operator without recording gradients.

    Without a kernel torch leaves autograd on inside the operator, and what it returns or writes
    to would get a gradient. No public registration switches that off at every level of torch.func.
    """

    def kernel(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return kernel


def unseen() -> AbstractContextManager[object]:
    """Hide operators from dispatch modes that run each of them as it is.

    Selective checkpointing is one: it hands saved tensors out by the count of each operator, and
    refuses those that were written to later. The count of what a layer does beside its
    normalization is none of its concern. There is no public way out of a mode.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return _NOTHING
    return _NOTHING if recorded() else _disable_current_modes()


def outside_modes() -> AbstractContextManager[object]:
    """Run operators on real values, outside of recording and fake modes: see :func:`unseen`."""
    return _disable_current_modes()


_NOTHING = nullcontext()


def on_host(tensor: Tensor) -> bool:
    """Whether Python may read a tensor's values at no cost: on CPU, no mode or transform active."""
    return (
        not torch.compiler.is_compiling()  # first: in a backward torch 2.6 compiles no is_cpu
        and type(tensor) is Tensor
        and tensor.is_cpu
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def is_mutable(operator: Any) -> bool:
    """Whether an operator writes to arguments. Only its schema knows, and no public name has it."""
    return bool(operator._schema.is_mutable)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether something runs after a module's forward: hooks, or a forward put in its place."""
    return bool(module._forward_hooks) or "forward" in vars(module)


def add_unnumbered_hooks(
    module: nn.Module, key: Any, before: Callable[..., Any], after: Callable[..., Any]
) -> None:
    """Add hooks before and after a module's forward, the second also after one that fails.

    The public functions number all hooks of the process, and compiled code remembers the number.
    """
    module._forward_pre_hooks[key] = before
    module._forward_hooks[key] = after
    module._forward_hooks_always_called[key] = True


def remove_unnumbered_hooks(module: nn.Module, key: Any) -> None:
    """Remove what :func:`add_unnumbered_hooks` has added, if it is there."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        hooks.pop(key, None)
    module._forward_hooks_always_called.pop(key, None)


def version(tensor: Tensor) -> float:
    """Return autograd's count of the writes to a tensor, which has no public reader.

    Inference tensors count none: NaN, which equals no other.
    """
    return float("nan") if tensor.is_inference() else tensor._version


def apart_from_other_readers(loader: Any) -> Any:
    """Return a loader of the same batches that can be read without disturbing a loop over this one.

    A DataLoader with persistent workers keeps one iterator. A second loop over it starts that
    iterator again, and the first loop ends with what its workers had already sent (12 of 24
    samples). No public name shows whether a loop is underway, or gives an iterator of one's own. A
    copy has workers of its own, which end with it.
    """
    iterator = vars(loader).get("_iterator") if isinstance(loader, DataLoader) else None
    if iterator is None or iterator._rcvd_idx >= iterator._send_idx:
        return loader
    mine = copy.copy(loader)
    mine._iterator = None
    return mine
