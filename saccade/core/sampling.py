"""Images at real-valued locations: bilinear sampler and affine grids."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import keras
import numpy as np
from keras import ops

from saccade.core import compilation, keras_settings
from saccade.core import names as known_names
from saccade.core.arrays import Tensor

keras_settings.set_up_keras()


# The top-left neighbours of locations, and the fractions to the next ones.
_Located: TypeAlias = tuple[Tensor, Tensor, Tensor]
PADDINGS = ("zeros", "edge")


def sample_bilinear(
    images: Tensor, points: Tensor, padding: str = "zeros"
) -> Tensor:
    """Reads images at real-valued locations by bilinear interpolation.

    Differentiable in the images and in the locations, on every backend. Both
    gradients are written out instead of left to the tape: the backward pass
    then repeats the four reads instead of keeping them, and scatters once.

    Args:
        images: Float tensor of shape `(batch, height, width, channels)`.
        points: Float tensor of shape `(batch, ..., 2)`, pixel (row, column).
        padding: What lies outside the image: `"zeros"` (black, blending over
            one pixel, as `grid_sample` does) or `"edge"` (the nearest pixel;
            the gradient with respect to a location outside is zero).

    Returns:
        Tensor of shape `(batch, ..., channels)`, dtype of `images`.

    Raises:
        ValueError: If ranks or the last axis do not match, or the padding is
            unknown.

    References:
        - [Jaderberg et al., 2015](https://arxiv.org/abs/1506.02025), Eq. 5-7.
    """
    if len(images.shape) != 4 or len(points.shape) < 2 or points.shape[-1] != 2:
        raise ValueError(
            "Expected images of shape (batch, height, width, channels) and "
            "points of shape (batch, ..., 2). Received: "
            f"images.shape={tuple(images.shape)}, "
            f"points.shape={tuple(points.shape)}"
        )
    known_names.require("padding", padding, PADDINGS)
    height, width, channels = images.shape[1:]
    source = ops.convert_to_tensor(images, "float32")
    points = ops.convert_to_tensor(points, "float32")
    inner = tuple(ops.shape(points))[1:-1]
    points = ops.reshape(points, (ops.shape(images)[0], -1, 2))
    values = _sampler(padding)(source, points)
    values = ops.reshape(values, (-1, *inner, channels))
    return ops.cast(values, keras.backend.standardize_dtype(images.dtype))


INTERPOLATIONS = ("bilinear", "nearest", "straight_through")


def sample(
    images: Tensor,
    points: Tensor,
    padding: str = "zeros",
    interpolation: str = "bilinear",
) -> Tensor:
    """Reads images at points by one of three kinds of interpolation.

    Args:
        images: See `sample_bilinear`, like `points`, `padding` and the result.
        points: Pixel coordinates (row, column).
        padding: `"zeros"` or `"edge"`.
        interpolation: `"bilinear"`; `"nearest"`, which reads the nearest pixel
            as the handover's single-gaze warp did and passes no gradient to
            the points; `"straight_through"`, which reads the nearest pixel
            and passes the gradients of bilinear interpolation (BPDA), for
            attacks on a model that samples the nearest.

    Returns:
        Tensor like that of `sample_bilinear`.

    Raises:
        ValueError: If `interpolation` is none of the three.

    References:
        - [Athalye et al., 2018](https://arxiv.org/abs/1802.00420), BPDA
    """
    check_interpolation(interpolation)
    if interpolation == "bilinear":
        return sample_bilinear(images, points, padding)
    # Halves are rounded up: ops.round would send them to the even pixel.
    nearest = ops.stop_gradient(ops.floor(points + 0.5))
    values = sample_bilinear(images, nearest, padding)
    if interpolation == "nearest":
        return values
    smooth = sample_bilinear(images, points, padding)
    return smooth + ops.stop_gradient(values - smooth)


def check_interpolation(interpolation: str) -> None:
    """Raises a ValueError if there is no such kind of interpolation."""
    known_names.require("interpolation", interpolation, INTERPOLATIONS)


@functools.cache
def _sampler(padding: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The sampler on `(batch, points, 2)`, with its two gradients.

    Each of the parts is compiled by itself (see `compilation.fuse`): a training
    step, which needs no gradient for the image, never computes it, and what is
    said once a location is not computed again for each channel of each corner.
    """
    locate, frame, read, to_points, to_images = (
        compilation.fuse(functools.partial(part, padding=padding))
        for part in (
            _locate,
            _frame,
            _read,
            _gradient_to_points,
            _gradient_to_images,
        )
    )

    @ops.custom_gradient
    def sample(
        images: Tensor, points: Tensor
    ) -> tuple[Tensor, Callable[..., tuple[Tensor, Tensor]]]:
        framed = frame(images)
        where = locate(images, points)

        def gradient(
            *args: Tensor, upstream: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            # TensorFlow and JAX pass the upstream gradient alone, Torch
            # passes the inputs as well and names it.
            upstream = args[0] if upstream is None else upstream
            return (
                to_images(images, where, upstream),
                to_points(framed, points, where, upstream),
            )

        return read(framed, where), gradient

    return sample


def _frame(images: Tensor, padding: str) -> Tensor:
    """Puts one pixel before the image and two after it, along both axes.

    Every location then has four neighbours, and no read needs a condition.
    """
    mode = {"zeros": "constant", "edge": "symmetric"}[padding]
    return ops.pad(images, [[0, 0], [1, 2], [1, 2], [0, 0]], mode=mode)


def _locate(
    images: Tensor, points: Tensor, padding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the top-left neighbours in the framed image, and the fractions.

    Locations far outside are moved to where the sampler is constant: one pixel
    beyond the image if that is black, onto its border otherwise.
    """
    reach = 1.0 if padding == "zeros" else 0.0
    height, width = images.shape[1:3]
    batch = ops.shape(images)[0]
    rows, columns = height + 3, width + 3
    parts = []
    for axis, size in enumerate((height, width)):
        place = ops.clip(points[..., axis], -reach, size - 1.0 + reach)
        corner = ops.floor(place)
        parts.append((ops.cast(corner, "int32") + 1, place - corner))
    (row, down), (column, right) = parts
    first = ops.arange(batch, dtype="int32") * (rows * columns)
    index = ops.reshape(first, (-1, 1)) + row * columns + column
    return index, ops.expand_dims(down, -1), ops.expand_dims(right, -1)


def _neighbours(framed: Tensor, index: Tensor) -> Iterator[Tensor]:
    """Reads the four pixels around each location."""
    columns, channels = framed.shape[2:]
    flat = ops.reshape(framed, (-1, channels))
    return (
        ops.take(flat, index + offset, axis=0)
        for offset in (0, 1, columns, columns + 1)
    )


def _read(framed: Tensor, where: _Located, padding: str) -> Tensor:
    index, down, right = where
    a, b, c, d = _neighbours(framed, index)
    # (1 - w) a + w b, not a + w (b - a): only the former returns b at w = 1.
    upper = (1.0 - right) * a + right * b
    lower = (1.0 - right) * c + right * d
    return (1.0 - down) * upper + down * lower


def _gradient_to_points(
    framed: Tensor,
    points: Tensor,
    where: _Located,
    upstream: Tensor,
    padding: str,
) -> Tensor:
    index, down, right = where
    a, b, c, d = _neighbours(framed, index)
    by_row = (1.0 - right) * (c - a) + right * (d - b)
    by_column = (1.0 - down) * (b - a) + down * (d - c)
    gradient = ops.stack(
        [
            ops.sum(upstream * by_row, axis=-1),
            ops.sum(upstream * by_column, axis=-1),
        ],
        axis=-1,
    )
    # Where `_locate` moved a location, the sampler is constant.
    reach = 1.0 if padding == "zeros" else 0.0
    height, width = framed.shape[1] - 3, framed.shape[2] - 3
    last = [height - 1.0 + reach, width - 1.0 + reach]
    last = ops.convert_to_tensor(last, "float32")
    inside = (points >= -reach) & (points <= last)
    return ops.where(inside, gradient, 0.0)


def _gradient_to_images(
    images: Tensor, where: _Located, upstream: Tensor, padding: str
) -> Tensor:
    """Adds every upstream value to the four pixels it was read from.

    The four shares of a location lie side by side in one row of a table with a
    row for each pixel of the framed image, so one scatter does for all of
    them; four shifted slices of the table then add up to the gradient.
    """
    index, down, right = where
    height, width, channels = images.shape[1:]
    batch = ops.shape(images)[0]
    rows, columns = height + 3, width + 3
    upper, lower = (1.0 - down) * upstream, down * upstream
    shares = ops.concatenate(
        [
            (1.0 - right) * upper,
            right * upper,
            (1.0 - right) * lower,
            right * lower,
        ],
        axis=-1,
    )
    table = ops.segment_sum(
        ops.reshape(shares, (-1, 4 * channels)),
        ops.reshape(index, (-1,)),
        batch * rows * columns,
    )
    table = ops.reshape(table, (-1, rows, columns, 4, channels))
    down, right = slice(0, height), slice(0, width)
    below, beside = slice(1, height + 1), slice(1, width + 1)
    return (
        table[:, below, beside, 0]
        + table[:, below, right, 1]
        + table[:, down, beside, 2]
        + table[:, down, right, 3]
    )


def full_affine(theta: Tensor) -> Tensor:
    """Completes restricted parameters to the six of an affine transform.

    Args:
        theta: Tensor of shape `(..., 6)`, the rows (a, b, tx), (c, d, ty) of a
            transform of (x, y), returned as it is; or `(..., 4)`, the
            restricted form (sx, tx, sy, ty) without rotation and shear.

    Returns:
        Tensor of shape `(..., 6)`.

    Raises:
        ValueError: If the last axis is neither 6 nor 4.
    """
    theta = ops.convert_to_tensor(theta)
    if theta.shape[-1] == 6:
        return theta
    if theta.shape[-1] != 4:
        raise ValueError(
            "Expected 6 affine or 4 restricted parameters on the last axis. "
            f"Received: theta.shape={tuple(theta.shape)}"
        )
    sx, tx, sy, ty = (theta[..., i] for i in range(4))
    zero = ops.zeros_like(sx)
    return ops.stack([sx, zero, tx, zero, sy, ty], axis=-1)


def affine_points(
    theta: Tensor, image_size: Sequence[int], view_size: Sequence[int]
) -> Tensor:
    """Returns the pixels that an affine view of an image reads.

    Args:
        theta: Tensor of shape `(..., 6)` or `(..., 4)`; see `full_affine`.
            Translations are in half images: `tx = 1` looks at the right edge.
        image_size: (height, width) of the image, in pixels.
        view_size: (height, width) of the view, in pixels.

    Returns:
        Tensor of shape `(..., view height, view width, 2)`, pixel (row,
        column). The identity at equal sizes is exact, bit for bit.
    """
    (height, width), (rows, columns) = image_size, view_size
    # In image pixels from the centre; the ratio is exactly 1 at equal sizes.
    down = (np.arange(rows) - (rows - 1) / 2)[:, None] * (height / rows)
    right = (np.arange(columns) - (columns - 1) / 2)[None] * (width / columns)
    # Tensors, for Torch would hand a product with an array to NumPy.
    down = ops.convert_to_tensor(down, "float32")
    right = ops.convert_to_tensor(right, "float32")
    a, b, tx, c, d, ty = (
        ops.expand_dims(ops.expand_dims(full_affine(theta)[..., i], -1), -1)
        for i in range(6)
    )
    aspect = width / height
    column = a * right + b * (down * aspect) + tx * (width / 2)
    row = c * (right / aspect) + d * down + ty * (height / 2)
    return ops.stack(
        [row + (height - 1) / 2, column + (width - 1) / 2], axis=-1
    )
