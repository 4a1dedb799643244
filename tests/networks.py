"""Small networks with batch norm, their data, and snapshots that must not change."""

import torch
from torch import nn

import cases

METHODS = ["pooled", "batch_average", "ema"]
"""The methods that normalize each batch by itself."""


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5),
    )  # fmt: skip


def trained():
    model = network()
    for x in cases.batches((4, 2, 8, 8), 3):
        model(x)
    return model


def mix_modes(model):
    """Put every other layer into evaluation mode, but no BatchNorm: it would count as frozen."""
    for i, module in enumerate(model):
        module.train(i % 2 == 0 or isinstance(module, nn.modules.batchnorm._BatchNorm))


def uneven(dtype=torch.float32):
    return [x[: 8 - 2 * i] for i, x in enumerate(cases.batches((8, 2, 8, 8), 4, dtype=dtype))]


def snapshot(model):
    """Everything that a failed recalibration must leave alone, with the tensors' identities."""
    return (
        {
            key: (id(value), value.clone())
            for key, value in model.state_dict(keep_vars=True).items()
        },
        [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        [(m.momentum, m.eps) for m in model.modules() if hasattr(m, "momentum")],
    )


def assert_untouched(model, before):
    tensors, *rest = snapshot(model)
    assert rest == [*before[1:]]
    assert tensors.keys() == before[0].keys()
    for key, (identity, value) in tensors.items():
        assert identity == before[0][key][0], key
        assert torch.equal(value.nan_to_num(9.5), before[0][key][1].nan_to_num(9.5)), key
