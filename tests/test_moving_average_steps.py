"""MovingAverageBatchNorm where forwards and backwards do not simply alternate."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import bnstats
import oracles
from moving_average import ORACLE_OPTIONS, make, same, state, train


class TestAccumulation:
    def test_several_forwards_then_backwards_pair_by_step_in_any_order(self):
        layer, oracle = make(dtype=torch.float64), oracles.MovingAverage(3, **ORACLE_OPTIONS)
        for _ in range(12):
            xs = [torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3)]
            inputs = [x.clone().requires_grad_() for x in xs]
            outputs = [layer(x) for x in inputs]
            saved = [oracle.forward(x)[1] for x in xs]
            for i in (2, 0, 1):
                grad = torch.randn_like(xs[i])
                outputs[i].backward(grad)
                grad_x, *_ = oracle.backward(grad, saved[i])
                np.testing.assert_allclose(inputs[i].grad, grad_x, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(layer.window_gradients, oracle.psi, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(layer.window_mean_squares, oracle.chi, rtol=1e-9)

    @pytest.mark.parametrize("steps", [3, 30])
    def test_several_backwards_of_one_forward_add_up_to_that_of_the_sum(self, steps):
        layer = train(make(dtype=torch.float64), steps, dtype=torch.float64)
        layer.zero_grad()
        other = copy.deepcopy(layer)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        first, second = torch.randn(2, *x.shape, dtype=torch.float64)
        output = layer(a)
        output.backward(first, retain_graph=True)
        output.backward(second)
        other(b).backward(first + second)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.window_gradients, other.window_gradients)
        torch.testing.assert_close(layer.weight.grad, other.weight.grad)

    def test_slots_that_no_backward_reached_do_not_count(self):
        layer = make(warmup=0, renorm_warmup=10**6, dtype=torch.float64)
        psis = []
        for i in range(12):
            x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
            output = layer(x)
            if i % 2:  # every other forward, and so only two of the four slots
                output.sum().backward()
                psis.append(layer.window_gradients[layer.num_steps_tracked % 4].clone())
        z = x.detach() / (layer.window_mean_squares.mean(0) + layer.eps).sqrt().view(-1, 1, 1)
        mean = torch.stack(psis[-2:]).mean(0).view(-1, 1, 1)
        expected = (1 - z * mean) / (layer.window_mean_squares.mean(0) + 1e-5).sqrt().view(-1, 1, 1)
        torch.testing.assert_close(x.grad, expected)

    def test_a_psi_two_turns_of_the_ring_old_does_not_count(self):
        layer = train(make(warmup=0), 9)
        layer.window_gradients.fill_(1e6)
        with torch.no_grad():
            for _ in range(2 * layer.window):
                layer(torch.randn(2, 3, 4, 5))
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad.abs().max() < 100

    def test_a_backward_a_turn_of_the_ring_late_changes_no_window(self):
        layer = make()
        late = layer(torch.randn(2, 3, 4, 5)).sum()
        train(layer, 6)
        before = state(layer)
        late.backward()
        same(before, state(layer))

    def test_second_derivatives_are_refused(self):
        layer = make()
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        with pytest.raises(bnstats.errors.InvalidValueError, match="create_graph"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)

    def test_many_gradients_at_once_are_refused(self):
        layer, x = make(), torch.randn(2, 3, 4, 5, requires_grad=True)
        y = layer(x)
        with pytest.raises(bnstats.errors.InvalidValueError, match="is_grads_batched"):
            torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)

    def test_forward_mode_is_refused(self):
        layer, x = make(), torch.randn(2, 3, 4, 5)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(bnstats.errors.InvalidValueError, match="forward-mode"):
                layer(dual)


class Net(nn.Module):
    """A region with two layers of different statistics, as a checkpoint would hold."""

    def __init__(self, **options):
        super().__init__()
        self.first = nn.Sequential(bnstats.CenteredConv2d(3, 4, 3), make(2, 4, **options))
        self.second = nn.Sequential(
            nn.ReLU(), nn.Dropout(0.2), bnstats.CenteredConv2d(4, 4, 3), make(2, 4, **options)
        )

    def forward(self, x):
        return self.second(self.first(x)).square().sum()


def checkpointed(model, x, use_reentrant):
    return checkpoint(model, x, use_reentrant=use_reentrant)


def assert_close_models(a, b):
    """Gradients to the rounding of adding them up in another order; states to the bit."""
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    same(state(a), state(b))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
class TestActivationCheckpointing:
    def run(
        self, forwards, use_reentrant, steps=32, model=None, separately=False, alike=False, calls=1
    ):
        plain = (model or Net(window=6)).double()
        other = copy.deepcopy(plain)
        for step in range(steps):
            x = torch.randn(forwards, 2, 3, 7, 7, dtype=torch.float64)
            x = x[:1].expand_as(x).clone() if alike else x
            for model, run in (
                (plain, lambda m, x: m(x)),
                (other, lambda m, x: checkpointed(m, x, use_reentrant)),
            ):
                torch.manual_seed(step)
                model.zero_grad()
                losses = [run(model, part.clone().requires_grad_()) for part in x]
                if separately:
                    for loss in losses:
                        loss.backward()
                else:
                    sum(losses).backward()
            assert_close_models(plain, other)
        assert plain.first[1].num_steps_tracked == steps * forwards * calls

    def test_moves_once_per_step_with_the_gradients_of_none(self, use_reentrant):
        self.run(1, use_reentrant)

    def test_normalizes_as_the_first_forward_did_after_others_have_moved_the_windows(
        self, use_reentrant
    ):
        self.run(3, use_reentrant)
        self.run(3, use_reentrant, separately=True)

    def test_tells_forwards_of_the_same_batch_apart(self, use_reentrant):
        # Without dropout both are alike to the bit, except for the state that they met.
        model = Net(window=6)
        model.second[1].p = 0.0
        self.run(2, use_reentrant, model=model, alike=True)

    def test_a_layer_used_twice_in_a_region(self, use_reentrant):
        class Twice(Net):
            def forward(self, x):
                norm = self.first[1]
                return norm(self.second(norm(self.first[0](x)))).pow(3).sum()

        self.run(1, use_reentrant, model=Twice(window=6), calls=2)

    def test_a_batch_that_is_not_finite_still_changes_nothing(self, use_reentrant):
        layer = train(make(), 30)
        before = state(layer)
        x = torch.full((2, 3, 4, 5), float("nan"), requires_grad=True)
        checkpointed(layer, x, use_reentrant).sum().backward()
        same(before, state(layer))

    def test_a_forward_longer_ago_than_the_window_is_refused(self, use_reentrant):
        layer = make(window=2)
        losses = [
            checkpointed(layer, torch.randn(2, 3, 4, 5, requires_grad=True), use_reentrant).sum()
            for _ in range(3)
        ]
        with pytest.raises(bnstats.errors.InvalidValueError, match="at most window=2"):
            losses[0].backward()

    def test_bfloat16_under_autocast(self, use_reentrant):
        model = Net(window=6)
        other = copy.deepcopy(model)
        for step in range(15):
            x = torch.randn(2, 3, 7, 7)
            for net, run in ((model, lambda m, x: m(x)), (other, checkpointed)):
                torch.manual_seed(step)
                net.zero_grad()
                extra = () if net is model else (use_reentrant,)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = run(net, x.clone().requires_grad_(), *extra)
                loss.backward()
            same(state(model), state(other))
            for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
                assert torch.equal(ours.grad, theirs.grad)
