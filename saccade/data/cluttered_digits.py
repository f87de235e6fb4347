"""The embedded data set: handwritten digits among clutter, made from a seed.

Real digits (scikit-learn's 1797 of 8x8) are enlarged and placed at random on a
canvas, among patches cut out of other digits. Whole numbers throughout, so the
bytes are the same on every machine.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

CANVAS = 40
SIZES = range(22, 28)
COUNTS = {"train": 4000, "validation": 500, "test": 1000}
_PATCHES, _PATCH = 5, 5
_FAINTEST = 16


def make(seed: int) -> dict[str, tuple]:
    """Makes the data set.

    Args:
        seed: Non-negative integer.

    Returns:
        Dictionary from the names in `COUNTS` to `(images, labels, boxes)`:
        uint8 `(n, 40, 40, 1)`, integers `(n,)`, and float32 `(n, 4)`: top,
        left, bottom, right of the digit's ink as fractions of the image.
    """
    images, labels, pools = sources()
    made = {}
    for key, (name, count) in enumerate(COUNTS.items()):
        random = np.random.default_rng([seed, key])
        made[name] = compose(images, labels, pools[name], count, random)[:3]
    return made


def sources() -> tuple[
    npt.NDArray[Any], npt.NDArray[Any], dict[str, npt.NDArray[Any]]
]:
    """Reads scikit-learn's digits and deals them to the splits.

    Returns:
        `(images, labels, pools)`: int64 `(1797, 8, 8)` of 0 to 16, `(1797,)`,
        and disjoint arrays of indices, one a split. They do not depend on the
        run's seed: a model trained with one seed has not seen the test digits
        of another.
    """
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = flat.reshape(-1, 8, 8).astype(np.int64)
    random = np.random.default_rng(1797)
    pools: dict[str, list] = {"test": [], "validation": [], "train": []}
    for digit in range(10):
        members = random.permutation(np.flatnonzero(labels == digit))
        cuts = [len(members) * 2 // 9, len(members) // 3]
        for name, part in zip(pools, np.split(members, cuts), strict=True):
            pools[name].append(part)
    return images, labels, {k: np.concatenate(v) for k, v in pools.items()}


def enlarge(images: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Enlarges digits.

    Catmull-Rom interpolation over a border of one zero; the weights are whole
    multiples of 1/1024.

    Args:
        images: int64 of shape `(n, 8, 8)`, 0 to 16.
        size: Side wanted, in pixels.

    Returns:
        uint8 array of shape `(n, size, size)`.
    """
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    side = padded.shape[-1]
    centres = (np.arange(size) + 0.5) * side / size - 0.5
    distance = np.abs(centres[:, None] - np.arange(side)[None, :])
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights = np.rint(1024 * weights).astype(np.int64)
    scaled = weights @ padded @ weights.T
    enlarged = np.clip((scaled * 255 + 2**23) >> 24, 0, 255)
    return np.where(enlarged < _FAINTEST, 0, enlarged).astype(np.uint8)


def compose(
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    pool: npt.NDArray[Any],
    count: int,
    random: np.random.Generator,
) -> tuple[npt.NDArray[Any], ...]:
    """Places digits of `pool` among patches of others.

    Args:
        images: int64 of shape `(n, 8, 8)`, 0 to 16.
        labels: Their classes, `(n,)`.
        pool: Indices of the digits that may be used.
        count: Images wanted, as many of each class as can be.
        random: NumPy `Generator`.

    Returns:
        `(images, labels, boxes, digits)`: the first three as from `make`, and
        the index of the digit in each image.
    """
    drawn = random.permutation(np.arange(count) % 10)
    digits = np.empty(count, np.int64)
    for digit in range(10):
        members = random.permutation(pool[labels[pool] == digit])
        wanted = np.flatnonzero(drawn == digit)
        digits[wanted] = np.resize(members, len(wanted))
    enlarged = {size: enlarge(images, size) for size in SIZES}
    sizes = random.choice(SIZES, count)
    corners = random.integers(0, CANVAS - sizes[:, None] + 1, (count, 2))
    canvas = np.zeros((count, CANVAS, CANVAS), np.uint8)
    boxes = np.empty((count, 4), np.float32)
    places = zip(sizes.tolist(), corners, strict=True)
    for i, (size, (top, left)) in enumerate(places):
        digit = enlarged[size][digits[i]]
        canvas[i, top : top + size, left : left + size] = digit
        rows = top + np.flatnonzero(digit.any(axis=1))
        columns = left + np.flatnonzero(digit.any(axis=0))
        boxes[i] = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
    _add_clutter(canvas, enlarged, pool, digits, random)
    return canvas[..., None], drawn, boxes / np.float32(CANVAS), digits


def _add_clutter(
    canvas: npt.NDArray[Any],
    enlarged: dict[int, npt.NDArray[Any]],
    pool: npt.NDArray[Any],
    digits: npt.NDArray[Any],
    random: np.random.Generator,
) -> None:
    """Adds patches of the pool's other digits to each image, in place."""
    shape = (len(canvas), _PATCHES)
    # Others: a shift within the pool never meets the digit itself.
    places = np.argsort(pool)[np.searchsorted(np.sort(pool), digits)]
    shifts = random.integers(1, len(pool), shape)
    others = pool[(places[:, None] + shifts) % len(pool)]
    sizes = random.choice(SIZES, shape)
    cuts = random.integers(2, sizes[..., None] - _PATCH - 1, (*shape, 2))
    spots = random.integers(0, CANVAS - _PATCH + 1, (*shape, 2))
    for i, j in np.ndindex(shape):
        row, column = cuts[i, j]
        patch = enlarged[int(sizes[i, j])][others[i, j]]
        patch = patch[row : row + _PATCH, column : column + _PATCH]
        down, right = spots[i, j]
        area = canvas[i, down : down + _PATCH, right : right + _PATCH]
        np.maximum(area, patch, out=area)
