"""Pictures of every kind, turned, cropped or broken, against their pixels."""

import ast
import os
import pathlib
import struct
import subprocess

import numpy as np
import pytest
from pictures import noise, one_line, save, solid
from PIL import Image

from saccade.data import decoding, tfrecord
from saccade.data import folders as class_folders
from saccade.data import images as image_files


def read_one(path, lazy, size=8, resize="short_side"):
    read, corrupt = image_files.reader(
        image_files.of_files([path], [0]),
        size,
        resize,
        "RGB",
        in_memory=not lazy,
        skip_corrupt=False,
        title="one",
    )
    assert corrupt == []
    (pixels,) = read(np.array([0]))
    assert pixels.dtype == np.uint8 and pixels.shape == (size, size, 3)
    return pixels.astype(int)


lazily = pytest.mark.parametrize("lazy", [False, True])


@lazily
def test_cmyk(tmp_path, lazy):
    # Ink: none, all cyan, all magenta; half yellow with half black.
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 128, 128)]
    colours = [
        (255, 255, 255), (0, 255, 255), (255, 0, 255), (127, 127, 63)
    ]  # fmt: skip
    ink = np.repeat(np.uint8(inks)[:, None], 8, axis=0).repeat(32, axis=1)
    image = Image.fromarray(ink.reshape(32, 32, 4), "CMYK")
    path = save(tmp_path / "ink.jpg", image, quality=100)
    got = read_one(path, lazy, size=32)
    for row, colour in enumerate(colours):
        np.testing.assert_allclose(got[8 * row + 4, 16], colour, atol=4)


def over_white(pixels):
    """What is seen of transparent pixels on a white ground."""
    colours, alpha = pixels[..., :-1], pixels[..., -1:] / 255
    return colours * alpha + 255 * (1 - alpha)


@lazily
def test_greyscale_and_palette_and_alpha(tmp_path, lazy):
    grey = noise(1, (8, 8))
    path = save(tmp_path / "grey.png", grey)
    got = read_one(path, lazy)
    np.testing.assert_array_equal(got, np.stack([grey] * 3, axis=-1))
    alpha = np.dstack([noise(2), np.full((8, 8), 7, np.uint8)])
    save(path, alpha)
    got = read_one(path, lazy)
    np.testing.assert_allclose(got, over_white(alpha), atol=1)
    few = Image.fromarray(noise(3) // 128 * 255).quantize(8)
    save(path, few)
    got = read_one(path, lazy)
    table = np.array(few.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(got, table[np.asarray(few)])


@lazily
def test_what_is_transparent_is_white(tmp_path, lazy):
    pixels = noise(11, (8, 8, 4))
    path = save(tmp_path / "some.png", pixels)
    got = read_one(path, lazy)
    np.testing.assert_allclose(got, over_white(pixels), atol=1)
    save(path, pixels[..., 2:])  # Grey, with alpha.
    got = read_one(path, lazy)[..., :1]
    np.testing.assert_allclose(got, over_white(pixels[..., 2:]), atol=1)
    # One colour of a palette, one grey and one colour are transparent.
    grey, colours = pixels[..., 0] // 64 * 64, pixels[..., :3] // 128 * 128
    few = Image.fromarray(colours).quantize(8)
    table = np.array(few.getpalette()).reshape(-1, 3)
    gone = np.asarray(few) == 3
    save(path, few, transparency=3)
    want = np.where(gone[..., None], 255, table[np.asarray(few)])
    np.testing.assert_array_equal(read_one(path, lazy), want)
    save(path, grey, transparency=64)
    want = np.where(grey == 64, 255, grey)
    np.testing.assert_array_equal(read_one(path, lazy)[..., 0], want)
    deep = grey.astype(np.uint16) * 257
    save(path, Image.fromarray(deep), transparency=64 * 257)
    np.testing.assert_array_equal(read_one(path, lazy)[..., 0], want)
    save(path, colours, transparency=(128, 0, 128))
    gone = np.all(colours == (128, 0, 128), axis=-1, keepdims=True)
    want = np.where(gone, 255, colours)
    np.testing.assert_array_equal(read_one(path, lazy), want)


@lazily
def test_floats_and_twelve_bits_are_scaled(tmp_path, lazy):
    grey = noise(12, (8, 8))
    path = tmp_path / "deep.tif"
    save(path, Image.fromarray((grey / 255).astype(np.float32)))
    np.testing.assert_array_equal(read_one(path, lazy)[..., 0], grey)
    # 12 bits of 16, which the file tells.
    twelve = np.rint(grey / 255 * 4095).astype(np.uint16)
    save(path, Image.fromarray(twelve), tiffinfo={281: 4095})
    got = read_one(path, lazy)[..., 0]
    np.testing.assert_allclose(got, grey, atol=1)
    # A PGM of 12 bits: its head tells the largest value, too.
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5 8 8 4095 " + twelve.astype(">u2").tobytes())
    got = read_one(path, lazy)[..., 0]
    np.testing.assert_allclose(got, grey, atol=1)


@lazily
@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.float32([[0, 255]]), "not in the range"),
        (np.float32([[-1, 1]]), "not in the range"),
        (np.float32([[np.nan, 1]]), "not in the range"),
        (np.uint16([[0, 4095]]), "almost black"),
        (np.int32([[0, 70000]]), "signed"),
        (np.int16([[0, 4095]]), "signed"),
    ],
)
def test_pixels_without_a_known_white_are_refused(
    tmp_path, lazy, pixels, reason
):
    image = Image.fromarray(np.tile(pixels, (8, 4)))
    path = save(tmp_path / "deep.tif", image)
    with pytest.raises(decoding.CorruptImageError, match=reason) as error:
        read_one(path, lazy)
    assert str(path) in one_line(error)


@lazily
def test_no_image_starts_a_program(tmp_path, lazy, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an image started a program")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    path = save(tmp_path / "3.JPEG", noise(1), format="EPS")
    with pytest.raises(decoding.CorruptImageError, match="not an image"):
        read_one(path, lazy)
    with pytest.raises(ValueError, match="Not one file"):
        image_files.common_size([image_files.of_files([path], [0])])


def test_every_image_is_opened_with_a_list_of_formats():
    """Of all files that the programs read, that is."""
    root = pathlib.Path(__file__).parents[2]
    for path in [*root.glob("*.py"), *root.glob("experiments/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                "Image.open"
            ):
                names = [keyword.arg for keyword in node.keywords]
                assert "formats" in names, path.name


@lazily
def test_an_image_that_claims_to_be_huge(tmp_path, lazy, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    path = save(tmp_path / "bomb.png", noise(1))
    with pytest.raises(decoding.CorruptImageError, match="64 pixels"):
        read_one(path, lazy)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # Pillow's own error.
    with pytest.raises(decoding.CorruptImageError, match="64 pixels") as e:
        read_one(path, lazy)
    one_line(e)


@lazily
@pytest.mark.parametrize("kind", ["link", "loop", "pipe", "device", "sparse"])
def test_what_cannot_be_read_is_named(tmp_path, lazy, kind):
    path = tmp_path / "0.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(2**40)
    else:
        target = {"link": "gone.jpg", "loop": "0.jpg", "device": "/dev/zero"}
        path.symlink_to(target[kind])
    with pytest.raises(decoding.CorruptImageError) as error:
        read_one(path, lazy)
    assert str(path) in one_line(error)
    if kind == "link":
        assert "a link to a file that is not there" in one_line(error)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = noise(4, (8, 8)).astype(np.uint16) * 257
    path = save(tmp_path / "deep.png", Image.fromarray(grey))
    got = read_one(path, False)
    np.testing.assert_array_equal(got[..., 0], grey // 257)


@lazily
def test_a_png_that_is_called_jpeg(tmp_path, lazy):
    pixels = noise(5)
    path = save(tmp_path / "really.JPEG", pixels, format="PNG")
    got = read_one(path, lazy)
    np.testing.assert_array_equal(got, pixels)


# EXIF 2.32, 4.6.4 A: which corner of the stored picture is the top left.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("turn", UPRIGHT)
def test_exif_turned(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / "turned.jpg", noise(6), exif=exif)
    with Image.open(path) as image:
        stored = np.asarray(image)
    got = read_one(path, turn % 2)
    np.testing.assert_array_equal(got, UPRIGHT[turn](stored))


@pytest.mark.parametrize("turn", UPRIGHT)
def test_a_box_is_of_the_image_as_it_is_stored(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = noise(9, (8, 16, 3))
    path = save(tmp_path / "turned.png", pixels, exif=exif)
    got = decoding.decode(path.read_bytes(), path, box=(0.25, 0.5, 1, 0.75))
    np.testing.assert_array_equal(got, UPRIGHT[turn](pixels[2:8, 8:12]))


def test_a_box_without_area_is_one_pixel(tmp_path):
    pixels = noise(9)
    path = save(tmp_path / "small.png", pixels)
    for box, want in (
        ((0.5, 0.5, 0.5, 0.5), pixels[4:5, 4:5]),
        ((1.0, 0.0, 1.0, 1.0), pixels[7:8]),
    ):
        got = decoding.decode(path.read_bytes(), path, box=box)
        np.testing.assert_array_equal(got, want)


@lazily
def test_bytes_after_the_end_are_harmless(tmp_path, lazy):
    path = save(tmp_path / "long.jpg", solid(200))
    with open(path, "ab") as file:
        file.write(b"written by a camera" * 40)
    got = read_one(path, lazy)
    np.testing.assert_allclose(got, 200, atol=2)


def test_short_side_and_handover_preparation(tmp_path):
    # A black left and a white right half stay halves, whatever the sides.
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 40:] = 255
    wide[:, :20] = wide[:, 60:] = 128  # Outside the centre square.
    path = save(tmp_path / "wide.png", wide)
    got = read_one(path, False, size=20)
    assert got.shape == (20, 20, 3)
    # Only the two columns at the edge mix with what was cropped.
    assert np.all(got[:, 1:9] == 0) and np.all(got[:, 11:19] == 255)
    # Handover: a larger image is cropped as it is, an odd rest at the end.
    large = noise(7, (25, 36, 3))
    save(path, large)
    got = read_one(path, False, size=20, resize="handover")
    np.testing.assert_array_equal(got, large[2:22, 8:28])
    # A smaller one is enlarged: bilinear keeps a ramp a ramp.
    ramp = np.broadcast_to(np.arange(10)[:, None, None] * 20, (10, 15, 3))
    save(path, ramp)
    for resize in ("handover", "short_side"):
        got = read_one(path, False, size=20, resize=resize)
        expected = np.clip((np.arange(20) + 0.5) / 2 - 0.5, 0, 9) * 20
        error = got - expected[:, None, None]
        assert np.abs(error).max() <= 1


@pytest.mark.parametrize("cut", [10, 100, 400])
def test_a_picture_cut_short_is_seen_in_its_file_and_its_bytes(tmp_path, cut):
    path = save(tmp_path / "cut.jpg", noise(8, (32, 32, 3)))
    path.write_bytes(path.read_bytes()[:-cut])
    for lazy in (False, True):
        with pytest.raises(decoding.CorruptImageError, match="cut.jpg"):
            read_one(path, lazy)


# A tf.train.Example by hand: fields of number << 3 | 2, a length, the bytes.
def message(number, content):
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def example(**features):
    entries = [
        message(1, message(1, name.encode()) + message(2, feature))
        for name, feature in features.items()
    ]
    return message(1, b"".join(entries))


def write_shard(path, records):
    frames = [struct.pack("<QI", len(r), 0) + r + bytes(4) for r in records]
    path.write_bytes(b"".join(frames))
    return str(path)


IMAGE = message(1, message(1, b"the bytes"))


def test_shards_hold_images_and_labels_of_either_form(tmp_path):
    packed, plain = message(3, message(1, b"\x02")), message(3, b"\x08\x01")
    records = [
        example(image=IMAGE, label=packed),
        example(label=plain, file_name=message(1, b""), image=IMAGE),
    ]
    paths = [
        write_shard(tmp_path / "0", records),
        write_shard(tmp_path / "1", []),
        write_shard(tmp_path / "2", records[:1]),
    ]
    class_of = np.array([-1, -1, 5], np.int32)
    images = tfrecord.of_shards(paths, class_of, "train")
    np.testing.assert_array_equal(images.labels, [5, 5])
    assert [images.fetch(i) for i in (0, 1)] == [b"the bytes"] * 2
    assert images.describe(1).endswith(paths[2])
    with pytest.raises(decoding.CorruptImageError, match="not an image"):
        images.check(1)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"no protocol buffer",
        example(image=IMAGE),
        example(image=IMAGE, label=b""),
        example(image=IMAGE, label=b"\x08\x01"),
        example(image=IMAGE, label=message(3, b"\x0d1234")),
    ],
)
def test_other_records_are_refused_in_one_line(tmp_path, record):
    path = write_shard(tmp_path / "shard", [record])
    with pytest.raises(ValueError, match="not a whole TFRecord") as error:
        tfrecord.of_shards([path], np.arange(10), "train")
    assert path in one_line(error)


def test_files_in_folders_below_a_class_folder_are_read(tmp_path):
    for place in ("a/0", "a/x/1", "a/x/y/2", "a/.hidden/3", "b/z/4"):
        save(tmp_path / f"{place}.png", solid(int(place[-1])))
    (tmp_path / "a" / "x" / "again").symlink_to(tmp_path / "a")
    paths, labels = class_folders.class_files(tmp_path, ["a", "b"])
    names = [str(p.relative_to(tmp_path)) for p in map(pathlib.Path, paths)]
    assert names == ["a/0.png", "a/x/1.png", "a/x/y/2.png", "b/z/4.png"]
    assert labels == [0, 0, 0, 1]


def test_the_same_image_in_two_splits_is_one_line(tmp_path, capsys):
    for i in range(6):
        save(tmp_path / "train" / f"{i}.png", noise(i))
        save(tmp_path / "test" / f"{i}.bmp", noise(i))  # Other bytes.
    images = [
        image_files.of_files(sorted((tmp_path / s).iterdir()), [0] * 6)
        for s in ("train", "test")
    ]
    image_files.warn_of_shared(image_files.shared(*images))
    assert capsys.readouterr().err == ""
    for i in (2, 3):
        path = tmp_path / "test" / f"{i}.bmp"
        path.write_bytes((tmp_path / "train" / f"{i}.png").read_bytes())
    # Of the same size, with the same end.
    other = bytearray((tmp_path / "train" / "4.png").read_bytes())
    other[20] ^= 1
    (tmp_path / "test" / "4.bmp").write_bytes(other)
    image_files.warn_of_shared(image_files.shared(*images))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "(same bytes): 2," in err
    assert str(tmp_path / "train" / "2.png") in err
    assert str(tmp_path / "test" / "2.bmp") in err
