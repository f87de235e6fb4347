"""What the tests of files share: small pictures, and one line an error."""

import numpy as np
from PIL import Image


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(pixels, Image.Image):
        pixels = Image.fromarray(np.asarray(pixels, np.uint8))
    pixels.save(path, **options)
    return path


def solid(value, sides=(8, 8)):
    return np.full((*sides, 3), value, np.uint8)


def noise(seed, sides=(8, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, sides, np.uint8)


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text
