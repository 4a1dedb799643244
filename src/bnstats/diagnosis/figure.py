"""The figures that are returned: matplotlib's, which notebooks display. Needs matplotlib."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that displays as the last expression of a cell.

    IPython displays matplotlib's own figures only once pyplot is set up, which keeps every
    figure that it makes. This one renders itself, and is kept by its caller only.
    """

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
