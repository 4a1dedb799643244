"""``python -m benchmarks [NAME ...] [--quick] [--output DIR]``."""

from benchmarks.command import main

main()
