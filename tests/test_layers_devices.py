"""Layers on a second device: the CPU's numbers, and a host that never waits.

What a GPU runs is another branch than the CPU's: tensors in place of numbers. It runs here on the
substitute device, and on CUDA where there is one.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
import cases
from cases import FAMILIES, each_family, each_shape
from moving_average import SHORT

STEPS = 30  # the phases of SHORT: window from 5, warm from 12, renormalized from 26
IMAGES = (4, 3, 5, 6)
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
COMMON = [
    {},
    {"momentum": None},
    {"momentum": 1.0},
    {"momentum": 0.0},
    {"affine": False},
    {"bias": False},
    {"eps": 1e-2},
]
OPTIONS = {
    "ema": [{"debias": False}, {"pooled": False}, {"debias": False, "pooled": False}],
    "cumulative": [],
    "moving_average": [
        {"window": 1, "warmup": 0, "renorm_warmup": 0},
        {"max_ratio": 1.01},
    ],
    "renorm": [
        {"debias": False},
        {"pooled": False},
        {"max_ratio": 1.1, "max_shift": 0.1},
    ],
}
each_option = pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(family, options, id=f"{family.name}, {options or 'default'}")
        for family in FAMILIES
        for options in [*COMMON, *OPTIONS[family.name]]
    ],
)


def make(family, dims=2, dtype=torch.float32, **options):
    schedule = SHORT if family.name == "moving_average" else {}
    layer = family.make(dims, dtype=dtype, **{**schedule, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(3))
    return layer


def on(device, module):
    return copy.deepcopy(module).to(device)


def data(shape=IMAGES, count=STEPS, dtype=torch.float32):
    """Inputs and gradients; two batches are not finite."""
    inputs = cases.batches(shape, count, shift=0.05, dtype=dtype)
    for bad in (0, 7):
        inputs[bad].view(-1)[0] = torch.nan
    return [(x, torch.randn(shape).to(dtype)) for x in inputs]


def step(module, x, grad, run=None):
    """Train for a step on the module's device; return output and gradients."""
    device = next(iter(module.state_dict().values())).device
    x = x.to(device).detach().requires_grad_()
    output = module(x) if run is None else run(module, x)
    module.zero_grad()
    output.backward(grad.to(device, output.dtype))
    return [output.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_close(mine, expected, dtype=torch.float32, factor=1):
    tolerance = TOLERANCES[dtype] * factor
    for a, b in zip(mine, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_buffers(module, expected, dtype=torch.float32):
    """All buffers agree, of counters every bit; those that no state dict has too."""
    theirs = dict(expected.named_buffers())
    for name, buffer in module.named_buffers():
        assert_close([buffer], [theirs[name]], dtype)
        if not buffer.is_floating_point():
            assert torch.equal(buffer.cpu(), theirs[name].cpu()), name


def assert_trains_alike(module, expected, pairs, dtype=torch.float32, run=None):
    for x, grad in pairs:
        assert_close(step(module, x, grad, run), step(expected, x, grad), dtype)
        assert_buffers(module, expected, dtype)


def assert_evaluates_alike(module, expected, x, dtype=torch.float32):
    device = next(iter(module.state_dict().values())).device
    module.eval(), expected.eval()
    assert_close([module(x.to(device))], [expected(x)], dtype)
    module.train(), expected.train()


@each_option
def test_training_and_evaluation_are_those_on_cpu(device, family, options):
    here = make(family, **options)
    there = on(device, here)
    pairs = data()
    assert_trains_alike(there, here, pairs)
    assert_evaluates_alike(there, here, pairs[1][0])


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name != "moving_average"], ids=lambda f: f.name
)
def test_a_layer_without_running_statistics_is_that_on_cpu(device, no_waits, family):
    here = family.make(2, track_running_stats=False)
    there = on(device, here)
    for x, grad in data(count=8):
        assert_close(step(there, x, grad), step(here, x, grad))
    assert_evaluates_alike(there, here, x)
    x, grad = x.to(device).requires_grad_(), grad.to(device)
    with no_waits():
        there(x).backward(grad)


@each_family
@each_shape
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_shape_and_dtype_trains_as_on_cpu(device, family, shape, dtype):
    dims, size = shape
    here = make(family, dims, dtype)
    there = on(device, here)
    pairs = data(size, dtype=dtype)
    assert_trains_alike(there, here, pairs, dtype)
    assert_evaluates_alike(there, here, pairs[1][0], dtype)


@each_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_statistics_of_half_inputs_are_those_on_cpu(device, family, dtype):
    here = make(family)
    model = on(device, nn.Sequential(nn.Conv2d(3, 3, 1), here))
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().cpu()))
    for x, grad in data():
        with torch.autocast(device.type, dtype=dtype):
            output, *_ = step(model, x, grad)
        assert seen[-1].dtype == output.dtype == dtype
        assert_close([output], step(here, seen[-1], grad.to(dtype))[:1], dtype)
    for name, buffer in model[1].named_buffers():
        if name != "window_gradients":  # averages of half numbers
            assert_close([buffer], [here.get_buffer(name)])


@each_family
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_that_a_checkpoint_runs_again_moves_nothing(
    device, no_waits, family, use_reentrant
):
    def run(module, x):
        return checkpoint(module, x, use_reentrant=use_reentrant)

    here = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), make(family), nn.ReLU())
    there = on(device, here)
    assert_trains_alike(there, here, data(), run=run)
    x = torch.randn(IMAGES, device=device, requires_grad=True)
    with no_waits():
        run(there, x).sum().backward()


@each_family
def test_forwards_may_come_before_their_backwards(device, family):
    here = make(family)
    there = on(device, here)
    pairs = data()
    for (x, grad), (y, other) in zip(pairs[::2], pairs[1::2], strict=True):
        results = []
        for layer, where in ((here, "cpu"), (there, device)):
            inputs = [i.to(where).detach().requires_grad_() for i in (x, y)]
            first, second = map(layer, inputs)
            layer.zero_grad()
            first.backward(grad.to(where))
            second.backward(other.to(where))
            results.append([i.grad for i in (*inputs, *layer.parameters())])
        assert_close(*results)
        assert_buffers(there, here)


@each_family
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_accumulate_as_on_cpu(device, no_waits, family, use_reentrant):
    here = make(family)
    there = on(device, here)
    pairs = data()
    for start in range(0, STEPS, 3):
        here.zero_grad()
        there.zero_grad()
        for x, grad in pairs[start : start + 3]:
            for layer, where in ((here, "cpu"), (there, device)):
                x = x.to(where).detach().requires_grad_()
                if use_reentrant is None or layer is here:
                    output = layer(x)
                else:
                    output = checkpoint(layer, x, use_reentrant=use_reentrant)
                output.backward(grad.to(where))
        assert_close([p.grad for p in there.parameters()], [p.grad for p in here.parameters()])
        assert_buffers(there, here)
    inputs = [(x.to(device).requires_grad_(), grad.to(device)) for x, grad in pairs[1:4]]
    with no_waits():
        for x, grad in inputs:
            output = (
                there(x)
                if use_reentrant is None
                else checkpoint(there, x, use_reentrant=use_reentrant)
            )
            output.backward(grad)


@each_family
@pytest.mark.parametrize("halves", ["two devices", "first on CPU", "last on CPU"])
def test_a_network_over_two_devices_trains_as_on_cpu(device, family, halves):
    first = second = torch.device(device.type, 0)
    if halves == "two devices":
        if torch.accelerator.device_count() < 2:
            pytest.skip(f"needs two {device.type} devices")
        second = torch.device(device.type, 1)
    elif halves == "first on CPU":
        first = torch.device("cpu")
    else:
        second = torch.device("cpu")
    here = nn.ModuleList([make(family), make(family)])
    there = nn.ModuleList([on(first, here[0]), on(second, here[1])])
    for x, grad in data():
        gradients = []
        for model in (here, there):
            model.zero_grad()
            x = x.detach().requires_grad_()
            where = model[0].weight.device, model[1].weight.device
            y = model[1](model[0](x.to(where[0])).relu().to(where[1]))
            y.backward(grad.to(where[1]))
            gradients.append([x.grad, *(p.grad for p in model.parameters())])
        assert_close(*reversed(gradients), factor=10)  # what two layers round
    assert {tensor.device for tensor in there[0].state_dict().values()} == {first}
    assert {tensor.device for tensor in there[1].state_dict().values()} == {second}


CENTERED = {
    "conv1d": (lambda: bnstats.CenteredConv1d(3, 4, 2), (2, 3, 5)),
    "conv2d": (lambda: bnstats.CenteredConv2d(3, 4, 2), (2, 3, 5, 4)),
    "conv3d": (lambda: bnstats.CenteredConv3d(3, 4, 2), (2, 3, 5, 4, 3)),
    "linear": (lambda: bnstats.CenteredLinear(3, 4), (2, 3)),
}


@pytest.mark.parametrize(("new", "shape"), CENTERED.values(), ids=CENTERED.keys())
def test_centered_layers_are_those_on_cpu_and_wait_for_nothing(device, no_waits, new, shape):
    here = new()
    there = on(device, here)
    x = torch.randn(shape)
    grad = torch.randn_like(here(x))
    assert_close(step(there, x, grad), step(here, x, grad))
    x, grad = x.to(device), grad.to(device)
    with no_waits():
        there(x).backward(grad)


@each_family
@pytest.mark.parametrize("back", [False, True], ids=["to the device", "to the CPU"])
def test_a_checkpoint_from_the_middle_of_training_goes_on_elsewhere(device, family, back):
    pairs = data()
    here = make(family)
    source = on(device, here) if back else here
    for x, grad in pairs[: STEPS // 2]:
        step(source, x, grad)
        if back:
            step(here, x, grad)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = torch.device("cpu") if back else device
    loaded = on(target, make(family))
    loaded.load_state_dict(torch.load(file, map_location=target))
    for x, grad in pairs[STEPS // 2 :]:
        assert_close(step(loaded, x, grad), step(here, x, grad))
    for key, value in here.state_dict().items():
        assert_close([loaded.state_dict()[key]], [value])


@each_family
def test_copies_and_moves_between_devices_change_nothing(device, family):
    here = make(family)
    there, pairs = on(device, here), data()
    for start in range(0, STEPS, 5):
        assert_trains_alike(there, here, pairs[start : start + 5])
        there = copy.deepcopy(there)
        assert all(b.device.type == device.type for b in there.buffers())
        assert_trains_alike(there.cpu(), copy.deepcopy(here), pairs[:1])
        here = copy.deepcopy(there)
        there = there.to(device)


@each_family
def test_a_layer_on_another_index_than_the_current_one_stays_there(device, family):
    if torch.accelerator.device_count() < 2:
        pytest.skip(f"needs two {device.type} devices")
    second = torch.device(device.type, 1)
    here = make(family)
    there = on(second, here)
    assert torch.accelerator.current_device_index() == 0
    assert_trains_alike(there, here, data())
    assert {tensor.device for tensor in (*there.buffers(), *there.parameters())} == {second}


@each_family
def test_forward_and_backward_run_on_the_callers_stream(substitute, substitute_module, family):
    layer = on(substitute, make(family))
    x = torch.randn(IMAGES, device=substitute, requires_grad=True)
    before, stream = torch.accelerator.current_stream(substitute), torch.Stream(substitute)
    try:
        torch.accelerator.set_stream(stream)
        with substitute_module.counting() as counts:
            layer(x).sum().backward()
    finally:
        torch.accelerator.set_stream(before)
    assert counts.streams.keys() == {(0, stream.stream_id)}


@each_family
def test_a_model_is_converted_and_reverted_where_it_is(device, family):
    here = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    there = on(device, here)
    models = [bnstats.convert_batchnorm(model, family.name) for model in (there, here)]
    pairs = data()
    assert_trains_alike(*models, pairs)
    assert_evaluates_alike(*models, pairs[1][0])
    x = pairs[1][0].to(device)
    expected = there.eval()(x)
    plain = bnstats.revert_batchnorm(there)
    assert type(plain[1]) is nn.BatchNorm2d
    assert {t.device.type for t in (*plain.parameters(), *plain.buffers())} == {device.type}
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


@each_option
def test_no_training_step_waits_for_the_device_or_copies(device, no_waits, family, options):
    layer = on(device, make(family, **options))
    pairs = [(x.to(device).requires_grad_(), grad.to(device)) for x, grad in data()]
    with no_waits():
        for x, grad in pairs:
            layer(x).backward(grad)


@each_family
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_no_step_in_any_dtype_waits_for_the_device_or_copies(device, no_waits, family, dtype):
    layer = on(device, make(family, dtype=dtype))
    pairs = [(x.to(device).requires_grad_(), g.to(device)) for x, g in data(dtype=dtype)]
    with no_waits():
        for x, grad in pairs:
            layer(x).backward(grad)


@each_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_step_of_a_network_under_autocast_waits_or_copies(device, no_waits, family, dtype):
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    schedule = SHORT if family.name == "moving_average" else {}
    model = on(device, bnstats.convert_batchnorm(plain, family.name, **schedule))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = [torch.randn(IMAGES).to(device) for _ in range(STEPS)]

    def step(x):
        with torch.autocast(device.type, dtype=dtype):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(inputs[0])  # makes what the optimizer keeps
    with no_waits():
        for x in inputs[1:]:
            step(x)


@each_family
def test_no_evaluation_waits_for_the_device_or_copies(device, no_waits, family):
    layer = on(device, make(family)).eval()
    x = torch.randn(IMAGES, device=device)
    with no_waits():
        layer(x)


LAYOUTS = {
    "N C": ((8, 3), torch.contiguous_format),
    "N C H W": (IMAGES, torch.contiguous_format),
    "channels_last": (IMAGES, torch.channels_last),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@each_family
@each_layout
def test_masked_batches_train_as_on_cpu(device, no_waits, family, layout):
    shape, memory_format = layout
    here = family.base(3, **(SHORT if family.name == "moving_average" else {}))
    there = on(device, here)
    mask = torch.rand(shape[0], *shape[2:]) < 0.7
    there_mask = mask.to(device)

    def run(layer, x):
        if x.device.type == "cpu":
            return layer(x, mask)
        return layer(x.to(memory_format=memory_format), there_mask)

    for _ in range(STEPS):
        x, grad = torch.randn(2, *shape).unbind()
        assert_close(step(there, x, grad, run), step(here, x, grad, run))
        assert_buffers(there, here)
    x = torch.randn(shape).to(device).requires_grad_()
    grad = torch.ones_like(x)
    with no_waits():
        run(there, x).backward(grad)


@each_family
@each_layout
def test_every_layout_trains_as_on_cpu(device, family, layout):
    shape, memory_format = layout
    here = family.base(3, **(SHORT if family.name == "moving_average" else {}))
    there = on(device, here)

    def run(layer, x):
        output = layer(x.to(memory_format=memory_format))
        assert output.is_contiguous(memory_format=memory_format)
        return output

    for x, grad in data(shape):
        assert_close(step(there, x, grad, run), step(here, x, grad))
        assert_buffers(there, here)
