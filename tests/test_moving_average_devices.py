"""MovingAverageBatchNorm where the host must not wait: on CUDA, and what a CPU can run of it."""

import copy
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bnstats import MovingAverageBatchNorm
from bnstats.layers import moving_average_gradient
from moving_average import SHORT, make, same, state, train
from paths import take_tensors_for_a_devices

ACCUMULATED_IN = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x[..., ::2],
    "two dimensions": lambda x: x[..., 0, 0].contiguous(),
}


class TestDevicePath:
    """What runs on CUDA, as far as a CPU can run it."""

    @pytest.mark.parametrize("use_reentrant", [None, False, True])
    def test_counters_as_tensors_give_the_numbers_of_counters_as_numbers(
        self, monkeypatch, use_reentrant
    ):
        layer, other = make(dtype=torch.float64), make(dtype=torch.float64)
        for step in range(40):
            x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
            x[0, 0, 0, 0] = float("nan") if step % 9 == 8 else 1.0
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            monkeypatch.undo()
            layer(inputs[0]).square().sum().backward()
            take_tensors_for_a_devices(monkeypatch)
            if use_reentrant is None:
                output = other(inputs[1])
            else:
                output = checkpoint(other, inputs[1], use_reentrant=use_reentrant)
            output.square().sum().backward()
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad, equal_nan=True)
            ours, theirs = state(layer), state(other)
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], msg=name)

    def test_a_forward_longer_ago_than_the_window_shows_as_nan(self, monkeypatch):
        take_tensors_for_a_devices(monkeypatch)
        layer = make(window=2)
        xs = [torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(3)]
        losses = [checkpoint(layer, x, use_reentrant=False).sum() for x in xs]
        losses[0].backward()
        assert xs[0].grad.isnan().all()

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
    @pytest.mark.parametrize("dtype", ACCUMULATED_IN, ids=str)
    def test_fused_operators_of_cuda_by_their_definitions(self, monkeypatch, dtype, layout, affine):
        monkeypatch.setattr(torch, "batch_norm_backward_reduce", _backward_reduce)
        monkeypatch.setattr(torch, "batch_norm_backward_elemt", _backward_elemt)
        wide = ACCUMULATED_IN[dtype]
        x, grad = (layout(torch.randn(2, 6, 3, 4, 5, dtype=wide)[i].to(dtype)) for i in (0, 1))
        layer = train(MovingAverageBatchNorm(3, **SHORT, dtype=wide, affine=affine), 30, dtype=wide)
        if affine:
            with torch.no_grad():
                layer.weight.copy_(torch.tensor([0.0, 1e-3, -2.0]))
            layer.zero_grad()
        other = copy.deepcopy(layer)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(a).backward(grad)
        monkeypatch.setattr(
            moving_average_gradient,
            "_anywhere",
            lambda *arguments: moving_average_gradient._on_cuda(*arguments[:-1]),
        )
        # A gradient may come in another layout than the input's.
        other(b).backward(grad.transpose(0, -1).contiguous().transpose(0, -1))
        # The CPU's kernel rounds half gradients twice, and half sums of strided values once.
        rtol, atol = (1e-7, 1e-7) if wide == torch.float64 else (1.3e-6, 1e-5)  # torch's own
        eps = 2 * torch.finfo(dtype).eps if dtype != wide else rtol
        close = functools.partial(torch.testing.assert_close, rtol=eps)
        close(a.grad, b.grad, atol=eps * float(a.grad.abs().max()))
        for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            close(ours.grad, theirs.grad, atol=atol)
        close(layer.window_gradients, other.window_gradients, atol=atol)


def _check_as_cuda_does(grad, x, statistics, factors):
    """What CUDA's kernels ask for, and do not always check (torch's Normalization.cu).

    Input and gradient are read by one dtype and one layout, dense; vectors per channel by the
    dtype that values of the input's are added up in, a weight of half beside it being another
    kernel's.
    """
    assert grad.dtype == x.dtype
    dense = any(
        grad.is_contiguous(memory_format=layout) and x.is_contiguous(memory_format=layout)
        for layout in (torch.contiguous_format, *([torch.channels_last] if x.dim() == 4 else []))
    )
    assert dense
    for vector in (*statistics, *factors):
        assert vector.dtype == ACCUMULATED_IN[x.dtype]
        assert vector.shape == (x.shape[1],)
        assert vector.is_contiguous()


def _backward_reduce(grad, x, mean, invstd, weight, input_g, weight_g, bias_g):
    """SyncBatchNorm's operator by its definition; the second sum is about the mean."""
    assert (input_g, weight_g, bias_g) == (True, False, False)
    _check_as_cuda_does(grad, x, (mean, invstd), (weight,))
    axes = [axis for axis in range(x.dim()) if axis != 1]
    grad, x = grad.to(mean), x.to(mean)
    centered = x - mean.view(1, -1, *[1] * (x.dim() - 2))
    return grad.sum(axes), (grad * centered).sum(axes), None, None


def _backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    """The gradient of normalization with statistics over ``count`` values."""
    _check_as_cuda_does(grad, x, (mean, invstd), (weight, sum_dy, sum_dy_xmu))
    assert (count.dtype, count.dim()) == (torch.int32, 1)
    shape, dtype = (1, -1, *[1] * (x.dim() - 2)), x.dtype
    grad, x = grad.to(mean), x.to(mean)
    sum_dy, sum_dy_xmu = sum_dy / count.sum(), sum_dy_xmu / count.sum()
    scaled = (x - mean.view(shape)) * (invstd.square() * sum_dy_xmu).view(shape)
    return ((grad - sum_dy.view(shape) - scaled) * (invstd * weight).view(shape)).to(dtype)


class TestCuda:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_is_the_cpus_without_waiting_for_the_device(self, cuda, dtype, layout):
        layer, other = make(channels=8), make(channels=8).to(cuda)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        for _ in range(40):
            x, grad = torch.randn(2, 4, 8, 6, 6).to(dtype).unbind()
            a = x.clone().requires_grad_()
            b = x.to(cuda).to(memory_format=layout).requires_grad_()
            layer.zero_grad()
            other.zero_grad()
            expected = layer(a)
            expected.backward(grad)
            grad = grad.to(cuda)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                output = other(b)
                output.backward(grad)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            close = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(output.cpu(), expected, **close)
            torch.testing.assert_close(b.grad.cpu(), a.grad, **close)
            torch.testing.assert_close(other.weight.grad.cpu(), layer.weight.grad, **close)
        for name, value in state(layer).items():
            torch.testing.assert_close(state(other)[name].cpu(), value, **close)

    def test_in_a_cuda_graph_goes_through_warmup_and_window(self, cuda):
        layer, other = make().to(cuda), make().to(cuda)
        static = torch.randn(2, 3, 4, 5, device=cuda, requires_grad=True)
        grad = torch.randn_like(static)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                static.grad = None
                layer(static).backward(grad)
        torch.cuda.current_stream().wait_stream(stream)
        other.load_state_dict(layer.state_dict())
        graph = torch.cuda.CUDAGraph()
        static.grad = None
        with torch.cuda.graph(graph):
            layer(static).backward(grad)
        for _ in range(40):
            x = torch.randn(2, 3, 4, 5, device=cuda)
            with torch.no_grad():
                static.copy_(x)
            graph.replay()
            x.requires_grad_()
            other(x).backward(grad)
            torch.testing.assert_close(static.grad, x.grad)
        for name, value in state(layer).items():
            torch.testing.assert_close(state(other)[name], value)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_under_activation_checkpointing(self, cuda, use_reentrant):
        layer, other = make().to(cuda), make().to(cuda)
        for _ in range(40):
            x = torch.randn(2, 3, 4, 5, device=cuda)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            layer(a).square().sum().backward()
            checkpoint(other, b, use_reentrant=use_reentrant).square().sum().backward()
            torch.testing.assert_close(a.grad, b.grad)
        same(state(layer), state(other))
