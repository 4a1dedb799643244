"""Tables: on the screen, and as JSON and Markdown in a folder of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, today, versions
from benchmarks.rows import Row

HEADER = [
    *("work", "size", "what", "median", "spread", "against", "ratio", "at most", ""),
    *("memory allows", "reached", "GB/s"),
]


def write(name: str, command: str, rows: Sequence[Row], folder: Path) -> None:
    """Write a benchmark's JSON, and the Markdown that it makes."""
    content = {"command": command, **_source(), "rows": [asdict(row) for row in rows]}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(path))


def write_table(path: Path, benchmark: str, lines: Iterable[Sequence[str]], note: str = "") -> None:
    """Write a table of a benchmark's own for the README, with what measured it under it."""
    source = f"{note}`python -m benchmarks.bench_{benchmark}` on {provenance(_source())}."
    path.write_text("\n".join([*table(lines), "", source, ""]))


def _source() -> dict[str, Any]:
    return {"date": today(), "machine": machine(), "versions": versions()}


def page(path: Path) -> str:
    """Return the Markdown page of a benchmark's JSON."""
    content = json.loads(path.read_text())
    lines = [f"`{content['command']}` on {provenance(content)}.", ""]
    lines += table(filled([HEADER, *(cells(row) for row in load(path))]))
    return "\n".join([*lines, ""])


def load(path: Path) -> list[Row]:
    """Return the rows of a benchmark's JSON."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def provenance(content: dict[str, Any]) -> str:
    """Say what measured, with what, and when."""
    device, *counts = content["machine"].items()
    numbers = [f"{number} {name}" for name, number in counts]
    installed = [f"{name} {version}" for name, version in content["versions"].items()]
    return ", ".join([str(device[1]), *numbers, *installed, str(content["date"])])


def filled(lines: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return the lines without the columns in which none but the header says anything."""
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return list(zip(*columns, strict=True))


def table(lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, of which the first is the header."""
    header, *body = (f"| {' | '.join(line)} |" for line in lines)
    return [header, "|" + " --- |" * (header.count("|") - 1), *body]


def cells(row: Row) -> list[str]:
    """Return what the table says of a row; nothing where there is nothing to say."""
    spread = "" if row.low is None else f"{show(row.low, row.unit)} to {show(row.high, row.unit)}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    limit = "" if row.limit is None else show(row.limit, row.unit)
    reached = "" if row.reached is None else f"{row.reached:.0%}"
    bandwidth = "" if row.moved is None else f"{row.moved / row.median / 1e9:.3g}"
    return [
        *(row.work, row.size, row.what, show(row.median, row.unit), spread, row.against or ""),
        *(ratio, promise(row), verdict(row), limit, reached, bandwidth),
    ]


def promise(row: Row) -> str:
    """Return what the row's ratio or median is at most to be."""
    if row.at_most is None:
        return ""
    return show(row.at_most, row.unit) if row.ratio is None else f"{row.at_most:.2f}"


def verdict(row: Row) -> str:
    """Return whether the promise is kept."""
    return {None: "", True: "met", False: "MISSED"}[row.met]


def show(value: float, unit: str) -> str:
    """Return a figure with its unit, times in milliseconds and memory in megabytes."""
    scale, name = {"s": (1e3, "ms"), "bytes": (1e-6, "MB")}.get(unit, (1, unit))
    return f"{scale * value:.4g} {name}".rstrip()
