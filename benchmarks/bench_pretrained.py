"""A network with its ImageNet weights, fine-tuned on photographs: what recalibration is worth.

Trainings that are done are kept in ``pretrained_trainings.json``, and not done again: a run may
be stopped, or given ``--minutes``, and the next one goes on. The table says how many seeds
there are. Photographs and weights are the reader's to get; neither is kept here.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks import command, report
from benchmarks.fine_tuning import VARIANTS, Cell, Training, plan, quick_plan, together, train
from benchmarks.photographs import missing, say
from benchmarks.pretrained_figure import figure_of
from benchmarks.rows import Row, Run
from benchmarks.timing import keep_freed_memory
from benchmarks.tuned_networks import FROM_SCRATCH, PRETRAINED, SYNTHETIC

KINDS = {"running": "running averages", "pooled": "pooled", "layerwise": "layerwise"}
TABLES = {"pretrained": (PRETRAINED, 60), "from_scratch": (FROM_SCRATCH, 400)}
"""The tables: of which network, trained for how many steps."""

FIRST = tuple(
    f"{layer}, momentum {momentum}"
    for layer, momentum in [
        *(("BatchNorm", 0.01), ("BatchNorm", 0.1)),
        *(("EMABatchNorm", 0.1), ("RenormBatchNorm", 0.1)),
    ]
)
"""The layers on the README's first screen, at the extremes of the batch."""

STEPS_NOTE = (
    "Accuracy in %, median of the seeds, with running averages and, behind the arrow, recomputed. "
)


def measure(run: Run) -> list[Row]:
    """Train what is not done yet; return accuracies, their spread the range of the seeds."""
    lacking = missing(run.photos)
    network = PRETRAINED if lacking is None else SYNTHETIC
    tasks = quick_plan(network) if run.quick else plan()
    path = run.folder / "pretrained_trainings.json"
    done = _load(path)
    todo = [task for task in tasks if task not in {(t.cell, t.seed) for t in done}]
    if lacking is not None:
        say(run.quick, lacking)
        todo = todo if run.quick else []
    for trainings in _train_all(together(todo), run):
        done += trainings
        _save(path, done)
    cells = _by_cell(done)
    for name, (network, steps) in TABLES.items():
        lines = table(cells, network, steps)
        if len(lines) > 1:
            report.write_table(run.folder / f"{name}_table.md", "pretrained", lines, _note(done))
            if name == "pretrained":
                path = run.folder / f"{name}_first_table.md"
                report.write_table(path, "pretrained", _first(lines), _note(done))
    lines = steps_table(cells)
    if len(lines[0]) > 3:
        report.write_table(run.folder / "steps_table.md", "pretrained", lines, STEPS_NOTE)
    if cells and not run.quick:
        figure_of(cells).savefig(run.folder / "pretrained.png", dpi=100)
    return [row for cell, trainings in cells.items() for row in _rows(cell, trainings)]


def _train_all(tasks: Sequence[tuple[list[Cell], int]], run: Run) -> Iterable[list[Training]]:
    """Train, each training on a core of its own; begin none once the minutes are over."""
    if run.quick or not tasks:
        yield from (train(*task, run.photos) for task in tasks)
        return
    end = None if run.minutes is None else time.monotonic() + 60 * run.minutes
    waiting = list(reversed(tasks))
    cores = os.cpu_count() or 1
    with (
        # Nothing is timed here; half of the page faults are saved.
        ProcessPoolExecutor(cores, get_context("spawn"), keep_freed_memory) as pool,
        tqdm(total=len(tasks), desc="trainings", smoothing=0) as bar,
    ):
        running: set[Future[list[Training]]] = set()
        while True:
            while waiting and len(running) < cores and (end is None or time.monotonic() < end):
                running.add(pool.submit(train, *waiting.pop(), run.photos))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
                bar.update()


def _load(path: Path) -> list[Training]:
    if not path.exists():
        return []
    return [
        Training(**{**kept, "cell": Cell(**kept["cell"]), "curve": _tuples(kept["curve"])})
        for kept in json.loads(path.read_text())
    ]


def _tuples(curve: list[Any]) -> tuple[tuple[int, float, float], ...]:
    return tuple((steps, running, pooled) for steps, running, pooled in curve)


def _save(path: Path, done: Sequence[Training]) -> None:
    new = path.with_suffix(".new")
    lines = ",\n".join(json.dumps(asdict(training)) for training in done)
    new.write_text(f"[\n{lines}\n]\n")
    new.replace(path)


def _by_cell(done: Iterable[Training]) -> dict[Cell, list[Training]]:
    """Return the trainings of each cell, in the order of the plan."""
    cells: dict[Cell, list[Training]] = defaultdict(list)
    order = {task: place for place, task in enumerate(plan())}
    for training in sorted(done, key=lambda t: order.get((t.cell, t.seed), -1)):
        cells[training.cell].append(training)
    return cells


def _rows(cell: Cell, trainings: Sequence[Training]) -> list[Row]:
    work = f"accuracy, {cell.network}, {cell.steps} steps, {_seeds(trainings)}"
    return [
        Row(work, f"batch {cell.batch}", f"{cell.variant}: {name}", *summary, unit="%")
        for kind, name in KINDS.items()
        for summary in [_summary(trainings, kind)]
    ]


def _seeds(trainings: Sequence[Training]) -> str:
    return f"{len(trainings)} seed{'s' * (len(trainings) > 1)}"


def _summary(trainings: Sequence[Training], kind: str) -> tuple[float, float, float]:
    """Return median, least and most, in percent."""
    shares = [100 * getattr(training, kind) for training in trainings]
    return statistics.median(shares), min(shares), max(shares)


def _note(done: Sequence[Training]) -> str:
    """Say what the figures are, and how sure."""
    number = max(training.held_out for training in done)
    error = 100 * (0.7 * 0.3 / number) ** 0.5
    return (
        f"Accuracy in %, median and range of the seeds, on {number} held-out pictures, the same "
        f"in every row: an accuracy of 70 has a standard error of {error:.1f}. "
    )


def table(cells: dict[Cell, list[Training]], network: str, steps: int) -> list[list[str]]:
    """Return the lines of a README's table: a network trained for some steps."""
    header = ["trained with", "normalized over", "running averages", "recomputed"]
    lines = [[*header, "layerwise", "better recomputed"]]
    variants = list(VARIANTS)
    for cell in sorted(cells, key=lambda cell: (-cell.batch, variants.index(cell.variant))):
        trainings = cells[cell]
        if (cell.network, cell.steps) == (network, steps):
            better = sum(t.pooled > t.running for t in trainings)
            figures = [_figure(trainings, kind) for kind in KINDS]
            lines.append(
                [cell.variant, str(cell.batch), *figures, f"{better} of {_seeds(trainings)}"]
            )
    return lines


def steps_table(cells: dict[Cell, list[Training]]) -> list[list[str]]:
    """Return the lines of a README's table: the fine-tuned network, a column a length."""
    tuned = {cell: found for cell, found in cells.items() if cell.network == PRETRAINED}
    lengths = sorted({cell.steps for cell in tuned})
    figures: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for cell, trainings in tuned.items():
        before, after = (_summary(trainings, kind)[0] for kind in ("running", "pooled"))
        figure = f"{before:.1f} → {after:.1f}, {_seeds(trainings)}"
        figures[cell.variant, cell.batch][cell.steps] = figure
    variants = list(VARIANTS)
    lines = [["trained with", "normalized over", *(f"{length} steps" for length in lengths)]]
    for variant, batch in sorted(figures, key=lambda key: (-key[1], variants.index(key[0]))):
        found = figures[variant, batch]
        lines.append([variant, str(batch), *(found.get(length, "") for length in lengths)])
    return lines


def _first(lines: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return the header and the rows of the first screen, without the last two columns."""
    header, *rows = lines
    batches = [int(row[1]) for row in rows]
    extremes = {str(max(batches)), str(min(batches))}
    chosen = [row for row in rows if row[1] in extremes and row[0] in FIRST]
    return [row[:4] for row in (header, *chosen)]


def _figure(trainings: Sequence[Training], kind: str) -> str:
    median, low, high = _summary(trainings, kind)
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    command.main("pretrained")
