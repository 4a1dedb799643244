"""RenormBatchNorm trains with what it evaluates with, from the end of its warm-up on."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
import oracles
from bnstats import EMABatchNorm1d, RenormBatchNorm1d, RenormBatchNorm2d
from bnstats.errors import InvalidTypeError, InvalidValueError
from cases import batches

OPEN = {"warmup": 0, "ramp": 0, "max_ratio": 1e9, "max_shift": 1e9}


def make(cls=RenormBatchNorm1d, num_features=3, dtype=torch.float64, **options):
    layer = cls(num_features, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-1, 2, num_features))
    return layer


def limits(step, warmup, ramp, max_ratio, max_shift):
    part = min(max((step - warmup) / ramp, 0), 1)
    return 1 + part * (max_ratio - 1), part * max_shift


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 7)])
def test_outputs_are_those_of_the_definition_through_warm_up_ramp_and_after(shape):
    options = {"warmup": 2, "ramp": 4, "max_ratio": 1.5, "max_shift": 0.4}
    layer = make(momentum=0.2, **options)
    clipped = 0
    for step, x in enumerate(batches(shape, count=12, dtype=torch.float64), start=1):
        mean, var = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        rmax, dmax = limits(step, **options)
        expected, r, d = oracles.renormalized(x, weight, bias, mean, var, layer.eps, rmax, dmax)
        torch.testing.assert_close(layer(x), torch.from_numpy(expected))
        clipped += (abs(d) == dmax).sum() + (r == rmax).sum()
    assert clipped  # the limits had something to do


def test_running_statistics_are_those_of_the_exponential_average():
    layer, average = make(momentum=0.2, **OPEN), EMABatchNorm1d(3, momentum=0.2).double()
    for x in batches((8, 3), dtype=torch.float64):
        layer(x)
        average(x)
    torch.testing.assert_close(layer.running_mean, average.running_mean)
    torch.testing.assert_close(layer.running_var, average.running_var)
    assert layer.state_dict().keys() == nn.BatchNorm1d(3).state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unclipped_the_training_output_is_the_evaluation_output_at_any_step(dtype):
    # torchrl's drifts apart after the warm-up: by 0.76 at twice, by 3.4 at ten times of it.
    layer = make(
        RenormBatchNorm2d, dtype=dtype, momentum=0.3, warmup=5, ramp=0, max_ratio=1e9, max_shift=1e9
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for step, x in enumerate(batches((4, 3, 5, 6), count=60, dtype=dtype), start=1):
        expected = copy.deepcopy(layer).eval()(x).detach()
        found = layer(x)
        if step > 5:
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def test_before_the_end_of_the_warm_up_it_is_torchs_to_the_bit():
    layer, plain = make(dtype=torch.float32, warmup=3), make(nn.BatchNorm1d, dtype=torch.float32)
    for x in batches((8, 3), count=3):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = layer(a), plain(b)
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
        assert torch.equal(a.grad, b.grad)


def test_gradients_take_r_and_d_for_constants():
    layer = make(momentum=0.2, **OPEN)
    layer(torch.randn(8, 3, dtype=torch.float64) + 1)
    mean, sd = layer.running_mean.clone(), (layer.running_var + layer.eps).sqrt()

    def ours(x, weight, bias):
        values = {"weight": weight, "bias": bias}
        return torch.func.functional_call(copy.deepcopy(layer), values, (x,))

    def frozen(x, weight, bias):
        var, batch_mean = torch.var_mean(x, 0, correction=0)
        batch_sd = (var + layer.eps).sqrt()
        r, d = (batch_sd / sd).detach(), ((batch_mean - mean) / sd).detach()
        return ((x - batch_mean) / batch_sd * r + d) * weight + bias

    x = torch.randn(8, 3, dtype=torch.float64)
    inputs = [x, layer.weight.detach(), layer.bias.detach()]
    grads = []
    for function in (ours, frozen):
        own = [value.clone().requires_grad_() for value in inputs]
        function(*own).pow(3).sum().backward()
        grads.append([value.grad for value in own])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("mask", [None, torch.arange(7) < torch.tensor([3, 7, 5, 6])[:, None]])
def test_gradcheck_with_frozen_r_and_d(mask):
    # Where r and d are at their limits, numerical derivatives take them for constants too.
    layer = make(warmup=0, ramp=0, max_ratio=1.5, max_shift=0.25)
    layer.running_mean.copy_(torch.tensor([9.0, -9.0, 9.0]))
    layer.running_var.copy_(torch.tensor([0.01, 0.01, 100.0]))
    shape = (8, 3) if mask is None else (4, 3, 7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]

    def function(x, weight, bias):
        twin = copy.deepcopy(layer)
        values = {"weight": weight, "bias": bias}
        return torch.func.functional_call(twin, values, (x,), {"mask": mask})

    z = (function(x, torch.ones(3).double(), torch.zeros(3).double())).detach()
    valid = z.movedim(1, -1)[mask] if mask is not None else z
    expected = torch.tensor([1.5, 1.5, 1 / 1.5], dtype=torch.float64)
    torch.testing.assert_close(valid.std(0, correction=0), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(valid.mean(0), torch.tensor([-0.25, 0.25, -0.25]).double())
    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_gradients_of_a_constant_feature_are_finite(momentum):
    # sb3-contrib's are NaN after the warm-up: d is 0 / 0 there.
    layer = RenormBatchNorm1d(2, momentum=momentum, **{**OPEN, "max_ratio": 3.0, "max_shift": 5.0})
    for _ in range(5):
        x = torch.stack((torch.full((8,), 4.0), torch.randn(8)), dim=1).requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad.isfinite().all()
        assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_that_runs_again_gets_the_r_and_d_that_it_had(use_reentrant):
    layer = make(momentum=0.3, warmup=1, ramp=2)
    twin = copy.deepcopy(layer)
    xs = [x.requires_grad_() for x in batches((8, 3), count=6, dtype=torch.float64)]
    others = [x.detach().clone().requires_grad_() for x in xs]
    # All forwards come first: running statistics have moved, and the warm-up is over, by then.
    losses = [checkpoint(layer, x, use_reentrant=use_reentrant).pow(3).sum() for x in xs]
    expected = [twin(x).pow(3).sum() for x in others]
    torch.stack(losses).sum().backward()
    torch.stack(expected).sum().backward()
    for mine, theirs in zip(xs, others, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("same", [False, True])
def test_forwards_of_nearly_one_mean_on_both_sides_of_the_warm_ups_end_are_told_apart(
    use_reentrant, same
):
    layer = bnstats.RenormBatchNorm1d(4, momentum=0.1, warmup=1, ramp=0)
    narrow, wide = torch.randn(64, 4, 16) * 0.3 + 5, torch.randn(64, 4, 16) + 5
    weights, grads = torch.randn(2, 64, 4, 16), []
    for repeats in (False, True):
        own, inputs = copy.deepcopy(layer), [narrow.clone(), (narrow if same else wide).clone()]

        def run(x, own=own, repeats=repeats):
            return checkpoint(own, x, use_reentrant=use_reentrant) if repeats else own(x)

        outputs = [run(x.requires_grad_()) for x in inputs]
        sum((y.square() * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
        grads.append([x.grad for x in inputs])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("how", ["reset", "load"])
def test_a_second_warm_up_ends_as_the_first(use_reentrant, how):
    layer = bnstats.RenormBatchNorm1d(4, warmup=4, ramp=4)
    start = copy.deepcopy(layer.state_dict())
    first = []
    for turn in range(2):
        torch.manual_seed(1)
        for step in range(20):
            x = torch.randn(8, 4, requires_grad=True)
            checkpoint(layer, x, use_reentrant=use_reentrant).pow(3).sum().backward()
            if turn == 0:
                first.append(x.grad)
            else:
                torch.testing.assert_close(x.grad, first[step])
        layer.reset_running_stats() if how == "reset" else layer.load_state_dict(start)


@pytest.mark.parametrize("held", [False, True])
def test_one_batch_that_goes_through_twice_gets_each_forwards_own_r_and_d(held):
    # As in R-Drop and consistency losses.
    net = nn.Sequential(
        nn.Linear(4, 8), make(num_features=8, momentum=0.3, **OPEN), nn.Dropout(0.3)
    ).double()
    for x in batches((16, 4), count=5, dtype=torch.float64):
        net(x)
    twin, x = copy.deepcopy(net), torch.randn(16, 4, dtype=torch.float64)

    def gradients(model, run):
        torch.manual_seed(0)
        first = run(model)
        with bnstats.hold_statistics(model) if held else contextlib.nullcontext():
            second = run(model)
        ((first - second).square().sum() + first.pow(3).sum()).backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(twin, lambda model: model(x))
    found = gradients(net, lambda model: checkpoint(model, x, use_reentrant=False))
    torch.testing.assert_close(found, expected)


def test_an_input_of_another_dtype_is_refused_as_batchnorm_refuses_it():
    layer = bnstats.RenormBatchNorm1d(3, **OPEN)
    with pytest.raises(InvalidTypeError, match=r"expected an input of torch.float32 .*float64"):
        layer(torch.randn(8, 3, dtype=torch.float64))


def test_a_forward_too_long_ago_to_be_run_again_is_an_error():
    layer = make(momentum=0.3, **OPEN)
    xs = [torch.randn(8, 3, dtype=torch.float64, requires_grad=True) for _ in range(17)]
    losses = [checkpoint(layer, x, use_reentrant=False).sum() for x in xs]
    losses[1].backward()
    with pytest.raises(InvalidValueError, match="16 forwards later"):
        losses[0].backward()


def test_compiled_it_does_the_same():
    layer = make(momentum=0.2, warmup=1, ramp=3)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for x in batches((8, 3), count=6, dtype=torch.float64):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        for function, own in ((compiled, a), (twin, b)):
            output = function(own)
            output.pow(3).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_layers_compiled_one_by_one_share_their_code():
    # More than the eight versions of a function's code that torch.compile keeps.
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    layers = [RenormBatchNorm1d(3, **OPEN) for _ in range(10)]
    twins, x = copy.deepcopy(layers), torch.randn(8, 3)
    for layer, twin in zip(layers, twins, strict=True):
        twin(x + 1)
        layer(x + 1)
        torch.testing.assert_close(torch.compile(layer, backend=frames, fullgraph=True)(x), twin(x))
    assert frames.frame_count == 1


def test_the_count_of_a_checkpoint_goes_on():
    plain = nn.BatchNorm1d(3)
    for x in batches((8, 3)):
        plain(x)
    layer = RenormBatchNorm1d(3, warmup=5, ramp=0)
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert not torch.equal(layer(x), plain(x))
    plain.load_state_dict(layer.state_dict(), strict=True)


def test_a_model_is_converted_and_comes_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    bnstats.convert_batchnorm(model, "renorm", warmup=10, max_ratio=2.0, momentum=0.01)
    assert type(model[1]) is RenormBatchNorm2d
    assert (model[1].warmup, model[1].max_ratio, model[1].momentum) == (10, 2.0, 0.01)
    assert torch.equal(model(x), expected)
    assert type(bnstats.revert_batchnorm(model)[1]) is nn.BatchNorm2d
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"warmup": -1}, InvalidValueError),
        ({"ramp": 1.5}, InvalidTypeError),
        ({"max_ratio": 0.9}, InvalidValueError),
        ({"max_ratio": float("inf")}, InvalidValueError),
        ({"max_shift": -1.0}, InvalidValueError),
        ({"max_shift": "far"}, InvalidTypeError),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises(error, match=f"RenormBatchNorm1d: {next(iter(options))}"):
        RenormBatchNorm1d(3, **options)


def test_the_defaults_are_documented_ones():
    layer = RenormBatchNorm1d(3)
    assert (layer.momentum, layer.warmup, layer.ramp) == (0.01, 1000, 4000)
    assert (layer.max_ratio, layer.max_shift, layer.debias) == (3.0, 5.0, True)
