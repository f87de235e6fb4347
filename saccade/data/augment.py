"""Augmentation of training images: random affine views, then colours.

    crop = on_host(augmentation)
    images = pipeline.batches(split, order, 64, crops=Crops(crop, seed, epoch))
    images = augment(images, keys, on_device(augmentation))

Crops of whole pictures are taken on the host while files are decoded, since
what is outside the central square exists nowhere else. Flips, rotations and
colours are computed on the device, on every data set alike. Both depend on one
key an image, so that they are the same whatever the batch.
"""

import dataclasses
import math

from keras import ops

from saccade.core import randomness, sampling
from saccade.core.arrays import Tensor
from saccade.data import decoding

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
        jitter: Whether brightness, contrast and saturation are scaled by
            factors uniform in [0.6, 1.4), and the lighting is changed along
            the principal components of ImageNet's colours, in random order.

    References:
        - [Szegedy et al., 2014](https://arxiv.org/abs/1409.4842), section 6,
          for `area` and `aspect`.
        - [Krizhevsky et al., 2012](https://papers.nips.cc/paper/4824), section
          4.1, for the lighting; [Xie et al.,
          2019](https://arxiv.org/abs/1812.03411), whose code has all four.
    """

    flip: bool = False
    crop: float = 1.0
    rotation: float = 0.0
    area: float = 1.0
    aspect: float = 1.0
    jitter: bool = False


# The handover's: sides [300, 320) of 320, [30, 32) of 32, [38, 40) of 40.
AUGMENTATIONS = {
    "none": Augmentation(),
    "photographs": Augmentation(flip=True, crop=300 / 320),
    "small_photographs": Augmentation(flip=True, crop=30 / 32),
    "digits": Augmentation(crop=38 / 40, rotation=math.pi / 4),
    # As ImageNet is trained on elsewhere.
    "resized_crops": Augmentation(flip=True, area=0.08, aspect=4 / 3),
    # DENOISE's, and thereby S3TA's.
    "denoise": Augmentation(flip=True, area=0.08, aspect=4 / 3, jitter=True),
    # Beyond the handover, for few photographs and many epochs.
    "strong_photographs": Augmentation(flip=True, crop=0.6),
    "upright_digits": Augmentation(crop=0.8, rotation=math.pi / 12),
}


# Principal components of the colours of ImageNet in [0, 1]: their standard
# deviations, and directions as columns.
_DEVIATIONS = (0.2175, 0.0188, 0.0045)
_DIRECTIONS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
_LIGHTING = 0.1
_JITTER = 0.4
_COLOURS = 2  # The stream of keys.
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601.


def on_host(augmentation: Augmentation) -> decoding.RandomCrop | None:
    """Returns the crops that are taken while files are decoded, or None."""
    if augmentation.area == 1.0:
        return None
    return decoding.RandomCrop(augmentation.area, augmentation.aspect)


def on_device(augmentation: Augmentation) -> Augmentation:
    """Returns what is left of an augmentation after `on_host`."""
    return dataclasses.replace(augmentation, area=1.0, aspect=1.0)


def check(augmentation: Augmentation, channels: int) -> None:
    """Raises a ValueError if images have no colours to be changed."""
    if augmentation.jitter and channels != 3:
        raise ValueError(
            "Expected colour images for an augmentation that changes colours. "
            f"Received: images with channels={channels}"
        )


def augment(images: Tensor, keys: Tensor, augmentation: Augmentation) -> Tensor:
    """Draws a random view of every image, then changes its colours.

    A view is read once, bilinearly; mirroring alone changes no pixel.

    Args:
        images: Tensor of shape `(batch, height, width, channels)`.
        keys: Integer tensor of shape `(batch, 2)`, one key an image (see
            `randomness.example_keys`): the same key gives the same view.
        augmentation: An `Augmentation`.

    Returns:
        Tensor of the shape of `images`; black comes in only where a rotation
        uncovers it.

    Raises:
        ValueError: If the colours of grey images are to be changed.
    """
    views = dataclasses.replace(augmentation, jitter=False)
    if views == Augmentation(flip=True):
        mirrored = randomness.uniform(keys, (5,))[:, 1] < 0.5
        flipped = ops.flip(images, axis=2)
        images = ops.where(mirrored[:, None, None, None], flipped, images)
    elif views != Augmentation():
        images = _view(images, keys, views)
    if augmentation.jitter:
        images = jitter(images, randomness.fold_in(keys, _COLOURS))
    return images


def _view(images: Tensor, keys: Tensor, augmentation: Augmentation) -> Tensor:
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


def jitter(images: Tensor, keys: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and lighting in random order.

    Each of the four maps colours affinely, and so does their composition. It
    is composed from small matrices, and the images are mapped once.

    Args:
        images: Tensor of shape `(batch, height, width, 3)` in [0, 1].
        keys: Integer tensor of shape `(batch, 2)`, one key an image.

    Returns:
        Tensor of the shape of `images`, clipped to [0, 1].

    Raises:
        ValueError: If the images have another number of channels.
    """
    check(Augmentation(jitter=True), images.shape[-1])
    draws = randomness.uniform(keys, (7,))
    factors = 1.0 + _JITTER * (2.0 * draws[:, :3] - 1.0)
    normal = randomness.normal(randomness.fold_in(keys, 1), (3,))
    weights = _LIGHTING * ops.convert_to_tensor(_DEVIATIONS) * normal
    light = weights @ ops.transpose(ops.convert_to_tensor(_DIRECTIONS))
    order = ops.argsort(draws[:, 3:], axis=-1)
    matrix, shift = _composed(factors, light, order, images)
    mapped = ops.einsum("bhwc,bdc->bhwd", images, matrix)
    return ops.clip(mapped + shift[:, None, None], 0.0, 1.0)


def _composed(
    factors: Tensor, light: Tensor, order: Tensor, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Composes the four maps of colours.

    Args:
        factors: Factors of brightness, contrast and saturation, `(batch, 3)`.
        light: What lighting adds, `(batch, 3)`.
        order: Permutation of the four maps, `(batch, 4)`.
        images: Tensor of shape `(batch, height, width, 3)`.

    Returns:
        Matrices of shape `(batch, 3, 3)` and shifts of shape `(batch, 3)`.
    """
    grey = ops.convert_to_tensor(_GREY)
    mean = ops.mean(images, axis=(1, 2))
    identity = ops.broadcast_to(ops.eye(3), (ops.shape(mean)[0], 3, 3))
    matrix, shift = identity, ops.zeros_like(mean)
    bright, contrast, saturation = (factors[:, i, None] for i in range(3))
    to_grey = (1.0 - saturation)[..., None] * ops.outer(ops.ones(3), grey)
    maps = [
        bright[..., None] * identity,
        contrast[..., None] * identity,
        saturation[..., None] * identity + to_grey,
        identity,
    ]
    for slot in range(4):
        # The grey to which contrast draws an image is that of its mean.
        now = ops.einsum("bdc,bc->bd", matrix, mean) + shift
        middle = ops.sum(now * grey, axis=-1, keepdims=True)
        none, drawn = ops.zeros_like(now), ops.ones_like(now) * middle
        chosen = ops.one_hot(order[:, slot], 4, dtype=images.dtype)
        step = ops.einsum("bk,bkdc->bdc", chosen, ops.stack(maps, axis=1))
        to_middle = (1.0 - contrast) * drawn
        added = ops.stack([none, to_middle, none, light], axis=1)
        matrix = ops.einsum("bde,bec->bdc", step, matrix)
        shift = ops.einsum("bde,be->bd", step, shift)
        shift = shift + ops.einsum("bk,bkd->bd", chosen, added)
    return matrix, shift
