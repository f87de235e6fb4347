"""Augmentation of training images by random affine views."""

import dataclasses
import math

from keras import ops

from saccade.core import randomness, sampling
from saccade.core.arrays import Tensor

# --- Augmentation ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random views of the training images, drawn for each image separately.

    Attributes:
        flip: Whether to mirror left and right with probability 1/2.
        crop: Smallest side of the crop as a fraction of the image; the side
            is uniform in [crop, 1), the place uniform, the result enlarged
            back (bilinear).
        rotation: Largest angle in radians; uniform in +-rotation.
        area: Smallest area of the crop as a fraction of the image's, in place
            of `crop`; the area is uniform in [area, 1).
        aspect: Largest aspect ratio of that crop; its logarithm is uniform
            between those of 1 / aspect and aspect. A side that would be longer
            than the image is as long.

    References:
        - [Szegedy et al., 2014](https://arxiv.org/abs/1409.4842), section 6,
          for `area` and `aspect`.
    """

    flip: bool = False
    crop: float = 1.0
    rotation: float = 0.0
    area: float = 1.0
    aspect: float = 1.0


# The handover's: sides [300, 320) of 320, [30, 32) of 32, [38, 40) of 40.
AUGMENTATIONS = {
    "none": Augmentation(),
    "photographs": Augmentation(flip=True, crop=300 / 320),
    "small_photographs": Augmentation(flip=True, crop=30 / 32),
    "digits": Augmentation(crop=38 / 40, rotation=math.pi / 4),
    # As ImageNet is trained on elsewhere (DENOISE's, S3TA's).
    "resized_crops": Augmentation(flip=True, area=0.08, aspect=4 / 3),
    # Beyond the handover, for few photographs and many epochs.
    "strong_photographs": Augmentation(flip=True, crop=0.6),
    "upright_digits": Augmentation(crop=0.8, rotation=math.pi / 12),
}


def augment(images: Tensor, keys: Tensor, augmentation: Augmentation) -> Tensor:
    """Draws a random view of every image; one bilinear read for all of it.

    Args:
        images: Tensor of shape `(batch, height, width, channels)`.
        keys: Integer tensor of shape `(batch, 2)`, one key an image (see
            `randomness.example_keys`): the same key gives the same view.
        augmentation: An `Augmentation`.

    Returns:
        Tensor of the shape of `images`; black comes in only where a rotation
        uncovers it.
    """
    if augmentation == Augmentation():
        return images
    draws = randomness.uniform(keys, (5,))
    width, height = _sides(draws[:, 0], keys, augmentation)
    mirror = ops.where(draws[:, 1] < 0.5, -1.0, 1.0)
    mirror = mirror if augmentation.flip else ops.ones_like(mirror)
    angle = augmentation.rotation * (2.0 * draws[:, 2] - 1.0)
    cos, sin = ops.cos(angle), ops.sin(angle)
    theta = ops.stack(
        [
            mirror * cos * width,
            -sin * height,
            (1.0 - width) * (2.0 * draws[:, 3] - 1.0),
            mirror * sin * width,
            cos * height,
            (1.0 - height) * (2.0 * draws[:, 4] - 1.0),
        ],
        axis=-1,
    )
    size = tuple(images.shape[1:3])
    points = sampling.affine_points(theta, size, size)
    return sampling.sample_bilinear(images, points, "zeros")


def _sides(
    draw: Tensor, keys: Tensor, augmentation: Augmentation
) -> tuple[Tensor, Tensor]:
    """Width and height of each crop, as fractions of the image's."""
    if augmentation.area == 1.0:
        side = augmentation.crop + (1.0 - augmentation.crop) * draw
        return side, side
    area = augmentation.area + (1.0 - augmentation.area) * draw
    spread = randomness.uniform(randomness.fold_in(keys, 1), (1,))[:, 0]
    aspect = ops.exp(math.log(augmentation.aspect) * (2.0 * spread - 1.0))
    width, height = ops.sqrt(area * aspect), ops.sqrt(area / aspect)
    return ops.minimum(width, 1.0), ops.minimum(height, 1.0)
