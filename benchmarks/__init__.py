"""What bnstats costs, beside what it replaces; nothing here imports the tests.

``python -m benchmarks`` finds every ``bench_*`` and calls its ``measure``, which returns rows.
They are printed in one table, and kept in ``benchmarks/results`` as JSON, the Markdown made from
it, and the README's table.
"""
