"""The same as ``prior``, on colour photographs: EfficientNet-Lite0, and Tux Paint's stamps.

The features are those of the network's ImageNet weights; the source's statistics are measured on
the clean photographs, layer by layer, and the head is a linear classifier trained behind them. The
held-out photographs come noisy, pale, bright or blurred.
"""

from __future__ import annotations

from collections import defaultdict

from torch import nn

import bnstats
from benchmarks import command, report
from benchmarks.bench_checkpoint import features_of, linear_head, small_classifier
from benchmarks.bench_prior import WAYS, Trained, errors_of
from benchmarks.photographs import missing, say, synthetic_photos
from benchmarks.rows import Row, Run
from bnstats.cli.photos import Photos, efficientnet_lite0

PIXELS, BATCH = 96, 16
SIZES = (1, 2, 4, 16)
DRAWS = 5
NET = "EfficientNet-Lite0"


def measure(run: Run) -> list[Row]:
    """Average over draws and conditions, of one network."""
    if (lacking := missing(run.photos)) is not None:
        say(run.quick, lacking)
        if not run.quick:
            return []
        trained = with_new_head(small_classifier(), synthetic_photos(32))
    else:
        trained = with_new_head(efficientnet_lite0(), Photos.load(run.photos, PIXELS))
    rows = []
    for size in SIZES[:1] if run.quick else SIZES:
        rows += errors_of(NET, [trained], size, draws=1 if run.quick else DRAWS, classes=10)
    path = run.folder / "prior_photographs_table.md"
    report.write_table(path, "prior_photographs", table(rows), "Errors in %. ")
    return rows


def table(rows: list[Row]) -> list[list[str]]:
    """Return a line for each kind and number of photographs, and in it the error of every way."""
    ways = [way for way in WAYS if any(row.what == way for row in rows)]
    errors: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row.what in ways:
            held_out = row.work.removeprefix(f"{NET}, error: ")
            errors[held_out, row.size][row.what] = f"{row.median:.1f}"
    by_kind = sorted(errors.items(), key=lambda item: item[0][0])
    lines = [[*kind, *(found[way] for way in ways)] for kind, found in by_kind]
    return [["held out", "adapted to", *ways], *lines]


def with_new_head(model: nn.Module, photos: Photos) -> Trained:
    """Give a network statistics of the photographs, and train its last layer anew behind them."""
    images, labels = photos.train.tensors
    source = bnstats.measure_population_stats(model, images.split(BATCH), method="layerwise")
    source.apply_to(model)
    name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    _, features = features_of(model.eval(), images, BATCH)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, linear_head(features, labels))
    return Trained(model, source, *photos.test.tensors)


if __name__ == "__main__":
    command.main("prior_photographs")
