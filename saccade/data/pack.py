"""Packs the pictures of a data set into a few large files, once.

    python -m saccade.data.pack --dataset=imagenet --data_dir=DATA \\
      --out=PACK --size=256
    python trainer.py --dataset=imagenet --data_dir=PACK --image_size=224

The folder PACK then stands for the data set: --data_dir of the programs takes
it. Pictures with a short side of at most --size pixels are copied as they are,
larger ones are resized. Ctrl-C or a kill loses at most the file that was being
written; the same command continues.
"""

import dataclasses
import pathlib
import types

from absl import flags

# This module is a program. It is the one in this room that may import the rooms
# above; nothing imports it.
from saccade.cli import command_line
from saccade.cli import flags as program_flags
from saccade.core.settings import setting
from saccade.data import packed, packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackFlags:
    """The flags of the program."""

    dataset: str = setting(
        "",
        "Data set of photographs: imagenette, imagenet10, imagenet100, "
        "imagenet, bbox_imagenet10 or folder.",
        "none: it is required",
    )
    data_dir: str | None = setting(
        None, "Folder of the data set's files, or the folder above it.", "none"
    )
    out: str = setting("", "Folder of the pack.", "none: it is required")
    size: int | None = setting(
        None,
        "Short side in pixels that larger pictures are resized to; 0 copies "
        "every picture as it is.",
        "none: it is required",
        minimum=0,
    )
    lossless: bool = setting(
        False,
        "Whether resized pictures are stored as PNG (1) or as JPEG of quality "
        "95 (0).",
    )
    class_list_file: str | None = setting(
        None,
        "Text file of the classes of an ImageNet set, one WordNet id a line.",
        "the data set's own list",
        flag="class_list",
    )
    skip_corrupt: bool = setting(
        False,
        "Whether to leave out and count unreadable images (1) or to stop with "
        "an error (0).",
    )
    download: bool = setting(
        False,
        "Whether TensorFlow Datasets may download a data set that is missing.",
    )
    shard_images: int = setting(4096, "Pictures in a file.", minimum=1)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    program_flags.define(PackFlags, values)


HELP = command_line.Help(__doc__, {"flags": program_flags.names(PackFlags)})


def _table() -> types.ModuleType:
    """Imports the table of data sets, which is not part of the package.

    Raises:
        ValueError: If the program does not run in a checkout.
    """
    try:
        import datasets
    except ImportError:
        datasets = types.ModuleType("datasets")
    # Another project's package has the same name.
    if not hasattr(datasets, "stored_images"):
        raise ValueError(
            "Expected to run in a checkout of Saccade, whose datasets.py knows "
            f"the data sets. Received: the folder {pathlib.Path.cwd()}."
        )
    return datasets


def run(given: PackFlags) -> packed.Pack:
    """Makes a pack.

    Raises:
        ValueError: If a flag is missing or does not fit.
        OSError: If files cannot be read or written.
    """
    for name in ("dataset", "out", "size"):
        if getattr(given, name) in ("", None):
            raise ValueError(f"Expected --{name}. Received: none; see --help.")
    settings = packing.Settings(
        given.dataset, given.size or 0, given.lossless, given.shard_images
    )
    datasets = _table()
    out = pathlib.Path(given.out)
    packing.require_free(out)
    classes, splits, source = datasets.stored_images(
        given.dataset,
        data_dir=given.data_dir,
        class_list_file=given.class_list_file,
        download=given.download,
    )
    return packing.write(
        out, settings, classes, splits, source, given.skip_corrupt
    )


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs the program.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard(), command_line.continues():
        pack = run(program_flags.read(PackFlags, values))
    for name, split in pack.content["splits"].items():
        size = sum(size for _, size in split["shards"])
        left = len(split["left_out"])
        print(
            f"{name}: {split['images']} images ({split['resized']} resized), "
            f"{len(split['shards'])} files, {size / 1e6:.1f} MB"
            + (f"; {left} unreadable images are left out" if left else "")
        )
    print(f"pack: {pack.folder}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main, help=HELP)
