"""Measures how long training waits for data that are decoded from files.

    python benchmarks/waiting.py --data_dir=imagenette
    python benchmarks/waiting.py --data_dir=imagenette --models=s3ta,multi_gaze

Each model takes standard training steps on random crops of the files of
`train/<class>/`. The share is the time in which the loop waited for the next
batch, of all its time after the first two steps. No test asserts a speed.
"""

import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])

import outputs  # noqa: E402

from saccade.cli import command_line  # noqa: E402
from saccade.cli import flags as program_flags  # noqa: E402
from saccade.core import names as known_names  # noqa: E402
from saccade.core import run_folder  # noqa: E402
from saccade.core.settings import setting  # noqa: E402

if TYPE_CHECKING:
    from saccade.data import splits as image_splits

_WARM_UP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaitingFlags:
    """The flags of the program."""

    data_dir: str | None = setting(
        None, "Folder of train/<class>/* and val/<class>/*.", "none"
    )
    models: tuple[str, ...] = setting(
        (), "Models, separated by commas.", "all registered ones"
    )
    image_size: int = setting(96, "Side of the images in pixels.", minimum=8)
    batch_size: int = setting(32, "Images in a batch.", minimum=1)
    steps: int = setting(8, "Training steps that are measured.", minimum=1)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    for cls in (WaitingFlags, outputs.Output):
        program_flags.define(cls, values)


def measure(
    name: str, split: "image_splits.Split", options: WaitingFlags
) -> dict[str, Any]:
    """Trains a model for a few steps; returns what it waited for."""
    from saccade.data import augment
    from saccade.training import checkpoints, loop, objectives, recipes
    from saccade.training import step as training_step

    side, classes = options.image_size, int(split.labels.max()) + 1
    model = checkpoints.create(
        name, num_classes=classes, image_shape=(side, side, 3)
    )
    recipe = recipes.Recipe(optimizer="sgd", learning_rate=0.01)
    count = (_WARM_UP + options.steps) * options.batch_size
    chosen = np.resize(np.arange(len(split)), count)
    waits = []  # When each batch was asked for, and how long it took.

    class Measured(loop.Loop):
        """A loop whose batches are timed."""

        def _batches(self, epoch: int) -> Iterator[Any]:
            batches = super()._batches(epoch)
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                waits.append((asked, time.perf_counter() - asked))
                if batch is None:
                    return
                yield batch

    with tempfile.TemporaryDirectory() as folder:
        Measured(
            model=model,
            optimizer=recipes.make_optimizer(recipe, 1000),
            split=split.subset(chosen),
            folder=pathlib.Path(folder),
            batch_size=options.batch_size,
            epochs=1,
            objective=objectives.Standard(),
            options=training_step.StepOptions(
                augmentation=augment.AUGMENTATIONS["resized_crops"]
            ),
            log_every=1,
            on_collapse="ignore",
        ).train()
    timed = waits[_WARM_UP:]
    seconds = time.perf_counter() - timed[0][0]
    return {
        "model": name,
        "step_seconds": round(seconds / options.steps, 3),
        "waited": round(sum(wait for _, wait in timed) / seconds, 4),
    }


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Measures the models and prints a line for each.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard():
        command_line.load_keras()
        from saccade.models import registry

        import datasets
        import model_backbone  # noqa: F401 -- Registers the models.

        options = program_flags.read(WaitingFlags, values)
        output = program_flags.read(outputs.Output, values)
        for name in options.models:
            known_names.require_known("models", name, registry.names())
        datasets.IN_MEMORY_BYTES = 0  # Otherwise so few files are kept.
        data = datasets.load(
            "folder",
            data_dir=options.data_dir,
            image_size=options.image_size,
            validation_fraction=0.0,
        )
    rows = []
    for name in options.models or registry.names():
        rows.append(measure(name, data.training, options))
        print(
            f"{name:24} {rows[-1]['step_seconds']:8.3f} s a step, waited "
            f"{100 * rows[-1]['waited']:.1f}%",
            flush=True,
        )
        output.write(
            {
                **dataclasses.asdict(options),
                "rows": rows,
                "provenance": run_folder.provenance(),
            }
        )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
