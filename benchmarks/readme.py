"""The READMEs' tables: every promise, as the results keep it, and those that a benchmark wrote."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.rows import Row

READMES = (Path(__file__).parent.parent / "README.md", Path(__file__).parent / "README.md")
PROMISED = [
    *("layers", "moving_average", "operators", "recompute", "layerwise"),
    *("memory", "import", "merges", "drift", "masks", "renorm", "observe", "prior"),
    *("verdicts", "architectures"),
]
HEADER = ["what", "work", "sizes", "against", "measured", "at most", "of what memory allows"]


def rewrite(results: Path, readmes: Iterable[Path] = READMES) -> None:
    """Put the tables of these results between their marks in the READMEs."""
    for readme in readmes:
        text = readme.read_text()
        for name, table in tables(results, text).items():
            begin, end = marks(name)
            new = f"{begin}\n\n{table}\n\n{end}"
            text = re.sub(f"{begin}.*{end}", lambda _, new=new: new, text, flags=re.DOTALL)
        readme.write_text(text)


def marks(name: str) -> tuple[str, str]:
    """Return what begins and ends a table in the README."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def tables(results: Path, text: str) -> dict[str, str]:
    """Return the tables that a text has marks for: a benchmark's NAME_table.md, or all promises.

    In place of one that is not there yet, what measures it.
    """
    found = {}
    for name in re.findall("<!-- (\\w+): begin -->", text):
        path = results / f"{name}_table.md"
        if name == "performance":
            found[name] = performance(results)
        elif path.exists():
            found[name] = path.read_text().strip()
        else:
            found[name] = f"Not measured yet: `python -m benchmarks.bench_{name}`."
    return found


def performance(results: Path) -> str:
    """Return the table of the promised rows, and what measured them."""
    lines, sources = [HEADER], defaultdict(list)
    for name in PROMISED:
        path = results / f"{name}.json"
        if path.exists():
            lines += [_line(rows) for rows in _promises(report.load(path))]
            sources[report.provenance(json.loads(path.read_text()))].append(name)
    measured = [f"{', '.join(names)}: {source}." for source, names in sources.items()]
    return "\n".join([*report.table(lines), "", *measured])


def _promises(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the promised rows, those that differ only in size together."""
    promises = defaultdict(list)
    for row in rows:
        if row.at_most is not None:
            promises[row.work, row.what, row.against].append(row)
    return list(promises.values())


def _line(rows: Sequence[Row]) -> list[str]:
    """Return the line of one promise for several sizes."""
    first = rows[0]
    return [
        *(first.what, first.work, _listed(row.size for row in rows), first.against or ""),
        *(_listed(map(_figure, rows)), _at_most(rows)),
        _listed(f"{row.reached:.0%}" for row in rows if row.reached is not None),
    ]


def _at_most(rows: Sequence[Row]) -> str:
    """Return the promises, or the one that all sizes share."""
    promises = [report.promise(row) for row in rows]
    return promises[0] if len(set(promises)) == 1 else _listed(promises)


def _figure(row: Row) -> str:
    figure = report.show(row.median, row.unit) if row.ratio is None else f"{row.ratio:.3f}"
    return figure if row.met else f"**{figure} missed**"


def _listed(parts: Iterable[str]) -> str:
    return " / ".join(parts)
