"""A notebook is executed: what its cells display is what a reader of it sees."""

import textwrap

import pytest

CELLS = [
    """
    import sys, warnings
    warnings.simplefilter("error")
    import torch, bnstats
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.BatchNorm1d(8))
    loader = (3 + torch.randn(64, 8)).split(16)
    stats = bnstats.measure_population_stats(model, loader)
    """,
    "bnstats.plot_drift(stats, model)",
    "assert 'matplotlib.pyplot' not in sys.modules",
    "stats.drift_from(model)",
    "stats",
    "result = bnstats.recompute_population_stats(model, loader)\nresult",
    "result.drift['0']",
    "result.before",
    """
    with bnstats.record_batch_stats(model) as record:
        model(loader[0]).sum().backward()
    record
    """,
    "bnstats.plot_batch_stats(record, '0')",
    "import matplotlib.pyplot  # from here on IPython knows figures by itself",
    "bnstats.plot_drift(result)",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By cell, what it displayed: mime types and data."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from nbformat import v4

    notebook = v4.new_notebook(cells=[v4.new_code_cell(textwrap.dedent(c).strip()) for c in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "", "language": "python"}
    folder = str(tmp_path_factory.mktemp("notebook"))
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": folder}}
    ).execute()
    return {
        cell: [output.get("data", output) for output in executed.outputs]
        for cell, executed in zip(CELLS, notebook.cells, strict=True)
    }


@pytest.mark.parametrize("cell", [cell for cell in CELLS if "plot_" in cell])
def test_a_figure_as_the_last_line_of_a_cell_is_displayed_once(outputs, cell):
    (shown,) = outputs[cell]
    assert "image/png" in shown


@pytest.mark.parametrize("cell", ["stats", "stats.drift_from(model)", CELLS[5]])
def test_results_are_displayed_as_tables(outputs, cell):
    (shown,) = outputs[cell]
    assert "<table>" in shown["text/html"]
    assert "2 BatchNorm layers" in shown["text/plain"]


@pytest.mark.parametrize(
    ("cell", "begins"),
    [
        ("result.drift['0']", "Drift(mean_shift=<"),
        ("result.before", "{'0': RunningStats(mean=<0, 8 values>"),
        (CELLS[8], "BatchStatsRecord of 2 layers\n{'0': LayerRecord("),
    ],
)
def test_other_values_are_displayed_as_at_a_prompt(outputs, cell, begins):
    (shown,) = outputs[cell]
    assert shown["text/plain"].startswith(begins)
    assert len(shown["text/plain"].splitlines()) < 10
