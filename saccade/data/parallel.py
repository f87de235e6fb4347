"""Work on many items in several threads, ahead of whoever uses the results.

Grain runs the threads. It is imported with the first item, for it takes a
second and a data set that is not there must be missed at once.
"""

import os
import types
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from absl import logging

Result = TypeVar("Result")
# More threads than this wait for Python's lock.
_MAX_THREADS = 32


def threads() -> int:
    """Returns the number of threads that decode files."""
    return min(_MAX_THREADS, os.cpu_count() or 1)


def _import_grain() -> types.ModuleType:
    """Imports Grain without its warning that JAX is not installed."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        import grain
    finally:
        logging.set_verbosity(verbosity)
    return grain


def ahead(
    work: Callable[[Any], Result],
    items: Sequence[Any],
    *,
    workers: int | None = None,
    buffer: int | None = None,
) -> Generator[Result]:
    """Calls `work` for every item, in several threads.

    Args:
        work: Callable from an item; it may be called in any thread.
        items: Sequence of items.
        workers: Number of threads; None for `threads()`.
        buffer: Largest number of results that wait for the consumer; None for
            eight times as many as there are threads.

    Yields:
        The results in the order of the items. An exception of `work` is raised
        at its item. The threads end with the iterator, also when that is
        closed early.
    """
    count = len(items)
    if not count:
        return
    workers = threads() if workers is None else workers
    buffer = 8 * workers if buffer is None else buffer
    grain = _import_grain()
    results = (
        grain.MapDataset.range(count)
        .map(lambda i: work(items[i]))
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=max(1, min(workers, count)),
                prefetch_buffer_size=max(1, min(max(buffer, workers), count)),
            )
        )
    )
    iterator = iter(results)
    try:
        yield from iterator
    finally:
        iterator.close()
