"""Weighting policies: what the core's recursion weighs a new batch with.

Each is a pure function of counters, which are numbers where the host knows them and tensors
where it must not wait for them; :mod:`bnstats.accumulators.averaging` has the mathematics. A mean
of the last m values is no such recursion: it keeps them, in
:mod:`bnstats.accumulators.ring_buffer`.
"""

from bnstats.accumulators.averaging import separate
from bnstats.accumulators.cumulative import cumulative
from bnstats.accumulators.exponential import exponential
from bnstats.accumulators.per_batch import per_batch

__all__ = ["cumulative", "exponential", "per_batch", "separate"]
