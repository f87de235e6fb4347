"""Helpers for tests of image files: small images, and one-line errors."""

import numpy as np
from PIL import Image


def save(path, pixels, **options):
    """Saves an array or a Pillow image; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(pixels, Image.Image):
        pixels = Image.fromarray(np.asarray(pixels, np.uint8))
    pixels.save(path, **options)
    return path


def solid(value, sides=(8, 8)):
    """An image of a single grey level, `(height, width, 3)`."""
    return np.full((*sides, 3), value, np.uint8)


def noise(seed, sides=(8, 8, 3)):
    """An image of uniform noise."""
    return np.random.default_rng(seed).integers(0, 256, sides, np.uint8)


def one_line(error):
    """Asserts that a caught error has a one-line message and returns it."""
    text = str(error.value)
    assert text and "\n" not in text
    return text
