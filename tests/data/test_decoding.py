"""One image: what libjpeg-turbo reads as Pillow does, and random crops."""

import io

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from saccade.data import decoding, pipeline
from saccade.data import images as image_files
from saccade.data import splits as image_splits

SMOOTH = np.asarray(
    Image.fromarray(noise(0, (9, 11, 3))).resize((75, 57), Image.BICUBIC)
)
TURNED = Image.Exif()
TURNED[0x112] = 6  # A quarter turn.


def encoded(pixels, form="JPEG", mode="RGB", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def by_pillow(content, mode):
    with Image.open(io.BytesIO(content)) as image:
        turned = image.getexif().get(0x112) == 6
        pixels = np.asarray(image.convert(mode))
    return np.rot90(pixels, -1) if turned else pixels


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 30},
        {"quality": 95, "subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"optimize": True, "restart_marker_rows": 1},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"exif": TURNED},
        {"comment": b"Exif\0 in a comment"},
        {"form": "PNG"},
    ],
)
def test_pixels_are_those_of_pillow(options, mode):
    content = encoded(SMOOTH, **options)
    got = decoding.decode(content, "it", mode=mode)
    want = by_pillow(content, mode)
    np.testing.assert_array_equal(got, want.reshape(got.shape))


def test_a_central_crop_shows_seven_eighths_of_the_short_side():
    content = encoded(noise(2, (60, 90, 3)), "PNG")
    got = decoding.decode(content, "it", 28, "central_crop")
    image = Image.open(io.BytesIO(content)).resize((48, 32), Image.BILINEAR)
    np.testing.assert_array_equal(got, np.asarray(image.crop((10, 2, 38, 30))))


@pytest.mark.parametrize(
    "sides", [(500, 375), (64, 64), (1000, 10), (10, 1000), (1, 1)]
)
def test_crops_lie_in_the_picture_and_have_the_area_and_the_aspect(sides):
    width, height = sides
    rng = np.random.default_rng(0)
    crops = np.array(
        [decoding.RandomCrop().draw(*sides, rng) for _ in range(500)]
    )
    left, top, right, bottom = crops.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= width).all() and (bottom <= height).all()
    wide, high = right - left, bottom - top
    assert (wide >= 1).all() and (high >= 1).all()
    if min(sides) < 64:
        return
    aspect = wide / high
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    area = wide * high / (width * height)
    assert 0.07 < area.min() < 0.12 and 0.9 < area.max() <= 1.0
    # All places where a crop fits are equally likely.
    free = width - wide
    share = left[free > 9] / free[free > 9]
    assert abs(share.mean() - 0.5) < 0.05


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("sides", [(96, 64), (800, 600), (350, 1400)])
def test_a_crop_shows_the_part_of_the_picture_that_was_drawn(form, sides):
    """Red tells the column and green the row, all over the picture."""
    width, height = sides
    ramp = np.zeros((height, width, 3))
    ramp[..., 0] = np.linspace(20, 230, width)
    ramp[..., 1] = np.linspace(20, 230, height)[:, None]
    content = encoded(np.uint8(np.rint(ramp)), form)
    crop = decoding.RandomCrop()
    outside = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        got = decoding.decode_crop(content, "it", 32, crop, rng).astype(float)
        rng = np.random.default_rng(seed)
        left, top, right, bottom = crop.draw(*sides, rng)
        away = abs(left + right - width), abs(top + bottom - height)
        outside += max(away) > min(sides)
        want = (np.arange(32) + 0.5) / 32
        for values, start, end, side in (
            (got[..., 0].mean(0), left, right, width),
            (got[..., 1].mean(1), top, bottom, height),
        ):
            place = (values - 20) / 210 * (side - 1) + 0.5
            expected = start + want * (end - start)
            # Corners move by less than 8 pixels, and JPEG errs by a level.
            assert np.abs(place - expected).max() < 8 + side / 60
    assert outside or max(sides) < 2 * min(sides)


def split_of(count, **sizes):
    contents = [encoded(noise(i, (30, 40, 3)), "PNG") for i in range(count)]
    images = image_files.Encoded(
        np.arange(count) % 3,
        lambda i: len(contents[i]),
        lambda i: f"number {i}",
        lambda i, last=None: contents[i][-(last or 0) :],
        lambda i: None,
    )
    read, _ = image_files.reader(
        *(images, 16, "short_side", "RGB"),
        in_memory=False,
        skip_corrupt=False,
        title="train",
    )
    return image_splits.Split(
        "train",
        images.labels,
        read,
        crop_reader=image_files.crop_reader(images, 16, "RGB"),
        decodes=True,
    )


def crops_of(split, size, epoch=0, seed=0, first=0, prefetch=2):
    batches = pipeline.batches(
        *(split, range(len(split)), size),
        first_batch=first,
        prefetch=prefetch,
        crops=(decoding.RandomCrop(), seed, epoch),
    )
    return np.concatenate([images for images, _, _ in batches])


def test_crops_depend_on_seed_epoch_and_index_alone():
    split = split_of(13)
    want = crops_of(split, 13)
    assert want.dtype == np.uint8 and want.shape == (13, 16, 16, 3)
    np.testing.assert_array_equal(crops_of(split, 4), want)
    np.testing.assert_array_equal(crops_of(split, 4, prefetch=0), want)
    np.testing.assert_array_equal(crops_of(split, 3, first=2), want[6:])
    for other in (crops_of(split, 13, epoch=1), crops_of(split, 13, seed=1)):
        assert (other != want).any((1, 2, 3)).all()


def test_a_subset_shows_its_own_pictures():
    """A one-pixel picture shows the same colour in every crop."""
    split = split_of(5)
    colours = np.arange(5, dtype=np.uint8) * 50

    def read(indices, crop, rngs):
        list(rngs)
        return np.full((1, 2, 2, 3), 1, np.uint8) * colours[indices].reshape(
            -1, 1, 1, 1
        )

    whole = image_splits.Split(
        "train", split.labels, split.reader, crop_reader=read
    )
    part = whole.subset([4, 2]).subset([1])
    got = part.read_crops([0], decoding.RandomCrop(), 0, 0)
    np.testing.assert_array_equal(got, 100)


def test_crops_need_the_pictures_and_their_indices():
    pixels = image_splits.Split("train", np.zeros(3), np.zeros(3).__getitem__)
    with pytest.raises(ValueError, match="has pixels only"):
        pixels.read_crops([0], decoding.RandomCrop(), 0, 0)
    with pytest.raises(IndexError, match="3 to 3"):
        split_of(3).read_crops([3], decoding.RandomCrop(), 0, 0)


def test_a_damaged_picture_is_named_when_it_is_cropped():
    content = encoded(SMOOTH)[:-200]
    with pytest.raises(decoding.CorruptImageError, match="that one"):
        decoding.decode_crop(
            *(content, "that one", 8, decoding.RandomCrop()),
            np.random.default_rng(0),
        )
