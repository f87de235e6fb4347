"""adversary.py on a small run: records, reuse, the table and invalid input."""

import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import programs
import pytest

from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import registry as attack_registry
from saccade.cli import command_line
from saccade.cli import flags as program_flags
from saccade.core import run_folder
from saccade.evaluation import evaluate as robust_evaluation
from saccade.training import checkpoints

import datasets
import model_backbone

ROOT = pathlib.Path(__file__).parents[1]
MODEL, OPTIONS = (
    "multi_gaze",
    {
        "num_transformers": 2,
        "backbone": "simple_cnn",
        "width": 4,
        "localization": "simple_cnn",
        "localization_width": 4,
    },
)


adversary, _ = programs.load("adversary")


@pytest.fixture(scope="module")
def data():
    """The embedded digits; only the test images."""
    return datasets.load("cluttered_digits", test_only=True)


def make_run(folder, data, **changes):
    """Makes a run folder as trainer.py writes it, with untrained weights."""
    folder.mkdir(parents=True)
    keras.utils.set_random_seed(0)
    model = model_backbone.create(
        MODEL, num_classes=10, image_shape=data.image_shape, **OPTIONS
    )
    # The model predicts the class of the first image for every image, so that
    # some images are correct and can be attacked.
    bias = 2.0 * np.eye(10)[data.test.labels[0]]
    model.get_layer("logits").bias.assign(bias)
    config = {
        "model": MODEL,
        "model_options": OPTIONS,
        "dataset": "cluttered_digits",
        "num_classes": 10,
        "class_names": list(data.class_names),
        "class_list": data.class_list,
        "class_list_file": None,
        "image_shape": list(data.image_shape),
        "image_size": None,
        "data_dir": None,
        "skip_corrupt": False,
        "seed": 0,
        "validation_fraction": 0.05,
        **changes,
    }
    run_folder.write_json(folder / run_folder.CONFIG, config)
    for weights in ("best", "last"):
        checkpoints.save_weights(folder / f"{weights}.weights.h5", model)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "cluttered_digits-multi_gaze", data)
    return root


@pytest.fixture
def cli(root, data, monkeypatch, capsys):
    """Calls the program; returns exit status, output and error output."""
    monkeypatch.setattr(datasets, "load", lambda *a, **k: data)

    def call(*arguments, runs_dir=root):
        def main():
            with command_line.guard():
                values = programs.parse(
                    "adversary", f"--runs_dir={runs_dir}", *arguments
                )
            adversary.main(values)

        return programs.outcome(main, capsys)

    return call


def parse(*arguments):
    """Returns the `AdversaryFlags` of some arguments."""
    values = programs.parse("adversary", *arguments)
    return program_flags.read(adversary.AdversaryFlags, values)


@pytest.mark.parametrize("eot", [None, 4])
@pytest.mark.parametrize("name", sorted(attack_registry.ATTACKS))
def test_every_attack_can_be_made_with_and_without_eot(name, eot):
    eot_flag = [] if eot is None else [f"--eot={eot}"]
    given = parse(f"--attack={name}", *eot_flag)
    (attack,) = adversary.attacks_of(given, "linf", (0.1,))
    assert type(attack) is attack_registry.ATTACKS[name]
    changes = {"norm": "linf", "epsilon": 0.1}
    if isinstance(attack, gradient_attacks.Iterative):
        changes["keep"] = "first" if eot is None else "last"
    assert attack == dataclasses.replace(type(attack)(), **changes)


SCAN = ("--epsilon=4/255,0.1", "--steps=1,2", "--num_examples=10")


def test_summary_is_printed_before_the_attack(cli):
    status, out, err = cli(*SCAN, "--overwrite")
    assert status == 0, err
    said = out.splitlines()
    heads = [line.split()[0] for line in said[:5]]
    assert heads == ["run", "images", "attack", "threat", "device"]
    assert "10 of 1000 test images" in said[1]
    assert said[2].endswith("pgd steps 1, 2 restarts 1")
    assert said[3].endswith("linf 4/255, 0.1, untargeted")


class TestRunSelection:
    """Model options on the command line select among the runs."""

    @pytest.fixture
    def runs(self, tmp_path):
        for age, (model, tag, options) in enumerate(
            [
                ("resnet", "plain", {}),
                ("resnet", "coarse", {"coarse_fixations": True}),
                ("multi_gaze", "two", {"num_transformers": 2}),
                ("multi_gaze", "shared", {"shared": True}),
            ]
        ):
            folder = tmp_path / f"digits-{model}-{tag}"
            folder.mkdir()
            config = {"model": model, "model_options": options}
            run_folder.write_json(folder / run_folder.CONFIG, config)
            (folder / "last.weights.h5").write_text("")
            os.utime(folder / "last.weights.h5", (1e9 - age, 1e9 - age))
        return tmp_path

    @pytest.mark.parametrize(
        ("line", "tag"),
        [
            ([], "plain"),
            (["--coarse_fixations=1"], "coarse"),
            (["--coarse_fixations=1", "--coarse_variant=crop"], "coarse"),
            (["--sampling=0", "--coarse_fixations=0"], "plain"),
            (["--num_transformers=2"], "two"),
            # The default is 5 transformers.
            (["--num_transformers=5", "--auxiliary=0"], "shared"),
            (["--model=multi_gaze", "--shared=0"], "two"),
        ],
    )
    def test_newest_run_with_the_given_options_is_selected(
        self, runs, line, tag
    ):
        assert self.find(runs, *line)[0].name.endswith(tag)

    def test_error_names_the_options_if_no_run_has_them(self, runs):
        with pytest.raises(FileNotFoundError) as error:
            self.find(runs, "--sampling=1", "--model=resnet")
        assert "of --model=resnet --sampling=1 under" in str(error.value)

    def test_named_run_must_have_the_given_options(self, runs):
        with pytest.raises(ValueError, match="coarse_fixations=0, not --coar"):
            self.find(runs, "--run=digits-resnet-plain", "--coarse_fixations=1")

    @staticmethod
    def find(runs, *line):
        return adversary.find_run(
            programs.parse("adversary", f"--runs_dir={runs}", *line)
        )


class TestScan:
    @pytest.fixture(autouse=True)
    def scanned(self, cli, root):
        status, self.out, self.err = cli(*SCAN)
        assert status == 0, self.err
        self.attacks = root / "cluttered_digits-multi_gaze" / "attacks"
        self.names = [
            f"pgd-linf-eps{epsilon}-{steps}steps-10images"
            for epsilon in ("4_255", "0.1")
            for steps in (1, 2)
        ]

    def test_every_combination_has_a_folder(self):
        for name in self.names:
            files = {path.name for path in (self.attacks / name).iterdir()}
            assert files == {"results.json", "adversarial.npz", "pictures.png"}
        assert not list(self.attacks.glob(".*"))  # No partial folders.

    def test_record_holds_settings_results_and_provenance(self, root, data):
        folder = self.attacks / self.names[2]
        record = run_folder.read_json(folder / "results.json")
        expected = {
            "model": MODEL,
            "dataset": "cluttered_digits",
            "split": "test",
            "attack": "pgd",
            "norm": "linf",
            "epsilon": 0.1,
            "steps": 1,
            "restarts": 1,
            "step_size": 0.1,
            "target": "none",
            "seed": 0,
            "num_examples": 10,
            "class_list": None,
            "weights": "best",
            "nonfinite_answers": 0,
            "nonfinite_crafting": 0,
        }
        assert {k: record[k] for k in expected} == expected
        weights = self.attacks.parent / "best.weights.h5"
        assert record["weights_sha256"] == run_folder.sha256(weights)
        assert record["largest_norm"] == pytest.approx(0.1, rel=1e-5)
        assert {"command", "versions", "git_hash", "started"} <= set(
            record["provenance"]
        )
        for key in ("clean_accuracy", "robust_accuracy", "attack_success",
                    "loss", "seconds", "device", "pixel_range"):  # fmt: skip
            assert key in record

    def test_record_agrees_with_the_saved_images(self, data):
        folder = self.attacks / self.names[1]
        record = run_folder.read_json(folder / "results.json")
        model, _ = checkpoints.load_run(self.attacks.parent)
        with np.load(folder / "adversarial.npz") as file:
            arrays = dict(file)
        np.testing.assert_array_equal(
            arrays["clean"], data.test.read(arrays["indices"])
        )
        predicted = model.predict(arrays["adversarial"], verbose=0).argmax(-1)
        accuracy = np.mean(predicted == data.test.labels[arrays["indices"]])
        assert accuracy == record["robust_accuracy"]

    def test_record_counts_predictions_of_each_class(self, data):
        folder = self.attacks / self.names[3]
        record = run_folder.read_json(folder / "results.json")
        with np.load(folder / "adversarial.npz", allow_pickle=False) as file:
            names = list(file["class_names"])
            labels = file["all_labels"]
            pairs = list(
                zip(labels, file["all_adversarial_predictions"], strict=True)
            )
        assert names == list(data.class_names)
        classes, confusion = record["per_class"], record["confusion"]
        assert sum(classes["num_examples"]) == len(labels)
        share = sum(classes["robust_correct"]) / len(labels)
        assert share == record["robust_accuracy"]
        share = sum(classes["clean_correct"]) / len(labels)
        assert share == record["clean_accuracy"]
        for true, row in enumerate(confusion["adversarial"]):
            for predicted, count in enumerate(row):
                assert count == pairs.count((true, predicted))
        assert confusion["columns"] == [*names, "non-finite"]

    def test_table_shows_every_record(self, root):
        record = run_folder.read_json(
            self.attacks / self.names[0] / "results.json"
        )
        # The table's success rate is on images correct before the attack.
        success = record["attack_success_on_correct"]
        (row,) = [x for x in self.out.splitlines() if x.startswith(" 1   pgd")]
        attacked = round(10 * record["clean_accuracy"])
        assert row.split()[8:11] == [
            f"{record['clean_accuracy']:.1%}",
            str(attacked),
            f"{success:.1%}",
        ]
        assert "0.01569 (4/255)" in self.out
        assert f"{record['robust_accuracy']:.1%}" in self.out
        for name in self.names:
            assert str(self.attacks / name / "results.json") in self.out
        for line in self.out.splitlines():
            assert "…" not in line

    def test_records_are_reused_without_overwrite(self, cli, root):
        path = self.attacks / self.names[0] / "results.json"
        before = path.read_bytes(), path.stat().st_mtime_ns
        status, out, _ = cli(*SCAN)
        assert status == 0 and out.count("already there") == 4
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before
        status, out, _ = cli(*SCAN, "--overwrite")
        assert status == 0 and "already there" not in out
        assert path.stat().st_mtime_ns != before[1]
        again, earlier = json.loads(path.read_text()), json.loads(before[0])
        for key in ("robust_accuracy", "loss", "largest_norm"):
            assert again[key] == earlier[key]

    def test_record_of_other_weights_is_not_reused(self, cli, root):
        path = self.attacks.parent / "best.weights.h5"
        kept = path.read_bytes()
        record = self.attacks / self.names[0] / "results.json"
        before = record.read_bytes()
        try:
            model, _ = checkpoints.load_run(self.attacks.parent)
            model.set_weights([w + 0.01 for w in model.get_weights()])
            checkpoints.save_weights(path, model)
            status, _, err = cli(*SCAN)
        finally:
            path.write_bytes(kept)
        assert status == 2 and one_line(err)
        assert "another weights_sha256" in err and "--overwrite" in err
        assert record.read_bytes() == before

    def test_full_disk_gives_one_line_and_keeps_the_old_record(
        self, cli, root, monkeypatch
    ):
        path = self.attacks / self.names[0]
        before = {p.name: p.read_bytes() for p in path.iterdir()}

        def full(file, **arrays):
            pathlib.Path(file).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

        monkeypatch.setattr(np, "savez_compressed", full)
        status, _, err = cli(*SCAN, "--overwrite")
        assert status == 2 and one_line(err) and "No space left" in err
        assert {p.name: p.read_bytes() for p in path.iterdir()} == before
        # The finished attacks are kept, so that the program can resume.
        kept = {p.name for p in self.attacks.glob(".*")}
        assert kept == {f".{self.names[0]}.partial"}

    def test_scan_writes_curves(self):
        rows = (self.attacks / "scan.csv").read_text().splitlines()
        assert len(rows) == 1 + 4
        assert (self.attacks / "scan.png").stat().st_size > 5000

    def test_record_has_confidence_interval_and_worst_case(self):
        for name in self.names:
            record = run_folder.read_json(self.attacks / name / "results.json")
            low, high = record["robust_accuracy_interval"]
            assert 0 <= low <= record["robust_accuracy"] <= high <= 1
            worst = record["worst_case"]
            assert worst["robust_accuracy"] <= record["robust_accuracy"]
            assert name in worst["attacks"]
        # The last attack has the largest radius, so all others count.
        assert set(self.names) <= set(worst["attacks"])

    def test_state_of_another_evaluation_gives_one_line(self, cli, root):
        status, _, err = cli(*SCAN)
        partial = self.attacks / ".pgd-linf-eps0.3-1steps-10images.partial"
        again = ("--epsilon=0.3", "--steps=1", "--num_examples=10")
        partial.mkdir()
        run_folder.write_json(partial / "evaluation.json", {"seed": 7})
        status, _, err = cli(*again)
        assert status == 2 and one_line(err) and "--overwrite" in err
        status, _, err = cli(*again, "--overwrite")
        assert status == 0, err
        assert not partial.exists()


class TestPictures:
    FAST = ("--steps=1", "--epsilon=0.12", "--num_examples=8")

    @pytest.fixture
    def drawn(self, monkeypatch):
        """The arguments of each grid of pictures."""
        from saccade.figures import images as figure_images

        calls = []
        grid = figure_images.attack_grid

        def remember(*args, **kwargs):
            calls.append((args, kwargs))
            return grid(*args, **kwargs)

        monkeypatch.setattr(figure_images, "attack_grid", remember)
        return calls

    def test_pictures_show_only_images_correct_before_the_attack(
        self, cli, drawn, data
    ):
        status, _, err = cli(*self.FAST, "--target=random", "--overwrite")
        assert status == 0, err
        ((clean, _, labels, before, after, names), more) = drawn[0]
        assert len(clean) and np.all(before == labels)
        robust = after == labels
        assert list(robust) == sorted(robust)  # Misclassified ones first.
        assert names == list(data.class_names)
        assert np.all(more["targets"] >= 0)
        for which in ("clean", "adversarial"):
            confidences = more[f"{which}_confidences"]
            assert np.all((0.1 <= confidences) & (confidences <= 1))
        assert "random targets" in more["title"]
        assert "1 step" in more["title"]

    def test_picture_rows_redraws_without_a_new_attack(
        self, cli, root, drawn, monkeypatch
    ):
        status, out, err = cli(*self.FAST, "--picture_rows=1", "--overwrite")
        assert status == 0, err
        monkeypatch.setattr(robust_evaluation, "evaluate", None)
        for rows, calls in ((1, 1), (2, 2), (2, 2)):
            status, out, err = cli(*self.FAST, f"--picture_rows={rows}")
            assert status == 0 and "already there" in out, err
            assert len(drawn) == calls
            assert drawn[-1][1]["max_rows"] == rows
        (folder,) = root.glob("*/attacks/pgd-linf-eps0.12-1steps-8images")
        record = run_folder.read_json(folder / "results.json")
        assert record["picture_rows"] == 2

    def test_worst_classes_are_printed(self, cli):
        status, out, err = cli(*self.FAST, "--worst_classes=3")
        assert status == 0 and "Worst 3 of " in out, err
        assert "PGD, L∞, untargeted, ε = 0.12, 1 step" in out
        status, out, err = cli(*self.FAST, "--worst_classes=0")
        assert status == 0 and "Worst" not in out, err


def one_line(err):
    return err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments,name",
    [
        (("--attack=fgsm", "--norm=l2", "--epsilon=0.5"), "fgsm-l2-eps0.5"),
        (
            ("--norm=l1", "--epsilon=5", "--steps=1", "--target=random"),
            "pgd-l1-eps5-1steps-target_random",
        ),
        (
            ("--epsilon=0.2", "--steps=1", "--restarts=2", "--target=7",
             "--random_start=0.8", "--keep=last", "--step_size=1/255",
             "--seed=3", "--weights=last"),
            "pgd-linf-eps0.2-1steps-2restarts-start0.8-last_iterate"
            "-step1_255-target_7-6images-seed3-last_weights",
        ),
    ],
)  # fmt: skip
def test_folder_name_lists_the_settings(cli, root, arguments, name):
    status, out, err = cli(*arguments, "--num_examples=6", "--save_images=2")
    assert status == 0, err
    if "6images" not in name:
        name += "-6images"
    folder = root / "cluttered_digits-multi_gaze" / "attacks" / name
    assert (folder / "results.json").exists()
    with np.load(folder / "adversarial.npz") as file:
        assert len(file["clean"]) == 2 and len(file["all_labels"]) == 6
        if "target" in name:
            assert np.all(file["targets"] != file["labels"])


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--model=multi_gase"], ["multi_gase", "Did you mean multi_gaze"]),
        (["--dataset=cifar1"], ["cifar1", "Did you mean cifar10"]),
        (["--attack=pdg"], ["--attack=pdg", "Did you mean pgd"]),
        (["--norm=linv"], ["--norm=linv", "Did you mean linf"]),
        (["--split=tests"], ["--split=tests", "Did you mean test"]),
        (["--weights=bets"], ["--weights=bets", "Did you mean best"]),
        (["--keep=lest"], ["--keep=lest", "last"]),
        (["--target=nxt"], ["--target=nxt", "Did you mean next"]),
        (["--target=10"], ["--target=10", "0 to 9"]),
        (["--epsilon=8"], ["epsilon=8", "Write 8/255"]),
        (["--epsilon=-1"], ["epsilon=-1"]),
        (["--epsilon=a,b"], ["--epsilon=a,b", "8/255"]),
        (["--steps=2.5"], ["--steps=2.5", "10,100"]),
        (["--restarts=0"], ["restarts=0"]),
        (["--attack=fgsm", "--steps=9"], ["fgsm has no --steps"]),
        (["--restarts=2", "--random_start=0"], ["random_start=0"]),
        (["--num_examples=0"], ["num_examples=0"]),
        (["--attack=pgd,squar"], ["squar", "Did you mean square"]),
        (["--protocol=s3tta"], ["s3tta", "Did you mean s3ta"]),
        (["--protocol=s3ta", "--steps=5"], ["--steps", "s3ta"]),
        (["--loss=hinge"], ["hinge", "margin"]),
        (["--step_rule=wild"], ["wild", "decayed"]),
        (["--version=best", "--attack=autoattack"], ["best", "standard"]),
        (["--queries=9"], ["pgd has no --queries"]),
        (["--examples=1,x"], ["--examples=1,x", "list of numbers"]),
        (["--examples=1,1"], ["indices", "different"]),
        (["--examples=99999"], ["99999", "test split"]),
        (["--eot=4"], ["deterministic", "--eot=4"]),
        (["--test_gazes=random"], ["test_gazes"]),
        (["--surrogate=nowhere"], ["nowhere", "Runs: "]),
        (["--craft_dtype=int8"], ["int8", "bfloat16"]),
        (["--distraction=-1"], ["distraction=-1"]),
        (["--batch_size=0"], ["batch_size >= 1"]),
        (["--save_images=-2"], ["--save_images", "-2"]),
        (["--run=nowhere"], ["nowhere", "Runs: "]),
        (["--dataset=mnist"], ["No trained run of --dataset=mnist"]),
        (["--run=cluttered_digits-multi_gaze", "--dataset=mnist"],
         ["dataset=cluttered_digits", "another dataset"]),
        (["--run=cluttered_digits-multi_gaze", "--model=resnet"],
         ["model=multi_gaze", "another model"]),
    ],
)  # fmt: skip
def test_invalid_input_gives_one_line_and_status_2(cli, root, arguments, words):
    before = sorted(root.rglob("*"))
    status, _, err = cli(*arguments)
    assert status == 2
    assert one_line(err), err
    for word in words:
        assert word in err
    assert sorted(root.rglob("*")) == before


class TestMismatchedRun:
    """A run whose files, class list or weights do not fit its data set."""

    @pytest.mark.parametrize(
        "changes,word",
        [
            ({"class_names": [f"class {i}" for i in range(10)]}, "class_names"),
            ({"class_list": {"name": "a.txt", "sha256": "0"}}, "class_list"),
            ({"image_shape": [28, 28, 1]}, "image_shape"),
        ],
    )
    def test_other_classes_or_images_are_refused(
        self, cli, data, tmp_path, changes, word
    ):
        make_run(tmp_path / "other", data, **changes)
        status, _, err = cli("--steps=1", runs_dir=tmp_path)
        assert status == 2 and one_line(err)
        assert "another data set" in err and word in err
        assert not (tmp_path / "other" / "attacks").exists()

    def test_changed_images_are_refused(self, cli, data, tmp_path):
        found = data.test.fingerprint()
        make_run(tmp_path / "same", data, test_fingerprint=found)
        status, _, err = cli("--steps=1", runs_dir=tmp_path)
        assert status == 0, err
        darker = [mean - 0.01 for mean in found["means"]]
        changed = {**found, "means": darker}
        make_run(tmp_path / "x" / "other", data, test_fingerprint=changed)
        status, _, err = cli("--steps=1", runs_dir=tmp_path / "x")
        assert status == 2 and one_line(err)
        assert "not those of the run" in err

    def test_weights_of_another_model_are_refused(self, cli, data, tmp_path):
        folder = make_run(tmp_path / "run", data)
        other = model_backbone.create(
            MODEL, num_classes=3, image_shape=data.image_shape, **OPTIONS
        )
        checkpoints.save_weights(folder / "best.weights.h5", other)
        status, _, err = cli("--steps=1", runs_dir=tmp_path)
        assert status == 2 and one_line(err)
        assert "best.weights.h5 does not fit" in err

    def test_run_without_weights_is_refused(self, cli, data, tmp_path):
        folder = make_run(tmp_path / "run", data)
        (folder / "best.weights.h5").unlink()
        status, _, err = cli("--steps=1", runs_dir=tmp_path)
        assert status == 2 and one_line(err) and "no best weights" in err

    def test_missing_validation_split_is_refused(self, cli, data, tmp_path):
        make_run(tmp_path / "run", data)
        status, _, err = cli("--split=validation", runs_dir=tmp_path)
        assert status == 2 and one_line(err)
        assert "no validation images" in err


def test_default_radii_and_batch_size_depend_on_the_images(
    cli, root, data, tmp_path
):
    for shape, norm, want in (
        ([40, 40, 1], "linf", (0.05, 0.1, 0.2)),
        ([96, 96, 3], "linf", (1 / 255, 2 / 255, 4 / 255)),
        ([96, 96, 3], "l2", (0.25, 0.5, 1.0)),
    ):
        given = parse(f"--norm={norm}")
        run = {"image_shape": shape, "class_names": list(data.class_names)}
        found = list(adversary.evaluations_of(given, run, None))
        assert tuple(e.attack.epsilon for e in found) == pytest.approx(want)
        assert all(e.attack.steps == 20 and e.name == "pgd" for e in found)
        assert found[0].batch_size == {1: 128, 3: 32}[shape[-1]]


def test_different_settings_have_different_folders():
    """Evaluations that differ in any field have different folders."""
    from saccade.attacks.gradient import PGD
    from saccade.evaluation.config import EvaluationConfig

    base = PGD(norm="l1", epsilon=0.5)
    changes = dict(
        norm="l2", epsilon=0.25, step_size=0.1, steps=3, restarts=2,
        random_start=0.5, keep="last", l1_fraction=0.2, loss="dlr",
        distraction=0.5, step_rule="decayed", momentum=0.75,
    )  # fmt: skip
    assert set(changes) == {f.name for f in dataclasses.fields(base)}
    attacks = [
        base,
        *(dataclasses.replace(base, **{k: v}) for k, v in changes.items()),
    ]
    evaluations = [EvaluationConfig(attack) for attack in attacks]
    for fields in (
        dict(target=3),
        dict(num_examples=5),
        dict(indices=(1, 2)),
        dict(seed=1),
        dict(eot=3),
        dict(read_outs="all"),
        dict(craft_dtype="bfloat16"),
    ):
        evaluations.append(EvaluationConfig(base, **fields))
    config = adversary.AdversaryConfig(pathlib.Path("run"), ())
    folders = {config.record_folder(e) for e in evaluations}
    for fields in (
        dict(split="train"),
        dict(weights="last"),
        dict(straight_through=True),
        dict(surrogate="runs/other"),
        dict(options={"test_gazes": "random"}),
    ):
        other = dataclasses.replace(config, **fields)
        folders.add(other.record_folder(evaluations[0]))
    assert len(folders) == len(evaluations) + 5


def test_request_depends_on_weights_of_run_and_surrogate(tmp_path):
    """If the surrogate is trained further, its record does not apply."""
    from saccade.attacks import gradient as gradient_attacks
    from saccade.evaluation.config import EvaluationConfig

    import adversary

    evaluation = EvaluationConfig(gradient_attacks.FGSM(epsilon=0.1))
    folders = [tmp_path / name for name in ("attacked", "surrogate")]
    config = adversary.AdversaryConfig(
        folders[0], (), surrogate=str(folders[1])
    )
    for folder in folders:
        folder.mkdir()
        with pytest.raises(FileNotFoundError, match=f"{folder.name}/best"):
            config.hashes()
        (folder / "best.weights.h5").write_bytes(b"first")
    seen = [config.request(evaluation, config.hashes())]
    for folder in folders:
        (folder / "best.weights.h5").write_bytes(b"then")
        seen.append(config.request(evaluation, config.hashes()))
    assert seen[0] != seen[1] != seen[2] != seen[0]
    alone = dataclasses.replace(config, surrogate=None)
    assert list(alone.hashes()) == ["weights_sha256"]


def test_unknown_flag_ends_the_program_with_status_2(root):
    """The program runs as a subprocess."""
    completed = subprocess.run(
        [sys.executable, "adversary.py", f"--runs_dir={root}", "--epsilom=1"],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 2
    last = completed.stderr.splitlines()[-1]
    assert last.startswith("adversary.py: ") and "epsilon" in last
    assert "Traceback" not in completed.stderr


def test_softmax_model_is_refused(cli, root, monkeypatch):
    import keras

    load_run = checkpoints.load_run

    def with_softmax(*args, **kwargs):
        model, run = load_run(*args, **kwargs)
        return keras.Sequential([model, keras.layers.Softmax()]), run

    monkeypatch.setattr(checkpoints, "load_run", with_softmax)
    status, _, err = cli("--steps=1", "--epsilon=0.25", "--num_examples=4")
    assert status == 2 and one_line(err) and "Remove the softmax" in err


def test_stochastic_run_requires_eot(cli, data, tmp_path, monkeypatch):
    options = {
        "sampling": True,
        "backbone": "simple_cnn",
        "width": 4,
        "test_gazes": "random",
    }
    model = model_backbone.create(
        "resnet", num_classes=10, image_shape=data.image_shape, **options
    )
    folder = make_run(
        tmp_path / "run", data, model="resnet", model_options=options
    )
    checkpoints.save_weights(folder / "best.weights.h5", model)
    fast = ("--steps=1", "--epsilon=0.1", "--num_examples=4")
    status, _, err = cli(*fast, runs_dir=tmp_path)
    assert status == 2 and one_line(err) and "--eot=20" in err
    for draws in (1, 2):
        status, out, err = cli(*fast, f"--eot={draws}", runs_dir=tmp_path)
        assert status == 0, err
        assert f"eot{draws}" in out
    # With five fixed gazes the same weights give a deterministic model.
    status, out, err = cli(*fast, "--test_gazes=five", runs_dir=tmp_path)
    assert status == 0 and "test_gazes_five" in out, err


@pytest.mark.parametrize(
    "flag,word",
    [
        ("--distraction=1 --num_examples=4", "distraction1"),
        ("--straight_through --num_examples=4", "straight_through"),
        ("--craft_dtype=bfloat16 --num_examples=4", "bfloat16"),
        (
            "--surrogate=cluttered_digits-multi_gaze --num_examples=4",
            "from_cluttered",
        ),
        ("--examples=3,5", "list_of_2"),
    ],
)
def test_special_settings_appear_in_the_folder_name(cli, flag, word):
    status, out, err = cli("--steps=2", "--epsilon=0.15", *flag.split())
    assert status == 0, err
    assert word in out


def test_protocol_prints_and_writes_its_table(cli, root):
    status, out, err = cli(
        "--protocol=perceptual", "--epsilon=0.01,0.02", "--num_examples=4"
    )
    assert status == 0, err
    folder = root / "cluttered_digits-multi_gaze" / "attacks"
    for ending in ("csv", "png", "md", "table.csv"):
        assert (folder / f"perceptual.{ending}").exists()
    assert "multi_gaze" in out


def test_failed_check_gives_status_1_and_is_named(cli, root, monkeypatch):
    from saccade.evaluation import checklist

    monkeypatch.setattr(
        checklist,
        "run",
        lambda *a, **k: [
            checklist.Check("logits", True, "fine", "none"),
            checklist.Check("black_box", False, "Square wins", "attack more"),
        ],
    )
    status, out, _ = cli("--checklist", "--epsilon=0.1")
    assert status == 1
    assert "FAIL  black_box" in out and "attack more" in out
    path = root / "cluttered_digits-multi_gaze" / "attacks" / "checklist.json"
    assert len(run_folder.read_json(path)["checks"]) == 2
