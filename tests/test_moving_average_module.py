"""MovingAverageBatchNorm as a module: state, loading, recalibration, compilers, devices."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnstats
from bnstats.errors import InvalidTypeError, InvalidValueError
from cases import PLAIN
from moving_average import make, same, state, train

PLAIN_KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
WINDOW_KEYS = [
    "window_mean_squares",
    "window_gradients",
    "window_gradient_steps",
    "num_steps_tracked",
]


def ring_buffers(layer):
    """Every buffer beside those of torch's layer, by name."""
    return {name: b for name, b in layer.named_buffers() if name not in PLAIN_KEYS}


class TestModule:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_is_torchs_class_with_its_keys_and_a_few_more(self, dims):
        layer = make(dims)
        assert isinstance(layer, bnstats.MovingAverageBatchNorm)
        assert isinstance(layer, PLAIN[dims])
        assert list(layer.state_dict()) == PLAIN_KEYS + WINDOW_KEYS

    def test_signature_is_the_published_one(self):
        layer = bnstats.MovingAverageBatchNorm2d(3, 1e-3, 0.1, True, True, "cpu", torch.float64)
        assert (layer.window, layer.warmup, layer.renorm_warmup) == (16, 100, 1000)
        assert layer.max_ratio == 5.0
        assert bnstats.MovingAverageBatchNorm1d(3).momentum == 0.02
        assert "window=16, warmup=100, renorm_warmup=1000, max_ratio=5.0" in repr(layer)

    def test_options_may_be_numpys_numbers(self):
        options = {"eps": np.float64(1e-3), "max_ratio": np.float64(2), "warmup": np.int64(2)}
        layer = train(make(**options), 30)
        assert layer(torch.randn(2, 3, 4, 5)).dtype == torch.float32
        assert {v.dtype for v in ring_buffers(layer).values()} == {torch.float32, torch.int64}

    def test_the_package_can_be_imported_twice(self):
        # notebooks do so; torch registers an operator once
        again = "[sys.modules.pop(name) for name in list(sys.modules) if 'bnstats' in name]"
        code = f"import sys, bnstats; {again}; import bnstats"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_takes_device_and_dtype(self):
        layer = make(device="meta", dtype=torch.float64)
        assert all(v.is_meta for v in layer.state_dict().values())
        assert layer.window_gradients.dtype == torch.float64

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_leaves_the_windows_as_they_are(self, dtype):
        layer = make(window=2, warmup=0)
        for _ in range(3):
            layer(torch.randn(8, 3, 5, 5) * 400)
        before = state(layer)
        layer.to(dtype)
        assert layer.running_var.dtype == dtype
        for key in WINDOW_KEYS:
            assert torch.equal(layer.state_dict()[key], before[key]), key

    def test_half_precision_goes_with_a_change_of_device(self):
        layer = make().to("meta", torch.float16)
        assert all(v.is_meta for v in ring_buffers(layer).values())
        layer._apply(lambda t: torch.empty_like(t, device="cpu").half())
        assert layer.window_mean_squares.device.type == "cpu"
        assert layer.window_mean_squares.dtype == torch.float32

    @pytest.mark.parametrize(
        ("option", "error", "words"),
        [
            ({"window": 0}, InvalidValueError, "window: expected 1 or more, got 0"),
            ({"window": 2.0}, InvalidTypeError, "window: expected an int, got float"),
            ({"warmup": -1}, InvalidValueError, "warmup: expected 0 or more, got -1"),
            ({"renorm_warmup": -5}, InvalidValueError, "renorm_warmup: expected 0 or more, got -5"),
            ({"max_ratio": 0.5}, InvalidValueError, "max_ratio: expected .* 1 or more, got 0.5"),
            ({"max_ratio": float("nan")}, InvalidValueError, "max_ratio"),
            ({"max_ratio": "5"}, InvalidTypeError, "max_ratio: expected a number, got str"),
            ({"track_running_stats": False}, InvalidValueError, "track_running_stats.*windows"),
            ({"momentum": 2}, InvalidValueError, "momentum"),
            ({"eps": 0}, InvalidValueError, "eps"),
        ],
    )
    def test_refuses_bad_options(self, option, error, words):
        with pytest.raises(error, match=words):
            make(**option)

    @pytest.mark.parametrize("shape", [(2, 3), (2, 4, 5, 5), (2, 3, 5, 5, 5)])
    def test_refuses_inputs_of_the_wrong_shape_and_stays_as_it_is(self, shape):
        layer = make()
        before = state(layer)
        with pytest.raises(InvalidValueError, match="expected a 4d input with 3 channels"):
            layer(torch.randn(shape))
        same(before, state(layer))

    def test_reset_empties_the_windows(self):
        layer = train(make(), 30)
        layer.reset_running_stats()
        same(state(layer), state(make()))

    @pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "save"])
    @pytest.mark.parametrize("steps", [2, 15, 40])
    def test_goes_on_to_the_bit_after_a_round_trip_within_the_window(self, way, steps):
        layer = train(make(), steps)
        if way == "state_dict":
            other = make()
            other.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True)
        elif way == "save":
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            file.seek(0)
            other = make()
            other.load_state_dict(torch.load(file), assign=True)
        else:
            other = pickle.loads(pickle.dumps(layer)) if way == "pickle" else copy.deepcopy(layer)
        for _ in range(20):
            x = torch.randn(2, 3, 4, 5)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            for model, inputs in ((layer, a), (other, b)):
                model.zero_grad()
                model(inputs).square().sum().backward()
            assert torch.equal(a.grad, b.grad)
            assert torch.equal(layer.weight.grad, other.weight.grad)
        same(state(layer), state(other))

    def test_keeps_x_and_little_else_for_the_backward(self):
        layer = train(make(channels=64), 30, shape=(2, 64, 4, 4))
        kept = []
        x = torch.randn(2, 64, 32, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            output = layer(x)
        storages = {t.untyped_storage().data_ptr() for t in kept if t.numel() > 64}
        assert storages == {x.untyped_storage().data_ptr()}
        held = [v for v in vars(output.grad_fn).values() if isinstance(v, torch.Tensor)]
        assert all(t.numel() <= layer.window * 64 for t in held)
        own = layer.weight.data_ptr()  # is there in any case
        assert len([t for t in kept if t.data_ptr() != own]) + len(held) <= 6


class TestLoading:
    def plain(self, mean=0.0):
        plain = nn.BatchNorm2d(3)
        for _ in range(5):
            plain(torch.randn(4, 3, 5, 5) + mean)
        if not mean:
            plain.running_mean.zero_()
        return plain

    def test_plain_checkpoint_loads_strictly_with_empty_windows(self):
        plain, layer = self.plain(), train(make(), 30)
        expected = copy.deepcopy(plain.state_dict())
        result = layer.load_state_dict(plain.state_dict(), strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        for key, value in expected.items():
            assert torch.equal(layer.state_dict()[key], value), key
        assert not any(layer.state_dict()[key].any() for key in WINDOW_KEYS)
        x = torch.randn(2, 3, 4, 5)
        assert torch.equal(layer.eval()(x), plain.eval()(x))

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_mean_is_warned_of_and_taken_over_about_zero(self, assign):
        plain = self.plain(mean=3.0)
        checkpoint = {f"0.{k}": v for k, v in plain.state_dict().items()}
        before = copy.deepcopy(checkpoint)
        model = nn.Sequential(make())
        with pytest.warns(bnstats.BnstatsWarning, match=r"layer '0'.*running_mean is not near"):
            model.load_state_dict(checkpoint, strict=True, assign=assign)
        same(before, checkpoint)
        assert not model[0].running_mean.any()
        expected = plain.running_var + plain.running_mean**2
        torch.testing.assert_close(model[0].running_var, expected)

    @pytest.mark.parametrize("depth", [0, 1, 3])
    def test_the_warning_points_at_who_loads(self, depth):
        model, prefix = make(), ""
        for _ in range(depth):
            model, prefix = nn.Sequential(model), prefix + "0."
        checkpoint = {prefix + k: v for k, v in self.plain(mean=3.0).state_dict().items()}
        with pytest.warns(bnstats.BnstatsWarning) as warned:
            model.load_state_dict(checkpoint)
        assert warned[0].filename == __file__

    @pytest.mark.filterwarnings("ignore::bnstats.BnstatsWarning")
    def test_a_half_precision_mean_is_squared_in_float32(self):
        plain = self.plain(mean=300.0).half()
        layer = make()
        layer.load_state_dict(plain.state_dict())
        expected = plain.running_var.float() + plain.running_mean.float() ** 2
        torch.testing.assert_close(layer.running_var, expected)

    @pytest.mark.filterwarnings("ignore::bnstats.BnstatsWarning")
    def test_assigned_statistics_keep_the_checkpoints_dtype(self):
        layer = make()
        layer.load_state_dict(self.plain(mean=3.0).half().state_dict(), assign=True)
        dtypes = {v.dtype for v in (layer.weight, layer.running_mean, layer.running_var)}
        assert dtypes == {torch.float16}
        assert layer.window_mean_squares.dtype == torch.float32
        assert layer.eval()(torch.randn(2, 3, 4, 5).half()).isfinite().all()

    @pytest.mark.parametrize("source", [make, lambda: nn.BatchNorm2d(3)], ids=["own", "plain"])
    def test_assigned_double_precision_is_that_of_every_window(self, source):
        layer = make()
        layer.load_state_dict(source().double().state_dict(), assign=True)
        assert {v.dtype for v in ring_buffers(layer).values()} == {torch.float64, torch.int64}
        train(layer, 3, dtype=torch.float64)

    def test_assigned_half_windows_become_float32_again(self):
        layer = make()
        half = {k: v.half() if v.is_floating_point() else v for k, v in make().state_dict().items()}
        layer.load_state_dict(half, assign=True)
        assert layer.running_var.dtype == torch.float16
        assert {v.dtype for v in ring_buffers(layer).values()} == {torch.float32, torch.int64}
        train(layer, 3, dtype=torch.float16)

    def test_own_checkpoints_load_without_a_word(self):
        layer, other = train(make(), 30), make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(layer.state_dict())
            other.load_state_dict(self.plain().state_dict())

    def test_bad_checkpoints_are_refused_in_torchs_words(self):
        with pytest.raises(RuntimeError, match="size mismatch"):
            make().load_state_dict(nn.BatchNorm2d(4).state_dict())
        with pytest.raises(RuntimeError, match="size mismatch for window_gradients"):
            make().load_state_dict(make(window=5).state_dict())
        with pytest.raises(RuntimeError, match=r"Missing key.*running_mean"):
            make().load_state_dict(nn.BatchNorm2d(3, track_running_stats=False).state_dict())

    def test_goes_back_to_plain_with_its_own_keys_left_over(self):
        layer, plain = train(make(), 30), nn.BatchNorm2d(3)
        result = plain.load_state_dict(layer.state_dict(), strict=False)
        assert result.unexpected_keys == WINDOW_KEYS
        x = torch.randn(2, 3, 4, 5)
        assert torch.equal(layer.eval()(x), plain.eval()(x))


class TestRecalibration:
    def batches(self, count=6, size=4):
        return [torch.randn(size, 3, 5, 5) * (1 + i) + i for i in range(count)]

    def test_leaves_running_mean_zero_and_running_var_the_mean_square(self):
        model = nn.Sequential(train(make(), 30))
        before = state(model[0])
        data = [*self.batches(), torch.randn(1, 3, 5, 5)]
        result = bnstats.recompute_population_stats(model, data)
        values = torch.cat(data).double()
        assert not model[0].running_mean.any()
        expected = values.square().mean((0, 2, 3)).float()
        torch.testing.assert_close(model[0].running_var, expected)
        for key in WINDOW_KEYS:
            assert torch.equal(model[0].state_dict()[key], before[key])
        result.undo()
        same(before, state(model[0]))

    def test_torchs_own_recalibration_works(self):
        model = nn.Sequential(train(make(momentum=0.3), 30))
        data = self.batches()
        torch.optim.swa_utils.update_bn(data, model)
        expected = torch.stack([x.square().mean((0, 2, 3)) for x in data]).mean(0)
        torch.testing.assert_close(model[0].running_var, expected)
        assert not model[0].running_mean.any()
        assert model[0].momentum == 0.3

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from fvcore's import
    def test_fvcores_recalibration_works(self):
        from fvcore.nn.precise_bn import update_bn_stats

        model = nn.Sequential(make(warmup=100))
        data = self.batches()
        update_bn_stats(model, data, len(data))
        # It takes running_var for unbiased, and makes it biased; n is 100 values here.
        expected = torch.stack([x.square().mean((0, 2, 3)) for x in data]).mean(0) * 99 / 100
        torch.testing.assert_close(model[0].running_var, expected)
        assert not model[0].running_mean.any()


class Region(nn.Module):
    """A model in a checkpoint."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


class TestCompile:
    @pytest.mark.parametrize("checkpointed", ["nowhere", "inside", "around it"])
    def test_without_a_graph_break_it_is_the_eager_layer(self, checkpointed):
        torch.compiler.reset()
        options = {"window": 3, "warmup": 5, "renorm_warmup": 8}
        eager = nn.Sequential(
            bnstats.CenteredConv2d(3, 4, 3), make(2, 4, **options), nn.ReLU(), make(2, 4, **options)
        )
        other = copy.deepcopy(eager)
        compiled = Region(other) if checkpointed == "inside" else other
        compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        compiled = Region(compiled) if checkpointed == "around it" else compiled
        for _ in range(15):
            x = torch.randn(2, 3, 6, 6)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            for model, run, inputs in ((eager, eager, a), (other, compiled, b)):
                model.zero_grad()
                run(inputs).square().sum().backward()
            torch.testing.assert_close(a.grad, b.grad)
        ours, theirs = state(eager), state(other)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], msg=name)

    def test_where_shapes_are_dynamic_it_is_the_eager_layer(self):
        torch.compiler.reset()
        layer = make()
        twin = copy.deepcopy(layer)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in (4, 5, 6):
            x = torch.randn(2, 3, size, size + 1)
            for run in (compiled, twin):
                run(x).pow(3).sum().backward()
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())
        for mine, plain in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, plain.grad)

    @pytest.mark.parametrize(("name", "values"), [
        ("momentum", (0.5, 0.1, 0.0, 0.2)),
        ("eps", (1e-5, 1e-3, 0.1)),
        ("max_ratio", (1.2, 1.1, 3.0)),
        ("warmup", (12, 3, 8)),
    ])  # fmt: skip
    def test_layers_of_different_options_compile(self, name, values):
        # The compiler takes an option that differs for a number of the graph.
        torch.compiler.reset()
        for value in values:
            layer = make(**{name: value})
            train(layer, 30)
            layer.zero_grad()
            twin = copy.deepcopy(layer)
            x = torch.randn(2, 3, 4, 5)
            for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), twin):
                run(x).pow(3).sum().backward()
            torch.testing.assert_close(layer.state_dict(), twin.state_dict())
            for mine, plain in zip(layer.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, plain.grad)

    def test_a_momentum_of_1_replaces_what_was_there_after_others_too(self):
        torch.compiler.reset()
        for momentum in (0.5, 0.1, 1.0):
            layer = make(momentum=momentum)
            if momentum == 1:
                layer.running_var.fill_(torch.inf)
            torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(2, 3, 4, 5))
        assert layer.running_var.tolist() == [1, 1, 1]

    def test_options_of_numpy_compile(self):
        torch.compiler.reset()
        layer = make(eps=np.float64(1e-3), momentum=np.float64(0.1), max_ratio=np.float64(2))
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 3, 4, 5))
        assert layer.num_steps_tracked == 1

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_operators_keep_the_rules_of_custom_operators(self, momentum):
        layer = train(make(), 30)
        for held in (False, True):
            layer.hold_running_stats(held)
            options = (1e-5, momentum, 5, 8, 5.0, held)
            arguments = (*layer._step_state(), torch.rand(3), *options)
            torch.library.opcheck(torch.ops.bnstats.moving_average_step, arguments)
        _, _, *history = layer._step_state()
        scale = (torch.rand(3), torch.rand(3), layer.num_steps_tracked + 1, torch.tensor(True))
        arguments = (*scale, torch.rand(3), *history)
        torch.library.opcheck(torch.ops.bnstats.moving_average_recall, arguments)
        psi, step = torch.rand(3), layer.num_steps_tracked.clone()
        arguments = (layer.window_gradients, layer.window_gradient_steps, step, psi, 5)
        torch.library.opcheck(torch.ops.bnstats.moving_average_gradient, arguments)
