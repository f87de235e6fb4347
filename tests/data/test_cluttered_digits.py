"""The embedded digits against NumPy and Pillow: places, clutter, sources."""

import numpy as np
from PIL import Image

from saccade.data import cluttered_digits


def test_digits_lie_in_their_boxes():
    images, labels, pools = cluttered_digits.sources()
    random = np.random.default_rng(3)
    pixels, drawn, boxes, sources = cluttered_digits.compose(
        images, labels, pools["test"], 200, random
    )
    assert set(sources) <= set(pools["test"])
    np.testing.assert_array_equal(labels[sources], drawn)
    corners = boxes * 40
    np.testing.assert_array_equal(corners, np.round(corners))
    for image, source, box in zip(
        pixels[..., 0].astype(int), sources, corners.astype(int), strict=True
    ):
        top, left, bottom, right = box
        inside = image[top:bottom, left:right]
        # Clutter only adds light, so some size of the digit, cut to its ink,
        # lies below the image exactly there.
        fits = []
        for size in cluttered_digits.SIZES:
            digit = cluttered_digits.enlarge(images[[source]], size)
            digit = digit[0].astype(int)
            rows = np.flatnonzero(digit.any(axis=1))
            columns = np.flatnonzero(digit.any(axis=0))
            ink = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            fits.append(ink.shape == inside.shape and np.all(ink <= inside))
        assert any(fits)
        assert 12 <= bottom - top <= 28 and 4 <= right - left <= 28


def test_the_clutter_comes_from_other_digits():
    # One bright digit among faint ones: no bright patch beside it, but many
    # beside the others.
    images = np.full((10, 8, 8), 4)
    images[3] = 16
    pixels, drawn, boxes, _ = cluttered_digits.compose(
        images, np.arange(10), np.arange(10), 400, np.random.default_rng(0)
    )
    beside = pixels[..., 0].copy()
    for image, box in zip(beside, (boxes * 40).astype(int), strict=True):
        image[box[0] : box[2], box[1] : box[3]] = 0
    brightest = beside.max(axis=(1, 2))
    assert brightest[drawn == 3].max() < 128
    assert np.mean(brightest[drawn != 3] > 200) > 0.2


def test_no_source_digit_is_in_two_splits():
    images, _, pools = cluttered_digits.sources()
    assert sorted(np.concatenate(list(pools.values()))) == list(range(1797))
    seen = [
        {images[i].tobytes() for i in members} for members in pools.values()
    ]
    for i, one in enumerate(seen):
        assert all(not one & other for other in seen[i + 1 :])


def test_enlarged_digits_agree_with_cubic_interpolation():
    images, _, _ = cluttered_digits.sources()
    for size in (22, 27):
        ours = cluttered_digits.enlarge(images[:20], size).astype(float)
        for image, digit in zip(images[:20], ours, strict=True):
            # Pillow's BICUBIC is the same kernel, with renormalized edges:
            # one more pixel of border keeps those out of the comparison.
            wide = Image.fromarray(np.pad(image, 5).astype(np.float32))
            scale = 10 / size
            box = (4, 4, 4 + scale * size, 4 + scale * size)
            oracle = wide.resize((size, size), Image.BICUBIC, box=box)
            oracle = np.clip(np.asarray(oracle) * 255 / 16, 0, 255)
            oracle[oracle < 16] = 0
            close = np.abs(oracle - digit) < 2
            # At the threshold of 16 the two may fall on different sides.
            assert np.all(close | (np.maximum(oracle, digit) < 20))
