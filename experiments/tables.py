"""The comparisons of the README, each by one command that can be stopped.

    python experiments/tables.py --table=race --data_dir=data
    python experiments/tables.py --table=objectives --data_dir=data
    python experiments/tables.py --table=lineage --data_dir=data

`race` trains the same vision net adversarially as a plain net and as S3TA-2,
-4, -8 and -16: does attention help, do more steps? `objectives` trains one
small net with every robust objective. `lineage` trains the handover's ResNet-20
plain and with each kind of fixation. The size is printed first. Every part is a
run of `trainer.py` or `adversary.py`, which resume, so that the same command
goes on where it was stopped; after each part the table (`<table>.md` and
`.csv`) and the figure are written again and say what is missing. With `--show`
they are written from what is there and nothing is run.
"""

import csv
import dataclasses
import math
import pathlib
import statistics
import subprocess
import sys

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run_folder  # noqa: E402

_WHICH = flags.DEFINE_string("table", "race", "race, objectives or lineage.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the files.")
_DATASET = flags.DEFINE_string("dataset", None, "In place of the table's own.")
_OUT = flags.DEFINE_string("out", None, "Folder; runs/<table> by default.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, in this order.")
_EPOCHS = flags.DEFINE_integer("epochs", None, "In place of the table's own.")
_ROWS = flags.DEFINE_list("rows", None, "Only these rows.")
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 500, "Test images.")
_SHOW = flags.DEFINE_boolean("show", False, "Run nothing.")


@dataclasses.dataclass(frozen=True)
class Column:
    """A number of a table, read from one record.

    Attributes:
        head: Its name.
        flags: Those of the `adversary.py` that makes the record.
        match: Fields that tell the record from the run's others.
        value: Which field is printed, in percent.
    """

    head: str
    flags: tuple
    match: dict
    value: str = "robust_accuracy"

    def of(self, records):
        """Returns the number, None where there is no such record."""
        for record in records:
            if all(_same(record.get(k), v) for k, v in self.match.items()):
                return 100 * record[self.value]
        return None


def _same(found, wanted):
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted


@dataclasses.dataclass(frozen=True)
class Table:
    """A comparison.

    Attributes:
        dataset: Name of its data set.
        epochs: Passes over the training images.
        training: Flags of `trainer.py` that all rows share.
        rows: Dict from names to the flags of a row.
        columns: Its `Column`s.
        published: Dict from (row, head) to the text's number.
        figure: Heads that the figure shows, and their places on its axis.
    """

    dataset: str
    epochs: int
    training: tuple
    rows: dict
    columns: tuple
    published: dict = dataclasses.field(default_factory=dict)
    figure: dict = dataclasses.field(default_factory=dict)


def _pgd_columns():
    """S3TA's random targets: accuracy and success, by attack steps."""
    call = ("--protocol=s3ta", "--epsilon=0.1")
    return tuple(
        Column(
            f"PGD-{steps}" + (" success" if value == "attack_success" else ""),
            call,
            {"attack": "pgd", "steps": steps, "target": "random"},
            value,
        )
        for value in ("robust_accuracy", "attack_success")
        for steps in (10, 100, 250, 1000)
    )


_AUTOATTACK = Column(
    "AutoAttack",
    ("--protocol=autoattack", "--epsilon=0.1"),
    {"attack": "autoattack"},
)
_SMALL = (
    "--optimizer=adam",
    "--learning_rate=2e-3",
    "--schedule=cosine",
    "--warmup=1",
    "--batch_size=128",
    "--augmentation=none",
)
# S3TA's training (random targets, random start with probability 0.8) in small:
# five steps of a quarter of the radius, where the paper has ten or thirty of a
# sixteenth, so that all of it should take less than three hours of two cores.
RACE = Table(
    dataset="cluttered_mnist",
    epochs=15,
    training=(
        *_SMALL,
        "--adv_train=1",
        "--adv_epsilon=0.1",
        "--adv_target=random",
        "--adv_steps=5",
        "--adv_step_size=0.025",
        "--adv_random_start=0.8",
    ),
    rows={
        "plain": ("--model=resnet", "--backbone=simple_cnn"),
        **{
            f"S3TA-{steps}": (
                "--model=s3ta",
                "--vision=simple_cnn",
                f"--num_steps={steps}",
                "--controller_units=128",
                "--hidden_units=128",
            )
            for steps in (2, 4, 8, 16)
        },
    },
    columns=(*_pgd_columns(), _AUTOATTACK),
    figure={f"PGD-{steps}": steps for steps in (10, 100, 250, 1000)},
)
_ADVERSARIAL = ("--adv_train=1", "--adv_epsilon=0.1")
OBJECTIVES = Table(
    dataset="cluttered_mnist",
    epochs=20,
    training=(*_SMALL, "--model=resnet", "--backbone=simple_cnn"),
    rows={
        "standard": (),
        "Madry": _ADVERSARIAL,
        **{
            name: (*_ADVERSARIAL, f"--adv_objective={name}")
            for name in ("trades", "mart", "alp", "llr", "fast", "noise")
        },
        "free": (*_ADVERSARIAL, "--adv_replays=4"),
        "AWP": (*_ADVERSARIAL, "--adv_awp=0.01"),
    },
    columns=(
        Column(
            "PGD-20",
            ("--attack=pgd", "--steps=20", "--epsilon=0.1"),
            {"attack": "pgd", "steps": 20, "target": "none"},
        ),
        _AUTOATTACK,
    ),
)


def _handover_columns():
    """PGD-5 at three radii, five gazes averaged; then in expectation."""
    radii = (0.001, 0.005, 0.01)
    attack = ("--attack=pgd", "--steps=5", "--random_start=0")
    scan = "--epsilon=" + ",".join(map(str, radii))
    drawn = (*attack, scan, "--test_gazes=random", "--eot=8")
    found = []
    for head, call, options in (
        ("", (*attack, scan), {}),
        ("EOT-8 ", drawn, {"test_gazes": "random"}),
    ):
        found += [
            Column(
                f"{head}{radius}",
                call,
                {
                    "attack": "pgd",
                    "steps": 5,
                    "epsilon": radius,
                    "options": options,
                },
            )
            for radius in radii
        ]
    return tuple(found)


_PUBLISHED = {
    "resnet": (88.1, 69.8, 11.4, 0.5),
    "coarse": (87.7, 70.7, 11.7, 0.5),
    "retinal": (88.9, 82.1, 43.8, 11.8),
    "cortical": (85.2, 77.8, 40.1, 11.5),
}
LINEAGE = Table(
    dataset="cifar10",
    epochs=25,
    training=("--schedule=cosine", "--warmup=1"),
    rows={
        "resnet": ("--model=resnet_cifar",),
        "coarse": ("--model=resnet_cifar", "--coarse_fixations=1"),
        "retinal": ("--model=resnet_cifar", "--sampling=1"),
        "cortical": ("--model=ecnn",),
    },
    columns=_handover_columns(),
    published={
        (row, head): value
        for row, values in _PUBLISHED.items()
        for head, value in zip(
            ("clean", "0.001", "0.005", "0.01"), values, strict=True
        )
    },
)
TABLES = {"race": RACE, "objectives": OBJECTIVES, "lineage": LINEAGE}


# --- Running -----------------------------------------------------------------


class Experiment:
    """The runs of a table and what is known of them."""

    def __init__(self, name, table):
        self.name, self.table = name, table
        self.out = pathlib.Path(_OUT.value or ROOT / "runs" / name)
        self.dataset = _DATASET.value or table.dataset
        self.epochs = _EPOCHS.value or table.epochs
        self.rows = _ROWS.value or list(table.rows)
        unknown = set(self.rows) - set(table.rows)
        if unknown:
            raise app.UsageError(
                f"Unknown rows {sorted(unknown)}. Known: {list(table.rows)}."
            )
        self.jobs = [(r, int(s)) for s in _SEEDS.value for r in self.rows]

    def flags(self, row):
        """The trainer's flags of a row, the model's among them."""
        return (*self.table.training, *self.table.rows[row])

    def tag(self, row, seed):
        """The last part of the name of a run."""
        return f"{row.lower()}-seed{seed}"

    def folder(self, row, seed):
        """The folder of a run, as `trainer.py` names it."""
        model = next(
            flag.removeprefix("--model=")
            for flag in self.flags(row)
            if flag.startswith("--model=")
        )
        return self.out / f"{self.dataset}-{model}-{self.tag(row, seed)}"

    def train(self, row, seed):
        """Trains one model, or goes on with it."""
        place = self.folder(row, seed)
        if (place / "results.json").exists():
            return
        command = ["trainer.py", *self.flags(row), f"--epochs={self.epochs}"]
        command += [f"--dataset={self.dataset}", f"--seed={seed}"]
        command += [f"--runs_dir={self.out}", f"--tag={self.tag(row, seed)}"]
        if (place / "config.json").exists():
            command.append("--resume")
        call(command)

    def attack(self, row, seed):
        """Attacks one model; what has its records is not attacked again."""
        stochastic = {"--sampling=1", "--coarse_fixations=1"}
        stochastic |= {"--model=ecnn"}
        for chosen in dict.fromkeys(c.flags for c in self.table.columns):
            if "--test_gazes=random" in chosen:
                if not stochastic & set(self.flags(row)):
                    continue  # It has no gazes to draw.
            known = self.numbers(row, seed)
            heads = [c.head for c in self.table.columns if c.flags == chosen]
            if not set(heads) <= set(known):
                call(
                    [
                        "adversary.py",
                        f"--run={self.folder(row, seed)}",
                        f"--num_examples={_NUM_EXAMPLES.value}",
                        *chosen,
                    ]
                )

    @property
    def heads(self):
        """The heads of all the columns."""
        return ("s / epoch", "clean", *(c.head for c in self.table.columns))

    def numbers(self, row, seed):
        """Returns the numbers of one run by head."""
        place = self.folder(row, seed)
        if not (place / "results.json").exists():
            return {}
        trained = run_folder.read_json(place / "results.json")
        found = {
            "s / epoch": trained["training_seconds"] / self.epochs,
            "clean": 100 * trained["best"]["accuracy"],
        }
        records = [
            run_folder.read_json(path)
            for path in sorted(place.glob("attacks/*/results.json"))
        ]
        records = [
            r for r in records if r["num_examples"] == _NUM_EXAMPLES.value
        ]
        for column in self.table.columns:
            value = column.of(records)
            if value is not None:
                found[column.head] = value
        return found

    def report(self):
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
        text = self._markdown(found)
        (self.out / f"{self.name}.md").write_text(text)
        print(text, flush=True)
        if self.table.figure:
            self._figure(found)

    def _markdown(self, found):
        lines = ["| model | seeds | " + " | ".join(self.heads) + " |"]
        lines.append("|---" * (2 + len(self.heads)) + "|")
        for row in self.rows:
            mine = [found[job] for job in self.jobs if job[0] == row]
            count = sum(map(bool, mine))
            cells = []
            for head in self.heads:
                text = _cell([n[head] for n in mine if head in n], count)
                published = self.table.published.get((row, head))
                if published is not None:
                    text += f" [{published}]"
                cells.append(text)
            lines.append(f"| {row} | {count} | " + " | ".join(cells) + " |")
        size = f"{self.epochs} epochs, {_NUM_EXAMPLES.value} images attacked"
        note = "; [published]" if self.table.published else ""
        return "\n".join([f"{self.dataset}, {size}{note}", "", *lines, ""])

    def _figure(self, found):
        """Accuracy against what varies: a line a row, bars over the seeds."""
        from matplotlib import figure

        drawn = figure.Figure(figsize=(6, 4), dpi=150, layout="constrained")
        axes = drawn.subplots()
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
        drawn.savefig(self.out / f"{self.name}.png")


def call(command):
    """Runs a program of ours; its own lines go through."""
    if _DATA_DIR.value:
        command = [*command, f"--data_dir={_DATA_DIR.value}"]
    print("$ python", *command, flush=True)
    program, *rest = command
    subprocess.run([sys.executable, ROOT / program, *rest], check=True)


def _cell(values, count):
    """The mean, its range over the seeds, and how many are missing."""
    if not values:
        return "missing"
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ({min(values):.1f}-{max(values):.1f})"
    if len(values) < count:
        text += f", {len(values)} of {count}"
    return text


def main(argv):
    """Runs what is missing, the seeds one after another."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    if _WHICH.value not in TABLES:
        raise app.UsageError(
            f"Expected --table to be one of {', '.join(TABLES)}. Received: "
            f"{_WHICH.value}."
        )
    experiment = Experiment(_WHICH.value, TABLES[_WHICH.value])
    jobs = experiment.jobs
    calls = len({column.flags for column in experiment.table.columns})
    print(
        f"{len(jobs)} trainings of {experiment.epochs} epochs, {calls} attacks "
        f"on {_NUM_EXAMPLES.value} images each: {experiment.out}",
        flush=True,
    )
    if _SHOW.value:
        experiment.report()
        return
    for job in jobs:
        experiment.train(*job)
        experiment.attack(*job)
        experiment.report()


if __name__ == "__main__":
    app.run(main)
