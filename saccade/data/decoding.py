"""One image: from the bytes of its file to pixels, whole or a random crop.

Only formats that hold pixels are opened, for Pillow starts other programs for
some. JPEG files of the usual kinds are decoded by libjpeg-turbo directly, the
others by Pillow; the pixels are the same.
"""

import dataclasses
import functools
import io
import math
import struct
import warnings
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

# Images are decoded in several threads already.
cv2.setNumThreads(1)

# Pillow runs Ghostscript for EPS, and has many more formats for which nobody
# made a data set.
_FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP"),
    *("TIFF", "PPM", "JPEG2000"),
)
_BITS, _LARGEST_SAMPLE, _SAMPLE_FORMAT = 258, 281, 339  # Tags of TIFF.
# What Pillow raises for a file that is no image or not a whole one.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
# It is an error here, see `open_image`.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


# Top, left, bottom and right of a box as fractions of the image.
Box: TypeAlias = tuple[float, float, float, float]


class CorruptImageError(OSError):
    """A file that is no image, or one cut short.

    Attributes:
        path: Text that names the file (for TFDS: shard and record).
    """

    def __init__(self, path: Any, reason: Any) -> None:
        reason = " ".join(str(reason).split())
        super().__init__(
            f"Cannot read the image {path} ({reason}). Replace or delete it, "
            "or leave such files out with --skip_corrupt."
        )
        self.path = str(path)


# How photographs are brought to a size: names, and what they mean.
RESIZES = {
    "short_side": "the short side resized, then the centre cropped",
    "central_crop": "the centre, 7/8 of the short side, resized",
    "handover": "smaller ones enlarged, then the centre cropped",
}
# The sides of an image that `central_crop` shows: 224 of 256 pixels, as
# ImageNet classifiers are evaluated.
_CENTRAL = 7 / 8
# A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where that is enough.
_REDUCTIONS = (8, 4, 2)


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Crops of random area and aspect ratio, from anywhere in a picture.

    Attributes:
        area: Smallest area as a fraction of the picture's; uniform in
            [area, 1).
        aspect: Largest aspect ratio of width and height in pixels; its
            logarithm is uniform between those of 1 / aspect and aspect.

    References:
        - [Szegedy et al., 2014](https://arxiv.org/abs/1409.4842), section 6.
    """

    area: float = 0.08
    aspect: float = 4 / 3

    def draw(
        self, width: int, height: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Draws a crop.

        A crop that does not fit into the picture is drawn again, ten times at
        most; then the largest central crop of a permitted aspect is taken.

        Args:
            width, height: The picture's, in pixels.
            rng: Source of the draws.

        Returns:
            Left, top, right and bottom in pixels.
        """
        limit = math.log(self.aspect)
        for part, spread, x, y in rng.random((10, 4)).tolist():
            area = (self.area + (1 - self.area) * part) * width * height
            aspect = math.exp(limit * (2 * spread - 1))
            wide = max(1, round(math.sqrt(area * aspect)))
            high = max(1, round(math.sqrt(area / aspect)))
            if wide <= width and high <= height:
                left = int(x * (width - wide + 1))
                top = int(y * (height - high + 1))
                return left, top, left + wide, top + high
        wide = min(width, max(1, round(height * self.aspect)))
        high = min(height, max(1, round(width * self.aspect)))
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high


def decode(
    encoded: bytes,
    described: Any,
    size: int | None = None,
    resize: str | None = None,
    mode: str = "RGB",
    box: Box | None = None,
) -> npt.NDArray[np.uint8]:
    """Decodes an image of any mode, upright.

    Transparent parts are white. More than 8 bits are scaled to 8, and floats
    from [0, 1] to [0, 255].

    Args:
        encoded: The bytes of the file.
        described: What an error calls it.
        size: Side of the square image wanted, in pixels; None keeps the sides.
        resize: `"short_side"`: the short side is brought to `size`, then the
            centre is cropped. `"central_crop"`: likewise, but the short side
            is brought to 8/7 of `size`. Otherwise only an image with a shorter
            side is enlarged, and a larger one is cropped as it is.
        mode: Pillow's `"RGB"` or `"L"`.
        box: None, or what is cropped out first: top, left, bottom, right as
            fractions of the image as it is stored.

    Returns:
        uint8 array of shape `(height, width, channels)`.

    Raises:
        CorruptImageError: If it is no image or not a whole one, is too large,
            or does not tell which value is white.
    """
    image = _decoded(encoded, described, mode, box)
    image = _fit(image, size, resize)
    return np.asarray(image).reshape(*image.size[::-1], -1)


def decode_crop(
    encoded: bytes,
    described: Any,
    size: int,
    crop: RandomCrop,
    rng: np.random.Generator,
    mode: str = "RGB",
    box: Box | None = None,
) -> npt.NDArray[np.uint8]:
    """Decodes a random crop of an image, upright, and brings it to size.

    The crop is taken from the whole picture. A JPEG file is decoded at the
    smallest of its sizes (1, 1/2, 1/4, 1/8) at which the crop is not smaller
    than `size`, and the corners of the crop are moved to whole pixels of that
    size. What is left is bilinear interpolation.

    Args:
        encoded, described, mode, box: As for `decode`.
        size: Side of the square image returned, in pixels.
        crop: Which crops there are.
        rng: Source of the draws.

    Returns:
        uint8 array of shape `(size, size, channels)`.

    Raises:
        CorruptImageError: As `decode`.
    """
    header = None if box else _plain_jpeg(encoded, mode)
    if header is not None:
        left, top, right, bottom = crop.draw(*header[::-1], rng)
        short = min(right - left, bottom - top)
        factor = next((f for f in _REDUCTIONS if short >= f * size), 1)
        pixels = _turbo(encoded, mode, *header, factor)
        if pixels is not None:
            left, top = left // factor, top // factor
            right = max(right // factor, left + 1)
            bottom = max(bottom // factor, top + 1)
            return _resized(pixels[top:bottom, left:right], size)
    image = _decoded(encoded, described, mode, box)
    return _resized(np.asarray(image.crop(crop.draw(*image.size, rng))), size)


def _resized(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    sides = (size, size)
    found = cv2.resize(pixels, sides, interpolation=cv2.INTER_LINEAR)
    return np.asarray(found, np.uint8).reshape(size, size, -1)


def _decoded(
    encoded: bytes, described: Any, mode: str, box: Box | None
) -> Image.Image:
    """Decodes an image in a mode of Pillow, cropped to its box and upright."""
    header = _plain_jpeg(encoded, mode)
    if header is not None:
        pixels = _turbo(encoded, mode, *header)
        if pixels is not None:
            return _cut(Image.fromarray(pixels), box)
    try:
        with open_image(io.BytesIO(encoded)) as image:
            white = white_value(image)
            image.load()
            image = _cut(image, box)
            return _as_mode(_upright(image), mode, white)
    except Image.UnidentifiedImageError:
        raise CorruptImageError(described, "not an image") from None
    except BROKEN as error:
        raise CorruptImageError(described, error) from None


def _plain_jpeg(encoded: bytes, mode: str) -> tuple[int, int] | None:
    """Returns height and width of a JPEG file that `_turbo` can read.

    None is for the other formats and kinds: other colour spaces (CMYK), and
    files with EXIF data, which can ask for a turn.
    """
    if encoded[:2] != b"\xff\xd8" or _has_exif(encoded):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    # Pillow makes grey of RGB, which is not the stored brightness exactly.
    known = ("Gray",) if mode == "L" else ("Gray", "YCbCr")
    limit = Image.MAX_IMAGE_PIXELS
    if space not in known or (limit is not None and height * width > limit):
        return None
    return height, width


def _has_exif(encoded: bytes) -> bool:
    """Whether a segment before the pixels of a JPEG file holds EXIF data."""
    at = 2
    while encoded[at : at + 1] == b"\xff":
        marker = encoded[at + 1 : at + 2]
        if marker == b"\xe1" and encoded[at + 4 : at + 8] == b"Exif":
            return True
        if marker == b"\xda":  # The pixels begin.
            return False
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return False


def _turbo(
    encoded: bytes, mode: str, height: int, width: int, factor: int = 1
) -> npt.NDArray[np.uint8] | None:
    """Decodes a JPEG file by libjpeg-turbo; None if anything is odd in it."""
    try:
        pixels = simplejpeg.decode_jpeg(
            encoded,
            "GRAY" if mode == "L" else "RGB",
            min_height=-(-height // factor),
            min_width=-(-width // factor),
            min_factor=factor,
        )
    except ValueError:  # Pillow says what it is, or can read it.
        return None
    return pixels[..., 0] if mode == "L" else pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow can read; AVIF is not in all of them."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_image(file: Any) -> Image.Image:
    """Opens an image of a known format and of a size that can be expected."""
    image = Image.open(file, formats=_formats())
    pixels = math.prod(image.size)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        image.close()
        raise ValueError(f"it has {pixels} pixels, more than {limit}")
    return image


def white_value(image: Any) -> float | None:
    """The value that is white in an open image; None for 8 bits.

    Raises:
        ValueError: If the image does not tell it.
    """
    modes = {str(tile[0]) + str(tile[3]) for tile in image.tile}
    deep = image.mode[0] in "IF" or any("16" in mode for mode in modes)
    if not deep:
        return None
    if image.mode == "F":
        return 1.0
    if image.format != "TIFF":
        return 65535  # Pillow brings PGM and JPEG 2000 to 16 bits.
    tags = image.tag_v2
    if 2 in tuple(tags.get(_SAMPLE_FORMAT, ())):
        raise ValueError("its signed integers do not tell which is white")
    largest = tags.get(_LARGEST_SAMPLE, 2 ** tags.get(_BITS, (16,))[0] - 1)
    return max(largest) if isinstance(largest, tuple) else largest


def _cut(image: Image.Image, box: Box | None) -> Image.Image:
    if box is None:
        return image
    # Boxes were drawn before browsers heeded EXIF: cut first, turn then.
    width, height = image.size
    top, left, bottom, right = box
    # At least one pixel, inside the image.
    left = min(round(left * width), width - 1)
    top = min(round(top * height), height - 1)
    right = max(round(right * width), left + 1)
    bottom = max(round(bottom * height), top + 1)
    return image.crop((left, top, right, bottom))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except BROKEN:  # Pixels are whole; only the note on their turn is not.
        return image


def _as_mode(image: Image.Image, mode: str, white: float | None) -> Image.Image:
    if white is not None:
        image = _shallow(image, white)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert(mode)


def _shallow(image: Image.Image, white: float) -> Image.Image:
    """Brings pixels of more than 8 bits to 8.

    Raises:
        ValueError: If they are outside the range, or leave most of it unused:
            12 bits in 16, say, would be almost black.
    """
    if image.mode[0] not in "IF":  # Pillow keeps the upper 8 of 16 bits.
        bands = image.getbands()
        values = np.asarray(image).reshape(-1, len(bands))
        values = values[:, [i for i, band in enumerate(bands) if band != "A"]]
        smallest, largest, white = 0, int(values.max()), 255
        deep = None
    else:
        deep = np.asarray(image)
        smallest, largest = deep.min(), deep.max()
    if not (0 <= smallest and largest <= white):
        raise ValueError(
            f"its values from {smallest:g} to {largest:g} are not in the range "
            f"[0, {white:g}]; write it with 8 bits"
        )
    if 0 < largest <= white / 16 and white != 1:
        raise ValueError(
            f"it has 16 bits and is almost black (at most {largest} of "
            f"{white}), as 12 bits in 16 would be; write it with 8 bits"
        )
    if deep is None:
        return image
    levels = deep.astype(np.float64) * (255 / white)
    # Floats are rounded; integers are cut, as Pillow does: 256 levels of 257.
    levels = np.rint(levels) if white == 1 else np.floor(levels + 1e-6)
    alpha = image.info.get("transparency")
    image = Image.fromarray(levels.astype(np.uint8))
    if isinstance(alpha, int):
        image.putalpha(Image.fromarray(np.uint8(255) * (deep != alpha)))
    return image


def _fit(
    image: Image.Image, size: int | None, resize: str | None
) -> Image.Image:
    if size is None:
        return image
    if resize in ("short_side", "central_crop") or min(image.size) < size:
        image = with_short_side(image, short_side(size, resize))
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


def short_side(size: int, resize: str | None) -> int:
    """Returns the short side that `decode` brings an image to, in pixels."""
    return round(size / _CENTRAL) if resize == "central_crop" else size


def with_short_side(image: Image.Image, length: int) -> Image.Image:
    """Resizes an image; its short side becomes `length` pixels."""
    short = min(image.size)
    sides = [max(length, round(side * length / short)) for side in image.size]
    return image.resize(sides, Image.Resampling.BILINEAR)


def is_complete(tail: bytes, form: str | None) -> bool:
    """Whether an image's last bytes close its format."""
    end = _ENDS.get(form or "")
    return end is not None and tail.rstrip(b"\0\r\n ").endswith(end)
