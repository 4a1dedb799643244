"""Schedule-free optimizers evaluate at other weights than they train at, and need their statistics.

The statistics that training leaves are of no weights that are evaluated. The optimizers' own recipe
is a pass over the data in training mode, with the averaged weights, before each evaluation; its
running averages are then those of the last few batches. torch's own ``update_bn`` decides how the
model is called, and needs a loader (https://github.com/pytorch/pytorch/issues/49082).
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import bnstats
import networks
from cases import batches

pytestmark = pytest.mark.usefixtures("one_thread")


class ScheduleFreeSGD(torch.optim.Optimizer):
    """By definition (Defazio et al. 2024, arXiv:2405.15682): gradients at y, evaluation at x.

    z <- z - lr grad(y), x <- (1 - 1/t) x + z / t, y = (1 - beta) z + beta x.
    """

    def __init__(self, params, lr=0.5, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.steps = 0
        for p in self.param_groups[0]["params"]:
            self.state[p].update(x=p.detach().clone(), z=p.detach().clone())

    @torch.no_grad()
    def train(self):
        beta = self.param_groups[0]["beta"]
        for p, state in self.state.items():
            p.copy_(torch.lerp(state["z"], state["x"], beta))

    @torch.no_grad()
    def eval(self):
        for p, state in self.state.items():
            p.copy_(state["x"])

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for p, state in self.state.items():
            state["z"].sub_(p.grad, alpha=self.param_groups[0]["lr"])
            state["x"].lerp_(state["z"], 1 / self.steps)
        self.train()


def own(parameters):
    return ScheduleFreeSGD(parameters)


def of_the_package(parameters):
    package = pytest.importorskip("schedulefree")
    return package.SGDScheduleFree(parameters, lr=0.5)


each_optimizer = pytest.mark.parametrize("optimizer_of", [own, of_the_package])


def step(model, optimizer, x):
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    optimizer.step()


def trained(optimizer_of):
    """Return a model after some steps, at the weights of training, and its optimizer."""
    model = networks.network()
    model[3].p = 0.0
    optimizer = optimizer_of(model.parameters())
    optimizer.train()
    for x in batches((8, 2, 8, 8), 10):
        step(model, optimizer, x)
    return model, optimizer


@each_optimizer
def test_the_pass_at_the_averaged_weights_is_what_recomputing_finds(optimizer_of):
    model, optimizer = trained(optimizer_of)
    at_training = copy.deepcopy(model)
    data = networks.uneven()

    optimizer.eval()
    averaged = copy.deepcopy(model)
    assert not torch.allclose(averaged[0].weight, at_training[0].weight, rtol=1e-3)
    with bnstats.observe(model.train()) as seen, torch.no_grad():
        for x in data:
            model(x)
    seen.stats().apply_to(model)

    expected = bnstats.recompute_population_stats(averaged, data).after
    for name, stats in seen.stats().items():
        assert stats.count == expected[name].count
        torch.testing.assert_close(stats.mean, expected[name].mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats.var, expected[name].var, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.eval()(data[0]), averaged.eval()(data[0]))
    # Those of the weights of training are others.
    of_training = bnstats.measure_population_stats(at_training, data)
    assert of_training.drift_from(averaged)["1"].mean_shift.abs().max() > 0.01


@each_optimizer
def test_a_pass_that_is_held_leaves_training_as_it_would_be_without(optimizer_of):
    """Evaluated in the middle, training goes on with the same weights and statistics."""
    runs = {}
    for evaluating in (False, True):
        torch.manual_seed(0)
        model, optimizer = trained(optimizer_of)
        data = batches((8, 2, 8, 8), 3)
        for x in data:
            if evaluating:
                optimizer.eval()
                with bnstats.observe(model) as seen, bnstats.hold_statistics(model):
                    for y in data:
                        model(y)
                evaluated = copy.deepcopy(model).eval()
                seen.stats().apply_to(evaluated)
                optimizer.train()
            step(model, optimizer, x)
        runs[evaluating] = model.state_dict()
    for name, value in runs[False].items():
        torch.testing.assert_close(runs[True][name], value, rtol=1e-4, atol=1e-5)
