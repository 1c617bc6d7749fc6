"""The memory that a call takes while it runs, as torch's allocator on the CPU counts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile, record_function

MIB = 2**20
_MARK = "the call begins"


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """The most MiB that a call held at once beyond what was there before it.

    Args:
        prepare: makes the call. It is watched too, since the allocator counts as freed only what
            it has seen allocated.
    """
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call = prepare()
        with record_function(_MARK):
            pass
        result = call()
    del result
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == _MARK)
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    later = [nbytes for start, nbytes in changes if start >= begin]
    return max(accumulate(later, initial=0)) / MIB


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes to the standard error, past Python."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
