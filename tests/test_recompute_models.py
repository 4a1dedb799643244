"""Batches of many forms, and every model that has batch norm."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import bnstats
import cases
from bnstats.errors import (
    BnstatsWarning,
)
from networks import network, trained, uneven

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, None],
        lambda x: Pair(x, 0),
        lambda x: ((x, 1), 2),
        lambda x: {"input": x},
        lambda x: UserDict(input=x),
        lambda x: [{"input": x}, "labels"],
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "nested", "dict", "mapping", "dict in list"],
)
def test_batches_come_in_many_forms(wrap):
    x = torch.randn(20, 3)
    model = nn.Sequential(nn.BatchNorm1d(3))
    stats = bnstats.measure_population_stats(model, [wrap(part) for part in x.split(5)])
    torch.testing.assert_close(stats["0"].mean, x.double().mean(0))


def test_forward_serves_every_other_batch_and_autocast():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(20, 3)
    seen = []

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(model(batch.payload).dtype)

    class Batch:
        payload = x

    stats = bnstats.measure_population_stats(model, [Batch()], forward=forward)
    assert seen == [torch.bfloat16]
    assert stats["1"].count == 20


def test_a_dataloader_serves():
    x = torch.randn(21, 3)
    loader = DataLoader(TensorDataset(x, torch.zeros(21)), batch_size=4)
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), loader)
    assert (stats[""].count, stats[""].num_batches) == (21, 6)
    torch.testing.assert_close(stats[""].var, x.double().var(0))


def test_batches_of_one_value_per_channel_do_not_raise():
    # https://github.com/pytorch/pytorch/issues/1381
    x = torch.randn(9, 3)
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), x.split(1))
    torch.testing.assert_close(stats[""].var, x.double().var(0))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        DataParallel,
        AveragedModel,
        lambda m: torch.compile(DataParallel(m), backend="eager"),
    ],
    ids=["compile", "DataParallel", "AveragedModel", "both"],
)
def test_wrappers_are_seen_through(wrap):
    model = trained()
    wrapped = wrap(model)
    inner = wrapped.module if isinstance(wrapped, AveragedModel) else model
    result = bnstats.recompute_population_stats(wrapped, uneven())
    assert [*result.after] == ["1", "5", "8"]
    result.after.apply_to(network())
    assert torch.equal(inner[1].running_mean, result.after["1"].mean.float())


def test_distributed_data_parallel_is_seen_through(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = trained()
        result = bnstats.recompute_population_stats(DistributedDataParallel(model), uneven())
        assert [*result.after] == ["1", "5", "8"]
        assert torch.equal(model[8].running_var, result.after["8"].var.float())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.14's own reading
def test_compiled_parts_inside_are_seen_through_and_still_observed():
    # Compiled code does not notice hooks that are added later.
    model = nn.Sequential(torch.compile(network()[:2], backend="eager"), nn.ReLU())
    x = torch.randn(4, 2, 8, 8)
    model(x)
    model[1].compile(backend="eager")
    stats = bnstats.measure_population_stats(model, [x])
    assert [*stats] == ["0.1"]
    assert stats["0.1"].count == 4 * 36
    model(x)


def test_sync_batchnorm_on_cpu_serves():
    x = torch.randn(20, 3, 4)
    stats = bnstats.measure_population_stats(nn.SyncBatchNorm(3), x.split(5))
    torch.testing.assert_close(stats[""].mean, x.double().mean((0, 2)), rtol=1e-6, atol=1e-7)


def test_a_model_that_asks_for_gradients_in_its_forward_serves():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.BatchNorm1d(3)

        def forward(self, x):
            with torch.enable_grad():
                return self.layer(x.clone().requires_grad_())

    x = torch.randn(20, 3)
    stats = bnstats.measure_population_stats(Asking(), x.split(5))
    torch.testing.assert_close(stats["layer"].mean, x.double().mean(0))
    assert not stats["layer"].mean.requires_grad


def test_a_subclass_with_a_forward_of_its_own_serves():
    class BatchNormRelu(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    x = torch.randn(8, 3, 4, 4)
    stats = bnstats.measure_population_stats(nn.Sequential(BatchNormRelu(3), BatchNormRelu(3)), [x])
    assert (stats["1"].mean > 0.2).all()


@pytest.mark.parametrize("family", cases.FAMILIES, ids=lambda f: f.name)
def test_our_layers_serve_and_their_counters_stay(family):
    model = nn.Sequential(family.make(1))
    x = torch.randn(40, 3) + 1
    model(x)
    counters = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    result = bnstats.recompute_population_stats(model, x.split(10))
    assert torch.equal(model[0].running_var, result.after["0"].var.float())
    for key, value in counters.items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_layer_that_keeps_its_statistics_about_zero_says_so_itself():
    class AboutZero(nn.BatchNorm1d):
        def statistics_about_zero(self):
            return True

    x = torch.randn(40, 3) + 2
    model = nn.Sequential(AboutZero(3))
    bnstats.recompute_population_stats(model, x.split(10))
    assert (model[0].running_mean == 0).all()
    torch.testing.assert_close(model[0].running_var, x.square().mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_wide_and_keep_their_dtype(dtype):
    model = nn.Sequential(nn.BatchNorm1d(3)).to(dtype)
    x = (torch.randn(200, 3) + 4).to(dtype)
    result = bnstats.recompute_population_stats(model, x.split(50))
    assert model[0].running_mean.dtype == dtype
    torch.testing.assert_close(result.after["0"].var, x.double().var(0), rtol=1e-6, atol=0)


def test_layers_without_running_statistics_are_no_concern():
    model = nn.Sequential(
        nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3), nn.BatchNorm1d(3)
    )
    with torch.no_grad():
        assert [*bnstats.measure_population_stats(model, [torch.randn(4, 3, 5)])] == ["2"]


def test_shared_layers_are_one_layer():
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    stats = bnstats.measure_population_stats(model, [torch.randn(8, 3)])
    assert {name: s.count for name, s in stats.items()} == {"0": 16}


def test_no_batchnorm_is_a_warning_and_an_empty_result():
    with pytest.warns(BnstatsWarning, match="Linear has no BatchNorm layer"):
        result = bnstats.recompute_population_stats(nn.Linear(2, 2), [torch.randn(3, 2)])
    assert len(result.after) == 0
    assert "0 BatchNorm layers" in str(result)
    result.undo()
    with pytest.warns(BnstatsWarning, match="that include chooses"):
        bnstats.measure_population_stats(network(), uneven(), include=lambda *_: False)


def test_batches_move_to_the_models_device_at_any_depth(device):
    model, x = nn.Sequential(nn.BatchNorm1d(3)).to(device), torch.randn(20, 3)
    seen = []

    def forward(model, batch):
        seen.append(batch["a"][0].device.type)
        model(batch["a"][0])

    stats = bnstats.measure_population_stats(model, [{"a": (x,)}], forward=forward)
    assert seen == [device.type]
    assert stats["0"].mean.device.type == "cpu"
    torch.testing.assert_close(stats["0"].var, x.double().var(0), rtol=1e-5, atol=0)


def test_a_device_may_be_named():
    seen = []

    def forward(model, batch):
        seen.append(batch.device.type)
        model(torch.randn(4, 3))

    bnstats.measure_population_stats(
        nn.BatchNorm1d(3), [torch.randn(4, 3)], device="meta", forward=forward
    )
    assert seen == ["meta"]


def test_batches_go_where_the_first_parameter_is_that_is_not_offloaded():
    # Offloaded parameters are on the meta device until their module runs.
    model = nn.Sequential(nn.Linear(3, 3, device="meta"), nn.BatchNorm1d(3))
    seen = []

    def forward(model, batch):
        seen.append(batch.device.type)
        model[1](batch)

    bnstats.measure_population_stats(model, [torch.randn(4, 3)], forward=forward)
    assert seen == ["cpu"]


ALL_METHODS = ["pooled", "batch_average", "ema", "layerwise", "sweeps"]


class Unhooked(nn.Module):
    """Reaches its first layer without a call, which is what hooks need."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.second(self.reach(self.first, x))


@pytest.mark.filterwarnings("ignore:no batch reached:bnstats.BnstatsWarning")
@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize(
    "reach",
    [
        lambda layer, x: layer.forward(x),
        lambda layer, x: nn.functional.batch_norm(x, layer.running_mean, layer.running_var),
    ],
    ids=["forward", "functional"],
)
def test_a_layer_reached_without_a_call_normalizes_as_in_evaluation(reach, method):
    model = Unhooked(reach)
    model.first.running_mean.fill_(1)
    model.first.running_var.fill_(4)
    x = 2 * torch.randn(40, 3) + 1
    result = bnstats.recompute_population_stats(model, x.split(10), method=method)
    assert [*result.after] == ["second"]
    seen = (x.double() - 1) / (4 + 1e-5) ** 0.5
    if method not in ("batch_average", "ema"):
        torch.testing.assert_close(result.after["second"].var, seen.var(0), rtol=1e-5, atol=0)
    assert (model.first.running_var == 4).all()


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_layer_in_evaluation_mode_in_a_model_that_trains_is_left_alone_and_named(method):
    model, data = trained(), uneven()
    model[5].eval()
    before = model[5].running_mean.clone(), model[5].running_var.clone()
    result = bnstats.recompute_population_stats(model, data, method=method)
    assert [*result.after] == ["1", "8"]
    assert result.after.frozen == ("5",)
    assert "left alone, frozen or in evaluation mode while the model trains: '5'" in str(result)
    assert torch.equal(model[5].running_mean, before[0])
    assert torch.equal(model[5].running_var, before[1])
    assert not model[5].training


def test_what_is_frozen_is_known_from_a_file_and_after_a_merge(tmp_path):
    model, data = trained(), uneven()
    model[5].eval()
    stats = bnstats.measure_population_stats(model, data)
    stats.save(tmp_path / "stats.npz")
    assert bnstats.PopulationStats.load(tmp_path / "stats.npz").frozen == ("5",)
    assert stats.merge(stats).frozen == ("5",)


def test_in_a_model_that_is_in_evaluation_mode_as_a_whole_no_layer_is_frozen():
    model, data = trained().eval(), uneven()
    model[3].train()  # dropout, for Monte Carlo estimates say
    result = bnstats.recompute_population_stats(model, data)
    assert [*result.after] == ["1", "5", "8"]
    assert result.after.frozen == ()
    assert "left alone" not in str(result)


def test_a_model_of_frozen_layers_alone_is_a_warning_that_says_so():
    model, data = trained(), uneven()
    for i in (1, 5, 8):
        model[i].eval()
    with pytest.warns(BnstatsWarning, match="all 3 .* frozen, or in evaluation mode"):
        result = bnstats.recompute_population_stats(model, data)
    assert len(result.after) == 0


class OtherName(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = OtherName(3)

    def forward(self, x):
        return self.norm(x=x)


def test_a_subclass_that_is_called_with_its_own_keyword_is_observed():
    model, x = ByKeyword(), torch.randn(20, 3)
    assert bnstats.measure_population_stats(model, x.split(5))["norm"].count == 20
    with bnstats.record_batch_stats(model) as record:
        model(x)
    torch.testing.assert_close(record["norm"].mean[0], x.double().mean(0))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
@pytest.mark.parametrize("method", ALL_METHODS)
def test_layers_around_a_part_in_torchscript_are_measured(method):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval())
    model = nn.Sequential(nn.BatchNorm1d(3), scripted, nn.BatchNorm1d(3))
    stats = bnstats.measure_population_stats(model, torch.randn(40, 3).split(10), method=method)
    assert [*stats] == ["0", "2"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_the_models_error_for_a_nested_tensor_is_its_own_with_the_note(layout):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            raise RuntimeError("nothing for nested tensors")

    batch = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)
    with pytest.raises(RuntimeError, match="nothing for nested tensors") as caught:
        bnstats.measure_population_stats(Model(), [batch])
    assert "bnstats called Model(float32" in caught.value.__notes__[0]
