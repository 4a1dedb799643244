"""A program that torch.export makes of a training layer goes on as the layer does."""

import copy

import pytest
import torch
from torch import nn

from cases import FAMILIES
from versions import fails_on_oldest

OPTIONS = [
    (FAMILIES[0], {"debias": False}),
    (FAMILIES[0], {"pooled": False}),
    (FAMILIES[0], {"momentum": 1.0}),
    (FAMILIES[1], {"momentum": 1.0}),
]


def each_family(*unknown_to_oldest):
    """All families; of those named torch 2.6's export fails."""
    mark = fails_on_oldest("its export keeps no tensor that a forward makes, or no state of MABN's")
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(f, marks=[mark] * (f.name in unknown_to_oldest), id=f.name)
            for f in FAMILIES
        ],
    )


def exported(layer, strict):
    """The program of a training layer, for a batch of any size."""
    x, size = torch.randn(6, 3, 4, 4), torch.export.Dim("size", min=2, max=64)
    return torch.export.export(layer, (x,), dynamic_shapes=({0: size},), strict=strict)


def assert_goes_on(program, layer):
    """The program of a layer does what the layer does."""
    for size in (6, 2, 7):
        x = torch.randn(size, 3, 4, 4) * size
        torch.testing.assert_close(program(x), layer(x))
    moved = program.state_dict()  # a strict export leaves out what no operator reads
    torch.testing.assert_close(moved, {key: layer.state_dict()[key] for key in moved})
    assert [key for key in moved if key.endswith("num_batches_tracked")]


@each_family("renorm")
def test_a_training_layer_is_exported_for_batches_of_any_size(family):
    layer = family.make(2)
    assert_goes_on(exported(copy.deepcopy(layer), strict=False).module(), layer)


@each_family("moving_average", "renorm")
def test_so_it_is_strictly(family):
    layer = family.make(2)
    assert_goes_on(exported(copy.deepcopy(layer), strict=True).module(), layer)


@pytest.mark.parametrize(("family", "options"), OPTIONS, ids=lambda x: getattr(x, "name", str(x)))
def test_so_it_is_with_its_options(family, options):
    layer = family.make(2, **options)
    assert_goes_on(exported(copy.deepcopy(layer), False).module(), layer)


# torch's own, from a copy of what it exported
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@each_family("moving_average", "renorm")
def test_an_exported_model_decomposes(family):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), family.make(2), nn.Conv2d(3, 3, 1), family.make(2))
    program = exported(copy.deepcopy(model), False).run_decompositions()
    with torch.no_grad():  # decomposed, it is for inference: nothing is detached in it
        assert_goes_on(program.module(), model)
