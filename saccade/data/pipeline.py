"""Batches of a split, read ahead of the step that uses them."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from saccade.data import splits as image_splits

# Images, labels and indices.
Batch: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def batches(
    split: image_splits.Split,
    order: np.ndarray,
    batch_size: int,
    *,
    first_batch: int = 0,
    prefetch: int = 2,
    stored: bool = False,
) -> Iterator[Batch]:
    """Reads a split in a given order, ahead of the consumer.

    Args:
        split: A `Split`.
        order: Indices into the split, as from `epoch_order`.
        batch_size: Images in a batch; the last batch holds what is left.
        first_batch: Number of batches to pass over without reading them.
        prefetch: Batches read ahead in a background thread; 0 reads in the
            caller's thread.
        stored: Whether images that are stored as uint8 are returned as such.

    Returns:
        Iterator of `(images, labels, indices)`: float32 `(k, h, w, c)`, int32
        `(k,)`, int32 `(k,)`. An error while reading is raised at its batch;
        the thread ends with the iterator, also when that is closed early.

    Raises:
        ValueError: If `batch_size`, `first_batch` or `prefetch` is too small.
    """
    if batch_size < 1 or first_batch < 0 or prefetch < 0:
        raise ValueError(
            "Expected batch_size >= 1, first_batch >= 0 and prefetch >= 0. "
            f"Received: batch_size={batch_size}, first_batch={first_batch}, "
            f"prefetch={prefetch}"
        )
    order = np.asarray(order).reshape(-1)
    starts = range(first_batch * batch_size, len(order), batch_size)

    def read(start: int) -> Batch:
        chosen = order[start : start + batch_size]
        labels = split.labels[chosen]
        images = split.read(chosen, stored=stored)
        return images, labels, chosen.astype(np.int32)

    return _ahead(read, starts, prefetch)


def _ahead(
    read: Callable[[int], Batch], starts: Sequence[int], prefetch: int
) -> Iterator[Batch]:
    if not prefetch:
        yield from map(read, starts)
        return
    # One worker keeps the order; what is not consumed is cancelled on close.
    pool = concurrent.futures.ThreadPoolExecutor(1, "batches")
    waiting: collections.deque[concurrent.futures.Future[Batch]] = (
        collections.deque()
    )
    try:
        for start in starts:
            waiting.append(pool.submit(read, start))
            if len(waiting) > prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def scaled(
    name: str,
    read: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    boxes: np.ndarray | None = None,
    content: Callable[[int], bytes] | None = None,
) -> image_splits.Split:
    """Returns a split that scales uint8 images to [0, 1]; floats are kept.

    Args:
        name: See `Split`, like boxes and content.
        read: Callable from int64 indices of shape `(k,)` to images, uint8, or
            floats in [0, 1].
        labels: Integers of shape `(n,)`.
        boxes, content: See `Split`.
    """
    return image_splits.Split(
        name, np.asarray(labels, np.int32), read, boxes, content
    )
