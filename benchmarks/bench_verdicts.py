"""Does ``diagnose`` leave alone what has no fault? Every architecture after honest steps.

The averages of the steps are right: equal weights, of weights that hardly move, and all of the
data. What is left is what architectures do by themselves: dropout and stochastic depth, 2 x 2
positions in the last layers, heads that do not run in evaluation. "Cannot tell" is no alarm. Those
that are done are kept, and the command goes on where it was; it reads no photographs.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

import bnstats
from benchmarks import command, report
from benchmarks.bench_architectures import LARGER, PIXELS, architectures, logits
from benchmarks.rows import Row, Run

BATCHES, BATCH, CLASSES = 8, 8, 10
LEARNING_RATE = 1e-5
NO_ALARM = ("healthy", "cannot tell")
MOST_PARAMETERS = 400e6
"""RegNetY-128GF has 645 million, and takes 10 GB to train."""


def measure(run: Run) -> list[Row]:
    """Diagnose each architecture that is not done; count the alarms."""
    path = run.folder / "verdicts_done.json"
    done: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    end = None if run.minutes is None else time.monotonic() + 60 * run.minutes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models' own code
        for name, make in tqdm(architectures(run.quick).items(), disable=run.quick):
            if name in done or (end is not None and time.monotonic() > end):
                continue
            torch.manual_seed(0)
            model = make()
            if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
                continue
            pixels = 32 if run.quick else LARGER.get(name.split()[-1], PIXELS)
            loader = torch.randn(BATCHES, BATCH, 3, pixels, pixels).unbind()
            done[name] = look(model, loader)
            if done[name][0] not in NO_ALARM:  # do its weights move after all?
                done[name].append(look(make(), loader, learning_rate=0)[0])
            path.write_text(json.dumps(done, indent=1) + "\n")
    report.write_table(run.folder / "verdicts_table.md", "verdicts", table(done))
    return _rows(done)


def look(
    model: nn.Module, loader: Iterable[Tensor], learning_rate: float = LEARNING_RATE
) -> list[str]:
    """Train honestly; return the verdict and its first evidence."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = None
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    model.train()
    for images in loader:
        optimizer.zero_grad()
        F.cross_entropy(logits(model(images)), torch.arange(len(images)) % CLASSES).backward()
        optimizer.step()
    diagnosis = bnstats.diagnose(model.eval(), loader)
    return [diagnosis.verdict, diagnosis.evidence[0]]


def table(done: dict[str, list[str]]) -> list[list[str]]:
    """Return a line for each verdict: how many there are, and which if it is an alarm."""
    counts = Counter(found for found, *_ in done.values())
    lines = [["verdict", "architectures", "false alarms"]]
    for verdict, count in counts.most_common():
        names = [
            f"{name} (with a learning rate of 0: {fixed})"
            for name, (found, _, *others) in sorted(done.items())
            for fixed in others
            if found == verdict
        ]
        lines.append([verdict, str(count), ", ".join(names)])
    return lines


def _rows(done: dict[str, list[str]]) -> list[Row]:
    """Return how many there are of each verdict, and a row for each alarm."""
    work, size = "verdict after honest steps", f"{len(done)} architectures"
    counts = Counter(found for found, *_ in done.values())
    rows = [Row(work, size, found, count, unit="") for found, count in counts.items()]
    alarms = {name: found for name, (found, *_) in done.items() if found not in NO_ALARM}
    rows += [Row(work, name, f"alarm: {found}", 1, unit="") for name, found in alarms.items()]
    return [*rows, Row(work, size, "false alarms", len(alarms), unit="alarms", at_most=0)]


if __name__ == "__main__":
    command.main("verdicts")
