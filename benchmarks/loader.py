"""Measures the loader on JPEG files beside tf.data and one Pillow thread.

    python benchmarks/loader.py
    python benchmarks/loader.py --image_size=96 --output=results/loader/96.json
    python benchmarks/loader.py --files='data/imagenet/train/*/*.JPEG'

Each reads the same files in the same order, in batches. `crops` are random
resized crops of whole pictures, `whole` is the short side resized and the
centre cropped. The programs take turns, so that noise falls on all of them. No
test asserts a speed.
"""

import concurrent.futures
import dataclasses
import glob
import io
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])

import outputs  # noqa: E402

from saccade.cli import command_line  # noqa: E402
from saccade.cli import flags as program_flags  # noqa: E402
from saccade.core import run_folder  # noqa: E402
from saccade.core.settings import setting  # noqa: E402
from saccade.data import decoding, pipeline  # noqa: E402
from saccade.data import images as image_files  # noqa: E402
from saccade.data import splits as image_splits  # noqa: E402

_SIDES = (500, 375)  # ImageNet's median picture.


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What is read."""

    files: str | None = setting(
        None,
        "Pattern of the JPEG files that are read.",
        "pictures of 500x375 pixels are made, quality 92",
    )
    count: int = setting(400, "Number of files.", minimum=1)
    image_size: int = setting(224, "Side of the images read.", minimum=8)
    batch_size: int = setting(50, "Images in a batch.", minimum=1)
    rounds: int = setting(
        7, "Passes over the files, of which the median counts.", minimum=1
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    for cls in (LoaderConfig, outputs.Output):
        program_flags.define(cls, values)


def make_files(folder: pathlib.Path, count: int) -> list[str]:
    """Writes pictures with the spectrum of photographs; returns the paths."""
    rng = np.random.default_rng(0)
    width, height = _SIDES
    paths = []
    for number in range(count):
        pixels = np.zeros((height, width, 3))
        for scale in (4, 16, 64, 256):
            small = rng.normal(
                size=(height // scale + 2, width // scale + 2, 3)
            )
            for channel in range(3):
                layer = Image.fromarray(small[..., channel].astype("float32"))
                layer = layer.resize(_SIDES, Image.Resampling.BICUBIC)
                pixels[..., channel] += np.asarray(layer) * scale**0.5
        pixels = 128 + 9 * pixels + rng.normal(size=pixels.shape) * 3
        path = folder / f"{number:04d}.jpg"
        image = Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))
        image.save(path, quality=92)
        paths.append(str(path))
    return paths


def ours(
    paths: Sequence[str], config: LoaderConfig, crops: bool
) -> Callable[[], int]:
    """Returns a pass over the files by Saccade's loader."""
    encoded = image_files.of_files(paths, np.zeros(len(paths)))
    size = config.image_size
    read, _ = image_files.reader(
        *(encoded, size, "short_side", "RGB"),
        in_memory=False,
        skip_corrupt=False,
        title="files",
    )
    split = image_splits.Split(
        "train",
        encoded.labels,
        read,
        crop_reader=image_files.crop_reader(encoded, size, "RGB"),
        decodes=True,
    )
    epochs = iter(range(10**6))

    def run() -> int:
        how = (decoding.RandomCrop(), 0, next(epochs)) if crops else None
        order = np.arange(len(paths))
        found = pipeline.batches(
            split, order, config.batch_size, stored=True, crops=how
        )
        return sum(len(images) for images, _, _ in found)

    return run


def by_tf_data(
    paths: Sequence[str], config: LoaderConfig, crops: bool
) -> Callable[[], int]:
    """Returns a pass by tf.data, written as its guides do."""
    import tensorflow as tf

    sides = (config.image_size, config.image_size)

    def crop(path: Any) -> Any:
        content = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(content)
        box = tf.zeros((1, 0, 4), tf.float32)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            box,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], extent[:2]], 0)
        image = tf.io.decode_and_crop_jpeg(content, window, channels=3)
        return tf.cast(tf.image.resize(image, sides), tf.uint8)

    def whole(path: Any) -> Any:
        content = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(content)
        side = tf.minimum(shape[0], shape[1])
        top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
        window = tf.stack([top, left, side, side])
        image = tf.io.decode_and_crop_jpeg(content, window, channels=3)
        return tf.cast(tf.image.resize(image, sides), tf.uint8)

    dataset = (
        tf.data.Dataset.from_tensor_slices(list(paths))
        .map(crop if crops else whole, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(config.batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )
    return lambda: sum(len(images) for images in dataset.as_numpy_iterator())


def by_pillow(
    paths: Sequence[str], config: LoaderConfig, crops: bool
) -> Callable[[], int]:
    """Returns a pass by one thread that decodes with Pillow."""
    size = config.image_size
    rng = np.random.default_rng(0)

    def one(path: str) -> np.ndarray:
        with open(path, "rb") as file:
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
        if crops:
            box = decoding.RandomCrop().draw(*image.size, rng)
        else:
            side = min(image.size)
            left, top = [(length - side) // 2 for length in image.size]
            box = left, top, left + side, top + side
        bilinear = Image.Resampling.BILINEAR
        return np.asarray(image.resize((size, size), bilinear, box=box))

    def batch(start: int) -> np.ndarray:
        return np.stack(
            list(map(one, paths[start : start + config.batch_size]))
        )

    def run() -> int:
        starts = range(0, len(paths), config.batch_size)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return sum(len(images) for images in pool.map(batch, starts))

    return run


def measure(config: LoaderConfig, paths: Sequence[str]) -> dict[str, Any]:
    """Times all loaders in turn; returns images per second and ratios."""
    makers = {"saccade": ours, "tf.data": by_tf_data, "pillow": by_pillow}
    record: dict[str, Any] = {}
    for name, crops in (("crops", True), ("whole", False)):
        calls = {
            key: make(paths, config, crops) for key, make in makers.items()
        }
        rates: dict[str, list[float]] = {key: [] for key in calls}
        costs: dict[str, list[float]] = {key: [] for key in calls}
        for number in range(config.rounds + 1):
            for key, call in calls.items():
                start, processor = time.perf_counter(), time.process_time()
                if call() != len(paths):
                    raise RuntimeError(f"{key} did not read every file.")
                if number:  # The first pass warms up.
                    seconds = time.perf_counter() - start
                    rates[key].append(len(paths) / seconds)
                    used = time.process_time() - processor
                    costs[key].append(1000 * used / len(paths))
        record[name] = {
            "images_per_second": {
                key: statistics.median(found) for key, found in rates.items()
            },
            "processor_ms_per_image": {
                key: statistics.median(found) for key, found in costs.items()
            },
            "ratio": {
                peer: statistics.median(
                    a / b
                    for a, b in zip(rates["saccade"], rates[peer], strict=True)
                )
                for peer in ("tf.data", "pillow")
            },
        }
    return record


def show(record: dict[str, Any]) -> None:
    """Prints a record as a table."""
    print(f"{'':8}{'saccade':>10}{'tf.data':>10}{'pillow':>10}  ratios")
    for name in ("crops", "whole"):
        rates, ratio = record[name]["images_per_second"], record[name]["ratio"]
        cells = "".join(f"{rate:10.0f}" for rate in rates.values())
        print(f"{name:8}{cells}  {ratio['tf.data']:.2f} {ratio['pillow']:.2f}")
        costs = record[name]["processor_ms_per_image"]
        cells = "".join(f"{cost:10.2f}" for cost in costs.values())
        print(f"{'  ms':8}{cells}  of processor time an image")


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Prints a table, and writes the record.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard():
        command_line.require_package("tensorflow", "benchmarks/loader.py")
        config = program_flags.read(LoaderConfig, values)
        output = program_flags.read(outputs.Output, values)
        paths = []
        if config.files is not None:
            paths = sorted(glob.glob(config.files))[: config.count]
            if not paths:
                raise ValueError(
                    "Expected --files to match JPEG files. Received: "
                    f"--files={config.files}, which matches none"
                )
    with tempfile.TemporaryDirectory() as folder:
        paths = paths or make_files(pathlib.Path(folder), config.count)
        record = {
            **dataclasses.asdict(config),
            "bytes": sum(os.path.getsize(path) for path in paths),
            "cores": os.cpu_count(),
            **measure(config, paths),
            "provenance": run_folder.provenance(),
        }
    show(record)
    output.write(record)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
