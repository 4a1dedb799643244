"""What a recalibration reads: loaders of every kind, and batches of every form."""

import re
from collections import UserDict, defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, TensorDataset

import bnstats
from bnstats.errors import InvalidTypeError
from bnstats.recomputation.batches import move_to

METHODS = ["pooled", "batch_average", "ema", "layerwise", "sweeps"]


class Stream(IterableDataset):
    """A data set of unknown length."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


class Unsized:
    """A loader whose length is an error."""

    def __init__(self, batches, error):
        self.batches, self.error = batches, error

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        raise self.error


@pytest.mark.parametrize("method", METHODS)
def test_a_dataloader_of_unknown_length_serves_every_method(method):
    x = torch.randn(21, 3)
    stats = bnstats.measure_population_stats(
        nn.BatchNorm1d(3), DataLoader(Stream(x), batch_size=5), method=method, progress=True
    )[""]
    assert (stats.count, stats.num_batches) == (21, 5)
    known = bnstats.measure_population_stats(nn.BatchNorm1d(3), x.split(5), method=method)[""]
    assert torch.equal(stats.mean, known.mean)


@pytest.mark.parametrize("error", [TypeError("no len"), NotImplementedError()])
def test_a_length_that_cannot_be_asked_for_is_not_known(error):
    loader = Unsized([*torch.randn(20, 5, 3)], error)
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), loader, max_batches=10)[""]
    # Of an unknown number of batches these are a sample without correction.
    alone = bnstats.measure_population_stats(nn.BatchNorm1d(3), loader.batches[:10])[""]
    assert torch.equal(stats.mean_stderr, alone.mean_stderr)


def test_any_other_error_of_a_length_is_raised():
    loader = Unsized(torch.randn(2, 5, 3), OSError("the disk"))
    with pytest.raises(OSError, match="the disk"):
        bnstats.measure_population_stats(nn.BatchNorm1d(3), loader)


class Rows(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.randn(3)


class Fetched:
    """What torch's DataLoader fetches many samples of at once from; no subclass of Dataset."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"x": torch.randn(3)}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.randn(8, 3)),
        Rows(),
        ConcatDataset([TensorDataset(torch.randn(8, 3))]),
        Fetched(),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_a_dataset_in_place_of_a_loader_is_refused_with_the_remedy(dataset):
    name = type(dataset).__name__
    with pytest.raises(InvalidTypeError, match=rf"got {name}.*DataLoader\(dataset, batch_size="):
        bnstats.measure_population_stats(nn.BatchNorm1d(3), dataset)


def test_an_iterable_dataset_that_yields_batches_serves():
    stats = bnstats.measure_population_stats(nn.BatchNorm1d(3), Stream(torch.randn(4, 5, 3)))[""]
    assert stats.num_batches == 4


@pytest.mark.parametrize(
    "batch",
    [
        ([torch.randn(4, 3), torch.randn(4, 3)], torch.zeros(4)),
        ((torch.randn(3, 8, 8), torch.randn(3, 6, 9)), [{}, {}]),
        [((torch.randn(4, 3), torch.randn(4, 3)), 0), 1],
    ],
    ids=["two views", "images of a detector", "deeper"],
)
@pytest.mark.parametrize("method", METHODS)
def test_several_inputs_in_a_batch_are_refused_and_not_cut_down_to_the_first(batch, method):
    with pytest.raises(InvalidTypeError, match=r"2 floating-point tensors.*forward=lambda"):
        bnstats.measure_population_stats(nn.BatchNorm1d(3), [batch], method=method)


@pytest.mark.parametrize("method", METHODS)
def test_several_images_of_bytes_are_refused_too(method):
    views = list(torch.randint(0, 255, (2, 4, 3), dtype=torch.uint8))
    batch, forward = (views, torch.zeros(4)), lambda model, batch: model(batch[0][0].float())
    with pytest.raises(InvalidTypeError, match=r"2 .*tensors of several axes.*forward=lambda"):
        bnstats.measure_population_stats(nn.BatchNorm1d(3), [batch], method=method)
    stats = bnstats.measure_population_stats(
        nn.BatchNorm1d(3), [batch], method=method, forward=forward
    )
    assert stats[""].count == 4


def test_ids_with_their_lengths_are_no_several_inputs():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.bn = nn.Embedding(9, 3), nn.BatchNorm1d(3)

        def forward(self, ids):
            return self.bn(self.embedding(ids).transpose(1, 2))

    batch = ((torch.randint(9, (4, 5)), torch.tensor([5, 3, 4, 5])), torch.zeros(4))
    assert bnstats.measure_population_stats(Embedded(), [batch])["bn"].count == 20


def test_inputs_with_labels_and_an_index_are_no_several_inputs():
    x = torch.randn(8, 3)
    batch = ((x, torch.zeros(8, dtype=torch.long)), torch.arange(8))
    assert bnstats.measure_population_stats(nn.BatchNorm1d(3), [batch])[""].count == 8


class Graph:
    """Moves as a whole, as PyG's batches do."""

    def __init__(self, x):
        self.x, self.moves = x, []

    def to(self, device):
        self.moves.append(torch.device(device))
        return self


def test_an_object_that_can_move_is_moved_wherever_it_is():
    model = nn.Sequential(nn.BatchNorm1d(3))
    graph = Graph(torch.randn(8, 3))
    for batch, forward in (
        (graph, lambda model, batch: model(batch.x)),
        ({"g": [graph]}, lambda model, batch: model(batch["g"][0].x)),
    ):
        graph.moves.clear()
        bnstats.measure_population_stats(model, [batch], forward=forward)
        assert graph.moves == [torch.device("cpu")]
    with pytest.raises(InvalidTypeError, match=r"got Graph; pass forward=lambda"):
        bnstats.measure_population_stats(model, [graph])


def test_a_packed_sequence_moves_by_its_own_rule_and_is_no_tuple_of_tensors():
    packed = pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    moved = move_to(packed, "meta")
    assert isinstance(moved, PackedSequence)
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")
    with pytest.raises(InvalidTypeError, match="got PackedSequence; pass forward="):
        bnstats.measure_population_stats(nn.BatchNorm1d(2), [packed])


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, tokens):
        return self.bn(tokens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("batch", "how"),
    [
        (
            {"tokens": torch.randn(4, 3), "labels": torch.zeros(4, dtype=torch.long)},
            r"Tagger\(tokens=float32 \(4, 3\), labels=int64 \(4,\)\)",
        ),
        ((torch.randn(4, 2, 5), 1), r"Tagger\(float32 \(4, 2, 5\)\)"),
        ({"tokens": [torch.ones(2), 7]}, r"Tagger\(tokens=list\)"),
    ],
    ids=["too many keys", "another shape", "a list"],
)
def test_an_error_of_the_model_in_its_first_batch_notes_how_it_was_called(batch, how, method):
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as caught:
        bnstats.measure_population_stats(Tagger(), [batch], method=method)
    (note,) = caught.value.__notes__
    assert re.search(how, note)
    assert "forward=lambda model, batch: ..." in note


def test_a_later_error_and_one_of_a_forward_of_your_own_have_no_note():
    data = [torch.randn(4, 3), torch.randn(4, 5)]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        bnstats.measure_population_stats(Tagger(), data)
    assert not hasattr(caught.value, "__notes__")

    def forward(model, batch):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        bnstats.measure_population_stats(Tagger(), data, forward=forward)
    assert not hasattr(caught.value, "__notes__")


def test_what_leaves_a_device_is_waited_for():
    calls = []

    class Recording(torch.Tensor):
        def to(self, *args, **kwargs):
            calls.append(kwargs.get("non_blocking", False))
            return super().to(*args, **kwargs)

    on_host, on_device = (
        torch.randn(4, 3, device=device).as_subclass(Recording) for device in ("cpu", "meta")
    )
    move_to(on_host, torch.device("meta"))
    assert calls.pop() is True
    with pytest.raises(NotImplementedError):  # no data to copy
        move_to(on_device, torch.device("cpu"))
    assert calls.pop() is False


def test_namedtuples_and_mappings_keep_what_is_no_tensor():
    batch = SimpleNamespace(x=1)
    assert move_to([batch, {"a": (torch.ones(2), "b")}], "meta")[0] is batch


@pytest.mark.parametrize("method", ["pooled", "layerwise", "sweeps"])
def test_a_loop_over_persistent_workers_goes_on_after_a_measurement_from_the_same_loader(method):
    data = TensorDataset(torch.arange(24.0).reshape(24, 1))
    loader = DataLoader(data, 2, num_workers=2, persistent_workers=True)
    for _ in range(2):
        seen = []
        for index, (batch,) in enumerate(loader):
            seen += batch.flatten().tolist()
            if index == 3:
                stats = bnstats.measure_population_stats(nn.BatchNorm1d(1), loader, method=method)
                assert stats[""].count == 24
        assert seen == list(range(24))


def test_persistent_workers_at_rest_are_used_again():
    loader = DataLoader(TensorDataset(torch.randn(8, 1)), 2, num_workers=1, persistent_workers=True)
    for _ in loader:
        pass
    workers = [worker.pid for worker in loader._iterator._workers]
    bnstats.measure_population_stats(nn.BatchNorm1d(1), loader)
    assert [worker.pid for worker in loader._iterator._workers] == workers


class Tagged(list):
    """A list whose constructor takes more than its elements."""

    def __init__(self, elements, tag):
        super().__init__(elements)
        self.tag = tag


class Fields(UserDict):
    """A mapping with attributes, as transformers' batches are."""

    def __getattr__(self, name):
        return self.data[name] if name != "data" else super().__getattribute__(name)


def test_batches_of_classes_of_their_own_stay_of_their_class_with_their_attributes():
    x = torch.randn(8, 3)
    moved = move_to(Tagged([x, Fields(pixels=x)], "tag"), "meta")
    assert isinstance(moved, Tagged)
    assert moved.tag == "tag"
    assert moved[0].is_meta
    assert moved[1].pixels.is_meta
    stats = bnstats.measure_population_stats(
        nn.BatchNorm1d(3), [Fields(pixels=x)], forward=lambda model, batch: model(batch.pixels)
    )
    assert stats[""].count == 8
    ordered = move_to(defaultdict(list, a=x), "meta")
    assert ordered["a"].is_meta
    assert ordered["b"] == []


def test_moving_a_batch_changes_nothing_of_the_loaders():
    x = torch.randn(8, 3)
    for batch in (Tagged([x], "tag"), Fields(pixels=x), {"a": x}, [x]):
        move_to(batch, "meta")
        assert (batch[0] if isinstance(batch, list) else next(iter(batch.values()))) is x


class OfLength:
    """Says to have more batches than it has."""

    def __init__(self, batches, length):
        self.batches, self.length = batches, length

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return self.length


@pytest.mark.parametrize("method", ["pooled", "layerwise", "sweeps"])
def test_a_loader_that_ends_before_its_length_was_read_whole(method):
    # Its batches were taken for a part of the length, and the errors came out 3 times too small.
    batches = list(torch.randn(10, 8, 3))
    stats, expected = (
        bnstats.measure_population_stats(nn.BatchNorm1d(3), loader, method=method)[""]
        for loader in (OfLength(batches, 11), batches)
    )
    assert torch.equal(stats.mean_stderr, expected.mean_stderr)
