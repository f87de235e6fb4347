"""Compares our attacks with those of other libraries on the same weights.

    python benchmarks/parity.py --run=runs/mnist-madry_cnn --epsilon=0.3
    python benchmarks/parity.py --run=RUN --norm=l1 --epsilon=10 \\
      --attacks=autoattack --libraries=saccade,pyautoattack

The libraries are torchattacks, Foolbox, ART and pyautoattack, the package of
AutoAttack's authors. Only pyautoattack is compared in L2 and L1.

Each job, one attack of one library, runs in a process of its own: ours on
--backend, the others on Keras's Torch backend with the same function. PGD
starts at the image, so that libraries do not differ by chance. The result of a
job is a file in <run>/parity/; a job that has one is not run again. Needs the
torch and peers extras.
"""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from saccade.attacks import settings as attack_settings  # noqa: E402
from saccade.cli import command_line  # noqa: E402
from saccade.cli import flags as program_flags  # noqa: E402
from saccade.cli import runs as trained_runs  # noqa: E402
from saccade.core import names as known_names  # noqa: E402
from saccade.core import run_folder  # noqa: E402
from saccade.core import settings as core_settings  # noqa: E402
from saccade.core.settings import setting  # noqa: E402

import datasets  # noqa: E402

if TYPE_CHECKING:
    import keras
    import torch

    from saccade.data import splits as image_splits

OURS = ("saccade", "saccade_bfloat16")
# By the module of each.
PEERS = ("torchattacks", "foolbox", "art", "pyautoattack")
ATTACKS = ("fgsm", "pgd", "apgd", "apgd_t", "fab", "square", "autoattack")
# The attacks of `ATTACKS` that pyautoattack has, by its names.
MEMBERS = {
    "apgd": ["apgd-ce"],
    "apgd_t": ["apgd-t"],
    "fab": ["fab-t"],
    "square": ["square"],
    "autoattack": ["apgd-ce", "apgd-t", "fab-t", "square"],
}
ORDERS = {"l1": 1, "l2": 2, "linf": math.inf}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityFlags:
    """The flags of the program."""

    run: str = setting(
        "", "Folder of the run that is attacked.", "none: required"
    )
    data_dir: str | None = setting(
        None,
        "Folder of the data set's files.",
        "the one that the run was trained with",
    )
    norm: str = attack_settings.NORM.field(
        "linf",
        doc="Norm of the ball. Of the other libraries, only pyautoattack is "
        "compared in l2 and l1.",
    )
    # Text, because the names of the results have it as it is written.
    epsilon: str = setting(
        "",
        "Radius of the ball, in units of the pixel range: 0.3 or 8/255, for "
        "example.",
        "none: required",
    )
    attacks: tuple[str, ...] = setting(
        tuple(name for name in ATTACKS if name != "apgd_t"),
        "Attacks, separated by commas.",
    )
    libraries: tuple[str, ...] = setting(
        tuple(name for name in (*OURS, *PEERS) if name != "pyautoattack"),
        "Libraries, separated by commas.",
    )
    num_examples: int = setting(
        500, "Number of test images, drawn by --seed.", minimum=1
    )
    only_right: bool = setting(
        False,
        "Whether only images are attacked that the model classifies correctly.",
    )
    batch_size: int = setting(
        100, "Images that are attacked at a time.", minimum=1
    )
    pgd_steps: int = setting(50, "Gradient steps of pgd.", minimum=1)
    queries: int = setting(5000, "Queries of square for each image.", minimum=1)
    backend: str = setting(
        "tensorflow",
        "Keras backend of Saccade's own jobs: tensorflow, jax or torch.",
    )
    seed: int = core_settings.SEED.field(
        0, doc="Seed from which all randomness comes."
    )
    job: str | None = setting(
        None,
        "One job, library/attack, that the program runs in a process of its "
        "own.",
        "none: all jobs",
    )


@dataclasses.dataclass(frozen=True)
class Context:
    """What an attack needs to know of the comparison.

    Attributes:
        epsilon: The radius, in units of the pixel range.
        classes: The number of classes.
    """

    epsilon: float
    classes: int


# From images and labels to adversarial images, all on channels first.
Attacker: TypeAlias = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    program_flags.define(ParityFlags, values)


def ours(
    given: ParityFlags,
    library: str,
    attack: str,
    model: "keras.Model",
    split: "image_splits.Split",
    order: Iterable[int],
    context: Context,
) -> tuple[np.ndarray, list[float]]:
    """Runs one of our attacks; returns (adversarial images, times)."""
    from saccade.attacks import autoattack, square
    from saccade.attacks import gradient as gradient_attacks
    from saccade.evaluation import config as evaluation_config
    from saccade.evaluation import evaluate as robust_evaluation

    import model_backbone

    ball: dict[str, Any] = {"norm": given.norm, "epsilon": context.epsilon}
    suite = autoattack.AutoAttack(**ball)
    apgd, apgd_t, fab_t, _ = suite.members()
    chosen = {
        "fgsm": gradient_attacks.FGSM(**ball),
        "pgd": gradient_attacks.PGD(
            **ball, steps=given.pgd_steps, keep="first", random_start=0
        ),
        "apgd": apgd,
        "apgd_t": apgd_t,
        "fab": fab_t,
        # The last row and column are spared by the other libraries.
        "square": square.Square(**ball, n_queries=given.queries, spared=1),
        "autoattack": suite,
    }[attack]
    half = library.endswith("bfloat16")
    surrogate = None
    if half:
        surrogate, _ = model_backbone.load_run(
            given.run, dtype="mixed_bfloat16"
        )
    config = evaluation_config.EvaluationConfig(
        chosen,
        indices=tuple(int(i) for i in order),
        batch_size=given.batch_size,
        seed=given.seed,
        craft_dtype="bfloat16" if half else "float32",
    )
    times = []
    # The second time nothing is traced: that is the speed of a long job.
    for _ in range(2 if attack in ("fgsm", "pgd") else 1):
        started = time.perf_counter()
        _, arrays = robust_evaluation.evaluate(
            model, split, config, surrogate=surrogate, save_images=-1
        )
        times.append(time.perf_counter() - started)
    return arrays["adversarial"], times


def theirs(
    given: ParityFlags,
    library: str,
    attack: str,
    model: "keras.Model",
    images: np.ndarray,
    labels: np.ndarray,
    context: Context,
) -> tuple[np.ndarray, list[float]] | None:
    """Runs another library's attack; returns (adversarial images, times).

    Returns None if the library does not have the attack.
    """
    import torch

    class Channels(torch.nn.Module):
        """The model on channels first, as these libraries want it."""

        def __init__(self) -> None:
            super().__init__()
            self.keras_model = model

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            x = x.permute(0, 2, 3, 1).contiguous()
            return self.keras_model(x, training=False)

    torch.manual_seed(given.seed)
    np.random.seed(given.seed)  # ART draws from it.
    net = Channels().eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(labels, dtype=torch.int64)
    make = {
        "torchattacks": run_torchattacks,
        "foolbox": run_foolbox,
        "art": run_art,
        "pyautoattack": run_pyautoattack,
    }
    run = None
    if given.norm == "linf" or library == "pyautoattack":
        run = make[library](given, attack, net, x, context)
    if run is None:
        return None
    size, parts = given.batch_size, []
    started = time.perf_counter()
    for start in range(0, len(x), size):
        parts.append(run(x[start : start + size], y[start : start + size]))
    seconds = time.perf_counter() - started
    return torch.cat(parts).permute(0, 2, 3, 1).numpy(), [seconds]


def run_torchattacks(
    given: ParityFlags,
    attack: str,
    net: "torch.nn.Module",
    x: "torch.Tensor",
    context: Context,
) -> Attacker:
    """Returns a call of an attack of torchattacks; see `theirs`."""
    import torchattacks as peers

    epsilon, classes = context.epsilon, context.classes
    steps = given.pgd_steps
    made = {
        "fgsm": lambda: peers.FGSM(net, eps=epsilon),
        "pgd": lambda: peers.PGD(
            net,
            eps=epsilon,
            alpha=2.5 * epsilon / steps,
            steps=steps,
            random_start=False,
        ),
        # Its own defaults are ten steps; the published ones are a hundred.
        "apgd": lambda: peers.APGD(net, eps=epsilon, steps=100),
        "apgdt": lambda: peers.APGDT(
            net, eps=epsilon, steps=100, n_classes=classes
        ),
        "fab": lambda: peers.FAB(
            net,
            eps=epsilon,
            steps=100,
            multi_targeted=True,
            n_classes=classes,
        ),
        "square": lambda: peers.Square(
            net, eps=epsilon, n_queries=given.queries, seed=given.seed
        ),
    }
    if attack == "autoattack":
        members = ("apgd", "apgdt", "fab", "square")
        found = peers.MultiAttack([made[name]() for name in members])
    else:
        found = made[attack]()
    return lambda x, y: found(x, y).detach()


def run_foolbox(
    given: ParityFlags,
    attack: str,
    net: "torch.nn.Module",
    x: "torch.Tensor",
    context: Context,
) -> Attacker | None:
    """Returns a call of an attack of Foolbox, or None; see `theirs`."""
    import foolbox

    epsilon, steps = context.epsilon, given.pgd_steps
    found: Any
    if attack == "fgsm":
        found = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    elif attack == "pgd":
        found = foolbox.attacks.LinfPGD(
            abs_stepsize=2.5 * epsilon / steps,
            steps=steps,
            random_start=False,
        )
    else:
        return None
    bounded = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    return lambda x, y: found(bounded, x, y, epsilons=[epsilon])[1][0].detach()


def run_art(
    given: ParityFlags,
    attack: str,
    net: "torch.nn.Module",
    x: "torch.Tensor",
    context: Context,
) -> Attacker | None:
    """Returns a call of an attack of ART, or None; see `theirs`."""
    import torch
    from art import estimators
    from art.attacks import evasion

    epsilon, steps = context.epsilon, given.pgd_steps
    classifier = estimators.classification.PyTorchClassifier(
        net,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=context.classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    common = {"eps": epsilon, "batch_size": given.batch_size, "verbose": False}
    if attack == "fgsm":
        found = evasion.FastGradientMethod(
            classifier, eps=epsilon, batch_size=given.batch_size
        )
    elif attack == "pgd":
        found = evasion.ProjectedGradientDescentPyTorch(
            classifier,
            eps_step=2.5 * epsilon / steps,
            max_iter=steps,
            num_random_init=0,
            **common,
        )
    elif attack == "apgd":
        found = evasion.AutoProjectedGradientDescent(
            classifier,
            eps_step=2 * epsilon,
            max_iter=100,
            nb_random_init=1,
            loss_type="cross_entropy",
            **common,
        )
    elif attack == "square":
        found = evasion.SquareAttack(
            classifier, max_iter=given.queries, p_init=0.8, **common
        )
    else:
        return None
    return lambda x, y: torch.tensor(found.generate(x.numpy(), y.numpy()))


def run_pyautoattack(
    given: ParityFlags,
    attack: str,
    net: "torch.nn.Module",
    x: "torch.Tensor",
    context: Context,
) -> Attacker | None:
    """Returns a call of members of AutoAttack, or None; see `theirs`.

    Args:
        given: `ParityFlags`.
        attack: One of `ATTACKS`.
        net: The model, a `torch.nn.Module` on images with channels first.
        x: The images, unused.
        context: What the attack needs to know.

    Returns:
        A callable from a batch of images and labels to adversarial images;
        None if the package does not have the attack.
    """
    import pyautoattack

    if attack not in MEMBERS:
        return None
    names = {"l1": "L1", "l2": "L2", "linf": "Linf"}
    suite = pyautoattack.AutoAttack(
        net,
        norm=names[given.norm],
        eps=context.epsilon,
        seed=given.seed,
        version="standard",
    )
    suite.attacks_to_run = MEMBERS[attack]
    suite.square.n_queries = given.queries

    def run(x: "torch.Tensor", y: "torch.Tensor") -> "torch.Tensor":
        return suite.run_standard_evaluation(x, y, batch_size=len(x))[0]

    return run


def job(given: ParityFlags, name: str) -> None:
    """Runs one job and writes its result."""
    from saccade.attacks import runner
    from saccade.core import metrics
    from saccade.evaluation import checks as evaluation_checks

    import model_backbone

    library, attack = name.split("/")
    model, run = model_backbone.load_run(given.run)
    data = datasets.load_data(run, given.data_dir)
    split = datasets.split_of(pathlib.Path(given.run), run, data, "test")
    evaluation_checks.check_fit(model, split)
    order = np.random.default_rng(given.seed).permutation(len(split))
    if given.only_right:
        images = split.read(order)
        logits = runner.logits(model, images, 250)
        order = order[metrics.predictions(logits) == split.labels[order]]
    order = order[: given.num_examples]
    images, labels = split.read(order), split.labels[order]
    context = Context(
        command_line.parse_ratio(given.epsilon), len(data.class_names)
    )
    found: tuple[np.ndarray, list[float]] | None
    if library in OURS:
        found = ours(given, library, attack, model, split, order, context)
    else:
        found = theirs(given, library, attack, model, images, labels, context)
    result: dict[str, Any] = {
        "library": library,
        "attack": attack,
        "available": found is not None,
    }
    if found is not None:
        adversarial, times = found
        clean = metrics.predictions(runner.logits(model, images, 250))
        clean = clean == labels
        # Foolbox and others may round out of the ball by an ulp.
        right = metrics.predictions(runner.logits(model, adversarial, 250))
        right = right == labels
        moved = adversarial.astype("float64") - images
        norms = np.linalg.norm(
            moved.reshape(len(moved), -1), ORDERS[given.norm], axis=-1
        )
        result.update(
            clean_accuracy=float(clean.mean()),
            # An image that is wrong while clean is no success of a defence.
            robust_accuracy=float((right & clean).mean()),
            seconds=round(times[0], 2),
            warm_seconds=round(times[-1], 2),
            norm=given.norm,
            largest_norm=float(norms.max()),
            verdicts=(right & clean).astype(int).tolist(),
            indices=[int(i) for i in order],
            batch_size=given.batch_size,  # The seconds depend on it.
            **dataclasses.asdict(context),
        )
    result["provenance"] = run_folder.provenance()
    result_path(given, name).parent.mkdir(exist_ok=True)
    run_folder.write_json(result_path(given, name), result)


def result_path(given: ParityFlags, name: str) -> pathlib.Path:
    """Returns the path of a job's result, which names all that it depends on.

    Args:
        given: `ParityFlags`.
        name: The job, "library/attack".
    """
    radius = given.epsilon.replace("/", "_")
    settings = f"eps{radius}-{given.num_examples}"
    if given.norm != "linf":
        settings = f"{given.norm}-{settings}"
    if given.only_right:
        settings += "-right"
    if given.pgd_steps != 50 and name.endswith("/pgd"):
        settings += f"-{given.pgd_steps}steps"
    if given.queries != 5000 and name.endswith("/square"):
        settings += f"-{given.queries}queries"
    if given.seed != 0:
        settings += f"-seed{given.seed}"
    name = name.replace("/", "-")
    return pathlib.Path(given.run) / "parity" / f"{name}-{settings}.json"


def check(given: ParityFlags) -> None:
    """Raises a ValueError or an OSError, one line, if something is wrong."""
    if not given.run or not given.epsilon:
        raise ValueError("Expected --run=FOLDER and --epsilon=RADIUS.")
    epsilon = command_line.parsed(
        "epsilon", given.epsilon, command_line.parse_ratio
    )
    if not 0 < epsilon <= (1 if given.norm == "linf" else math.inf):
        raise ValueError(
            "Expected --epsilon above 0, in units of the pixel range, and up "
            f"to 1 in linf. Received: --epsilon={given.epsilon} in "
            f"{given.norm}."
        )
    for name in given.attacks:
        known_names.require_known("attacks", name, ATTACKS)
    for name in given.libraries:
        known_names.require_known("libraries", name, (*OURS, *PEERS))
    if given.job is not None:
        library, _, attack = given.job.partition("/")
        known_names.require_known("job", library, (*OURS, *PEERS))
        known_names.require_known("job", attack, ATTACKS)
    folder = trained_runs.at("runs", given.run)
    for library in given.libraries:
        if library in OURS:
            command_line.require_backend(given.backend, "--backend")
        else:
            for package in ("torch", library):
                command_line.require_package(package, f"--libraries={library}")
    _check_images(given, folder)


def _check_images(given: ParityFlags, folder: pathlib.Path) -> None:
    """Raises if a run's weights, or so many images, are not there."""
    trained_runs.weights_sha256(folder, "best")
    needed = ("model", "dataset", "class_names", "image_shape")
    run = run_folder.read_config(folder, needed)
    data = datasets.load_data(run, given.data_dir)
    split = datasets.split_of(folder, run, data, "test")
    if given.num_examples > len(split):
        raise ValueError(
            f"Expected --num_examples of at most the {len(split)} test images. "
            f"Received: --num_examples={given.num_examples}."
        )


def table(given: ParityFlags) -> None:
    """Prints what is there: accuracy and seconds, and the ratio of times."""
    import rich.box
    import rich.console
    import rich.table

    found = {}
    for library in given.libraries:
        for attack in given.attacks:
            path = result_path(given, f"{library}/{attack}")
            if path.exists():
                found[library, attack] = run_folder.read_json(path)
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    heads = ("attack", "library", "robust %", "s", "again", "peer / ours")
    for head in heads:
        text = head in ("attack", "library")
        grid.add_column(head, justify="left" if text else "right")
    for attack in given.attacks:
        peers = [
            r["seconds"]
            for (library, name), r in found.items()
            if name == attack and library not in OURS and r["available"]
        ]
        for library in given.libraries:
            result = found.get((library, attack))
            if result is None:
                grid.add_row(attack, library, "missing", "", "", "")
            elif result["available"]:
                again = result.get("warm_seconds", result["seconds"])
                ratio = ""
                if library in OURS and peers:
                    ratio = f"{min(peers) / again:.2f}"
                grid.add_row(
                    attack,
                    library,
                    f"{100 * result['robust_accuracy']:.1f}",
                    f"{result['seconds']:.1f}",
                    f"{again:.1f}",
                    ratio,
                )
    console = rich.console.Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 100
    some = next(iter(found.values()), {})
    console.print(
        f"{given.run}: {given.norm} {given.epsilon}, "
        f"{given.num_examples} images, "
        f"clean {100 * some.get('clean_accuracy', float('nan')):.1f}%",
        highlight=False,
    )
    console.print(grid)


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs every job that has no result yet, and prints the table.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard():
        given = program_flags.read(ParityFlags, values)
        check(given)
    if given.job is not None:
        command_line.load_keras()
        job(given, given.job)
        return
    names = [f"{b}/{a}" for a in given.attacks for b in given.libraries]
    failed = []
    for number, name in enumerate(names, 1):
        if result_path(given, name).exists():
            continue
        print(f"{number} of {len(names)}: {name}", flush=True)
        backend = given.backend if name.split("/")[0] in OURS else "torch"
        completed = subprocess.run(
            [sys.executable, *sys.argv, f"--job={name}"],
            env={**os.environ, "KERAS_BACKEND": backend},
            check=False,
        )
        if completed.returncode:
            print(f"{name} failed; the table goes on without it.")
            failed.append(name)
    table(given)
    if failed:
        command_line.fail(f"{len(failed)} jobs failed: {', '.join(failed)}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
