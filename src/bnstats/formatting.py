"""How values are shown at a prompt and in notebooks: short, however many layers and channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

MAX_ROWS = 40
"""Layers that a ``repr`` shows: with a heading and a note, it fits on one screen."""

_MAX_VALUES = 6


def summarize(values: Tensor) -> str:
    """Return a few values as they are, and of many their range and number."""
    if values.is_meta:
        return f"meta tensor of shape {tuple(values.shape)}"
    values = values.detach().cpu().flatten()
    if values.numel() <= _MAX_VALUES:
        return f"[{', '.join(f'{value:.4g}' for value in values.tolist())}]"
    return f"<{extent(values)}, {values.numel()} values>"


def extent(values: Tensor) -> str:
    """Return the least and the largest of some values, one where they are equal, and the NaNs."""
    known = values[~values.isnan()]
    missing = values.numel() - known.numel()
    if known.numel() == 0:
        return f"{missing} NaN"
    least, largest = f"{known.min():.4g}", f"{known.max():.4g}"
    span = least if least == largest else f"{least} to {largest}"
    return span + (f", {missing} NaN" if missing else "")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, "1 layer" or "2 layers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def describe(name: str, fields: Mapping[str, Any]) -> str:
    """Return what a class's ``repr`` is, tensors summarized and numbers rounded."""
    return f"{name}({', '.join(f'{key}={_short(value)}' for key, value in fields.items())})"


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return summarize(value)
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def describe_mapping(mapping: Mapping[str, Any]) -> str:
    """Return a mapping's ``repr``, one line a layer."""
    lines = [f"{key!r}: {mapping[key]!r}" for key in [*mapping][:MAX_ROWS]]
    return "{" + ",\n ".join([*lines, *remainder(len(mapping))]) + "}"


def remainder(total: int, whole: str = "") -> list[str]:
    """Return the line that ends a shortened list of this many layers, if it was shortened."""
    if total <= MAX_ROWS:
        return []
    return [f"... {total - MAX_ROWS} more layers{whole}"]


def text_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return aligned columns, the first to the left and the others to the right."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(
    heading: str, titles: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> str:
    """Return a table for a notebook. The first cell of a row is escaped, the others are HTML."""
    cell = "padding: 1px 8px; text-align: {}; white-space: nowrap"
    left, right = cell.format("left"), cell.format("right")
    head = "".join(
        f'<th style="{left if index == 0 else right}">{escape(title)}</th>'
        for index, title in enumerate(titles)
    )
    body = "\n".join(
        f'<tr><td style="{left}"><code>{escape(first)}</code></td>'
        + "".join(f'<td style="{right}">{other}</td>' for other in others)
        + "</tr>"
        for first, *others in rows
    )
    lines = escape(heading).replace("\n", "<br>")
    end = f"\n<p>{escape(note)}</p>" if note else ""
    return (
        f"<p>{lines}</p>\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        f"</table>{end}"
    )


def html_bar(start: float, end: float, text: str) -> str:
    """Return a number with a bar beside it, from one to another share of its width."""
    start, end = (100 * min(max(share, 0.0), 1.0) for share in (start, end))
    # What is drawn is not to vanish: a ratio of 1 is a mark in the middle.
    start, end = min(start, 98.0), max(end, start + 2.0)
    stops = f"transparent {start:.0f}%, #b2182b {start:.0f}% {end:.0f}%, transparent {end:.0f}%"
    return (
        f'{escape(text)} <span style="display: inline-block; width: 80px; height: 0.7em; '
        f'border-bottom: 1px solid #999; background: linear-gradient(to right, {stops})">'
        "</span>"
    )
