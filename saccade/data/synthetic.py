"""Random images in place of a data set's, to measure throughput.

A step with real images that takes longer than one with these waits for its
data. Nothing can be learned from them: the labels do not depend on the images.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from saccade.data import decoding
from saccade.data import splits as image_splits

# A prime number: an image gets the labels of all classes equally often.
_BANK = 61
_DRAWS = 0x5E7  # Tells the draws of images from others of a seed.


def data_name(run: Mapping[str, Any]) -> str:
    """Returns the name of the data of a run, for folders and records.

    Args:
        run: The run's config, a dict.

    Examples:
        >>> data_name({"dataset": "mnist"})
        'mnist'
        >>> data_name({"dataset": "mnist", "synthetic_data": True})
        'synthetic_mnist'
    """
    prefix = "synthetic_" if run.get("synthetic_data") else ""
    return f"{prefix}{run['dataset']}"


def labels(count: int, classes: int) -> npt.NDArray[np.int32]:
    """Returns class ids in turn, int32 of shape `(count,)`."""
    return np.arange(count, dtype=np.int32) % classes


def split(
    name: str,
    labels: npt.NDArray[np.int32],
    shape: tuple[int, int, int],
    seed: int,
) -> image_splits.Split:
    """Returns a split of random uint8 images.

    There are few different images, so that reading them costs a copy.

    Args:
        name: Name of the split.
        labels: Class ids, int32 of shape `(n,)`.
        shape: Height, width and channels of the images.
        seed: Non-negative integer that determines the images.
    """
    rng = np.random.default_rng([seed, _DRAWS])
    bank = rng.integers(0, 256, (_BANK, *shape), np.uint8)

    def read(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return bank[indices % _BANK]

    def read_crops(
        indices: npt.NDArray[np.int64],
        crop: decoding.RandomCrop,
        rngs: Iterable[np.random.Generator],
    ) -> npt.NDArray[np.uint8]:
        return read(indices)

    return image_splits.Split(
        name,
        labels,
        read,
        content=lambda i: repr((seed, shape, i % _BANK)).encode(),
        crop_reader=read_crops,
    )
