"""Makes the tables of results, each by one command that can be stopped.

    python experiments/tables.py --table=digits
    python experiments/tables.py --table=mnist --data_dir=data
    python experiments/tables.py --table=race --data_dir=data
    python experiments/tables.py --table=race --rows=plain,S3TA-4,S3TA-16
    python experiments/tables.py --table=objectives --data_dir=data
    python experiments/tables.py --table=lineage --data_dir=data/cifar10

digits trains the model of make demo, and a plain network and S3TA on the same
images. mnist trains a small network on clean and on adversarial images. race
trains the same vision network adversarially, plain and as S3TA-2, -4, -8 and
-16. objectives trains one small network with every robust objective. lineage
trains ResNet-20 plain and with each kind of fixation.

The size is printed first. Every part is a run of trainer.py or adversary.py,
which resume, so that the same command continues where it was stopped. After
each part the table (<table>.md and .csv) and the figure are written again and
say what is missing. With --publish the records are also copied to results/;
make results makes docs/results.md of them.
"""

import csv
import dataclasses
import pathlib
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from absl import flags

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import publish  # noqa: E402

from saccade.cli import command_line  # noqa: E402
from saccade.cli import flags as program_flags  # noqa: E402
from saccade.core import names as known_names  # noqa: E402
from saccade.core import run_folder  # noqa: E402
from saccade.core import settings as core_settings  # noqa: E402
from saccade.core.run_folder import Record, StrPath  # noqa: E402
from saccade.evaluation import published, tables  # noqa: E402

import datasets  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Job: TypeAlias = tuple[str, int]  # A row of a table and a seed.
Numbers: TypeAlias = dict[str, float]  # The numbers of a run by head.

# What every record of a table has in common, unless its column says otherwise.
_USUAL = {
    "norm": "linf",
    "restarts": 1,
    "eot": None,
    "options": {},
    "split": "test",
    "weights": "best",
    "surrogate": None,
    "read_outs": "last",
    "craft_dtype": "float32",
    "seed": 0,
}
# Flags that do not change what a finished run is.
_IDLE = ("--resume", "--runs_dir", "--data_dir", "--on_collapse")


@dataclasses.dataclass(frozen=True)
class Column:
    """A number of a table, read from one record.

    Attributes:
        head: Its name.
        flags: Those of the `adversary.py` that makes the record.
        match: Fields that tell the record from the run's others.
        value: Which field is printed, in percent.
        share: Of the table's test images, those that are attacked.
        images: Number of test images in the table's attacks.
    """

    head: str
    flags: tuple[str, ...]
    match: Mapping[str, Any]
    value: str = "robust_accuracy"
    share: float = 1.0
    images: int = 500

    @property
    def num_examples(self) -> int:
        """How many test images are attacked."""
        return round(self.share * self.images)

    def of(self, records: Iterable[Record]) -> float | None:
        """Returns the number, None where there is no such record.

        Raises:
            ValueError: If two records fit.
        """
        wanted = {**_USUAL, **self.match, "num_examples": self.num_examples}
        found = [
            record
            for record in records
            if all(
                _same(record.get(key, _USUAL.get(key)), value)
                for key, value in wanted.items()
            )
        ]
        if len(found) > 1:
            raise ValueError(
                f"Two records of {found[0]['run']} fit the column {self.head}: "
                "leave attacks of your own out of the table's folder."
            )
        return 100 * found[0][self.value] if found else None


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        return published.close(found, wanted)
    return found == wanted


@dataclasses.dataclass(frozen=True)
class Table:
    """A comparison.

    Attributes:
        epochs: Passes over the training images.
        training: Flags of `trainer.py` that all rows share.
        rows: Dict from names to the flags of a row.
        columns: Its `Column`s.
        published: Dict from (row, head) to the text's number.
        figure: Heads that the figure shows, and their places on its axis.
        drawing: Rows that draw their gazes; the columns that attack in
            expectation concern no other.
        images: Number of test images in each attack, unless `Choice` has one.
        tested: Whether a column shows the accuracy on all test images.
    """

    epochs: int
    training: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    columns: tuple[Column, ...]
    published: Mapping[tuple[str, str], Any] = dataclasses.field(
        default_factory=dict
    )
    figure: Mapping[str, float] = dataclasses.field(default_factory=dict)
    drawing: tuple[str, ...] = ()
    images: int = 500
    tested: bool = False

    def concerns(self, row: str, column: Column) -> bool:
        """Whether a column has a number for a row."""
        return row in self.drawing or "eot" not in column.match


@dataclasses.dataclass(frozen=True)
class Setting:
    """What depends on the kind of images.

    Attributes:
        radius: Of all attacks, in L-inf.
        step: A quarter of it.
        plain: Flags of the plain net.
        vision: Name of the same net as S3TA's vision net.
        augmentation: Of the training images.
        pools: Whether the plain net forgets where a feature was.
        units: Of S3TA's LSTM, and of its other hidden layers.
        epochs: Of the race.
        more: Flags of all trainings.
        race: Flags of the race's.
    """

    radius: str
    step: str
    plain: tuple[str, ...]
    vision: str
    augmentation: str
    pools: bool
    units: int = 64
    epochs: int = 15
    more: tuple[str, ...] = ()
    race: tuple[str, ...] = ()


_DIGITS = Setting(
    "0.1", "0.025", ("--model=resnet", "--backbone=simple_cnn"), "simple_cnn",
    "none", False,
)  # fmt: skip
_PHOTOGRAPHS = Setting(
    "8/255", "2/255", ("--model=resnet_cifar", "--downsampling=not_last"),
    "resnet_cifar", "small_photographs", True,
)  # fmt: skip
_IMAGENETTE = Setting(
    "4/255", "1/255", ("--model=resnet", "--backbone=resnet18_v2"),
    "resnet18_v2", "photographs", True, units=256, epochs=40,
    more=("--image_size=128",), race=("--adv_epsilon_warmup=3",),
)  # fmt: skip


def setting(dataset: str) -> Setting:
    """Returns the `Setting` of a data set."""
    if dataset in ("cluttered_digits", "cluttered_mnist", "mnist", "usps"):
        return _DIGITS
    return _IMAGENETTE if dataset == "imagenette" else _PHOTOGRAPHS


def _training(chosen: Setting) -> tuple[str, ...]:
    return (
        "--optimizer=adam",
        "--learning_rate=2e-3",
        "--schedule=cosine",
        "--warmup=1",
        "--batch_size=128",
        f"--augmentation={chosen.augmentation}",
        "--on_collapse=restore",
        *chosen.more,
    )


def _autoattack(chosen: Setting) -> Column:
    return Column(
        "AutoAttack",
        ("--protocol=autoattack", f"--epsilon={chosen.radius}"),
        {
            "attack": "autoattack",
            "version": "standard",
            "epsilon": command_line.parse_ratio(chosen.radius),
        },
        # Those that stand take all of its 6900 steps.
        share=0.4,
    )


def _pgd_columns(chosen: Setting) -> tuple[Column, ...]:
    """Clean accuracy, and S3TA's random targets by attack steps."""
    call = ("--protocol=s3ta", f"--epsilon={chosen.radius}")
    heads = {"clean": (10, "clean_accuracy")}
    for end, value in (("", "robust_accuracy"), (" success", "attack_success")):
        for steps in (10, 100, 250, 1000):
            heads[f"PGD-{steps}{end}"] = steps, value
    return tuple(
        Column(
            head,
            call,
            {
                "attack": "pgd",
                "epsilon": command_line.parse_ratio(chosen.radius),
                "steps": steps,
                "target": "random",
            },
            value,
        )
        for head, (steps, value) in heads.items()
    )


def race(chosen: Setting) -> Table:
    """S3TA's training (random targets, random start with probability 0.8).

    In small: five steps of a quarter of the radius, where the paper has ten or
    thirty of a sixteenth, so that all of it should take less than three hours
    of two cores. A plain net that sees every place of the last map has a row
    beside it that pools, as the paper's ResNet does.
    """
    plain = {"plain": (*chosen.plain, "--width=16")}
    if not chosen.pools:
        plain["plain, pooled"] = (*plain["plain"], "--global_pooling=1")
    return Table(
        epochs=chosen.epochs,
        training=(
            *_training(chosen),
            *chosen.race,
            "--adv_train=1",
            f"--adv_epsilon={chosen.radius}",
            "--adv_target=random",
            "--adv_steps=5",
            f"--adv_step_size={chosen.step}",
            "--adv_random_start=0.8",
        ),
        rows={
            **plain,
            **{
                f"S3TA-{steps}": (
                    "--model=s3ta",
                    f"--vision={chosen.vision}",
                    "--vision_width=16",
                    f"--num_steps={steps}",
                    f"--controller_units={chosen.units}",
                    f"--hidden_units={chosen.units}",
                )
                for steps in (2, 4, 8, 16)
            },
        },
        columns=(*_pgd_columns(chosen), _autoattack(chosen)),
        figure={f"PGD-{steps}": steps for steps in (10, 100, 250, 1000)},
    )


def objectives(chosen: Setting) -> Table:
    """One small net, every objective with its own paper's defaults."""
    adversarial = ("--adv_train=1", f"--adv_epsilon={chosen.radius}")
    # Some stay at chance, one distribution for every image, if the radius is
    # whole from the first step (cluttered_mnist, seed 0). For them it grows.
    grown = (*adversarial, "--adv_epsilon_warmup=5")
    call = ("--attack=pgd", "--steps=20", f"--epsilon={chosen.radius}")
    match = {
        "attack": "pgd",
        "epsilon": command_line.parse_ratio(chosen.radius),
        "steps": 20,
        "target": "none",
    }
    return Table(
        epochs=20,
        training=(*_training(chosen), *chosen.plain),
        rows={
            "standard": (),
            "Madry": adversarial,
            **{
                name: (*adversarial, f"--adv_objective={name}")
                for name in ("trades", "alp", "llr", "fast")
            },
            "mart": (*grown, "--adv_objective=mart"),
            # No radius is its own. As a vector noise of sigma 0.1 is as long as
            # an attack of 0.1, but points nowhere: so three times that, too.
            "noise": ("--adv_objective=noise", f"--adv_sigma={chosen.radius}"),
            "noise-3x": (
                "--adv_objective=noise",
                f"--adv_sigma={3 * command_line.parse_ratio(chosen.radius):g}",
            ),
            # Passes of one gradient each, where an epoch of Madry's takes
            # eight: as many epochs of four replays are half of its cost.
            "free": (
                *adversarial,
                "--adv_epsilon_warmup=20",
                "--adv_replays=4",
                "--epochs=80",
            ),
            # So that there is something to perturb.
            "AWP": (*adversarial, "--adv_awp=0.01", "--adv_awp_warmup=5"),
        },
        columns=(
            Column("clean", call, match, "clean_accuracy"),
            Column("PGD-20", call, match),
            _autoattack(chosen),
        ),
    )


_RADII = (0.001, 0.005, 0.01)


def _handover_columns() -> tuple[Column, ...]:
    """Its attack at three radii, five gazes averaged; then in expectation."""
    scan = "--epsilon=" + ",".join(map(str, _RADII))
    call = ("--attack=bim", "--steps=5", scan)
    drawn = (*call, "--test_gazes=random", "--eot=8")
    found = []
    for before, flags_, more in (
        ("", call, {}),
        ("EOT-8 ", drawn, {"options": {"test_gazes": "random"}, "eot": 8}),
    ):
        for value, radii in (
            ("clean_accuracy", _RADII[:1]),
            ("robust_accuracy", _RADII),
        ):
            found += [
                Column(
                    before + ("clean" if "clean" in value else str(radius)),
                    flags_,
                    {"attack": "bim", "steps": 5, "epsilon": radius, **more},
                    value,
                )
                for radius in radii
            ]
    return tuple(found)


def lineage(_: Setting) -> Table:
    """The handover's ResNet-20 and its fixations, its attack, its layout."""
    layout = dict(published.HANDOVER_CIFAR10.published)
    names = {
        "resnet": "resnet_cifar",
        "coarse": "coarse fixations",
        "retinal, nearest": "retinal sampling",
        "cortical": "cortical (ECNN)",
    }
    heads = ("clean", *map(str, _RADII))
    return Table(
        epochs=25,
        training=("--schedule=cosine", "--warmup=1"),
        rows={
            "resnet": ("--model=resnet_cifar",),
            "coarse": ("--model=resnet_cifar", "--coarse_fixations=1"),
            "retinal": ("--model=resnet_cifar", "--sampling=1"),
            "retinal, nearest": (
                "--model=resnet_cifar",
                "--sampling=1",
                "--interpolation=nearest",
            ),
            "cortical": ("--model=ecnn",),
        },
        columns=_handover_columns(),
        published={
            (row, head): float(value)
            for row, name in names.items()
            for head, value in zip(heads, layout[name].split(), strict=True)
        },
        drawing=("coarse", "retinal", "retinal, nearest", "cortical"),
    )


def _scan(
    call: tuple[str, ...], steps: int, radii: Sequence[str], images: int
) -> tuple[Column, ...]:
    """Columns of untargeted PGD at several radii."""
    call = (*call, f"--steps={steps}", f"--epsilon={','.join(radii)}")
    return tuple(
        Column(
            f"PGD-{steps}, {radius}",
            call,
            {
                "attack": "pgd",
                "epsilon": command_line.parse_ratio(radius),
                "steps": steps,
                "target": "none",
            },
            images=images,
        )
        for radius in radii
    )


def digits(_: Setting) -> Table:
    """The training and the attack of `make demo`, and other models on it."""
    s3ta = (
        "--model=s3ta",
        "--vision=simple_cnn",
        "--vision_width=16",
        "--controller_units=64",
        "--hidden_units=64",
    )
    return Table(
        epochs=12,
        training=(),
        rows={
            "multi_gaze": ("--model=multi_gaze",),
            "plain": ("--model=resnet", "--backbone=simple_cnn", "--width=16"),
            "S3TA-2": (*s3ta, "--num_steps=2"),
            "S3TA-4": (*s3ta, "--num_steps=4"),
        },
        columns=_scan(("--attack=pgd",), 20, ("0.05", "0.1", "0.2"), 200),
        images=200,
        tested=True,
    )


def mnist(_: Setting) -> Table:
    """A small net on clean and on adversarial images, and AutoAttack."""
    radius = "0.15"
    return Table(
        epochs=2,
        training=(
            "--model=resnet",
            "--backbone=simple_cnn",
            "--width=16",
            "--batch_size=128",
            "--learning_rate=2e-3",
            "--schedule=cosine",
        ),
        rows={
            "natural": (),
            "adversarial": (
                "--adv_train=1",
                f"--adv_epsilon={radius}",
                "--adv_steps=5",
                "--adv_step_size=0.06",
            ),
        },
        columns=(
            *_scan(("--attack=pgd",), 50, ("0.08", radius), 500),
            dataclasses.replace(
                _autoattack(dataclasses.replace(_DIGITS, radius=radius)),
                head=f"AutoAttack, {radius}",
                share=1.0,
            ),
        ),
        tested=True,
    )


TABLES: dict[str, tuple[Callable[[Setting], Table], str]] = {
    "digits": (digits, "cluttered_digits"),
    "mnist": (mnist, "mnist"),
    "race": (race, "cluttered_mnist"),
    "objectives": (objectives, "cluttered_mnist"),
    "lineage": (lineage, "cifar10"),
}


# --- Running -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which table is made, and how much of it."""

    table: str = core_settings.setting(
        "race",
        "Table that is made: digits, mnist, race, objectives or lineage.",
    )
    dataset: str | None = core_settings.setting(
        None, "Data set of the table.", "the table's own"
    )
    data_dir: str | None = core_settings.setting(
        None, "Folder of the data set's files.", "none"
    )
    seeds: tuple[int, ...] = core_settings.setting(
        (0, 1, 2), "Seeds separated by commas, run in this order.", "0,1,2"
    )
    rows: tuple[str, ...] | None = core_settings.setting(
        None, "Rows of the table that are run, separated by commas.", "all"
    )
    epochs: int | None = core_settings.setting(
        None, "Epochs of each training.", "the table's own", minimum=1
    )
    num_examples: int | None = core_settings.setting(
        None,
        "Number of test images in each attack; some columns take a part of "
        "them.",
        "the table's own",
        minimum=1,
    )

    def words(self) -> list[str]:
        """Returns the arguments of this program that make the same choice."""
        found = []
        for name, value in dataclasses.asdict(self).items():
            if value is not None:
                many = isinstance(value, (tuple, list))
                text = ",".join(map(str, value)) if many else value
                found.append(f"--{name}={text}")
        return found


class Experiment:
    """The runs of a table and what is known of them.

    Args:
        choice: A `Choice`.
        out: The folder of the runs, or of their records in results/.
    """

    def __init__(self, choice: Choice, out: StrPath) -> None:
        make, dataset = TABLES[choice.table]
        self.choice = choice
        self.name = choice.table
        self.dataset = choice.dataset or dataset
        table = make(setting(self.dataset))
        self.out = pathlib.Path(out)
        self.epochs = choice.epochs or table.epochs
        self.num_examples = choice.num_examples or table.images
        columns = (
            dataclasses.replace(column, images=self.num_examples)
            for column in table.columns
        )
        self.table = dataclasses.replace(table, columns=tuple(columns))
        self.rows = list(choice.rows or table.rows)
        for row in self.rows:
            known_names.require_known("rows", row, table.rows)
        _require_once("rows", self.rows)
        self.jobs = [(row, seed) for seed in choice.seeds for row in self.rows]
        for column in self.table.columns:
            if not column.num_examples:
                raise ValueError(
                    f"Expected --num_examples that leave one for the column "
                    f"{column.head}, which takes {column.share:.0%} of them. "
                    f"Received: --num_examples={self.num_examples}."
                )
        self.failed: list[Job] = []

    def command(self, row: str, seed: int) -> list[str]:
        """The `trainer.py` that makes a run."""
        own = self.table.rows[row]
        epochs = [f"--epochs={self.epochs}"]
        if any(flag.startswith("--epochs=") for flag in own):
            epochs = []
        return [
            "trainer.py",
            *self.table.training,
            *own,
            *epochs,
            f"--dataset={self.dataset}",
            f"--seed={seed}",
            f"--runs_dir={self.out}",
            f"--tag={self.tag(row, seed)}",
        ]

    def tag(self, row: str, seed: int) -> str:
        """The last part of the name of a run."""
        return f"{row.lower().replace(', ', '-')}-seed{seed}"

    def folder(self, row: str, seed: int) -> pathlib.Path:
        """The folder of a run, as `trainer.py` names it."""
        model = next(
            flag.removeprefix("--model=")
            for flag in self.command(row, seed)
            if flag.startswith("--model=")
        )
        return self.out / f"{self.dataset}-{model}-{self.tag(row, seed)}"

    def finished(self, row: str, seed: int) -> bool:
        """Whether a run is there; raises if it is one of other settings."""
        place = self.folder(row, seed)
        path = place / "results.json"
        if not path.exists():
            return False
        try:
            found = run_folder.read_json(path)
            run_folder.check_fields(path, found, {}, ("provenance", "ended"))
        except ValueError as error:  # --resume writes it anew.
            run_folder.pass_over(error)
            return False
        made = found["provenance"]
        made, wanted = (
            {x for x in line[1:] if not x.startswith(_IDLE)}
            for line in (
                shlex.split(made["command"]),
                self.command(row, seed),
            )
        )
        if made != wanted:
            raise ValueError(
                f"The run in {place} was made with other settings "
                f"({' '.join(sorted(made ^ wanted))}). Choose another --out."
            )
        return True

    def run(self, row: str, seed: int) -> None:
        """Trains one model and attacks it, as far as that is not done."""
        if not self.finished(row, seed):
            command = self.command(row, seed)
            if (self.folder(row, seed) / "config.json").exists():
                command.append("--resume")
            if not self._call(row, seed, command):
                return
        for column in self.table.columns:
            # One command line makes the records of several columns.
            if column.head in self.numbers(row, seed):
                continue
            if self.table.concerns(row, column):
                command = [
                    "adversary.py",
                    f"--run={self.folder(row, seed)}",
                    f"--num_examples={column.num_examples}",
                    *column.flags,
                ]
                if not self._call(row, seed, command):
                    return

    def _call(self, row: str, seed: int, command: list[str]) -> bool:
        """Runs a program of ours; one that fails does not stop the others."""
        if self.choice.data_dir:
            command = [*command, f"--data_dir={self.choice.data_dir}"]
        print("$ python", shlex.join(command), flush=True)
        program, *rest = command
        done = subprocess.run(
            [sys.executable, ROOT / program, *rest], check=False
        )
        if done.returncode:
            self.failed.append((row, seed))
        return not done.returncode

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads of all the columns."""
        tested = ("clean, all",) if self.table.tested else ()
        return ("s / epoch", *tested, *(c.head for c in self.table.columns))

    def numbers(self, row: str, seed: int) -> Numbers:
        """Returns the numbers of one run by head."""
        place = self.folder(row, seed)
        if not self.finished(row, seed):
            return {}
        trained = run_folder.read_json(place / "results.json")
        with open(place / "history.csv", newline="") as file:
            epochs = sum(1 for _ in csv.DictReader(file))
        passes = epochs * max(1, trained["step"]["replays"])
        found = {"s / epoch": trained["training_seconds"] / passes}
        if self.table.tested:
            found["clean, all"] = 100 * trained["best"]["accuracy"]
        if trained["ended"]:
            found["ended"] = epochs
        records = list(run_folder.records(place).values())
        for column in self.table.columns:
            value = column.of(records)
            if value is not None:
                found[column.head] = value
        return found

    def report(self) -> None:
        """Writes table and figure from what is there."""
        found = {job: self.numbers(*job) for job in self.jobs}
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / f"{self.name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("model", "seed", *self.heads))
            for (row, seed), numbers in found.items():
                cells = (
                    f"{numbers[h]:.2f}" if h in numbers else ""
                    for h in self.heads
                )
                writer.writerow((row, seed, *cells))
        text = self.markdown(found)
        (self.out / f"{self.name}.md").write_text(text)
        print(text, flush=True)
        if self.table.figure:
            self._figure(found)

    def markdown(self, found: Mapping[Job, Numbers] | None = None) -> str:
        """Returns the table and its size as Markdown.

        Args:
            found: Dict from (row, seed) to the numbers of a run; by default
                they are read from the runs.
        """
        if found is None:
            found = {job: self.numbers(*job) for job in self.jobs}
        rows = []
        notes = []
        for row in self.rows:
            mine = [found[job] for job in self.jobs if job[0] == row]
            ends = [n["ended"] for n in mine if "ended" in n]
            if ends:
                notes.append(
                    f"{row}: ended by a collapse after epoch "
                    f"{', '.join(map(str, ends))}, the weights before kept"
                )
            count = sum(map(bool, mine))
            cells = [self._cell(row, head, mine, count) for head in self.heads]
            rows.append([row, str(count), *cells])
        size = f"{self.epochs} epochs, {self.num_examples} images attacked"
        for column in self.table.columns:
            if column.share != 1.0:
                size += f" ({column.head}: {column.num_examples})"
        note = "; [published]" if self.table.published else ""
        where = ""
        if self.choice.data_dir and self.dataset == "folder":
            where = f" ({pathlib.Path(self.choice.data_dir).name})"
        head = f"{self.dataset}{where}, {size}{note}"
        lines = tables.markdown_grid(["model", "seeds", *self.heads], rows)
        return "\n".join([head, "", *lines, "", *notes, ""])

    def _cell(
        self, row: str, head: str, mine: Sequence[Numbers], count: int
    ) -> str:
        """The mean, its range over the seeds, and how many are missing."""
        columns = [c for c in self.table.columns if c.head == head]
        if not all(self.table.concerns(row, column) for column in columns):
            return "-"
        values = [numbers[head] for numbers in mine if head in numbers]
        text = "missing"
        if values:
            text = f"{statistics.mean(values):.1f}"
            if len(values) > 1:
                text += f" ({min(values):.1f}-{max(values):.1f})"
            if len(values) < count:
                text += f", {len(values)} of {count}"
        known = self.table.published.get((row, head))
        return text if known is None else f"{text} [{known}]"

    def _figure(self, found: Mapping[Job, Numbers]) -> None:
        """Accuracy against what varies: a line a row, bars over the seeds."""
        from saccade.figures import style as figure_style

        with figure_style.style():
            drawn = figure_style.new_figure(6, 4)
            self._draw(drawn.subplots(), found)
        figure_style.finish(drawn, self.out / f"{self.name}.png")

    def _draw(self, axes: "Axes", found: Mapping[Job, Numbers]) -> None:
        places = self.table.figure
        for number, row in enumerate(self.rows):
            points = []
            for head, place in places.items():
                values = [
                    found[job][head]
                    for job in self.jobs
                    if job[0] == row and head in found[job]
                ]
                if values:
                    mean = statistics.mean(values)
                    bar = mean - min(values), max(values) - mean
                    # Side by side, or the bars would hide one another.
                    points.append((place * 1.06 ** (number - 2), mean, *bar))
            if points:
                x, y, *bars = zip(*points, strict=True)
                axes.errorbar(x, y, bars, marker="o", capsize=3, label=row)
        axes.set_xscale("log")
        axes.set_xticks(list(places.values()), list(map(str, places.values())))
        axes.minorticks_off()
        axes.set_xlabel("attack steps")
        axes.set_ylabel("accuracy, %")
        axes.set_title(f"{self.dataset}: random targets", fontsize=10)
        if axes.lines:
            axes.legend(frameon=False)


@dataclasses.dataclass(frozen=True)
class TablesFlags(Choice):
    """The flags of the program."""

    out: str | None = core_settings.setting(
        None, "Folder of the runs and of the table.", "runs/<table>"
    )
    show: bool = core_settings.setting(
        False,
        "Whether to write the table from the runs that are there and run "
        "nothing.",
    )
    publish: str | None = core_settings.setting(
        None,
        "Name of the folder in results/ to which the records are copied, "
        "without weights and images.",
        "none: they stay with the runs",
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the program.

    Args:
        values: The `absl.flags.FlagValues` that get them.
    """
    program_flags.define(TablesFlags, values)


def _check_seeds(seeds: Sequence[int]) -> None:
    """Raises a ValueError if a seed is out of range or given twice."""
    _require_once("seeds", seeds)
    for seed in seeds:
        if not 0 <= seed < 2**31:
            raise ValueError(
                f"Expected --seeds from 0 to {2**31 - 1}. Received: {seed}."
            )


def _require_once(flag: str, values: Sequence[object]) -> None:
    """Raises a ValueError if a flag names something twice."""
    if len(set(values)) < len(values):
        raise ValueError(
            f"Expected --{flag} to name each once. Received: "
            f"--{flag}={','.join(map(str, values))}."
        )


def experiment_from_flags(
    values: flags.FlagValues = flags.FLAGS,
) -> Experiment:
    """Makes the `Experiment` of the parsed flags.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    choice = program_flags.read(Choice, values)
    known_names.require_known("table", choice.table, TABLES)
    _check_seeds(choice.seeds)
    out = values.out or ROOT / "runs" / choice.table
    return Experiment(choice, out)


def _experiment(values: flags.FlagValues) -> Experiment:
    """Makes the experiment of the flags; raises for what is wrong."""
    experiment = experiment_from_flags(values)
    if values.publish is not None:
        publish.destination(values.publish)
    if not values.show:
        datasets.require(experiment.dataset, data_dir=values.data_dir)
    elif experiment.dataset not in datasets.names():
        datasets.require(experiment.dataset)  # Raises, with the near names.
    elif not experiment.out.is_dir():
        raise FileNotFoundError(
            f"There is no folder {experiment.out} to show the runs of. Name "
            "it with --out, or make it without --show."
        )
    for job in experiment.jobs:
        experiment.finished(*job)
    return experiment


def _report(experiment: Experiment, published: str | None) -> None:
    """Writes the table, and copies the records if that is wanted."""
    experiment.report()
    if published is not None:
        publish_records(experiment, publish.destination(published))


def publish_records(experiment: Experiment, into: pathlib.Path) -> None:
    """Copies the records of finished runs to a folder in results/."""
    for job in experiment.jobs:
        if experiment.finished(*job):
            publish.copy_run(experiment.folder(*job), into)
    choice = experiment.choice
    if choice.data_dir:  # Its last part says which pictures a folder holds.
        name = pathlib.Path(choice.data_dir).name
        choice = dataclasses.replace(choice, data_dir=name)
    publish.write_about(into, dataclasses.asdict(choice))


def published_experiment(folder: pathlib.Path) -> Experiment:
    """Returns the `Experiment` whose records a folder in results/ holds."""
    about = run_folder.read_json(folder / publish.ABOUT)
    for name in ("seeds", "rows"):
        if about[name] is not None:
            about[name] = tuple(about[name])
    return Experiment(Choice(**about), folder)


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs what is missing, the seeds one after another.

    Args:
        values: `absl.flags.FlagValues` after `define_flags`, parsed.
    """
    with command_line.guard():
        experiment = _experiment(values)
    jobs = experiment.jobs
    calls = len({column.flags for column in experiment.table.columns})
    print(
        f"{len(jobs)} trainings of {experiment.epochs} epochs, {calls} attacks "
        f"on {experiment.num_examples} images each: {experiment.out}",
        flush=True,
    )
    if values.show:
        with command_line.guard():
            _report(experiment, values.publish)
        return
    for job in jobs:
        with command_line.guard():
            experiment.run(*job)
            _report(experiment, values.publish)
    if experiment.failed:
        failed = ", ".join(f"{row} seed {s}" for row, s in experiment.failed)
        command_line.fail(f"Failed, and left out of the table: {failed}.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
