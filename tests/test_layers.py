"""What every layer promises, on every family: one row in cases.FAMILIES, and it is held to it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cases
from bnstats.private import in_backward_pass
from cases import assert_state, each_family, each_shape, normalizing_as_torch, state


def forward_backward(layer, x, grad):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    output.backward(grad)
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    return [output.detach(), x.grad, *grads]


@normalizing_as_torch
@each_shape
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_output_and_gradients_are_those_of_torch(family, shape, channels_last):
    dims, size = shape
    layer, plain = family.make(dims), cases.PLAIN[dims](3)
    with torch.no_grad():
        for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
            p.copy_(q.copy_(torch.randn(3)))
    for x in cases.batches(size):
        if channels_last and dims > 1:
            formats = {2: torch.channels_last, 3: torch.channels_last_3d}
            x = x.contiguous(memory_format=formats[dims])
        grad = torch.randn_like(x)
        mine, torchs = forward_backward(layer, x, grad), forward_backward(plain, x, grad)
        for a, b in zip(mine, torchs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            assert a.stride() == b.stride()


@each_family
def test_synchronized_without_initialized_processes_it_works_as_one(family):
    layer, twin = family.make(2, sync=True), family.make(2)
    for x in cases.batches((4, 3, 5, 5)):
        grad = torch.randn_like(x)
        mine, alone = forward_backward(layer, x, grad), forward_backward(twin, x, grad)
        assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))
    assert_state(layer, state(twin))


@each_family
@each_shape
def test_evaluation_is_exactly_torchs_batch_norm(family, shape):
    dims, size = shape
    layer = family.make(dims)
    for x in cases.batches(size):
        layer(x)
    layer.eval()
    before = state(layer)
    expected = F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0, layer.eps
    )
    assert torch.equal(layer(x), expected)
    assert_state(layer, before)


@each_family
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_each_class_is_an_instance_of_torchs(family, dims):
    layer = family.make(dims)
    assert isinstance(layer, cases.PLAIN[dims])
    assert isinstance(layer, family.base)
    plain_keys = [*cases.PLAIN[dims](3).state_dict()]
    assert [key for key in layer.state_dict() if key in plain_keys] == plain_keys


@each_family
@each_shape
def test_the_base_class_takes_any_number_of_dimensions(family, shape):
    dims, size = shape
    base, layer = family.base(3, **family.options), family.make(dims)
    for x in cases.batches(size):
        assert torch.equal(base(x), layer(x))
    assert_state(base, state(layer))


@each_family
def test_a_plain_checkpoint_loads_strictly(family):
    plain = nn.Sequential(nn.BatchNorm2d(3, affine=True))
    plain(torch.randn(8, 3, 4, 4))
    model = nn.Sequential(family.make(2))
    with torch.no_grad():
        plain[0].running_mean.zero_()  # what every family can evaluate with
    model.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@each_family
def test_a_checkpoint_without_the_layer_is_still_refused(family):
    with pytest.raises(RuntimeError, match=r"Missing key.*running_mean"):
        nn.Sequential(family.make(2)).load_state_dict({}, strict=True)


@each_family
@pytest.mark.parametrize("own", [True, False], ids=["own checkpoint", "plain checkpoint"])
def test_a_layer_on_meta_takes_a_checkpoint_over(family, own):
    source = family.make(2) if own else nn.BatchNorm2d(3)
    layer, meta = family.make(2), family.make(2, device="meta")
    layer.load_state_dict(source.state_dict())
    meta.load_state_dict(source.state_dict(), assign=True)
    assert not any(buffer.is_meta for buffer in meta.buffers())
    for x in cases.batches((4, 3, 5, 5)):
        assert torch.equal(meta(x), layer(x))
    assert_state(meta, state(layer))


@each_family
def test_resuming_in_mid_training_goes_on_identically(family):
    data = cases.batches((4, 3, 5, 5), 8)
    straight, first = family.make(2), family.make(2)
    for x in data:
        straight(x)
    for x in data[:4]:
        first(x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = family.make(2)
    resumed.load_state_dict(torch.load(file))
    for x in data[4:]:
        resumed(x)
    assert_state(resumed, state(straight))


@each_family
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_equal_and_independent(family, clone):
    layer = family.make(2)
    data = cases.batches((4, 3, 5, 5), 4)
    for x in data[:2]:
        layer(x)
    twin = clone(layer)
    before = state(layer)
    for x in data[2:]:
        twin(x)
    assert_state(layer, before)
    for x in data[2:]:
        layer(x)
    assert_state(twin, state(layer))
    assert repr(twin) == repr(layer)


@each_family
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("compiled", [False, True], ids=["host", "device"])
def test_a_batch_that_is_not_finite_changes_nothing(family, value, compiled):
    # nn.BatchNorm stays NaN: https://github.com/pytorch/pytorch/issues/88474
    layer = family.make(2)
    good, bad = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    bad[0, 1, 0, 0] = value
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    run(good)
    before = state(layer)
    run(bad)
    assert_state(layer, before)


@each_family
def test_a_batch_of_no_values_changes_nothing_and_backpropagates_as_torchs(family):
    layer, x = family.make(2), torch.empty(0, 3, 4, 4, requires_grad=True)
    layer(torch.randn(4, 3, 4, 4))
    before = state(layer)
    output = layer(x)
    output.sum().backward()
    assert output.shape == x.shape == x.grad.shape
    assert_state(layer, before)


@each_family
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_moves_the_statistics_once_per_step(family, use_reentrant):
    # https://github.com/pytorch/pytorch/issues/96136: nn.BatchNorm's move twice.
    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 3, 3), family.make(2), nn.ReLU(), nn.Conv2d(3, 2, 3))

    plain, checkpointed = model(), model()
    for x in cases.batches((4, 3, 7, 7), 3):
        x.requires_grad_()
        plain(x).square().sum().backward()
        checkpoint(checkpointed, x, use_reentrant=use_reentrant).square().sum().backward()
        for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert_state(checkpointed, state(plain))


def test_torch_still_tells_a_recomputation_from_a_forward():
    seen = []

    def function(x):
        seen.append(in_backward_pass())
        return x.sin()

    for use_reentrant in (False, True):
        x = torch.randn(3, requires_grad=True)
        checkpoint(function, x, use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, True, False, True]


@each_family
def test_autocast_keeps_statistics_in_float32(family):
    layer, twin = family.make(2), family.make(2)
    for x in cases.batches((4, 3, 6, 6), dtype=torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
        assert output.dtype == torch.bfloat16
        twin(x.float())
    assert layer.running_var.dtype == torch.float32
    # The values are the same; only the kernels' order of summation may differ.
    torch.testing.assert_close(layer.running_var, twin.running_var, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, twin.running_mean, rtol=1e-5, atol=1e-5)


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_a_half_precision_layer_trains(family, dtype, affine):
    layer = family.make(2, affine=affine).to(dtype)
    twin = family.make(2, affine=affine)
    for x in cases.batches((4, 3, 6, 6), dtype=dtype):
        x.requires_grad_()
        output = layer(x)
        output.sum().backward()
        twin(x.detach().float())
    assert output.dtype == x.grad.dtype == layer.running_mean.dtype == dtype
    # Each of the five updates rounds the buffer once, to half a unit in its last place.
    tolerance = 5 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        layer.running_var.float(), twin.running_var, rtol=tolerance, atol=tolerance
    )


@each_family
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_makes_one_graph_with_the_same_results(family, backend):
    torch.compiler.reset()  # it counts what other tests have compiled
    plain, compiled = family.make(2), family.make(2)
    run = torch.compile(compiled, backend=backend, fullgraph=True)
    for x in cases.batches((4, 3, 5, 5), 3):
        grad = torch.randn_like(x)
        for layer, call in ((plain, plain), (compiled, run)):
            layer.zero_grad()
            layer.output = call(x)
            layer.output.backward(grad)
        torch.testing.assert_close(compiled.output, plain.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@each_family
def test_a_checkpoint_around_compiled_code_moves_the_statistics_once(family):
    torch.compiler.reset()
    plain, compiled = family.make(2), family.make(2)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for x in cases.batches((4, 3, 5, 5), 3):
        plain(x)
        checkpoint(run, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(compiled, name), getattr(plain, name))


@pytest.mark.parametrize("family", cases.FAMILIES[:2], ids=lambda family: family.name)
def test_a_training_layer_is_exported_in_torchs_operators_alone(family):
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch does not say that it exports")
    program = torch.export.export(family.make(2), (torch.randn(4, 3, 5, 5),))
    assert not [node for node in program.graph.nodes if "bnstats" in str(node.target)]


@each_family
def test_a_training_layer_is_exported_without_graphs_inside_of_its_graph(family):
    # Which torch.distributed.pipelining does not take.
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch does not say that it exports")
    program = torch.export.export(family.make(2), (torch.randn(4, 3, 5, 5),))
    assert [*program.graph_module.children()] == []


@each_family
def test_without_affine_there_are_no_parameters(family):
    layer = family.make(1, affine=False)
    assert not [*layer.parameters()]
    assert layer(torch.randn(8, 3)).shape == (8, 3)


@each_family
def test_buffers_stay_the_same_tensors(family):
    layer = family.make(1)
    before = dict(layer.named_buffers())
    for x in cases.batches((8, 3)):
        layer(x)
    layer.reset_running_stats()
    for name, buffer in layer.named_buffers():
        assert buffer is before[name]


@each_family
def test_reset_forgets_everything(family):
    layer = family.make(1)
    fresh = state(layer)
    for x in cases.batches((8, 3)):
        layer(x)
    layer.reset_running_stats()
    assert_state(layer, fresh)


@each_family
def test_double_precision_layers_keep_double_statistics(family):
    layer = family.make(2, dtype=torch.float64)
    assert layer(torch.randn(4, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64
    assert layer.running_var.dtype == torch.float64


@each_family
def test_state_is_linear_in_the_channels(family):
    def numbers(channels):
        return sum(b.numel() for b in family.make(2, num_features=channels).buffers())

    assert numbers(128) - numbers(64) == 2 * (numbers(64) - numbers(32))


@each_family
def test_frozen_statistics_do_not_move(family):
    # Fine-tuning with .eval() on the layer, the usual way to freeze it.
    model = nn.Sequential(nn.Linear(3, 3), family.make(1))
    model.train()
    model[1].eval()
    before = state(model[1])
    model(torch.randn(8, 3)).sum().backward()
    assert_state(model[1], before)
    assert model[1].weight.grad is not None
