"""Reading an image at real-valued locations: sampler and spatial transformer.

Pixel coordinates are `(row, column)` with (0, 0) at the centre of the top-left
pixel. Normalized coordinates run from -1 to 1 between the outer edges of the
image, so that the identity transform is the identity at every size, and a box
that covers the image is (0, 0, 1, 1) whatever the size of the view.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from saccade.core import sampling
from saccade.core.arrays import Shape, Tensor


def as_views(views: Tensor, boxes: Tensor, gazes: Tensor) -> dict[str, Tensor]:
    """Names what a sampler shows, one entry a view also if there is one."""
    named = {"gazes": (gazes, 3), "boxes": (boxes, 3), "views": (views, 5)}
    return {
        name: value if len(value.shape) == rank else ops.expand_dims(value, 1)
        for name, (value, rank) in named.items()
    }


def affine_box(theta: Tensor) -> Tensor:
    """Returns the box that an affine view covers.

    Examples:
        >>> whole, half = [1.0, 0, 0, 0, 1, 0], [0.5, 0, 0, 0, 0.5, 0]
        >>> ops.convert_to_numpy(affine_box(ops.array([whole, half])))
        array([[0.  , 0.  , 1.  , 1.  ],
               [0.25, 0.25, 0.75, 0.75]], dtype=float32)

    Args:
        theta: Tensor of shape `(..., 6)` or `(..., 4)`; see `full_affine`.

    Returns:
        Tensor of shape `(..., 4)`: top, left, bottom, right as fractions of
        the image, so the identity gives (0, 0, 1, 1). A view that leaves the
        image has a box that does; a rotated one has the upright box around
        it. Differentiable.
    """
    a, b, tx, c, d, ty = (sampling.full_affine(theta)[..., i] for i in range(6))
    across, tall = ops.abs(a) + ops.abs(b), ops.abs(c) + ops.abs(d)
    edges = ops.stack([ty - tall, tx - across, ty + tall, tx + across], axis=-1)
    return (edges + 1.0) / 2.0


def affine_centre(theta: Tensor, image_size: Sequence[int]) -> Tensor:
    """Returns where an affine view is centred, as a gaze.

    Examples:
        >>> right = ops.array([0.5, 0, 0.25, 0, 0.5, 0])
        >>> ops.convert_to_numpy(affine_centre(right, image_size=(40, 80)))
        array([ 0., 10.], dtype=float32)

    Args:
        theta: Tensor of shape `(..., 6)` or `(..., 4)`; see `full_affine`.
        image_size: (height, width) of the image.

    Returns:
        Tensor of shape `(..., 2)`: (row, column) in pixels from the centre of
        the image. Differentiable.
    """
    theta = sampling.full_affine(theta)
    height, width = image_size
    return ops.stack(
        [theta[..., 5] * (height / 2), theta[..., 2] * (width / 2)], axis=-1
    )


@keras.saving.register_keras_serializable("saccade")
class SpatialTransformer(keras.layers.Layer):
    """Takes affine views of an image.

    Args:
        view_size: (height, width) of a view; None for the image's own.
        padding: What lies outside the image; see `sample_bilinear`.
        interpolation: See `sample`.

    Call arguments:
        images: Tensor of shape `(batch, height, width, channels)`.
        theta: Tensor of shape `(batch, views, k)` or `(batch, k)`, with k = 6
            affine or k = 4 restricted parameters; see `full_affine`.

    Returns:
        Tuple of the views, `(batch, [views,] rows, columns, channels)`; their
        boxes, `(batch, [views,] 4)`, see `affine_box`; and their centres,
        `(batch, [views,] 2)`, see `affine_centre`.

    References:
        - [Jaderberg et al., 2015](https://arxiv.org/abs/1506.02025)
    """

    def __init__(
        self,
        view_size: Sequence[int] | None = None,
        padding: str = "zeros",
        interpolation: str = "bilinear",
        **kwargs: Any,
    ) -> None:
        sampling.check_interpolation(interpolation)
        # Coordinates in half precision are off by whole pixels.
        super().__init__(**{"dtype": "float32", **kwargs})
        self.view_size = None if view_size is None else tuple(view_size)
        self.padding = padding
        self.interpolation = interpolation

    def call(
        self, images: Tensor, theta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        image_size = tuple(images.shape[1:3])
        points = sampling.affine_points(
            theta, image_size, self.view_size or image_size
        )
        views = sampling.sample(
            images, points, self.padding, self.interpolation
        )
        return views, affine_box(theta), affine_centre(theta, image_size)

    def shown(self, inputs: Any, outputs: Any) -> dict[str, Tensor]:
        """What it shows; see `model_backbone.shown`."""
        del inputs
        views, boxes, centres = outputs
        return as_views(views, boxes, centres)

    def compute_output_shape(
        self, images_shape: Shape, theta_shape: Shape
    ) -> tuple[Shape, ...]:
        size: Shape = self.view_size or images_shape[1:3]
        lead = tuple(theta_shape[:-1])
        return (*lead, *size, images_shape[-1]), (*lead, 4), (*lead, 2)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "view_size": self.view_size,
            "padding": self.padding,
            "interpolation": self.interpolation,
        }
