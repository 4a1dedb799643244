"""MovingAverageBatchNorm against MABN's definition (arXiv:2001.06838), for inputs of every kind."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnstats
import oracles
from cases import SHAPES
from moving_average import ORACLE_OPTIONS, make, same, state, train


class TestMathematics:
    @pytest.mark.parametrize("case", SHAPES)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
    def test_is_the_oracle_through_warmup_window_and_renormalization(self, case, dtype, tolerance):
        dims, shape = SHAPES[case]
        layer = make(dims, dtype=dtype)
        oracle = oracles.MovingAverage(3, **ORACLE_OPTIONS)
        with torch.no_grad():
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_()
        oracle.weight = layer.weight.detach().double().numpy()
        oracle.bias = layer.bias.detach().double().numpy()
        ratios = set()
        for i in range(64):
            # Scale and size move, so that the window, the clamp and the batch all matter.
            x = (torch.randn(shape) * (1 + abs(np.sin(i / 5)))).to(dtype).requires_grad_()
            grad = torch.randn(shape).to(dtype)
            layer.zero_grad()
            output = layer(x)
            output.backward(grad)
            expected, saved = oracle.forward(x.detach())
            expected_grads = oracle.backward(grad, saved)
            ratios.update(np.round(saved[3], 6))
            actual = (
                *(output, x.grad, layer.weight.grad, layer.bias.grad),
                *(layer.running_var, layer.window_mean_squares, layer.window_gradients),
            )
            reference = (
                *(expected, *expected_grads),
                *(oracle.running_var, oracle.chi, oracle.psi),
            )
            for ours, theirs in zip(actual, reference, strict=True):
                # Relative to the largest number: a gradient's small entries are differences.
                ours = ours.detach().double().numpy()
                assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-3)
        assert {1.0, 1.2} < ratios  # the clamp was reached, and not only the clamp
        assert layer.num_steps_tracked == layer.num_batches_tracked == 64
        assert not layer.running_mean.any()

    @pytest.mark.parametrize("window", [1, 7])
    def test_window_and_defaults_of_any_size(self, window):
        options = {"window": window, "warmup": 0, "renorm_warmup": 0}
        layer = make(1, dtype=torch.float64, **options)
        oracle = oracles.MovingAverage(3, **{**ORACLE_OPTIONS, **options})
        for _ in range(20):
            x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
            layer(x).backward(x.detach() + 1)
            _, saved = oracle.forward(x.detach())
            grad_x, *_ = oracle.backward(x.detach() + 1, saved)
            np.testing.assert_allclose(x.grad, grad_x, rtol=1e-9, atol=1e-12)

    def test_gradient_is_the_outputs_derivative_while_the_batch_normalizes_itself(self):
        layer = make(2, warmup=10**9, dtype=torch.float64)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, *_: layer(x), (x, layer.weight, layer.bias), fast_mode=True
        )

    def test_gradients_of_the_parameters_are_the_outputs_when_the_window_is_constant(self):
        layer = train(make(2, dtype=torch.float64), 40, dtype=torch.float64)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        start = copy.deepcopy(layer.state_dict())

        def run(*_):
            with torch.no_grad():
                for name, value in layer.named_buffers():
                    if name in start:
                        value.copy_(start[name])
            return layer(x)

        assert torch.autograd.gradcheck(run, (layer.weight, layer.bias), fast_mode=True)

    def test_gradient_of_the_input_is_that_of_constant_statistics(self):
        # With var and Psi constants it is the derivative of sum(G output) - Psi / 2 sum(z^2).
        layer = train(make(2, dtype=torch.float64), 40, dtype=torch.float64)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        grad = torch.randn_like(x)
        running = layer.running_var.clone()
        layer(x).backward(grad)
        var, psi = layer.window_mean_squares.mean(0), layer.window_gradients.mean(0)
        ratio = ((var + layer.eps) / (running + layer.eps)).sqrt().clamp(1 / 1.2, 1.2)
        y = x.detach().requires_grad_()
        z = y / (var + layer.eps).sqrt().view(1, -1, 1, 1)
        weight = (layer.weight * ratio).view(1, -1, 1, 1)
        surrogate = (grad * weight * z).sum() - (psi.view(1, -1, 1, 1) * z * z).sum() / 2
        (expected,) = torch.autograd.grad(surrogate, y)
        torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-12)

    def test_evaluation_is_gradcheckable_plain_batch_norm(self):
        layer = train(make(2, dtype=torch.float64), 30, dtype=torch.float64).eval()
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        expected = F.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0, layer.eps
        )
        assert torch.equal(layer(x), expected)
        assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)

    def test_float32_statistics_of_many_values_keep_their_digits(self):
        layer = make(2, channels=1)
        x = torch.randn(4, 1, 512, 512) + 3
        layer(x)
        exact = x.double().square().mean()
        assert abs(layer.window_mean_squares[1].item() / exact.item() - 1) < 1e-6
        rows = make(1, channels=2)
        x = torch.randn(200_000, 2) + 3
        rows(x)
        exact = x.double().square().mean(0)
        torch.testing.assert_close(rows.window_mean_squares[1].double(), exact, rtol=1e-6, atol=0)


class TestInputs:
    @pytest.mark.parametrize("case", SHAPES)
    def test_one_value_per_channel_works(self, case):
        dims, shape = SHAPES[case]
        layer = make(dims)
        x = torch.randn(1, 3, *[1] * (len(shape) - 2), requires_grad=True)
        output = layer(x)
        output.sum().backward()
        torch.testing.assert_close(output, x.sign(), rtol=1e-2, atol=1e-2)
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize("affine", [True, False])
    def test_zero_size_batches_are_torchs_and_move_nothing(self, affine):
        layer, plain = make(affine=affine), nn.BatchNorm2d(3, affine=affine)
        train(layer, 3)
        before = state(layer)
        layer.zero_grad()
        for shape in [(0, 3, 4, 4), (2, 3, 0, 4)]:
            x, y = (torch.randn(shape, requires_grad=True) for _ in range(2))
            output = layer(x)
            output.sum().backward()
            plain(y).sum().backward()
            assert output.shape == y.shape
            assert x.grad.shape == y.grad.shape
        for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        same(before, state(layer))

    @pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
    def test_any_memory_layout_gives_the_same(self, layout):
        layer = train(make(), 30)
        other = copy.deepcopy(layer)
        x = torch.randn(2, 3, 4, 5)
        a = x.clone().requires_grad_()
        b = x.to(memory_format=layout).requires_grad_()
        layer(a).square().sum().backward()
        other(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        c = x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
        other = copy.deepcopy(layer)
        layer.zero_grad()
        torch.testing.assert_close(layer(a), other(c))

    def test_without_parameters(self):
        layer = train(make(affine=False), 40)
        affine = train(make(), 0)
        affine.load_state_dict(layer.state_dict(), strict=False)
        x = torch.randn(2, 3, 4, 5)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(a).square().sum().backward()
        affine(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)

    def test_gradients_only_where_they_are_wanted(self):
        layer = train(make(), 3)
        layer.zero_grad()
        layer.bias.requires_grad_(False)
        layer(torch.randn(2, 3, 4, 5)).square().sum().backward()
        assert layer.bias.grad is None
        assert layer.weight.grad is not None
        layer.weight.requires_grad_(False)
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert layer.window_gradient_steps.max() == layer.num_steps_tracked == 5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_inputs_keep_float32_statistics(self, dtype):
        layer, wide = train(make(), 20), None
        wide = copy.deepcopy(layer)
        x = torch.randn(4, 3, 8, 8).to(dtype)
        a, b = x.clone().requires_grad_(), x.float().requires_grad_()
        output = layer(a)
        output.sum().backward()
        wide(b).sum().backward()
        assert output.dtype == a.grad.dtype == dtype
        assert all(v.dtype in (torch.float32, torch.int64) for v in state(layer).values())
        torch.testing.assert_close(layer.window_mean_squares, wide.window_mean_squares)
        torch.testing.assert_close(layer.running_var, wide.running_var)
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_windows_of_a_half_module_stay_float32(self, dtype):
        layer = make().to(dtype)
        windows = [layer.window_mean_squares, layer.window_scales, layer.window_gradients]
        assert all(w.dtype == torch.float32 for w in windows)
        assert layer.running_var.dtype == layer.weight.dtype == dtype
        # A mean square above float16's largest number, which running_var, a tenth of it, is not.
        x = torch.full((2, 3, 4, 5), 300.0, dtype=dtype, requires_grad=True)
        output = layer(x)
        output.sum().backward()
        assert output.dtype == layer.weight.grad.dtype == dtype
        torch.testing.assert_close(output.float(), torch.ones(2, 3, 4, 5), rtol=1e-2, atol=0)
        assert layer.window_mean_squares[1, 0] > torch.finfo(torch.float16).max
        expected = torch.full((3,), 0.9 + 0.1 * 300**2)
        torch.testing.assert_close(layer.running_var.float(), expected, rtol=1e-2, atol=0)
        built = make(dtype=dtype)
        assert built.window_gradients.dtype == torch.float32

    def test_under_autocast_statistics_stay_float32(self):
        model = nn.Sequential(bnstats.CenteredConv2d(3, 3, 1), make())
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(30):
                output = model(torch.randn(2, 3, 4, 5))
                output.sum().backward()
        assert output.dtype == torch.bfloat16
        assert model[1].window_gradients.dtype == torch.float32
        assert model[1].running_var.dtype == torch.float32


class TestNonFinite:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
    def test_batch_changes_nothing(self, bad):
        layer = train(make(), 30)
        before = state(layer)
        x = torch.randn(2, 3, 4, 5)
        x[1, 2, 0, 0] = bad
        x.requires_grad_()
        layer(x).sum().backward()
        same(before, state(layer))

    def test_batch_shows_in_the_output(self):
        layer = train(make(), 30)
        x = torch.randn(2, 3, 4, 5)
        x[0, 1] = float("nan")
        output = layer(x)
        assert output[:, 1].isnan().all()
        assert output[:, [0, 2]].isfinite().all()

    def test_gradient_leaves_the_backward_window_alone_and_shows(self):
        layer = train(make(), 30)
        before = state(layer)
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        grad = torch.randn_like(x)
        grad[0, 0, 0, 0] = float("inf")
        layer(x).backward(grad)
        after = state(layer)
        assert torch.equal(after["window_gradients"], before["window_gradients"])
        assert torch.equal(after["window_gradient_steps"], before["window_gradient_steps"])
        assert after["num_steps_tracked"] == before["num_steps_tracked"] + 1
        assert not x.grad[:, 0].isfinite().all()

    @pytest.mark.parametrize("bad", [(float("inf"), -float("inf")), (3e38, 3e38)])
    def test_gradient_warns_no_more_than_torch_does(self, bad):
        layer = train(make(), 30)
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        grad = torch.randn_like(x)
        grad[0, 0, 0, :2] = torch.tensor(bad)
        layer(x).backward(grad)  # warnings are errors here

    def test_windows_that_overflow_do_not_warn_either(self):
        layer = make(1, channels=1, window=2, warmup=0)
        for _ in range(4):
            layer(torch.full((2, 1), 1.7e19))  # squares of 2.9e38: the sum of two is infinite
        assert layer.num_steps_tracked == 4

    def test_training_goes_on_after_it(self):
        layer = train(make(), 30)
        layer(torch.full((2, 3, 4, 5), float("nan"), requires_grad=True)).sum().backward()
        train(layer, 10)
        assert all(v.isfinite().all() for v in state(layer).values())
