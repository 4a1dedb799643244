"""What several processes do together; test_distributed.py runs it in each of them and asks."""

import copy
import datetime
import traceback
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bnstats
import held_layers
import masked_replicas
import replicated_layers
import sharded_layers
from bnstats.distributed import Peers
from bnstats.errors import (
    BnstatsWarning,
    InvalidTypeError,
    InvalidValueError,
    LayerMismatchError,
    NonFiniteStatisticsError,
    PeerError,
)

METHODS = ("pooled", "batch_average", "layerwise", "sweeps")
device = torch.device("cpu")
"""Where this process has its models."""


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5),
    ).to(device)  # fmt: skip


def shards(world):
    """Uneven batches for each rank, in uneven numbers: the last has none."""
    generator = torch.Generator().manual_seed(5)
    return [
        [
            torch.randn(9 - i - rank, 2, 8, 8, generator=generator) * (1 + rank) + 7 * i
            for i in range(2 * (world - 1 - rank))
        ]
        for rank in range(world)
    ]


def raises(error, run, says=""):
    with pytest.raises(error, match=says):
        run()


def assert_all_said_the_same(said):
    """No process failed, and all returned the same bits."""
    for rank, (failure, _) in enumerate(said):
        assert failure is None, f"rank {rank}: {failure}"
    first, *others = (tree_flatten(result) for _, result in said)
    for leaves, structure in others:
        assert structure == first[1]
        for mine, theirs in zip(first[0], leaves, strict=True):
            same = mine == theirs
            if isinstance(mine, torch.Tensor):  # what is not known is NaN
                same = mine.dtype == theirs.dtype and (same | (mine.isnan() & theirs.isnan())).all()
            assert same, "not the same bits on every rank"


def same_as_one_process(method):
    def scenario(rank, world):
        model, parts = network(), shards(world)
        stats = bnstats.recompute_population_stats(model, parts[rank], method=method).after
        everything = [batch for part in parts for batch in part]
        alone = bnstats.measure_population_stats(network(), everything, method=method, sync=False)
        for name in alone:
            for field in ("mean", "var", "mean_stderr", "var_stderr"):
                expected = getattr(alone[name], field)
                torch.testing.assert_close(
                    getattr(stats[name], field), expected, rtol=1e-4, atol=1e-6
                )
            assert stats[name].count == alone[name].count
            assert stats[name].num_batches == alone[name].num_batches
        return model.cpu().state_dict(), [vars(s) for s in stats.values()]

    return scenario


def a_prior_is_weighed_together(rank, world):
    """Weights are those of one process with all samples, and every layer's are the same bits."""
    source = bnstats.measure_population_stats(
        network(), [torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(1))],
        sync=False,
    )  # fmt: skip
    everything = [batch for part in shards(world) for batch in part]
    stats = bnstats.measure_population_stats(network(), shards(world)[rank], prior=source)
    alone = bnstats.measure_population_stats(network(), everything, prior=source, sync=False)
    for name in alone:
        for field in ("mean", "var", "mean_stderr", "var_stderr"):
            expected = getattr(alone[name], field)
            torch.testing.assert_close(getattr(stats[name], field), expected, rtol=1e-4, atol=1e-6)
    other = bnstats.PopulationStats({name: source[name] for name in [*source][: 3 - rank % 2]})
    if world > 1:
        raises(
            (LayerMismatchError, InvalidValueError, PeerError),
            lambda: bnstats.measure_population_stats(
                network(), shards(world)[rank], prior=other if rank else source
            ),
        )
    return [(s.mean, s.var, s.mean_weight, s.var_weight) for s in stats.values()]


def tolerance_is_decided_together(method):
    def scenario(rank, world):
        generator = torch.Generator().manual_seed(rank)
        # The last rank's data is spread so much more that alone it would read on.
        data = torch.randn(100 if rank else 20, 8, 3, generator=generator)
        data = list(data + rank * torch.randn(len(data), 1, 1, generator=generator) / 4)
        read = []

        def loader():
            for batch in data:
                read.append(batch)
                yield batch

        source = data if method == "sweeps" else loader()
        model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)).to(device)
        stats = bnstats.measure_population_stats(model, source, method=method, tolerance=0.1)
        for s in stats.values():
            assert (s.mean_stderr / s.var.sqrt()).square().mean().sqrt() <= 0.1
            assert 8 * world <= s.num_batches < 20 + 100 * (world - 1)
        return [vars(s) for s in stats.values()]

    return scenario


class Failing:
    def __init__(self, batches, error):
        self.batches, self.error = batches, error

    def __iter__(self):
        yield from self.batches[:1]
        raise self.error


def one_raises_and_all_do(method, error):
    def scenario(rank, world):
        model, parts = network(), shards(world + 1)
        before = copy.deepcopy(model.state_dict())
        loader = Failing(parts[rank], error("the disk")) if rank == 1 else parts[rank]

        def run():
            bnstats.recompute_population_stats(model, loader, method=method)

        if rank == 1:
            raises(error, run, "the disk")
        else:
            raises(PeerError, run, "rank 1")
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        assert all(module.training for module in model.modules())

    return scenario


class RaisingLength:
    def __iter__(self):
        return iter(())

    def __len__(self):
        raise OSError("the disk")


def _other_layers():
    return nn.Sequential(network()[:5], nn.Flatten())


# What one process does differently; its error, and the message of the others.
BEFORE_THE_FIRST_BATCH = {
    "a length that raises": ({"loader": RaisingLength()}, OSError, "rank 1"),
    "an iterator": ({"loader": iter(()), "method": "sweeps"}, InvalidValueError, "read once"),
    "a lazy layer": (
        {"model": nn.Sequential(nn.LazyBatchNorm1d(), network())},
        InvalidTypeError,
        "InvalidTypeError: layer '0' .* is lazy",
    ),
    "no model": ({"model": print}, InvalidTypeError, "expected a torch.nn.Module"),
    "an option": ({"max_batches": 0}, InvalidValueError, "max_batches"),
}
DIFFERENT = {
    "layers": {"model": _other_layers()},
    "method": {"method": "batch_average"},
    "tolerance": {"tolerance": 0.1},
    "correction": {"correction": 0},
    "on_nonfinite": {"on_nonfinite": "skip"},
    "dtypes": {"model": network().half()},
    "no layers": {"model": nn.Linear(2, 2)},
}


def _recompute(world, rank, model=None, loader=None, **options):
    model = network() if model is None else model
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    lazy = (nn.UninitializedParameter, nn.UninitializedBuffer)
    before = {key: value.clone() for key, value in state.items() if not isinstance(value, lazy)}
    loader = shards(world + 1)[rank] if loader is None else loader
    try:
        bnstats.recompute_population_stats(model, loader, **options)
    finally:
        for key, value in before.items():
            assert torch.equal(model.state_dict()[key], value)


def failing_before_the_first_batch(what):
    def scenario(rank, world):
        different, error, says = BEFORE_THE_FIRST_BATCH[what]
        method = different.get("method", "pooled")
        if rank == 1:
            raises(error, lambda: _recompute(world, rank, **different))
        else:
            raises(PeerError, lambda: _recompute(world, rank, method=method), says)

    return scenario


def a_warning_that_is_an_error_is_one_on_all(rank, world):
    model = network()
    model[1].spare = nn.BatchNorm1d(2)  # which no forward reaches
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rank == 1 else "ignore")
        error, says = (BnstatsWarning, "'1.spare'") if rank == 1 else (PeerError, "rank 1")
        raises(error, lambda: _recompute(world, rank, model), says)


def measuring_where_others_recompute(rank, world):
    function = bnstats.measure_population_stats if rank else bnstats.recompute_population_stats
    raises(InvalidValueError, lambda: function(network(), shards(world)[0]), "not measure the same")


def measuring_different_things(what):
    def scenario(rank, world):
        different = DIFFERENT[what] if rank == 1 else {}
        raises(
            InvalidValueError, lambda: _recompute(world, rank, **different), "not measure the same"
        )

    return scenario


def failing_while_it_writes(method):
    def scenario(rank, world):
        class Unwritable(torch.Tensor):
            written = 0

            def copy_(self, *args):
                type(self).written += 1
                if self.written == 1:
                    raise OSError("the disk")
                return super().copy_(*args)

        model = network()
        if rank == 1:
            model[4].running_var = model[4].running_var.as_subclass(Unwritable)
        raises(
            OSError if rank == 1 else PeerError,
            lambda: _recompute(world, rank, model, method=method),
            "the disk" if rank == 1 else "rank 1",
        )

    return scenario


def bad_batches_are_everybodys(method):
    def scenario(rank, world):
        parts = shards(world + 1)
        if rank == 0:
            parts[0].insert(1, torch.full((2, 2, 8, 8), torch.nan))

        def run(**options):
            return bnstats.measure_population_stats(
                network(), parts[rank], method=method, **options
            )

        raises(PeerError if rank else NonFiniteStatisticsError, run)
        stats = run(on_nonfinite="skip")
        assert stats.num_skipped == 1
        assert stats["1"].num_batches == sum(map(len, shards(world + 1)[:world]))
        return [vars(s) for s in stats.values()]

    return scenario


def all_without_a_batch_is_an_error_on_all(rank, world):
    for method in METHODS:
        raises(
            InvalidValueError,
            lambda method=method: bnstats.measure_population_stats(network(), [], method=method),
            "at least one batch",
        )


def ddp_and_its_sampler(rank, world):
    x = torch.randn(37, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, torch.zeros(37))
    loader = DataLoader(data, 5, sampler=DistributedSampler(data, shuffle=False))
    model = DistributedDataParallel(network())
    states = []
    for method in METHODS:
        result = bnstats.recompute_population_stats(model, loader, method=method)
        assert [*result.after] == ["1", "4", "7"]
        assert result.after["1"].count == -(-37 // world) * world * 36
        states.append(copy.deepcopy(model.module.state_dict()))
    return states


def without_sync_each_has_its_own(rank, world):
    x = torch.full((4, 3), float(rank)) + torch.eye(4, 3)
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), [x], sync=False)[""]
    assert torch.equal(stats.mean, x.double().mean(0))


def a_group_is_merged_and_no_other(rank, world):
    first = dist.new_group([0, 1])
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    if rank < 2:
        stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), [x], sync=first)[""]
        assert stats.count == 8
    else:
        raises(
            InvalidValueError,
            lambda: bnstats.measure_population_stats(nn.BatchNorm1d(3), [x], sync=first),
            "not a member",
        )
    assert world >= 2


def moving_averages_do_not_merge(rank, world):
    def run():
        bnstats.measure_population_stats(network(), shards(world)[rank], method="ema")

    raises(InvalidValueError, run, "do not merge")


def there_is_one_collective(rank, world):
    counts = {}
    gather = Peers.all_gather_into
    with mock.patch.object(Peers, "all_gather_into", autospec=True, side_effect=gather) as it:
        for method in ("pooled", "batch_average", "layerwise"):
            it.reset_mock()
            bnstats.measure_population_stats(network(), shards(world)[rank], method=method)
            counts[method] = it.call_count
    # Layer by layer: one for each of the three, and one to find that no batch is left.
    assert counts == {"pooled": 1, "batch_average": 1, "layerwise": 4}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.detour, self.last = (nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x):
        y = self.first(x)
        return self.last(self.detour(y).relu() if x[0, 0] > 0 else y)


def processes_may_go_different_ways(method):
    def scenario(rank, world):
        generator = torch.Generator().manual_seed(rank)
        sign = 1 if rank == 1 else -1
        data = [torch.randn(6, 2, generator=generator).abs() * sign for _ in range(3)]
        stats = bnstats.measure_population_stats(Branching().to(device), data, method=method)
        batches = {name: s.num_batches for name, s in stats.items()}
        assert batches == {"first": 3 * world, "detour": 3, "last": 3 * world}
        return [vars(s) for s in stats.values()]

    return scenario


def sharded(world):
    model, mesh = network(), init_device_mesh("cpu", (world,))
    for module in (model[0], model[3], model[6], model):
        fully_shard(module, mesh=mesh)
    return model


def even_shards(world):
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(6, 2, 8, 8, generator=generator) for _ in range(3)] for _ in range(world)]


def fully_sharded_models_are_measured(method):
    def scenario(rank, world):
        model, parts = sharded(world), even_shards(world)
        stats = bnstats.recompute_population_stats(model, parts[rank], method=method).after
        plain = sharded(world).eval()
        with torch.no_grad():
            plain(parts[rank][0])
        after_any_forward = [type(p) for p in plain.parameters()]  # the root's own stay gathered
        assert [type(p) for p in model.parameters()] == after_any_forward
        everything = [batch for part in parts for batch in part]
        alone = bnstats.measure_population_stats(network(), everything, method=method, sync=False)
        for name in alone:
            torch.testing.assert_close(stats[name].mean, alone[name].mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(stats[name].var, alone[name].var, rtol=1e-4, atol=1e-6)
        model.train()(parts[rank][0]).sum().backward()
        assert all(isinstance(p.grad, DTensor) for p in model.parameters())
        return [vars(s) for s in stats.values()]

    return scenario


def fully_sharded_models_are_refused_by_layerwise(rank, world):
    def run():
        bnstats.measure_population_stats(sharded(world), even_shards(world)[0], method="layerwise")

    raises(InvalidValueError, run, r"sharded model \(fully_shard.*use method=.sweeps")


def uneven_shares_of_a_sharded_model_are_an_error_on_all(method):
    def scenario(rank, world):
        batches = even_shards(world)[rank][: 3 if rank else 2]

        def run():
            bnstats.recompute_population_stats(sharded(world), batches, method=method)

        raises(InvalidValueError, run, "rank 0 has no batch left .* same number of batches")

    return scenario


def a_loader_that_fails_beside_a_sharded_model_is_an_error_on_all(method):
    def scenario(rank, world):
        batches = even_shards(world)[rank]
        loader = Failing(batches, OSError("the disk")) if rank == 1 else batches

        def run():
            bnstats.recompute_population_stats(sharded(world), loader, method=method)

        if rank == 1:
            raises(OSError, run, "the disk")
        else:
            raises(PeerError, run, "rank 1")

    return scenario


def statistics_in_dtensors_are_refused(rank, world):
    def run():
        model = distribute_module(nn.BatchNorm1d(3), init_device_mesh("cpu", (world,)))
        bnstats.measure_population_stats(model, [torch.randn(4, 3)])

    raises(InvalidTypeError, run, "layer '' keeps its running statistics in DTensors")


SCENARIOS = {
    **held_layers.SCENARIOS,
    **masked_replicas.SCENARIOS,
    **replicated_layers.SCENARIOS,
    **sharded_layers.SCENARIOS,
    **{
        f"{scenario.__name__}[{m}]": scenario(m)
        for scenario in (
            fully_sharded_models_are_measured,
            uneven_shares_of_a_sharded_model_are_an_error_on_all,
            a_loader_that_fails_beside_a_sharded_model_is_an_error_on_all,
        )
        for m in ("pooled", "batch_average", "sweeps")
    },
    **{f"same_as_one_process[{m}]": same_as_one_process(m) for m in METHODS},
    **{f"tolerance_is_decided_together[{m}]": tolerance_is_decided_together(m) for m in METHODS},
    **{
        f"one_raises_and_all_do[{m}-{e.__name__}]": one_raises_and_all_do(m, e)
        for m in METHODS
        for e in (OSError, KeyboardInterrupt)
    },
    **{
        f"failing_before_the_first_batch[{what}]": failing_before_the_first_batch(what)
        for what in BEFORE_THE_FIRST_BATCH
    },
    **{
        f"measuring_different_things[{what}]": measuring_different_things(what)
        for what in DIFFERENT
    },
    **{f"failing_while_it_writes[{m}]": failing_while_it_writes(m) for m in METHODS},
    **{f"bad_batches_are_everybodys[{m}]": bad_batches_are_everybodys(m) for m in METHODS},
    **{
        f"processes_may_go_different_ways[{m}]": processes_may_go_different_ways(m)
        for m in ("pooled", "layerwise", "sweeps")
    },
    **{
        scenario.__name__: scenario
        for scenario in (
            a_prior_is_weighed_together,
            a_warning_that_is_an_error_is_one_on_all,
            all_without_a_batch_is_an_error_on_all,
            measuring_where_others_recompute,
            ddp_and_its_sampler,
            without_sync_each_has_its_own,
            a_group_is_merged_and_no_other,
            moving_averages_do_not_merge,
            there_is_one_collective,
            fully_sharded_models_are_refused_by_layerwise,
            statistics_in_dtensors_are_refused,
        )
    },
}


ON_DEVICES = [
    name
    for name in SCENARIOS
    if name.startswith(
        (
            "same_as_one_process",
            "tolerance_is_decided_together",
            "one_raises_and_all_do",
            "failing_while_it_writes",
            "bad_batches_are_everybodys",
            "processes_may_go_different_ways",
        )
    )
]
"""What is said of models on devices too."""


def run(rank, world, folder, backend="gloo", scenarios=None):
    """Run the scenarios in this process, and keep the message of each."""
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    said = {}
    for name, scenario in (SCENARIOS if scenarios is None else scenarios).items():
        try:
            said[name] = (None, scenario(rank, world))
        except BaseException:
            said[name] = (traceback.format_exc(), None)
    torch.save(said, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
