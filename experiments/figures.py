"""Makes the README's figures: embedded digits and scikit-learn's photographs.

    python experiments/figures.py runs/cluttered_digits-multi_gaze-demo

Everything is made from files of the run and from pictures that come with
scikit-learn, so the figures may be published.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from saccade.cli import command_line  # noqa: E402
from saccade.cli import runs as trained_runs  # noqa: E402

import datasets  # noqa: E402

PARSER = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
PARSER.add_argument(
    "runs",
    nargs="*",
    help="Folders of runs that were attacked, for the figures of a demo. By "
    "default none: only the figure of the retina.",
)
if __name__ == "__main__":
    ARGUMENTS = command_line.parse_arguments(PARSER)  # Before Keras: quick.
command_line.load_keras()

from keras import ops  # noqa: E402

from saccade.core import run_folder, sampling  # noqa: E402
from saccade.evaluation import records as evaluation_records  # noqa: E402
from saccade.figures import images as figure_images  # noqa: E402

import glimpse  # noqa: E402
import model_backbone  # noqa: E402

FIGURES = pathlib.Path(__file__).parents[1] / "figures"
SIZE = 320


def photographs() -> np.ndarray:
    """The two sample photographs, their middle square at 320 pixels."""
    import sklearn.datasets

    found = []
    for image in sklearn.datasets.load_sample_images().images:
        image = image.astype("float32") / 255
        height, width = image.shape[:2]
        scale = min(height, width) / SIZE
        theta = np.array([[scale * SIZE / width, 0, scale * SIZE / height, 0]])
        points = sampling.affine_points(
            theta.astype("float32"), (height, width), (SIZE, SIZE)
        )
        view = sampling.sample_bilinear(image[None], points)
        found.append(ops.convert_to_numpy(view)[0])
    return np.stack(found)


def retina() -> None:
    """What a retina sees of a photograph at five gazes."""
    images = photographs()
    gazes = np.array(
        [
            [[0, 0], [-70, -80], [60, 90], [-90, 60], [90, -90]],
            [[0, 0], [-60, 70], [50, -60], [90, 90], [-100, -100]],
        ],
        "float32",
    )
    size = (SIZE, SIZE)
    views = ops.convert_to_numpy(glimpse.retinal_warp(images, gazes))
    boxes = ops.convert_to_numpy(glimpse.fovea_box(gazes, size, size))
    figure_images.glimpse_grid(
        images,
        [0, 1],
        [0, 1],
        ("china", "flower"),
        gazes=gazes,
        boxes=boxes,
        views=views,
        title="One photograph, five gazes: box = where the retina magnifies",
        path=FIGURES / "retina.png",
    )


def attacked(folder: pathlib.Path) -> pathlib.Path:
    """The images of the first attack on a run.

    Raises:
        FileNotFoundError: If it was not attacked.
    """
    found = sorted(pathlib.Path(folder).glob("attacks/*/adversarial.npz"))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no attack to draw; run adversary.py "
            f"--run={folder} first."
        )
    return found[0]


def demo(folder: pathlib.Path) -> None:
    """Where the demo's model looks, and what an attack does to it."""
    model, config = model_backbone.load_run(folder)
    data = datasets.load(
        config["dataset"], seed=config["seed"], test_only=True
    ).test
    images = data.read(np.arange(4))
    shown = model_backbone.glimpses(model)(images)
    logits = ops.convert_to_numpy(model(images))
    figure_images.glimpse_grid(
        images,
        data.labels[:4],
        logits.argmax(-1),
        config["class_names"],
        **shown,
        max_rows=4,
        title="Where multi_gaze looks on cluttered digits, and what it sees",
        path=FIGURES / "glimpses.png",
    )
    place = attacked(folder)
    record = run_folder.read_json(place.with_name("results.json"))
    arrays = evaluation_records.saved_images(
        place.parent, tuple(config["image_shape"])
    )
    chosen = evaluation_records.attacked(arrays)
    look = model_backbone.glimpses(model)
    evaluation_records.picture(
        chosen,
        look(chosen["clean"]),
        look(chosen["adversarial"]),
        config["class_names"],
        max_rows=3,
        title=evaluation_records.headline(record, arrays),
        path=FIGURES / "attack.png",
    )


if __name__ == "__main__":
    with command_line.guard():
        command_line.require_package("sklearn", "figures.py")
        runs = [trained_runs.at("runs", path) for path in ARGUMENTS.runs]
        for path in runs:
            attacked(path)
    FIGURES.mkdir(exist_ok=True)
    retina()
    for path in runs:
        demo(path)
