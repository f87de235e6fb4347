"""Batches of a split, read ahead of the step that uses them."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from saccade.data import decoding, parallel
from saccade.data import splits as image_splits

# Images, labels and indices.
Batch: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


# Which crops there are, seed and epoch; see `Split.read_crops`.
Crops: TypeAlias = tuple[decoding.RandomCrop, int, int]


def batches(
    split: image_splits.Split,
    order: np.ndarray,
    batch_size: int,
    *,
    first_batch: int = 0,
    prefetch: int = 2,
    stored: bool = False,
    crops: Crops | None = None,
) -> Iterator[Batch]:
    """Reads a split in a given order, ahead of the consumer.

    Args:
        split: A `Split`. If it decodes files, as many batches are read at a
            time as there are processor cores.
        order: Indices into the split, as from `epoch_order`.
        batch_size: Images in a batch; the last batch holds what is left.
        first_batch: Number of batches to pass over without reading them.
        prefetch: Batches read ahead in background threads; 0 reads in the
            caller's thread.
        stored: Whether images that are stored as uint8 are returned as such.
        crops: None, or the random crops of whole pictures to read in place of
            the images, see `Split.read_crops`; these are uint8.

    Returns:
        Iterator of `(images, labels, indices)`: float32 `(k, h, w, c)`, int32
        `(k,)`, int32 `(k,)`. An error while reading is raised at its batch;
        the threads end with the iterator, also when that is closed early.

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
        if crops is not None:
            images = split.read_crops(chosen, *crops)
        else:
            images = split.read(chosen, stored=stored)
        return images, labels, chosen.astype(np.int32)

    if not prefetch:
        return map(read, starts)
    workers = parallel.threads() if split.decodes else 1
    return parallel.ahead(read, starts, workers=workers, buffer=prefetch)
