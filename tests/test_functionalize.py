"""torch.func.functionalize of a training step: the same outputs, gradients and state."""

import copy

import pytest
import torch
from torch.func import functional_call, functionalize, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from cases import PLAIN, each_family

SHORT = {"window": 3, "warmup": 1, "renorm_warmup": 2}
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [1] * 5, [0] * 5]).bool()
each_mask = pytest.mark.parametrize("mask", [None, MASK], ids=["all values", "masked"])


def of(family):
    options = SHORT if family.name == "moving_average" else {}
    layer = family.make(1, **options, dtype=torch.float64)  # orders of summation differ
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def state_of(layer):
    return {k: v.detach() for k, v in layer.named_parameters()}, dict(layer.named_buffers())


def batches(count=6, members=()):
    scale = torch.arange(1.0, count + 1).view(-1, *[1] * (3 + len(members)))
    return torch.randn(count, *members, 4, 3, 5, dtype=torch.float64) * scale


def loss_of(layer, mask):
    def loss(weights, buffers, x):
        output = functional_call(layer, (weights, buffers), (x,) if mask is None else (x, mask))
        return output.pow(3).sum(), output

    return loss


def eager_step(layer, x, mask):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x) if mask is None else layer(x, mask)
    output.pow(3).sum().backward()
    return {k: v.grad for k, v in layer.named_parameters()}, x.grad, output.detach()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, equal_nan=True)


@each_family
@each_mask
@pytest.mark.parametrize("traced", [False, True], ids=["run", "make_fx"])
@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_a_functionalized_step_is_the_layers(family, mask, traced, remove):
    layer = of(family)
    twin, xs = copy.deepcopy(layer), batches()
    xs[3, 0, 0, 0] = torch.inf  # a batch that moves nothing
    weights, buffers = state_of(layer)
    step = functionalize(grad(loss_of(layer, mask), argnums=(0, 2), has_aux=True), remove=remove)
    if traced:
        example = copy.deepcopy(buffers)
        step = make_fx(step)(weights, example, xs[0])
    for x in xs:
        (gradients, grad_x), output = step(weights, buffers, x)
        close((gradients, grad_x, output), eager_step(twin, x, mask))
        close(layer.state_dict(), twin.state_dict())


@each_family
@each_mask
def test_a_functionalized_forward_has_the_layers_backward(family, mask):
    layer = of(family)
    twin, buffers = copy.deepcopy(layer), dict(layer.named_buffers())
    forward = functionalize(loss_of(layer, mask))
    for x in batches():
        layer.zero_grad()
        mine = x.clone().requires_grad_()
        loss, output = forward(dict(layer.named_parameters()), buffers, mine)
        loss.backward()
        found = {k: v.grad for k, v in layer.named_parameters()}, mine.grad, output.detach()
        close(found, eager_step(twin, x, mask))
        close(layer.state_dict(), twin.state_dict())


@each_family
@each_mask
def test_the_gradient_of_a_functionalized_loss_is_the_layers(family, mask):
    layer = of(family)
    twin = copy.deepcopy(layer)
    weights, buffers = state_of(layer)
    step = grad(functionalize(loss_of(layer, mask)), argnums=(0, 2), has_aux=True)
    for x in batches():
        (gradients, grad_x), output = step(weights, buffers, x)
        close((gradients, grad_x, output), eager_step(twin, x, mask))
        close(layer.state_dict(), twin.state_dict())


# torch's own: it copies what a functionalized member of an ensemble wrote one by one
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_family
@pytest.mark.parametrize("outer", ["functionalize", "vmap"])
def test_a_functionalized_ensemble_is_a_loop_over_its_members(family, outer):
    layers = [of(family), of(family)]
    twins = copy.deepcopy(layers)
    weights, buffers = stack_module_state(layers)
    weights = {k: v.detach() for k, v in weights.items()}
    step = grad(loss_of(layers[0], None), argnums=(0, 2), has_aux=True)
    step = functionalize(vmap(step)) if outer == "functionalize" else vmap(functionalize(step))
    for x in batches(members=(2,)):
        (gradients, grad_x), output = step(weights, buffers, x)
        for i, twin in enumerate(twins):
            own = {k: v[i] for k, v in gradients.items()}
            close((own, grad_x[i], output[i]), eager_step(twin, x[i], None))
            close({k: v[i] for k, v in buffers.items()}, dict(twin.named_buffers()))


@each_family
@each_mask
@pytest.mark.parametrize("parameters", ["captured", "given"])
@pytest.mark.parametrize("traced", [False, True], ids=["run", "make_fx"])
def test_buffers_that_are_no_arguments_move_as_torchs_do(family, mask, parameters, traced):
    layer, xs = of(family), batches()
    twin = copy.deepcopy(layer)
    given, calls = state_of(layer)[0] if parameters == "given" else {}, []
    layer.register_forward_hook(lambda *_: calls.append("hook"))

    def forward(weights, x):
        return functional_call(layer, weights, (x,) if mask is None else (x, mask)) * 2

    step = functionalize(forward)
    if traced:
        step = make_fx(step)(given, xs[0])
        twin(xs[0], mask)
    for x in xs:
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        found, expected = step(given, mine), twin(theirs, mask) * 2
        close(found, expected)
        if not traced:  # a trace is of the operators of a forward
            found.pow(3).sum().backward()
            expected.pow(3).sum().backward()
            close(mine.grad, theirs.grad)
        close(layer.state_dict(), twin.state_dict())
    assert len(calls) == (1 if traced else len(xs))


def test_torchs_buffers_that_are_no_arguments_move_too():
    # what is promised: wherever nn.BatchNorm works
    layer = PLAIN[1](3)
    twin, x = copy.deepcopy(layer), torch.randn(4, 3, 5)
    close(functionalize(layer)(x), twin(x))
    close(layer.state_dict(), twin.state_dict())
