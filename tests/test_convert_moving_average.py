"""convert_batchnorm(model, "moving_average"): statistics about zero, centered layers, folding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import bnstats
from bnstats.errors import InvalidTypeError, InvalidValueError

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.BatchNorm1d, bnstats.CenteredConv1d, bnstats.MovingAverageBatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d, bnstats.CenteredConv2d, bnstats.MovingAverageBatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d, bnstats.CenteredConv3d, bnstats.MovingAverageBatchNorm3d),
}


def convert(model, **options):
    return bnstats.convert_batchnorm(model, "moving_average", **options)


def types(model):
    return [type(module) for module in model.children()]


def train(model, *shape, steps=6):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_convolutions_become_their_centered_twins_and_come_back(dims):
    conv, norm, centered_conv, moving_average = CONVOLUTIONS[dims]
    model = nn.Sequential(conv(3, 4, 3, padding=1, groups=1), norm(4), conv(4, 2, 1))
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    assert types(convert(model)) == [centered_conv, moving_average, centered_conv]
    assert [key for key in model.state_dict() if key in keys] == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert types(bnstats.revert_batchnorm(model)) == [conv, norm, conv]
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


def test_center_false_leaves_layers_as_they_are():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    convert(model, center=False)
    assert types(model)[::2] == [nn.Conv1d, nn.Linear]


def test_include_chooses_the_layers_to_be_centered_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    convert(model, include=lambda name, module: name != "2")
    assert types(model)[::2] == [bnstats.CenteredConv2d, nn.Conv2d]


def test_without_a_batchnorm_nothing_is_centered():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.warns(bnstats.BnstatsWarning, match="no BatchNorm"):
        convert(model)
    assert types(model) == [nn.Conv2d]


# Which linear layers are centered


class Written(nn.Module):
    """Layers in another order than that of their use."""

    def __init__(self, untraceable=False):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm1, self.norm2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.block = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.BatchNorm1d(6), nn.ReLU())
        self.untraceable = untraceable

    def forward(self, x):
        if self.untraceable and x.sum() > 1e6:
            return x
        x = self.norm1(self.first(x)).relu()
        x = self.norm2(input=self.second(x).relu())
        return self.head(self.block(x))


def centered(model):
    return {n for n, m in model.named_modules() if isinstance(m, bnstats.CenteredLinear)}


def test_a_linear_layer_is_centered_where_it_feeds_a_converted_one():
    assert centered(convert(Written())) == {"first", "block.0.0"}


def test_in_a_model_that_fx_cannot_trace_neighbours_in_a_sequential_are_centered():
    assert centered(convert(Written(untraceable=True))) == {"block.0.0"}


def test_a_linear_layer_before_a_layer_that_is_left_out_stays():
    model = convert(Written(), include=lambda name, module: name != "norm1")
    assert centered(model) == {"block.0.0"}


def test_wrapped_models_are_traced_inside():
    model = torch.compile(nn.DataParallel(Written()), backend="eager")
    assert len(centered(convert(model))) == 2


def test_tracing_leaves_no_trace():
    class Noisy(Written):
        def forward(self, x):
            return super().forward(x + torch.rand(4))

    model = Noisy()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert centered(convert(model)) == {"first", "block.0.0"}
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags


def test_tracing_leaves_a_forward_that_keeps_state_alone():
    class Keeping(Written):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.zeros(()))
            self.register_buffer("seen", torch.zeros(()))
            self.steps, self.features = 0, []

        def forward(self, x):
            self.steps += 1
            self.seen.add_(1)
            self.center = 0.9 * self.center + 0.1 * x.mean().detach()
            self.features.append(x)
            return super().forward(x)

    model = Keeping()
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    # torch.fx of 2.6 cannot trace a buffer that is assigned: what is left are neighbours.
    traced = set() if torch.__version__.startswith("2.6.") else {"first"}
    assert centered(convert(model)) == {"block.0.0"} | traced
    assert (model.steps, model.features) == (0, [])
    for name in ("center", "seen"):
        buffer = getattr(model, name)
        assert (id(buffer), buffer) == buffers[name]


def test_tracing_calls_no_hook():
    model, calls = Written(), []
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    model.block.register_forward_hook(lambda module, args, output: calls.append(output))
    model.block[0].register_forward_pre_hook(lambda module, args: calls.append(args))
    assert centered(convert(model)) == {"first", "block.0.0"}
    assert calls == []
    model(torch.randn(3, 4))
    assert len(calls) == 3


def test_a_layer_with_one_weight_to_an_output_is_not_centered_away():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(4, 1), nn.Linear(1, 4), nn.BatchNorm1d(4),
    )  # fmt: skip
    assert centered(convert(model)) == set()


# Statistics


def test_statistics_go_on_about_zero_and_the_change_is_warned_of():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    mean, var = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 2.0, 3.0])
    model[1].running_mean.copy_(mean)
    model[1].running_var.copy_(var)
    with pytest.warns(bnstats.BnstatsWarning, match=r"evaluate differently.*further: '1'$"):
        convert(model)
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert torch.equal(model[1].running_var, var + mean.square())
    assert torch.equal(model[0].running_var, torch.ones(3))


def test_a_warning_that_is_an_error_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].running_mean.fill_(1.0)
    with pytest.raises(bnstats.BnstatsWarning):
        convert(model)
    assert types(model) == [nn.Conv2d, nn.BatchNorm2d]
    assert torch.equal(model[1].running_mean, torch.ones(3))


def test_a_mean_near_zero_is_not_worth_a_warning():
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(1e-4)
    assert torch.equal(convert(layer).running_mean, torch.zeros(3))


def test_half_statistics_do_not_overflow_on_the_way():
    layer = nn.BatchNorm1d(1).half()
    layer.running_mean.fill_(20.0)
    with pytest.warns(bnstats.BnstatsWarning, match="evaluate differently"):
        convert(layer)
    assert layer.running_var.dtype == torch.float16
    assert layer.running_var.item() == 401
    assert layer.window_mean_squares.dtype == torch.float32


def test_momentum_is_kept_unless_it_is_given():
    assert convert(nn.BatchNorm1d(3, momentum=0.3)).momentum == 0.3
    layer = convert(nn.BatchNorm1d(3), momentum=0.02, window=4, warmup=7, renorm_warmup=9)
    assert (layer.momentum, layer.window, layer.warmup, layer.renorm_warmup) == (0.02, 4, 7, 9)


def test_another_window_starts_empty_and_keeps_the_running_statistics():
    layer = convert(nn.BatchNorm1d(3), window=4, warmup=0)
    for _ in range(6):
        layer(torch.randn(8, 3))
    running_var = layer.running_var.clone()
    convert(layer, window=4, warmup=2)
    assert layer.num_steps_tracked == 6
    convert(layer, window=5)
    assert layer.num_steps_tracked == 0
    assert layer.window_mean_squares.shape == (5, 3)
    assert torch.equal(layer.running_var, running_var)
    assert "window_scales" not in layer.state_dict()
    layer(torch.randn(8, 3)).sum().backward()


def test_layers_without_running_statistics_are_refused_by_path():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(InvalidValueError, match=r"'1'.*track_running_stats"):
        convert(model)
    assert types(model) == [nn.BatchNorm1d, nn.BatchNorm1d]


# The way back


def deep(dims=2):
    conv, norm, *_ = CONVOLUTIONS[dims]
    return nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, 8, 3, groups=2), norm(8)
    )


@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_a_trained_model_evaluates_the_same_after_the_way_back(dims):
    shape = (2, 3, *[5] * dims)
    model = train(convert(deep(dims), window=2, warmup=0), *shape).eval()
    x = torch.randn(shape)
    expected = model(x)
    torch.testing.assert_close(bnstats.revert_batchnorm(model)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_trained_linear_model_evaluates_the_same_after_the_way_back():
    model = train(convert(Written(), window=2, warmup=0), 4, 4).eval()
    x = torch.randn(4, 4)
    expected = model(x)
    bnstats.revert_batchnorm(model)
    assert centered(model) == set()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_reverting_twice_is_reverting_once():
    model = train(convert(deep(), window=2, warmup=0), 2, 3, 5, 5)
    state = copy.deepcopy(bnstats.revert_batchnorm(model).state_dict())
    torch.testing.assert_close(bnstats.revert_batchnorm(model).state_dict(), state, rtol=0, atol=0)


def test_another_family_evaluates_the_same_and_leaves_centered_layers():
    model = train(convert(deep(), window=2, warmup=0), 2, 3, 5, 5).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert torch.equal(bnstats.convert_batchnorm(model, "ema")(x), expected)
    assert isinstance(model[0], bnstats.CenteredConv2d)


def test_a_weight_shared_by_two_centered_layers_is_folded_once():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    train(convert(model), 2, 3, 4, 4).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    bnstats.revert_batchnorm(model)
    assert model[2].weight is model[0].weight
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    model[3].weight = model[0].weight
    return model


def wrapped_weight(wrap):
    def make():
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        wrap(model[0])
        return model

    return make


def inference():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with torch.inference_mode():
        model[0].weight = nn.Parameter(torch.randn(3, 3, 1, 1), requires_grad=False)
    return model


UNFOLDABLE = {
    "tied to a layer that is not centered": (tied, "'0'.*also '3''s"),
    "weight norm": (wrapped_weight(parametrizations.weight_norm), "'0'.*parametrization"),
    "inference mode": (inference, "'0'.*inference_mode"),
    "pruning": (wrapped_weight(lambda m: prune.l1_unstructured(m, "weight", 2)), "'0'.*pruning"),
}


@pytest.mark.parametrize(("make", "words"), UNFOLDABLE.values(), ids=UNFOLDABLE)
def test_a_weight_that_cannot_be_folded_is_refused_and_nothing_changes(make, words):
    model = convert(make())
    before = types(model)
    with pytest.raises(InvalidValueError, match=words):
        bnstats.revert_batchnorm(model)
    assert types(model) == before


def test_a_parametrized_convolution_is_centered_and_comes_back_without_it():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    parametrizations.weight_norm(model[0])
    convert(model)
    assert isinstance(model[0], bnstats.CenteredConv2d)
    x = torch.randn(2, 3, 4, 4)
    expected = model.eval()(x)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is bnstats.CenteredConv2d
    torch.testing.assert_close(bnstats.revert_batchnorm(model)(x), expected)


# What is refused


def put_on_the_layer():
    layer = nn.Conv2d(3, 3, 1)
    layer.forward = lambda x: nn.Conv2d.forward(layer, x).relu()
    return layer


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (put_on_the_layer, "its own forward.*include.*center=False"),
        (lambda: nn.LazyConv2d(3, 1), "lazy"),
    ],
)
def test_a_convolution_that_cannot_be_centered_is_refused_by_path(make, words):
    conv = make()
    model = nn.Sequential(nn.BatchNorm2d(3), conv)
    with pytest.raises(InvalidTypeError, match=f"'1'.*{words}"):
        convert(model)
    assert types(model) == [nn.BatchNorm2d, type(conv)]
    convert(model, include=lambda name, module: name != "1")
    assert types(model) == [bnstats.MovingAverageBatchNorm2d, type(conv)]
    convert(model, center=False)


def test_bad_options_are_named():
    with pytest.raises(InvalidTypeError, match="center: expected True or False, got str"):
        convert(deep(), center="no")
    with pytest.raises(InvalidTypeError, match=r"debias: .* window, momentum, center$"):
        convert(deep(), debias=True)
    with pytest.raises(InvalidValueError, match="window"):
        convert(deep(), window=0)
