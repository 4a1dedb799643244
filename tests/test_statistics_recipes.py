"""Recipes of a few lines, and that each does what it is for.

The data are scikit-learn's handwritten digits; each network is trained for a second at most.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bnstats

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def digits():
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def loader():
    return digits()[0].split(100)


def network():
    layers = [
        layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def train(model, steps=150, seed=0, after_step=None):
    x, y, *_ = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x[chosen]), y[chosen]).backward()
        optimizer.step()
        if after_step is not None:
            after_step()
    return model


@torch.no_grad()
def error(model):
    *_, x, y = digits()
    return float((model.eval()(x).argmax(1) != y).float().mean())


@functools.cache
def trained(seed):
    torch.manual_seed(seed)
    return train(network(), seed=seed)


# Standing statistics of a generator: those of the noise that it is sampled with.


def with_standing_statistics(generator, num_batches=50, batch=64, noise=8):
    batches = (torch.randn(batch, noise) for _ in range(num_batches))
    bnstats.recompute_population_stats(generator, batches, method="layerwise")
    return generator.eval()


def test_a_generator_with_standing_statistics_makes_one_sample_as_it_makes_many():
    layers = [
        nn.Linear(8, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 16),
        nn.BatchNorm1d(16),
    ]
    generator = nn.Sequential(*layers)
    for _ in range(3):
        generator(torch.randn(64, 8))  # its averages have hardly begun
    before = bnstats.measure_population_stats(generator, torch.randn(6400, 8).split(64))
    assert max(d.var_ratio.max() for d in before.drift_from(generator).values()) > 2
    generator = with_standing_statistics(generator)
    samples = torch.cat([generator(z) for z in torch.randn(4000, 8).split(1)])
    assert samples.mean(0).abs().max() < 0.1
    torch.testing.assert_close(samples.std(0), torch.ones(16), rtol=0.05, atol=0.05)


# A teacher that averages the student's weights averages its statistics too, and normalizes with
# them whatever mode the trainer puts it in (EMAN, Cai et al. 2021, arXiv:2101.08482).


def teacher_of(student, decay=0.95):
    average = get_ema_multi_avg_fn(decay)
    teacher = AveragedModel(student, multi_avg_fn=average, use_buffers=True)
    return bnstats.freeze_statistics(teacher)


def test_a_teacher_has_the_average_of_the_students_statistics():
    torch.manual_seed(0)
    student = network()
    teacher = teacher_of(student)
    expected = [student[1].running_mean.clone()]

    def after_step():
        teacher.train().update_parameters(student)
        if teacher.n_averaged == 1:
            expected[0] = student[1].running_mean.clone()
        else:
            expected[0].lerp_(student[1].running_mean, 0.05)

    train(student, after_step=after_step)
    layer = teacher.module[1]
    torch.testing.assert_close(layer.running_mean, expected[0])
    assert not layer.training
    assert error(teacher) < 0.06


# A pruned network has other activations, and needs the statistics of those.


def pruned(model, amount=0.8):
    for layer in model:
        if isinstance(layer, nn.Linear):
            prune.l1_unstructured(layer, "weight", amount)
    return model


def test_a_pruned_network_recovers_with_statistics_of_its_own():
    model = pruned(copy.deepcopy(trained(0)))
    before = error(model)
    bnstats.recompute_population_stats(model, loader(), method="layerwise")
    assert before > 0.2
    assert error(model) < 0.1


# Merged weights make activations of too little variance; REPAIR (Jordan et al. 2023,
# arXiv:2211.08403) resets the statistics. (It aligns the units of the two first.)


def merged(one, other, loader):
    model = copy.deepcopy(one)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data.lerp_(q.data, 0.5)
    bnstats.recompute_population_stats(model, loader, method="layerwise")
    return model


def test_a_network_of_merged_weights_recovers_with_statistics_of_its_own():
    one, other = trained(0), trained(1)
    unrepaired = AveragedModel(one, use_buffers=True)
    for model in (one, other):
        unrepaired.update_parameters(model)
    repaired = merged(one, other, loader())
    assert error(unrepaired) > 0.5
    assert error(repaired) < 0.3
