"""Masks beside what else torch does to a layer: layouts, autocast, tracing, NaN, transforms."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import bnstats
from cases import FAMILIES, each_family, normalizing_as_torch
from test_masks import VALID, make

EXTREMES = {
    "nan": torch.nan,
    "inf": torch.inf,
    "-inf": -torch.inf,
    "least": torch.finfo(torch.float32).min,
}


def valid_of(x, mask=VALID):
    """The values at valid positions, of shape (values, C)."""
    return x.movedim(1, -1)[mask]


def step(layer, x, mask=VALID, run=None):
    """Output, gradients and state of one training step of which valid outputs are the loss."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, mask=mask) if run is None else run(layer, x, mask)
    valid_of(y, mask).to(torch.promote_types(y.dtype, torch.float32)).pow(3).sum().backward()
    grads = [parameter.grad for parameter in layer.parameters()]
    return valid_of(y, mask).detach(), x.grad, *grads, *(b.clone() for b in layer.buffers())


def assert_same(found, expected, **tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


WAYS = {
    "eager": None,
    "checkpoint": lambda layer, x, mask: checkpoint(layer, x, mask, use_reentrant=False),
    "reentrant checkpoint": lambda layer, x, mask: checkpoint(layer, x, mask, use_reentrant=True),
    "compiled": lambda layer, x, mask: torch.compile(layer, backend="aot_eager", fullgraph=True)(
        x, mask
    ),
}


@pytest.fixture
def many_graphs():
    """Torch keeps few graphs of one forward; all of these tests compile the same one."""
    with torch._dynamo.config.patch(cache_size_limit=64):
        yield


@each_family
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.usefixtures("many_graphs")
def test_padding_of_any_value_spoils_no_gradient(family, value, way):
    # Attention leaves NaN where a query has nothing to attend to, and masked_fill the least number.
    layer, twin = make(family), make(family)
    for _ in range(4):
        x = torch.randn(4, 3, 7)
        spoiled = torch.where(VALID.unsqueeze(1), x, value)
        assert_same(step(layer, spoiled, run=WAYS[way]), step(twin, x), rtol=1e-5, atol=1e-5)


@normalizing_as_torch
def test_padding_that_is_not_finite_spoils_no_second_derivative(family):
    layer, x = make(family, dtype=torch.float64), torch.randn(4, 3, 7, dtype=torch.float64)
    twice = []
    for own in (torch.where(VALID.unsqueeze(1), x, torch.nan), x):
        own.requires_grad_()
        loss = valid_of(copy.deepcopy(layer)(own, VALID)).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, own, create_graph=True)
        twice.append(torch.autograd.grad(valid_of(grad).pow(2).sum(), own)[0])
    torch.testing.assert_close(*twice)


def test_many_gradients_at_once_are_those_of_one_after_the_other():
    layer, x = make(FAMILIES[0]), torch.randn(4, 3, 7)
    x[~VALID.unsqueeze(1).expand_as(x)] = torch.nan
    y = layer(x.requires_grad_(), VALID)
    grads = torch.randn(5, *y.shape) * VALID.unsqueeze(1)
    (together,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(together, torch.stack(apart))


@each_family
def test_values_that_are_not_finite_and_count_are_seen_in_the_gradients(family):
    x = torch.randn(4, 3, 7)
    x[0, 1, 0] = torch.nan
    grad = step(make(family), x)[1]
    assert valid_of(grad)[:, 1].isnan().all()
    assert valid_of(grad)[:, ::2].isfinite().all()


@each_family
def test_masked_values_are_a_batch_of_those_values_alone(family):
    layer = make(family, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    for t in range(6):
        x = torch.randn(4, 3, 7, dtype=torch.float64) * (1 + t) + t
        output, grad, *others = step(layer, x)
        alone = valid_of(x).clone().requires_grad_()  # (values, C): no positions
        twin.zero_grad()
        expected = twin(alone)
        expected.pow(3).sum().backward()
        rest = [p.grad for p in twin.parameters()], twin.buffers()
        assert_same((output, valid_of(grad), *others), (expected, alone.grad, *rest[0], *rest[1]))
        assert not valid_of(grad, ~VALID).any()


@each_family
@pytest.mark.parametrize(
    ("dims", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)], ids=["2d", "3d"]
)
def test_layouts_stay_and_give_the_same(family, dims, layout):
    layer = family.make(dims, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    shape = (4, 3, 5, 6, 4)[: 2 + dims]
    for _ in range(3):
        x, mask = torch.randn(shape, dtype=torch.float64), torch.rand(4, *shape[2:]) < 0.6
        there = x.to(memory_format=layout)
        assert layer(there, mask).is_contiguous(memory_format=layout)
        twin(x, mask)
        found = step(layer, there, mask)
        assert found[1].is_contiguous(memory_format=layout)
        assert_same(found, step(twin, x, mask))
    strided = torch.randn(3, 4, *shape[2:], dtype=torch.float64).transpose(0, 1)
    assert_same(step(layer, strided, mask), step(twin, strided.contiguous(), mask))


@each_family
@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_under_autocast_statistics_are_as_precise_as_without(family, mean):
    layer, twin = make(family), make(family)
    x = torch.randn(4, 3, 7, dtype=torch.float64).mul(30).add(mean).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, VALID)
    torch.testing.assert_close(found, twin(x, VALID))
    for name, value in layer.named_buffers():
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if "error" not in name else {}
        torch.testing.assert_close(value, twin.get_buffer(name), msg=name, **tolerance)


@each_family
def test_a_half_model_under_autocast_trains_with_a_mask(family):
    model = nn.Sequential(nn.Conv1d(3, 3, 1), make(family))
    x = torch.randn(4, 3, 7)
    with torch.autocast("cpu", torch.bfloat16), bnstats.masked(model, VALID):
        y = model(x)
        assert y.dtype == torch.bfloat16
        valid_of(y).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@each_family
def test_a_trace_by_make_fx_normalizes_what_it_is_given_and_moves_the_state(family):
    layer = make(family, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    traced = make_fx(lambda x, mask: layer(x, mask))(
        torch.randn(4, 3, 7, dtype=torch.float64), VALID
    )
    layer.load_state_dict(twin.state_dict())  # tracing runs the step
    for shift in range(3):
        x, mask = torch.randn(4, 3, 7, dtype=torch.float64), VALID.roll(shift, 0)
        torch.testing.assert_close(traced(x, mask), twin(x, mask))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


# torch 2.6's own: it warns of a constant that it lifted itself
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node with no underlying")
@pytest.mark.filterwarnings("ignore:Node .*_number_tensor target .* does not reference")
@each_family
def test_an_exported_layer_takes_a_mask(family):
    layer, x = make(family), torch.randn(4, 3, 7)
    expected = copy.deepcopy(layer)(x, VALID)
    exported = torch.export.export(layer, (x, VALID)).module()
    torch.testing.assert_close(exported(x, VALID), expected)


@each_family
def test_a_default_device_is_none_of_a_masked_forwards_concern(family):
    layer, twin, x = make(family), make(family), torch.randn(4, 3, 7)
    expected = step(twin, x)
    with torch.device("meta"):
        found = step(layer, x)
    assert_same(found, expected)
    there = make(family, device="meta")
    assert there(x.to("meta"), VALID.to("meta")).device.type == "meta"


@each_family
def test_a_copy_made_inside_the_context_takes_any_input(family):
    model = nn.Sequential(make(family))
    with bnstats.masked(model, VALID):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in copies:
        one(torch.randn(2, 3, 5))


@each_family
def test_masks_of_every_batch_run_the_same_compiled_code(family):
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    model = nn.Sequential(nn.Conv1d(2, 3, 1), make(family))
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    for _ in range(4):
        with bnstats.masked(compiled, torch.rand(4, 7) < 0.7):
            compiled(torch.randn(4, 2, 7))
    assert frames.frame_count == 1


def test_layers_without_running_statistics_take_masks():
    x = torch.randn(4, 3, 7)
    plain = nn.BatchNorm1d(3, track_running_stats=False)
    for cls in (bnstats.EMABatchNorm1d, bnstats.CumulativeBatchNorm1d, bnstats.RenormBatchNorm1d):
        layer = cls(3, track_running_stats=False)
        for training in (True, False):
            found = layer.train(training)(x, VALID)
            torch.testing.assert_close(valid_of(found), plain(valid_of(x)))


@each_family
@pytest.mark.parametrize("way", ["compiled", "vmap"])
def test_where_a_batch_of_padding_alone_cannot_be_refused_it_moves_nothing(family, way):
    # As on a device, where the host would have to wait to know.
    torch._dynamo.reset()
    layer, nothing = make(family), torch.zeros(4, 7, dtype=torch.bool)
    for _ in range(3):
        layer(torch.randn(4, 3, 7))
    x = torch.randn(4, 3, 7).requires_grad_()
    if way == "compiled":
        before, after = copy.deepcopy(layer.state_dict()), layer.state_dict()
        output = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, nothing)
        output.square().sum().backward()
        assert x.grad.abs().max() < 100
    else:
        parameters, after = torch.func.stack_module_state([layer, layer])
        before = copy.deepcopy(after)
        output = torch.vmap(lambda *state: torch.func.functional_call(layer, state, (x, nothing)))(
            parameters, after
        )
    assert output.abs().max() < 100
    for key, value in after.items():
        assert torch.equal(value, before[key]), key
