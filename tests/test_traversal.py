"""Layers found by the names that users know, through every wrapper, and what is found instead."""

import importlib.util
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torchvision.ops.misc import FrozenBatchNorm2d

import bnstats
from bnstats.errors import BnstatsWarning, LayerMismatchError
from networks import network, trained, uneven

NAMES = ["1", "5", "8"]


def timm_ema(model):
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(model)


def timm_ema_v2(model):
    from timm.utils.model_ema import ModelEmaV2

    return ModelEmaV2(model)


def ema_pytorch(model):
    """ema-pytorch's class where it is installed, else one with its attributes and its name."""
    if importlib.util.find_spec("ema_pytorch") is not None:
        from ema_pytorch import EMA

        return EMA(model)

    class EMA(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.online_model = model
            self.ema_model = deepcopy(model)
            self.register_buffer("step", torch.tensor(0))

        def forward(self, x):
            return self.ema_model(x)

    EMA.__module__ = "ema_pytorch.ema_pytorch"
    return EMA(model)


EMAS = {"ModelEmaV3": timm_ema, "ModelEmaV2": timm_ema_v2, "ema-pytorch": ema_pytorch}


@pytest.mark.parametrize("wrap", EMAS.values(), ids=EMAS.keys())
def test_averages_of_weights_are_seen_through_to_the_averaged_model(wrap):
    online = trained()
    wrapped = wrap(online)
    averaged = wrapped.ema_model if hasattr(wrapped, "ema_model") else wrapped.module
    before = {key: value.clone() for key, value in online.state_dict().items()}
    result = bnstats.recompute_population_stats(wrapped, uneven())
    assert [*result.after] == NAMES
    assert torch.equal(averaged[1].running_mean, result.after["1"].mean.float())
    result.after.apply_to(network())
    for key, value in online.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_model_that_has_a_part_named_like_a_wrappers_is_no_wrapper():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.ema_model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.ema_model(self.module(x))

    stats = bnstats.measure_population_stats(Student(), [torch.randn(8, 3)])
    assert [*stats] == ["module", "ema_model"]


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")  # of one process
@pytest.mark.parametrize("method", ["pooled", "sweeps"])
def test_sharded_models_run_through_their_wrapper_and_keep_their_names(tmp_path, method):
    model, data = trained(), uneven()
    expected = bnstats.measure_population_stats(model, data, method=method)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model[4] = FullyShardedDataParallel(model[4], device_id=torch.device("cpu"))
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        stats = bnstats.recompute_population_stats(model, data, method=method).after
        assert [*stats] == NAMES
        for name in NAMES:
            torch.testing.assert_close(stats[name].var, expected[name].var)
        stats.apply_to(network())
    finally:
        torch.distributed.destroy_process_group()


def test_a_checkpointed_part_keeps_its_name():
    model = network()
    model[5] = checkpoint_wrapper(model[5])
    assert [*bnstats.measure_population_stats(model, uneven())] == NAMES


@pytest.mark.parametrize(
    ("has", "lacks", "says"),
    [
        ("encoder.", "", r"under the prefix 'encoder\.'.*get_submodule\('encoder'\)"),
        ("", "encoder.", r"without the prefix 'encoder\.'.*removeprefix\('encoder\.'\)"),
        ("net.encoder.", "net.", r"under the prefix 'net\.encoder\.' in place of 'net\.'"),
    ],
)
def test_a_mismatch_of_a_prefix_alone_is_named_with_the_remedy(has, lacks, says):
    def under(prefix):
        model = network()
        for key in reversed(prefix.split(".")[:-1]):
            parent = nn.Sequential()
            parent.add_module(key, model)
            model = parent
        return model

    stats = bnstats.measure_population_stats(under(lacks), uneven())
    with pytest.raises(LayerMismatchError, match=says):
        stats.apply_to(under(has))


def test_a_mismatch_of_other_kinds_names_the_nearest():
    stats = bnstats.measure_population_stats(network(), uneven())
    stats = bnstats.PopulationStats({"11": stats["1"], "5": stats["5"]})
    with pytest.raises(LayerMismatchError, match=r"not among .* '11' \(nearest: '1'\)"):
        stats.apply_to(network())


def frozen():
    return nn.Sequential(nn.Conv2d(2, 4, 3), FrozenBatchNorm2d(4, eps=0.1), nn.Flatten())


def test_frozen_layers_are_left_alone_until_include_names_them():
    model, data = frozen(), uneven()
    with pytest.warns(BnstatsWarning, match="1 FrozenBatchNorm2d"):
        assert len(bnstats.measure_population_stats(model, data)) == 0
    with torch.no_grad():
        x = torch.cat([model[0](x) for x in data]).double()
    plain = nn.Sequential(model[0], nn.BatchNorm2d(4, eps=0.1))
    for method in ("pooled", "batch_average", "layerwise", "sweeps"):
        result = bnstats.recompute_population_stats(
            model, data, method=method, include=lambda name, module: name == "1"
        )
        expected = bnstats.measure_population_stats(plain, data, method=method)["1"]
        torch.testing.assert_close(result.after["1"].mean, x.mean((0, 2, 3)), rtol=0.2, atol=0.2)
        torch.testing.assert_close(result.after["1"].var, expected.var)
        assert torch.equal(model[1].running_mean, result.after["1"].mean.float())
        assert torch.equal(model[1].running_var, result.after["1"].var.float())
    assert result.after.drift_from(model)["1"].kl.abs().max() < 1e-6
    result.undo()


def test_instance_norms_keep_statistics_of_another_kind_and_are_never_served():
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3))
    x = torch.randn(8, 3, 5)
    assert [*bnstats.measure_population_stats(model, [x], include=lambda *_: True)] == ["1"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Linear(3, 3), r"Linear has no BatchNorm layer with running statistics$"),
        (
            lambda: nn.Sequential(*(nn.BatchNorm1d(3, track_running_stats=False) for _ in "ab")),
            r"found instead: 2 BatchNorm1d without running statistics \(track_running_stats=False",
        ),
        (frozen, r"found instead: 1 FrozenBatchNorm2d.*include"),
        (
            lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))),
            r"found instead: 1 BatchNorm1d in TorchScript.*before torch\.jit\.script",
        ),
    ],
    ids=["none", "no statistics", "frozen", "scripted"],
)
def test_a_model_without_batchnorm_is_told_what_was_found_instead(make, says):
    with pytest.warns(BnstatsWarning, match=says):
        bnstats.measure_population_stats(make(), [torch.randn(4, 3)])


def test_an_include_that_chooses_nothing_is_told_what_there_is():
    with pytest.warns(BnstatsWarning, match=r"that include chooses, of 3: '1', '5', '8'"):
        bnstats.measure_population_stats(network(), uneven(), include=lambda *_: False)
