"""Glimpses: the retina, crops, cortical scales, fixations, and augmentation.

A gaze is an offset (row, column) in pixels from the image centre. The retinal
warp samples densely at the gaze and ever more sparsely away from it, as the
ganglion cells of a primate retina do; a coarse fixation is a crop there, and
the cortical scales are crops of several sizes, brought to one resolution.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import keras
import numpy as np
import numpy.typing as npt
import scipy.optimize
from keras import ops

from saccade.core import compilation, sampling
from saccade.core import names as known_names
from saccade.core.arrays import Shape, Tensor
from saccade.models.options import OPTIONS

import transformer

MAX_RATIO = 10.0


@functools.lru_cache(maxsize=None)
def retina_mapping(
    image_size: int, view_size: int, max_ratio: float = MAX_RATIO
) -> tuple[float, float]:
    """Fits the map from a radius in the view to a radius in the image.

    The sampling density falls off exponentially with eccentricity, by
    `max_ratio` between fovea and periphery. The density that makes the last of
    `view_size // 2` samples land on the border of the image is solved for, and
    a quadratic is fitted to the radii.

    Args:
        image_size: Side of the image in pixels.
        view_size: Side of the view in pixels.
        max_ratio: Density at the fovea over density at the periphery, > 1.

    Returns:
        Tuple (p0, p1), both at least 0: `r_image = p0 * r**2 + p1 * r` for a
        radius `r` in the view, in pixels.

    Raises:
        ValueError: If a size is under 4 pixels or the ratio is not above 1.

    References:
        - Bashivan, Kar and DiCarlo, "retinawarp" (2019).
    """
    if min(image_size, view_size) < 4 or not max_ratio > 1:
        raise ValueError(
            "The retina needs an image and a view of at least 4 pixels and "
            f"max_ratio > 1. Received: image_size={image_size}, "
            f"view_size={view_size}, max_ratio={max_ratio}"
        )
    border = image_size / 2
    growth = math.log(max_ratio) / (image_size // 2)

    def radii(log_density: float) -> npt.NDArray[np.float64]:
        step = 1.0 / math.sqrt(math.pi * math.exp(log_density))
        found = [0.0]
        for _ in range(view_size // 2 - 1):
            # Far outside already: stay finite, the solver only needs a sign.
            radius = min(found[-1], 2.0 * border)
            found.append(found[-1] + math.exp(growth * radius / 2) * step)
        return np.array(found)

    # Wider than the [0.01, 5] that retinas of equal sizes need, so that any
    # pair of sizes is bracketed.
    log_density = scipy.optimize.brentq(
        lambda x: radii(x)[-1] - border, math.log(1e-8), math.log(1e8)
    )
    view_radii = np.arange(view_size // 2, dtype=float)
    powers = np.stack([view_radii**2, view_radii], axis=1)
    (p0, p1), _ = scipy.optimize.nnls(powers, radii(log_density))
    return float(p0), float(p1)


def retina_points(
    gazes: Tensor,
    image_size: Sequence[int],
    view_size: Sequence[int],
    max_ratio: float = MAX_RATIO,
) -> Tensor:
    """Returns the pixels that a retina looking at `gazes` reads.

    Args:
        gazes: Tensor of shape `(..., 2)`, offsets (row, column) in pixels from
            the image centre.
        image_size: (height, width) of the image; the shorter side is fitted.
        view_size: (height, width) of the view.
        max_ratio: See `retina_mapping`.

    Returns:
        Tensor of shape `(..., view height, view width, 2)`, pixel (row,
        column).
    """
    p0, p1 = retina_mapping(min(image_size), min(view_size), max_ratio)
    rows, columns = view_size
    offset = np.stack(
        np.meshgrid(
            np.arange(rows) - (rows - 1) / 2,
            np.arange(columns) - (columns - 1) / 2,
            indexing="ij",
        ),
        axis=-1,
    )
    radius = np.linalg.norm(offset, axis=-1, keepdims=True)
    # v / |v| * r_image(|v|), without the division by zero at the fovea.
    offset = offset * (p0 * radius + p1)
    centre = (np.array(image_size) - 1) / 2
    gazes = ops.convert_to_tensor(gazes, "float32")
    gazes = ops.expand_dims(ops.expand_dims(gazes, -2), -2)
    return gazes + ops.convert_to_tensor(offset + centre, "float32")


def fovea_box(
    gazes: Tensor,
    image_size: Sequence[int],
    view_size: Sequence[int],
    max_ratio: float = MAX_RATIO,
) -> Tensor:
    """Returns the box in which a retina magnifies the image.

    There the view has more than one pixel for each pixel of the image; outside
    it the periphery is seen smaller than it is.

    Args:
        gazes: Tensor of shape `(..., 2)`, as in `retina_points`.
        image_size: (height, width) of the image.
        view_size: (height, width) of the view.
        max_ratio: See `retina_mapping`.

    Returns:
        Tensor of shape `(..., 4)`: top, left, bottom, right as fractions of
        the image; it may reach outside. Differentiable.
    """
    p0, p1 = retina_mapping(min(image_size), min(view_size), max_ratio)
    # d r_image / d r = 2 p0 r + p1 = 1 is where magnification ends.
    radius = max(0.0, (1.0 - p1) / (2 * p0)) if p0 > 0 else min(view_size) / 2
    radius = min(radius, min(view_size) / 2)
    reach = p0 * radius**2 + p1 * radius
    size = ops.convert_to_tensor(image_size, "float32")
    centre = ops.convert_to_tensor(gazes, "float32") / size + 0.5
    half = reach / size
    return ops.concatenate([centre - half, centre + half], axis=-1)


def retinal_warp(
    images: Tensor,
    gazes: Tensor,
    view_size: Sequence[int] | None = None,
    max_ratio: float = MAX_RATIO,
    interpolation: str = "bilinear",
) -> tuple[Tensor, Tensor]:
    """Looks at images through a retina.

    Args:
        images: Tensor of shape `(batch, height, width, channels)`.
        gazes: Tensor of shape `(2,)`, one gaze shared by all images; `(batch,
            2)`, one gaze an image; or `(batch, gazes, 2)`. Offsets (row,
            column) in pixels from the image centre.
        view_size: (height, width) of the view; None for the image's own.
        max_ratio: See `retina_mapping`.
        interpolation: See `sampling.sample`.

    Returns:
        Tensor of shape `(batch, [gazes,] rows, columns, channels)`, black
        outside the image; bilinear, it is differentiable in images and gazes.
    """
    image_size = tuple(images.shape[1:3])
    gazes = ops.convert_to_tensor(gazes, "float32")
    if len(gazes.shape) == 1:
        gazes = ops.broadcast_to(gazes, (ops.shape(images)[0], 2))
    look = _retina(image_size, tuple(view_size or image_size), max_ratio)
    return sampling.sample(images, look(gazes), "zeros", interpolation)


@functools.cache
def _retina(
    image_size: tuple[int, ...], view_size: tuple[int, ...], max_ratio: float
) -> Callable[[Tensor], Tensor]:
    """`retina_points` of one geometry, compiled as one kernel."""
    return compilation.fuse(
        functools.partial(
            retina_points,
            image_size=image_size,
            view_size=view_size,
            max_ratio=max_ratio,
        )
    )


def five_gazes(reach: float) -> npt.NDArray[np.float32]:
    """The five fixed gazes of an evaluation: the centre, then four corners.

    Args:
        reach: Distance of the corners along each axis, in pixels.

    Returns:
        Array of shape `(5, 2)`.
    """
    signs = [(0, 0), (-1, 1), (1, -1), (-1, -1), (1, 1)]
    return np.array(signs, "float32") * np.float32(reach)


@keras.saving.register_keras_serializable("saccade")
class RetinalWarp(keras.layers.Layer):
    """The retinal warp as a layer; see `retinal_warp`.

    Args:
        view_size: (height, width) of a view; None for the image's own.
        max_ratio: See `retina_mapping`.
        interpolation: See `sampling.sample`.

    Call arguments:
        images: Tensor of shape `(batch, height, width, channels)`.
        gazes: Tensor of shape `(batch, gazes, 2)` or `(batch, 2)`, pixels.

    Returns:
        Tuple of the views, `(batch, [gazes,] rows, columns, channels)`, and
        the boxes in which they magnify, `(batch, [gazes,] 4)`, see
        `fovea_box`.
    """

    def __init__(
        self,
        view_size: Sequence[int] | None = None,
        max_ratio: float = MAX_RATIO,
        interpolation: str = "bilinear",
        **kwargs: Any,
    ) -> None:
        sampling.check_interpolation(interpolation)
        # Coordinates in half precision are off by whole pixels.
        super().__init__(**{"dtype": "float32", **kwargs})
        self.view_size = None if view_size is None else tuple(view_size)
        self.max_ratio = max_ratio
        self.interpolation = interpolation

    def build(self, images_shape: Shape, gazes_shape: Shape) -> None:
        """Raises a ValueError for sizes that no retina has, before a call."""
        image_size = cast(tuple[int, ...], images_shape[1:3])
        size = self.view_size or image_size
        retina_mapping(min(image_size), min(size), self.max_ratio)

    def call(self, images: Tensor, gazes: Tensor) -> tuple[Tensor, ...]:
        image_size = tuple(images.shape[1:3])
        size = self.view_size or image_size
        views = retinal_warp(
            images, gazes, size, self.max_ratio, self.interpolation
        )
        return views, fovea_box(gazes, image_size, size, self.max_ratio)

    def shown(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """What it shows; see `model_backbone.shown`."""
        views, boxes = outputs
        return transformer.as_views(views, boxes, inputs[1])

    def compute_output_shape(
        self, images_shape: Shape, gazes_shape: Shape
    ) -> tuple[Shape, ...]:
        size: Shape = self.view_size or images_shape[1:3]
        lead = tuple(gazes_shape[:-1])
        return (*lead, *size, images_shape[-1]), (*lead, 4)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "view_size": self.view_size,
            "max_ratio": self.max_ratio,
            "interpolation": self.interpolation,
        }


# --- Crops and scales --------------------------------------------------------

# Images up to this side take the figures for 32 pixels, larger ones those for
# 320, in proportion.
_SMALL = 64
# Side of the crop of 320 and of 32 pixels, radius of the blur, enlargement.
# (The small crop of the blurred variant is ours: 240 / 320 of 32.)
_COARSE = {
    "crop": ((224, 0, 1), (24, 0, 1)),
    "upsample": ((160, 0, 2), (16, 0, 2)),
    "blur": ((240, 6, 1), (24, 2, 1)),
}
COARSE_VARIANTS = tuple(_COARSE)


@dataclasses.dataclass(frozen=True)
class Coarse:
    """A coarse fixation: a crop, and what is done to it.

    Attributes:
        side: Side of the crop in pixels.
        reach: Largest offset of its gaze in pixels, up to which the crop
            stays inside the image.
        blur: Radius of the Gaussian blur in pixels; 0 for none.
        enlarge: How often each pixel is repeated along both axes.
    """

    side: int
    reach: int
    blur: int = 0
    enlarge: int = 1


def coarse_fixation(image_size: int, variant: str = "crop") -> Coarse:
    """Returns the handover's coarse fixation of an image.

    Args:
        image_size: Shorter side of the image in pixels. At 320: crop 224 with
            gazes up to 48; at 32: crop 24, gazes up to 4. Other sizes in
            proportion.
        variant: `"crop"`; `"upsample"`, half the side, enlarged twice (320:
            crop 160, gazes up to 80); or `"blur"`, a larger crop, blurred
            (320: crop 240, radius 6, gazes up to 40).

    Returns:
        A `Coarse`.

    Raises:
        ValueError: If the variant is unknown.
    """
    known_names.require("coarse_variant", variant, _COARSE)
    small = image_size <= _SMALL
    scale = image_size / (32 if small else 320)
    side, blur, enlarge = _COARSE[variant][small]
    reach = round(((32 if small else 320) - side) / 2 * scale)
    blur = max(1, round(blur * scale)) if blur else 0
    return Coarse(image_size - 2 * reach, reach, blur, enlarge)


@dataclasses.dataclass(frozen=True)
class Scales:
    """Crops around one gaze, each brought to the same number of pixels.

    Attributes:
        sides: Side of each crop in pixels, rising.
        radii: Radius of the low-pass of each, in pixels.
        reach: Largest offset of the gaze in pixels, up to which all the crops
            that move stay inside the image.
        centred: Indices of the crops that stay at the image's centre.
    """

    sides: tuple[int, ...]
    radii: tuple[int, ...]
    reach: int
    centred: tuple[int, ...] = ()


def cortical_scales(image_size: int, freeze: bool = False) -> Scales:
    """Returns the handover's cortical scales of an image.

    Args:
        image_size: Shorter side of the image in pixels. At 320: sides 40, 80,
            160, 240, low-passed with radius 1, 2, 4, 6, and gazes up to 40;
            at 32: sides 12 and 24, radii 1 and 2, gazes up to 4. Other sizes
            in proportion.
        freeze: Whether the fourth scale is the whole image (320: side 320,
            radius 8) and stays where it is; gazes go up to 80 then.

    Returns:
        A `Scales`.

    Raises:
        ValueError: If there is no fourth scale to freeze.
    """
    if image_size <= _SMALL:
        if freeze:
            raise ValueError(
                "Expected images of four cortical scales, over "
                f"{_SMALL} pixels, to freeze the fourth. Received: "
                f"scale4_freeze=True with {image_size} pixels."
            )
        radii: tuple[int, ...] = (1, 2)
        unit = image_size * 12 // 32
    else:
        radii, unit = (1, 2, 4, 8 if freeze else 6), image_size // 8
    sides = tuple(radius * unit for radius in radii)
    moving = sides[:3] if freeze else sides
    return Scales(
        sides, radii, (image_size - moving[-1]) // 2, (3,) if freeze else ()
    )


@functools.cache
def _blur_matrix(
    side: int, radius: float, step: int = 1
) -> npt.NDArray[np.float32]:
    """The blur along an axis of `side` pixels; every `step`-th row of it.

    A matrix, for on every backend a product is faster than a depthwise
    convolution, and of a low-pass only the rows that are kept are computed.
    """
    if radius < 1 or radius != int(radius):
        raise ValueError(
            "Expected the radius of a blur to be a whole number of pixels "
            f"from 1. Received: radius={radius}."
        )
    sigma = radius / 2
    places = np.arange(side)
    offset = places[step // 2 :: step, None] - places
    reach = np.arange(-2 * radius, 2 * radius + 1)  # 4 sigma.
    total = np.exp(-0.5 * (reach / sigma) ** 2).sum()
    kernel = np.exp(-0.5 * (offset / sigma) ** 2) / total
    return np.where(abs(offset) <= 2 * radius, kernel, 0).astype("float32")


def _along_both(images: Tensor, radius: float, step: int) -> Tensor:
    rows, columns = (
        ops.convert_to_tensor(_blur_matrix(side, radius, step))
        for side in images.shape[-3:-1]
    )
    x = ops.moveaxis(ops.cast(images, "float32"), -1, -3)
    x = ops.matmul(ops.matmul(rows, x), ops.transpose(columns))
    x = ops.moveaxis(x, -3, -1)
    return ops.cast(x, keras.backend.standardize_dtype(images.dtype))


def gaussian_blur(images: Tensor, radius: float) -> Tensor:
    """Blurs images: sigma is half the radius, cut at 4 sigma, black outside.

    Args:
        images: Tensor of shape `(..., height, width, channels)`.
        radius: Whole number of pixels, from 1.

    Returns:
        Tensor like `images`.

    Raises:
        ValueError: If the radius is not a whole number of pixels from 1.
    """
    return _along_both(images, radius, 1)


def low_pass(images: Tensor, radius: int) -> Tensor:
    """Blurs images and keeps every `radius`-th pixel, from `radius // 2`.

    Args:
        images: See `gaussian_blur`, like `radius`.
        radius: With 1 the image is blurred and keeps all its pixels.

    Returns:
        Tensor of shape `(..., height / radius, width / radius, channels)`,
        for sides that the radius divides.
    """
    return _along_both(images, radius, radius)


def crop(images: Tensor, gazes: Tensor, side: int) -> Tensor:
    """Cuts squares around gazes out of images, black outside the image.

    Pixels are taken as they are: gazes are rounded to whole pixels (up from a
    half), and pass no gradient. The crop at the centre of a side that cannot
    be halved evenly lies half a pixel up and to the left.

    Args:
        images: Tensor of shape `(batch, height, width, channels)`.
        gazes: Tensor of shape `(batch, n, 2)`, offsets (row, column) in
            pixels from the image centre.
        side: Side of the squares in pixels.

    Returns:
        Tuple of the crops, `(batch, n, side, side, channels)`, and their
        boxes, `(batch, n, 4)`: top, left, bottom, right as fractions of the
        image; they may reach outside.
    """
    size = np.array(images.shape[1:3])
    corner = ops.convert_to_tensor((size - side) // 2, "float32")
    corner = corner + ops.floor(ops.cast(gazes, "float32") + 0.5)
    offset = np.moveaxis(np.indices((side, side)), 0, -1)
    points = corner[..., None, None, :] + ops.convert_to_tensor(
        offset, "float32"
    )
    crops = sampling.sample_bilinear(images, ops.stop_gradient(points), "zeros")
    size = ops.convert_to_tensor(size, "float32")
    box = ops.concatenate([corner / size, (corner + side) / size], axis=-1)
    return crops, box


@keras.saving.register_keras_serializable("saccade")
class CoarseFixation(keras.layers.Layer):
    """Crops images at gazes, and blurs or enlarges the crops.

    Args:
        side: Side of the crops in pixels.
        blur: Radius of the Gaussian blur, see `gaussian_blur`; 0 for none.
        enlarge: How often each pixel is repeated along both axes.

    Call arguments:
        images: Tensor of shape `(batch, height, width, channels)`.
        gazes: Tensor of shape `(batch, gazes, 2)`, pixels.

    Returns:
        Tuple of the views, `(batch, gazes, rows, columns, channels)`, and
        their boxes, `(batch, gazes, 4)`, see `crop`.
    """

    def __init__(
        self, side: int, blur: float = 0, enlarge: int = 1, **kwargs: Any
    ) -> None:
        # Coordinates in half precision are off by whole pixels.
        super().__init__(**{"dtype": "float32", **kwargs})
        self.side, self.blur, self.enlarge = side, blur, enlarge

    def call(self, images: Tensor, gazes: Tensor) -> tuple[Tensor, ...]:
        views, boxes = crop(images, gazes, self.side)
        if self.blur:
            views = gaussian_blur(views, self.blur)
        if self.enlarge > 1:
            views = ops.repeat(views, self.enlarge, axis=-3)
            views = ops.repeat(views, self.enlarge, axis=-2)
        return views, boxes

    def shown(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """What it shows; see `model_backbone.shown`."""
        views, boxes = outputs
        return transformer.as_views(views, boxes, inputs[1])

    def compute_output_shape(
        self, images_shape: Shape, gazes_shape: Shape
    ) -> tuple[Shape, ...]:
        lead, side = tuple(gazes_shape[:-1]), self.side * self.enlarge
        return (*lead, side, side, images_shape[-1]), (*lead, 4)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "side": self.side,
            "blur": self.blur,
            "enlarge": self.enlarge,
        }


@keras.saving.register_keras_serializable("saccade")
class CorticalSampling(keras.layers.Layer):
    """Crops of several sides around each gaze, at one resolution.

    The primary visual cortex is taken to sample a small part of the visual
    field finely and ever larger parts ever more coarsely.

    Args:
        sides: Side of each crop in pixels.
        radii: Radius of the low-pass of each, see `low_pass`; the crops must
            come out of it with the same number of pixels.
        centred: Indices of the crops that stay at the centre of the image.

    Call arguments:
        images: Tensor of shape `(batch, height, width, channels)`.
        gazes: Tensor of shape `(batch, gazes, 2)`, pixels.

    Returns:
        Tuple of the views, `(batch, gazes * scales, rows, columns, channels)`,
        all scales of the first gaze first; their boxes, `(batch, gazes *
        scales, 4)`, see `crop`; and their centres, `(batch, gazes * scales,
        2)`, pixels.

    Raises:
        ValueError: If the crops come out at several sizes.

    References:
        - Poggio, Mutch and Isik, "Computational role of eccentricity
          dependent cortical magnification" (2014)
        - [Reddy et al., 2020](https://arxiv.org/abs/2006.16427)
    """

    def __init__(
        self,
        sides: Sequence[int],
        radii: Sequence[int],
        centred: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.sides, self.radii = tuple(sides), tuple(radii)
        self.centred = tuple(centred)
        kept = {
            len(range(radius // 2, side, radius))
            for side, radius in zip(self.sides, self.radii, strict=True)
        }
        if len(kept) != 1:
            raise ValueError(
                "Expected crops that have equally many pixels after their "
                f"low-pass. Received: sides={self.sides}, radii={self.radii}."
            )
        (self.view_side,) = kept

    def call(self, images: Tensor, gazes: Tensor) -> tuple[Tensor, ...]:
        scales = []
        pairs = zip(self.sides, self.radii, strict=True)
        for index, (side, radius) in enumerate(pairs):
            at = ops.zeros_like(gazes) if index in self.centred else gazes
            views, boxes = crop(images, at, side)
            scales.append((low_pass(views, radius), boxes, at))
        return tuple(
            ops.reshape(
                ops.stack(parts, axis=2),
                (ops.shape(images)[0], -1, *parts[0].shape[2:]),
            )
            for parts in zip(*scales, strict=True)
        )

    def shown(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """What it shows; see `model_backbone.shown`."""
        del inputs
        return transformer.as_views(*outputs)

    def compute_output_shape(
        self, images_shape: Shape, gazes_shape: Shape
    ) -> tuple[Shape, ...]:
        batch, count = gazes_shape[:2]
        lead = (batch, None if count is None else count * len(self.sides))
        views = (*lead, self.view_side, self.view_side, images_shape[-1])
        return views, (*lead, 4), (*lead, 2)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "sides": self.sides,
            "radii": self.radii,
            "centred": self.centred,
        }


# --- Fixations ---------------------------------------------------------------

TEST_GAZES = tuple(OPTIONS["test_gazes"].choices)


@keras.saving.register_keras_serializable("saccade")
class Fixations(keras.layers.Layer):
    """Gazes that are not learned: random in training, fixed in evaluation.

    In training each image gets one gaze, uniform in the square of `reach`
    around its centre. In evaluation every image gets the same five
    (`five_gazes`), whose logits are to be averaged, so that a model is
    deterministic when it is tested; or a random one again, which makes it a
    stochastic model, to be attacked in expectation. That one is the same for
    all images of a call, as it was in the handover: what an image gets then
    does not depend on the others, on its place among them or on their number.

    Args:
        reach: Largest offset along each axis, in pixels.
        given: Optional list of (row, column) gazes used instead, in training
            and in evaluation alike.
        test_gazes: `"five"` or `"random"`: the gazes of an evaluation.
        seed: Integer or `keras.random.SeedGenerator`.
        whole: Whether gazes are drawn in whole pixels, for crops. (`reach`
            is rounded down to one.)

    Call arguments:
        images: Tensor of shape `(batch, height, width, channels)`; only the
            batch size is read.

    Returns:
        Tensor of shape `(batch, gazes, 2)`, offsets (row, column) in pixels.
    """

    def __init__(
        self,
        reach: float,
        given: Sequence[Sequence[float]] | None = None,
        test_gazes: str = "five",
        seed: int | None = None,
        whole: bool = False,
        **kwargs: Any,
    ) -> None:
        known_names.require("test_gazes", test_gazes, TEST_GAZES)
        if reach < 0:
            raise ValueError(
                "Expected gazes to reach a number of pixels >= 0 from the "
                f"centre. Received: reach={reach:g}."
            )
        super().__init__(**{"dtype": "float32", **kwargs})
        self.reach = float(reach // 1 if whole else reach)
        self.whole = whole
        self.given = given
        self.test_gazes = test_gazes
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def stochastic(self) -> bool:
        """Whether it draws in inference mode."""
        return self.given is None and self.test_gazes == "random"

    def call(self, images: Tensor, training: bool | None = False) -> Tensor:
        batch = ops.shape(images)[0]
        if training and self.given is None:
            return self._drawn((batch, 1, 2))
        if self.stochastic:
            gazes = self._drawn((1, 1, 2))
        elif self.given is None:
            gazes = five_gazes(self.reach)
        else:
            gazes = np.array(self.given, "float32").reshape(-1, 2)
        gazes = ops.reshape(ops.convert_to_tensor(gazes), (-1, 2))
        return ops.broadcast_to(gazes, (batch, gazes.shape[0], 2))

    def _drawn(self, shape: tuple[Tensor, ...]) -> Tensor:
        seed = self.seed_generator
        if not self.whole:
            return keras.random.uniform(
                shape, -self.reach, self.reach, seed=seed
            )
        reach = int(self.reach)
        drawn = keras.random.randint(shape, -reach, reach + 1, seed=seed)
        return ops.cast(drawn, "float32")

    def compute_output_shape(self, images_shape: Shape) -> Shape:
        return (images_shape[0], None, 2)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "reach": self.reach,
            "given": self.given,
            "test_gazes": self.test_gazes,
            "seed": self.seed,
            "whole": self.whole,
        }
