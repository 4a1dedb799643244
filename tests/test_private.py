"""torch's private names still mean what they are used for: these tests notice when they go."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bnstats import private


class Counting(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def seen_by(run):
    """What intercepted() says inside of something that calls a function of a tensor."""
    answers = []

    def function(x):
        answers.append(private.intercepted())
        return x * 2

    run(function, torch.ones(3))
    assert answers
    return answers[0]


def in_fake_mode(function, x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        function(x)


INTERCEPTING = {
    "fake tensors": in_fake_mode,
    "make_fx": lambda function, x: make_fx(function)(x),
    "vmap": lambda function, x: torch.vmap(function)(x),
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).sum())(x),
}


@pytest.mark.parametrize("run", INTERCEPTING.values(), ids=INTERCEPTING.keys())
def test_what_records_or_transforms_operators_is_noticed(run):
    assert seen_by(run)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_trace_is_noticed():
    assert seen_by(lambda function, x: torch.jit.trace(function, x, check_trace=False))


def test_plain_eager_code_is_not():
    assert not seen_by(lambda function, x: function(x))
    assert private.on_host(torch.ones(3))
    assert private.only_reverse_mode()


def test_a_mode_that_runs_operators_as_they_are_can_be_left():
    x = torch.ones(3)
    with Counting() as mode:
        assert not private.intercepted()
        assert not private.on_host(x)
        with private.unseen():
            assert private.on_host(x)
            x + 1
        assert mode.count == 0
        x + 1
        assert mode.count == 1


def test_make_fx_cannot():
    seen = []
    make_fx(lambda x: seen.append(private.unseen()) or x)(torch.ones(3))
    with seen[0]:
        assert private.on_host(torch.ones(3))  # nothing was to be left


def test_other_differentiation_than_reverse_mode_is_noticed():
    with forward_ad.dual_level():
        assert not private.only_reverse_mode()
    answers = []
    torch.func.grad(lambda x: answers.append(private.only_reverse_mode()) or x)(torch.ones(()))
    assert answers == [False]


def test_tangents_are_noticed():
    x = torch.ones(3)
    assert not private.has_tangent(x, None)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert private.has_tangent(None, x, dual)
        assert not private.has_tangent(x, None)
    answers = []
    torch.func.jvp(lambda y: answers.append(private.has_tangent(y)) or y, (x,), (x,))
    assert answers == [True]


def test_a_batch_of_gradients_is_noticed():
    answers = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(
        lambda grad: answers.append((private.is_batch_of_gradients(grad), private.on_host(grad)))
    )
    torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2, 3), is_grads_batched=True)
    assert answers == [(False, True), (True, False)]


def test_functionalize_is_noticed_under_other_transforms():
    answers = []

    def function(x):
        answers.append((private.functionalized(), private.functionalized_around(x) is not None))
        return x.sum()

    functionalize, grad, x = torch.func.functionalize, torch.func.grad, torch.ones(3)
    function(x)
    grad(function)(x)
    functionalize(function)(x)
    functionalize(grad(function))(x)
    assert answers == [(False, False), (False, False), (True, False), (True, False)]


def test_what_functionalize_does_not_follow_is_reached_below():
    x, outside = torch.ones(3), torch.zeros(3)

    def function(x):
        below = private.functionalized_around(outside)
        inner = below.unwrap_tensors(x)
        with below.redispatch_to_next():
            assert private.on_host(inner)
            outside.add_(inner)
        return below.wrap_tensors(inner * 2) + x

    assert torch.equal(torch.func.functionalize(function)(x), 3 * x)
    assert torch.equal(outside, x)


class Tripled(torch.autograd.Function):
    """The rules of an operator whose gradient is three times what it ought to be."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return 6 * ctx.saved_tensors[0] * grad


def test_an_operator_takes_its_backward_into_every_transform():
    with torch.library._scoped_library("bnstats_test", "FRAGMENT") as library:
        library.define("square(Tensor x) -> Tensor")
        library.impl("square", lambda x: x * x, "CompositeExplicitAutograd")
        square = torch.ops.bnstats_test.square
        library.impl("square", private.differentiated(square, Tripled), "Autograd")
        x = torch.tensor([2.0], requires_grad=True)
        expected = torch.tensor([12.0])
        square(x).sum().backward()
        assert torch.equal(x.grad, expected)
        grad, functionalize = torch.func.grad, torch.func.functionalize
        for transformed in (
            grad(lambda x: square(x).sum()),
            functionalize(grad(lambda x: square(x).sum())),
            grad(functionalize(lambda x: square(x).sum())),
        ):
            assert torch.equal(transformed(x.detach()), expected)


def test_writes_are_counted():
    x = torch.zeros(3)
    before = private.version(x)
    assert private.version(x) == before
    x.add_(1)
    assert private.version(x) != before
    with torch.inference_mode():
        y = torch.zeros(3)
    assert private.version(y) != private.version(y)


def may_be_checkpointed(run):
    answers = []

    def function(x):
        answers.append(private.may_be_checkpointed())
        return x * 2

    run(function, torch.ones(3, requires_grad=True))
    return answers


def test_a_forward_that_may_run_again_is_noticed():
    for reentrant in (True, False):
        answers = may_be_checkpointed(partial(checkpoint, use_reentrant=reentrant))
        assert answers == [True]
    assert may_be_checkpointed(lambda function, x: function(x)) == [False]


def test_hooks_are_noticed_without_torchs_reader_and_stay():
    # torch 2.6 has none.
    x, packed = torch.ones(3, requires_grad=True), []
    assert not private._has_saving_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda y: packed.append(y) or y, lambda y: y):
        assert private._has_saving_hooks()
        assert private._has_saving_hooks()
        x.exp()
    assert len(packed) == 1
    assert not private._has_saving_hooks()
    with torch.autograd.graph.disable_saved_tensors_hooks("disabled before"):
        assert not private._has_saving_hooks()
        with pytest.raises(RuntimeError, match="disabled before"), save_on_cpu():
            pass
    with save_on_cpu():
        assert private._has_saving_hooks()
