"""Padding counts for nothing: statistics, gradients and state are those of valid positions."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
from bnstats.errors import InvalidTypeError, InvalidValueError
from cases import FAMILIES, each_family, normalizing_as_torch

SHORT = {"window": 2, "warmup": 1, "renorm_warmup": 3}
LENGTHS = torch.tensor([3, 7, 5, 6])
VALID = torch.arange(7) < LENGTHS[:, None]


def make(family, num_features=3, **options):
    layer = family.make(
        1, num_features, **(SHORT if family.name == "moving_average" else {}), **options
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 2, num_features))
    return layer


def padded(x, length, value=7.0):
    return torch.cat((x, x.new_full((*x.shape[:2], length - x.shape[2]), value)), dim=2)


def steps(layer, xs, mask, run=None):
    """Output and gradients at valid positions of the last step, and the state after it."""
    weight = torch.linspace(-1, 2, xs[0].shape[2]).to(xs[0].dtype)
    for x in xs:
        layer.zero_grad()
        x = x.clone().requires_grad_()
        y = layer(x, mask=mask) if run is None else run(layer, x, mask)
        (y * weight * mask.unsqueeze(1)).square().sum().backward()
    valid = mask.unsqueeze(1)
    grads = [p.grad for p in layer.parameters()]
    return (y * valid).detach(), x.grad * valid, *grads, *(b.clone() for b in layer.buffers())


@each_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("times", [2, 10])
def test_more_padding_changes_nothing(family, dtype, tolerance, times):
    # Speech models' errors rise with the padding: https://github.com/pytorch/pytorch/issues/70529
    xs = [torch.randn(4, 3, 7, dtype=dtype) * (1 + t) + t for t in range(5)]
    layer = make(family, dtype=dtype)
    expected = steps(copy.deepcopy(layer), xs, VALID)
    length = 7 * times
    weight = torch.linspace(-1, 2, 7, dtype=dtype)
    mask = torch.arange(length) < LENGTHS[:, None]
    for x in xs:
        layer.zero_grad()
        x = padded(x, length).requires_grad_()
        y = layer(x, mask=mask)
        (y[..., :7] * weight * VALID.unsqueeze(1)).square().sum().backward()
    valid = VALID.unsqueeze(1)
    found = ((y[..., :7] * valid).detach(), x.grad[..., :7] * valid)
    found += (*(p.grad for p in layer.parameters()), *layer.buffers())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@normalizing_as_torch
def test_valid_positions_are_normalized_as_torch_does_without_the_others(family):
    x = torch.randn(4, 3, 7, dtype=torch.float64) + 2
    layer, plain = make(family, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    together = x.transpose(1, 2)[VALID].requires_grad_()  # (values, C)
    expected = plain(together)
    ours = x.clone().requires_grad_()
    found = layer(ours, mask=VALID)
    torch.testing.assert_close(found.transpose(1, 2)[VALID], expected)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found.transpose(1, 2)[VALID] * weight).sum().backward()
    torch.testing.assert_close(ours.grad.transpose(1, 2)[VALID], together.grad)
    assert not ours.grad.transpose(1, 2)[~VALID].any()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(layer, name).grad, getattr(plain, name).grad)


@normalizing_as_torch
def test_first_and_second_derivatives_know_that_moments_depend_on_valid_positions(family):
    layer = make(family, dtype=torch.float64)
    parameters = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]
    x = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        twin, values = copy.deepcopy(layer), {"weight": weight, "bias": bias}
        return torch.func.functional_call(twin, values, (x,), {"mask": VALID})

    # Padded positions are outputs too: their gradient flows through the moments.
    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@normalizing_as_torch
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_without_parameters_are_the_same(family, affine, bias):
    layer = family.make(1, affine=affine, bias=bias, dtype=torch.float64)
    x = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(layer)(x, VALID), x)


@normalizing_as_torch
@pytest.mark.parametrize("needed", [{"x"}, {"weight"}, {"bias"}, {"x", "bias"}])
def test_second_derivatives_need_no_gradient_of_what_is_frozen(family, needed):
    layer, x = make(family, dtype=torch.float64), torch.randn(4, 3, 7, dtype=torch.float64)
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needed)
    inputs = [tensors[name] for name in sorted(needed)]
    loss = layer(x, mask=VALID).pow(3).sum()
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
    assert all(g.isfinite().all() for g in second)


@normalizing_as_torch
def test_running_statistics_are_those_of_valid_values(family):
    layer, values = make(family, dtype=torch.float64, momentum=None), []
    for t in range(4):
        x = torch.randn(4, 3, 7, dtype=torch.float64) + t
        layer(x, mask=VALID)
        values.append(x.transpose(1, 2)[VALID])
    together = torch.cat(values)
    torch.testing.assert_close(layer.running_mean, together.mean(0))
    if family.name == "cumulative":
        torch.testing.assert_close(layer.running_var, together.var(0))
        assert layer.num_values_tracked == len(together)


@normalizing_as_torch
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_statistics_of_many_values_far_from_zero_are_right(family, mean):
    x = torch.randn(16, 8, 700) + mean  # so many are added up in float32
    valid = torch.rand(16, 700) < 0.6
    layer = make(family, 8, momentum=None)
    layer(x, mask=valid)
    values = x.double().transpose(1, 2)[valid]
    mean_error = (layer.running_mean - values.mean(0)) / values.std(0)
    assert mean_error.abs().max() < 1e-6 + mean * torch.finfo(torch.float32).eps
    torch.testing.assert_close(layer.running_var.double(), values.var(0), rtol=1e-6, atol=0)


@each_family
def test_padding_that_is_not_finite_leaves_outputs_and_state_alone(family):
    x = torch.randn(4, 3, 7)
    layer, twin = make(family), make(family)
    spoiled = torch.where(VALID.unsqueeze(1), x, torch.nan)
    expected, found = twin(x, mask=VALID), layer(spoiled, mask=VALID)
    valid = VALID.unsqueeze(1).expand_as(x)
    torch.testing.assert_close(found[valid], expected[valid])
    for ours, theirs in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@each_family
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_inputs_have_statistics_in_float32(family, half):
    x = torch.randn(4, 3, 7).to(half)
    layer, twin = make(family), make(family)
    y = layer(x, mask=VALID)
    assert y.dtype == half
    twin(x.float(), mask=VALID)
    torch.testing.assert_close(layer.running_var, twin.running_var, rtol=1e-5, atol=1e-6)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_half_layers_take_masks_with_inputs_that_they_take_without(family, dtype):
    layer, x = make(family).half(), torch.randn(4, 3, 7).to(dtype).requires_grad_()
    twin = copy.deepcopy(layer).float()
    y = layer(x, mask=VALID)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), twin(x.float(), mask=VALID), rtol=2e-3, atol=2e-3)
    y.sum().backward()
    assert x.grad.isfinite().all()


WAYS = {
    "checkpoint": lambda layer, x, mask: checkpoint(layer, x, mask, use_reentrant=False),
    "reentrant checkpoint": lambda layer, x, mask: checkpoint(layer, x, mask, use_reentrant=True),
    "compiled": lambda layer, x, mask: torch.compile(layer, backend="aot_eager", fullgraph=True)(
        x, mask
    ),
    "model-wide": lambda layer, x, mask: _masked(layer, x, mask),
}


def _masked(layer, x, mask):
    with bnstats.masked(layer, mask):
        return layer(x)


@each_family
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_gives_the_same(family, way):
    xs = [torch.randn(4, 3, 7, dtype=torch.float64) for _ in range(4)]
    layer = make(family, dtype=torch.float64)
    expected = steps(copy.deepcopy(layer), xs, VALID)
    for ours, theirs in zip(steps(layer, xs, VALID, WAYS[way]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_family
def test_stacked_ensembles_take_masks_under_vmap(family):
    layers = [make(family, dtype=torch.float64) for _ in range(2)]
    singles = [copy.deepcopy(layer) for layer in layers]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(2, 4, 3, 7, dtype=torch.float64)

    def forward(parameters, buffers, x):
        values = (parameters, buffers)
        return torch.func.functional_call(layers[0], values, (x,), {"mask": VALID})

    for _ in range(3):
        found = torch.vmap(forward, randomness="same")(parameters, buffers, x)
        expected = torch.stack(
            [one(part, mask=VALID) for one, part in zip(singles, x, strict=True)]
        )
    torch.testing.assert_close(found, expected)
    for name, buffer in buffers.items():
        stacked = torch.stack([dict(one.named_buffers())[name] for one in singles])
        torch.testing.assert_close(buffer, stacked, msg=name)


@each_family
def test_without_a_mask_nothing_is_masked_afterwards(family):
    layer = make(family)
    with pytest.raises(ZeroDivisionError), bnstats.masked(layer, VALID):
        raise ZeroDivisionError
    twin, x = make(family), torch.randn(4, 3, 7)
    torch.testing.assert_close(layer(x), twin(x), rtol=0, atol=0)


class Strided(nn.Module):
    def __init__(self, family):
        super().__init__()
        self.first, self.second = make(family, 2), make(family, 4)
        self.conv = nn.Conv1d(2, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.second(self.conv(self.first(x)))


BLOCKS = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()


@each_family
@pytest.mark.parametrize(
    ("downsample", "expected"),
    [
        ("any", [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ("all", [[1, 0, 0, 0], [1, 1, 1, 1]]),
        (lambda mask, size: mask[:, ::2][:, : size[0]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
    ],
    ids=["any", "all", "function"],
)
def test_a_mask_follows_strides(family, downsample, expected):
    model, x = Strided(family), torch.randn(2, 2, 8)
    twin = copy.deepcopy(model)
    with bnstats.masked(model, BLOCKS, downsample):
        found = model(x)
    hidden = twin.conv(twin.first(x, mask=BLOCKS))
    torch.testing.assert_close(found, twin.second(hidden, mask=torch.tensor(expected).bool()))


def test_a_layer_after_pooling_takes_the_samples_that_have_any_valid_position():
    model = nn.Sequential(
        bnstats.EMABatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), bnstats.EMABatchNorm1d(3)
    )
    x, mask = torch.randn(5, 3, 4, 6), torch.ones(5, 4, 6, dtype=torch.bool)
    mask[3:] = False
    with bnstats.masked(model, mask, "any"):
        model(x)
    pooled = (x[:3] - x[:3].mean((0, 2, 3), keepdim=True)).mean((2, 3))
    scale = x[:3].transpose(0, 1).flatten(1).var(1, correction=0).add(1e-5).sqrt()
    torch.testing.assert_close(model[3].running_mean, (pooled / scale).mean(0))


@pytest.mark.parametrize("method", ["pooled", "batch_average", "ema", "layerwise", "sweeps"])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, bnstats.EMABatchNorm1d])
def test_a_recalibration_counts_valid_positions_of_any_batchnorm(method, layer):
    model = nn.Sequential(layer(3), nn.ReLU(), layer(3))
    batches = [
        {"input": torch.randn(4, 3, 7) * (1 + t) + t, "mask": VALID.roll(t, 0)} for t in range(6)
    ]
    data = [{**b, "input": torch.where(b["mask"].unsqueeze(1), b["input"], 50.0)} for b in batches]
    result = bnstats.recompute_population_stats(
        model, data, method=method, mask=lambda batch: batch["mask"],
        forward=lambda model, batch: model(batch["input"]),
    )  # fmt: skip
    values = torch.cat([b["input"].transpose(1, 2)[b["mask"]] for b in batches]).double()
    after = result.after["0"]
    assert after.count == len(values)
    if method not in ("batch_average", "ema"):
        torch.testing.assert_close(after.mean, values.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after.var, values.var(0), rtol=1e-5, atol=1e-6)
    if method in ("layerwise", "sweeps"):
        second = (values - values.mean(0)) / (values.var(0) + 1e-5).sqrt()
        torch.testing.assert_close(
            result.after["2"].mean, second.relu().mean(0), rtol=1e-4, atol=1e-5
        )


def test_masks_that_the_model_gives_its_layers_count_in_a_recalibration_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bnstats.EMABatchNorm1d(3)

        def forward(self, x, mask):
            return self.bn(x, mask=mask)

    x = torch.randn(4, 3, 7)
    stats = bnstats.measure_population_stats(Model(), [{"x": x, "mask": VALID}])
    assert stats["bn"].count == int(VALID.sum())


def test_batch_statistics_are_recorded_of_valid_positions():
    layer, x = bnstats.EMABatchNorm1d(3), torch.randn(4, 3, 7)
    with bnstats.record_batch_stats(layer) as record:
        y = layer(x, mask=VALID)
        y.retain_grad()
        y.square().sum().backward()
        with bnstats.masked(layer, VALID):
            layer(x)
    values = x.transpose(1, 2)[VALID].double()
    for iteration in (0, 1):
        torch.testing.assert_close(record[""].mean[iteration], values.mean(0))
        torch.testing.assert_close(record[""].var[iteration], values.var(0, correction=0))
    gradient = y.grad.transpose(1, 2)[VALID].double().mean(0)
    torch.testing.assert_close(record[""].g[0], gradient, rtol=1e-5, atol=1e-6)
    z = (values - values.mean(0)) / (values.var(0, correction=0) + layer.eps).sqrt()
    psi = (y.grad.transpose(1, 2)[VALID].double() * z).mean(0)
    torch.testing.assert_close(record[""].psi[0], psi, rtol=1e-5, atol=1e-6)


def test_gradients_are_recorded_of_valid_positions_also_where_a_checkpoint_runs_again():
    records, x = [], torch.randn(4, 3, 7, requires_grad=True)
    for run in (lambda layer, x: layer(x), functools.partial(checkpoint, use_reentrant=True)):
        layer = bnstats.EMABatchNorm1d(3)
        with bnstats.record_batch_stats(layer) as record:
            with bnstats.masked(layer, VALID):
                y = run(layer, x)
            y.square().sum().backward()
        records.append(record[""])
    for name in ("g", "psi"):
        torch.testing.assert_close(getattr(records[1], name), getattr(records[0], name))


BAD = {
    "dtype": (lambda: {"mask": VALID.float()}, InvalidTypeError, "torch.bool, got torch.float32"),
    "type": (lambda: {"mask": [1]}, InvalidTypeError, "torch.bool, got list"),
    "shape": (lambda: {"mask": VALID[:, :5]}, InvalidValueError, r"\(4, 7\).*\(4, 5\)"),
    "more positions": (
        lambda: {"mask": VALID.repeat(1, 2)}, InvalidValueError, "downsample='any'",
    ),
    "no valid position": (lambda: {"mask": VALID & False}, InvalidValueError, "no valid value"),
    "another device": (
        lambda: {"mask": VALID.to("meta")}, InvalidValueError, r"meta: pass mask.to\('cpu'\)",
    ),
    "integers": (lambda: {"mask": VALID.long()}, InvalidTypeError, "int64: pass mask != 0"),
    "a channel axis": (
        lambda: {"mask": VALID[:, None]}, InvalidValueError, "leave its channel axis out",
    ),
    "fewer positions": (
        lambda: {"mask": VALID[:, :4]}, InvalidValueError, r"more positions.*downsample=f",
    ),
}  # fmt: skip


@each_family
@pytest.mark.parametrize("what", BAD)
def test_a_bad_mask_is_an_error_with_the_layers_name_and_changes_nothing(family, what):
    kwargs, error, message = BAD[what]
    layer = make(family)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=f"BatchNorm1d.*{message}"):
        layer(torch.randn(4, 3, 7), **kwargs())
    model = nn.Sequential(nn.Identity(), layer)
    with pytest.raises(error, match=message), bnstats.masked(model, **kwargs()):
        model(torch.randn(4, 3, 7))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@normalizing_as_torch
def test_one_valid_value_has_no_variance(family):
    with pytest.raises(InvalidValueError, match="2 or more valid values"):
        make(family)(torch.randn(4, 3, 7), mask=torch.arange(28).reshape(4, 7) == 3)


def test_an_unfit_mask_names_layer_sizes_and_remedy():
    model = nn.Sequential(nn.Conv1d(3, 3, 3, stride=2, padding=1), bnstats.EMABatchNorm1d(3))
    with (
        pytest.raises(InvalidValueError, match=r"'1'.*\(4, 4\).*\(4, 7\).*downsample='any'"),
        bnstats.masked(model, VALID),
    ):
        model(torch.randn(4, 3, 7))
    with (
        pytest.raises(InvalidValueError, match=r"'1'.*\(4, 4\).*\(4, 5\) from downsample"),
        bnstats.masked(model, VALID, lambda mask, size: mask[:, :5]),
    ):
        model(torch.randn(4, 3, 7))


def test_torchs_own_layers_are_refused_where_they_train():
    model = nn.Sequential(bnstats.EMABatchNorm1d(3), nn.BatchNorm1d(3))
    with (
        pytest.raises(InvalidValueError, match=r"'1'.*convert_batchnorm"),
        bnstats.masked(model, VALID),
    ):
        pass
    model[1].eval()
    with bnstats.masked(model, VALID):
        model(torch.randn(4, 3, 7))
    with pytest.raises(InvalidValueError, match="no layer"), bnstats.masked(nn.ReLU(), VALID):
        pass
    with (
        pytest.raises(InvalidValueError, match="downsample"),
        bnstats.masked(model[0], VALID, "most"),
    ):
        pass
    with (
        pytest.raises(InvalidValueError, match="downsample"),
        bnstats.masked(model[0], VALID, VALID.numpy()),
    ):
        pass


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_masks_of_any_dimension_and_broadcastable_ones(dims):
    for family in FAMILIES:
        size = (4, 5, 6)[:dims]
        layer = family.make(dims, dtype=torch.float64)
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        column = torch.arange(size[-1]) < 3
        twin = copy.deepcopy(layer)
        full = column.expand(2, *size)
        torch.testing.assert_close(layer(x, mask=column), twin(x, mask=full))
