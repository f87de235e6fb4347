"""The handover's command lines, and what they are in our flags."""

import math
import os
import pathlib
import shlex
import subprocess
import sys

import programs
import pytest
from test_adversary import parse
from test_trainer import tiny

from saccade.cli import legacy
from saccade.core import run_folder

import model_backbone
import trainer

ROOT = pathlib.Path(__file__).parents[2]
adversary, _ = programs.load("adversary")
PROGRAMS = {
    "trainer": legacy.of_trainer,
    "adversary": legacy.of_adversary,
}
# By program: an old line, and the same in our flags.
BOTH = [
    ("--name=first", "--tag=first"),
    ("--name=0", "--tag=0"),
    ("--name=None", ""),
    ("--upsample_fixations=1", "--coarse_variant=upsample"),
    ("--blur_fixations=1", "--coarse_variant=blur"),
    ("--cifar_ecnn=1", "--model=ecnn"),
    ("--model=resnet_cifar --cifar_ecnn=1", "--model=ecnn"),
    ("--cifar_ecnn=1 --model ecnn --seed=1", "--model=ecnn --seed=1"),
    ("--cifar_feedback=1", "--feedback=1"),
    ("--model=resnet_cifar --cifar_wider=1", "--width=32 --model=resnet_cifar"),
    ("--cifar_wider=1 --model=ecnn", "--width=43 --model=ecnn"),
    ("--cifar_wider=1 --cifar_ecnn=1", "--model=ecnn --width=43"),
    (
        "--cifar_wider --model=resnet_cifar --cifar_ecnn",
        "--model=ecnn --width=43",
    ),
    ("--mnist_attention=1", "--attention=transformer"),
    ("--mnist_dummy_attention=1", "--attention=dummy"),
    ("--mnist_dummy_scaled_attention=1", "--attention=dummy_scaled"),
    ("--mnist_retinal_attention=1", "--attention=retina"),
    (
        "--mnist_restricted_attention=1 --mnist_attention=1",
        "--attention=transformer --restricted_attention=1",
    ),
    ("--pooling=None", ""),
    ("--pooling=avg", "--pooling=mean"),
    ("--pooling=max", "--pooling=max"),
    ("--pooling=mean", "--pooling=mean"),
    ("--pooling concat", "--pooling=concat"),
    ("--dropout=0", ""),
    ("--dropout=1", "--dropout=0.75"),
    ("--dropout=0.3", "--dropout=0.3"),
    ("--dropout=0.0", "--dropout=0.0"),
]
TRAINER = [
    ("--only_evaluate=1", "--only_evaluate=1"),
    ("--only_evaluate 1", "--only_evaluate=1"),
    ("--only_evaluate=0", ""),
]
ADVERSARY = [
    ("--random_gaze=1", "--test_gazes=random"),
    ("--evaluate_mode=robustness", ""),
    ("--evaluate_mode=nonrobust_features", "--nonrobust_features=1"),
    ("--attack_algo=PGD", "--attack=bim"),
    ("--attack_algo=PGD_ADAM", "--attack=pgd_adam"),
    ("--attack_algo=FGSM", "--attack=fgsm"),
    ("--attack_iterations=20", "--steps=20"),
    ("--attack_distance_metric=LINF", "--norm=linf"),
    ("--attack_distance_metric=L2", "--norm=l2"),
    ("--attack_distance_metric=L1", "--norm=l1"),
    ("--attack_criteria_targeted=1", "--target=random"),
    (
        "--attack_criteria_det=1 --attack_criteria_targeted=1",
        "--target=next",
    ),
    (
        "--attack_criteria_targeted=1 --attack_criteria_det=0",
        "--target=random",
    ),
    ("--attack_random_init=1", "--random_start=1"),
    ("--attack_step_size=0.1", "--attack_step_size=0.1"),
]
CASES = [
    *((p, old, new) for p in PROGRAMS for old, new in BOTH),
    *(("trainer", old, new) for old, new in TRAINER),
    *(("adversary", old, new) for old, new in ADVERSARY),
]


def translate(program, line):
    return PROGRAMS[program](shlex.split(line))


@pytest.mark.parametrize("program,old,new", CASES)
def test_an_old_flag_is_one_of_ours(program, old, new):
    found = translate(program, old)
    assert found == new.split()
    # Which the program has, and takes.
    programs.parse(program, *found)


def test_every_old_flag_is_tried():
    for table, cases in (
        (legacy._TRAINER, BOTH + TRAINER),
        (legacy._ADVERSARY, BOTH + ADVERSARY),
    ):
        tried = " ".join(old for old, _ in cases)
        refused = set(legacy._REFUSED)
        assert {n for n in table if f"--{n}" not in tried} <= refused


@pytest.mark.parametrize(
    "program,name",
    [
        *((p, n) for p in PROGRAMS for n, row in legacy._BOTH.items()
          if legacy._ANY not in row or n == "dropout"),
        ("trainer", "only_evaluate"),
        *(("adversary", n) for n in (
            "random_gaze", "attack_criteria_targeted", "attack_criteria_det",
            "attack_random_init", "staggered_build", "staggered_build_code",
            "build_orthogonal_features", "subsample_dataset")),
    ],
)  # fmt: skip
def test_what_is_off_is_dropped(program, name):
    for off in ("0", "None"):
        assert translate(program, f"--{name}={off} --seed=1") == ["--seed=1"]
        assert translate(program, f"--{name} {off} --seed=1") == ["--seed=1"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--augment=1 --sampling 0 --seed",
        "--names=x --attack=pgd -name=x name",
        "--seed=1 -- --name=x",
        "--epsilon -1 --tag=a=b",
    ],
)
def test_everything_else_is_left_as_it_is(line):
    for program in PROGRAMS:
        assert translate(program, line) == line.split()


def test_a_flag_of_one_program_means_nothing_to_the_other():
    assert translate("trainer", "--random_gaze=1") == ["--random_gaze=1"]
    assert translate("adversary", "--only_evaluate 1") == [
        *("--only_evaluate", "1")
    ]


def test_the_last_of_several_counts():
    line = "--attack_algo=FGSM --cifar_feedback=1 --attack_algo=PGD"
    assert translate("adversary", line) == ["--feedback=1", "--attack=bim"]


def test_a_blank_in_a_value_stays():
    assert translate("trainer", "--name 'a b' --seed 1") == [
        *("--tag=a b", "--seed", "1")
    ]


REFUSED = [
    (p, line, message)
    for p in PROGRAMS
    for line, message in [
        (
            "--upsample_fixations=1 --blur_fixations=1",
            "--blur_fixations is --coarse_variant=blur here, which contradicts"
            " --upsample_fixations. Leave",
        ),
        (
            "--mnist_attention=1 --mnist_retinal_attention=1",
            "--mnist_retinal_attention is --attention=retina here, which "
            "contradicts --mnist_attention. Leave",
        ),
        (
            "--mnist_dummy_attention=1 --attention=retina",
            "which contradicts --attention=retina",
        ),
        ("--name=a --tag=b", "--name is --tag=a here, which contradicts"),
        (
            "--cifar_ecnn=1 --model=resnet",
            "--cifar_ecnn goes with --model=resnet_cifar or --model=ecnn. "
            "Received: --model=resnet.",
        ),
        (
            "--cifar_wider=1 --model=multi_gaze",
            "--cifar_wider goes with --model=resnet_cifar or --model=ecnn. "
            "Received: --model=multi_gaze.",
        ),
        ("--cifar_wider=1", "Received: no --model."),
        (
            "--cifar_wider=2",
            "Expected --cifar_wider to be one of 0, None, 1. Received: "
            "--cifar_wider=2.",
        ),
        (
            "--pooling=men",
            "one of 0, None, avg, max, mean, concat. Received: --pooling=men.",
        ),
        ("--name --seed=1", "--name needs a value"),
        ("--dropout", "--dropout needs a value"),
    ]
] + [
    ("adversary", line, message)
    for line, message in [
        (
            "--attack_algo=BIM",
            "Expected --attack_algo to be one of PGD, PGD_ADAM, FGSM. "
            "Received: --attack_algo=BIM.",
        ),
        ("--attack_distance_metric=linf", "to be one of LINF, L2, L1."),
        ("--evaluate_mode=all", "to be one of robustness, nonrobust_features."),
        ("--attack_algo", "--attack_algo needs a value"),
        (
            "--attack_criteria_det=1 --attack_criteria_targeted=0",
            "--attack_criteria_det has no effect without "
            "--attack_criteria_targeted=1",
        ),
        (
            "--attack_criteria_targeted=1 --target=3",
            "--attack_criteria_targeted is --target=random here, which "
            "contradicts --target=3",
        ),
        ("--staggered_build=1", "--staggered_build is not taken: an eval"),
        ("--staggered_build", "--staggered_build is not taken: an eval"),
        ("--staggered_build_code=ab", "goes on by itself"),
        ("--build_orthogonal_features=1", "--nonrobust_features builds"),
        ("--subsample_dataset=1", "--num_examples=N, or --examples"),
    ]
]


@pytest.mark.parametrize("program,line,message", REFUSED)
def test_what_is_refused_is_said_by_name(program, line, message):
    with pytest.raises(ValueError) as error:
        translate(program, line)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def call(program, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / f"{program}.py", *arguments],
        env={**os.environ},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "program,line,message",
    [
        ("trainer", "--pooling=sum", "Expected --pooling to be one of "),
        # Taken, or they would be said to be unknown.
        ("trainer", "--name=x --mnist_attention --dataset=imagenet10",
         "the files of imagenet10"),
        ("adversary", "--name x --random_gaze 1 --sede=1", "flag 'sede'"),
    ],
)  # fmt: skip
def test_the_programs_end_with_one_line_and_status_2(
    program, line, message, tmp_path
):
    done = call(program, *line.split(), f"--runs_dir={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr and not done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{program}.py: ")
    assert not list(tmp_path.iterdir())


# --- What the new flags do ---------------------------------------------------


class TestAttackStepSize:
    """The step at a radius of 0.3, and at others in proportion."""

    @staticmethod
    def attacks(line, radii=(0.03, 0.3, 8 / 255)):
        given = parse(*translate("adversary", line))
        return list(adversary.attacks_of(given, "linf", radii))

    @pytest.mark.parametrize("algo", ["PGD", "PGD --steps=3,7"])
    def test_each_radius_of_a_scan_has_its_own(self, algo):
        found = self.attacks(f"--attack_algo={algo} --attack_step_size=0.05")
        assert {a.name for a in found} == {"bim"}
        assert len({a.epsilon for a in found}) == 3
        for attack in found:
            want = attack.epsilon / 0.3 * 0.05
            assert math.isclose(attack.step_length, want)

    def test_the_basic_iterative_methods_own_is_the_same_attack(self):
        line = "--attack_algo=PGD --attack_iterations=5"
        plain = self.attacks(line)
        assert self.attacks(f"{line} --attack_step_size=0.1") == plain
        other = self.attacks(f"{line} --attack_step_size=0.2")
        for one, two in zip(plain, other, strict=True):
            assert one != two
            assert math.isclose(2 * one.step_length, two.step_length)

    def test_attacks_without_a_step_keep_out_of_it(self):
        found = self.attacks("--attack=fgsm,mim --attack_step_size=0.3", (0.1,))
        assert [a.name for a in found] == ["fgsm", "mim"]
        assert math.isclose(found[1].step_length, 0.1)
        with pytest.raises(ValueError, match="fgsm has no --attack_step_size"):
            self.attacks("--attack_algo=FGSM --attack_step_size=0.3")

    @pytest.mark.parametrize(
        "other", ["step_size=0.1", "protocol=s3ta", "nonrobust_features=1"]
    )
    def test_two_that_say_how_long_a_step_is_are_refused(self, other):
        given = parse("--attack_step_size=0.1", f"--{other}")
        name = other.partition("=")[0]
        with pytest.raises(ValueError, match=f"size with --{name}, .*size=0.1"):
            adversary.check_step_size(given)

    @pytest.mark.parametrize(
        "line,lengths",
        [
            ("--attack_step_size=0.1", (0.01, 0.1, 8 / 765)),
            ("--step_size=0.1", (0.1, 0.1, 0.1)),
        ],
    )
    def test_one_alone_sets_the_step_size(self, line, lengths):
        found = self.attacks(line)
        assert [a.step_length for a in found] == pytest.approx(lengths)


class TestTag:
    """Of several runs adversary.py attacks the one of that name."""

    @pytest.fixture
    def runs(self, tmp_path):
        for age, tag in enumerate(("new", "old", "")):
            folder = run_folder.folder(tmp_path, "digits", "resnet", tag)
            folder.mkdir()
            config = {"model": "resnet", "dataset": "digits", "tag": tag}
            run_folder.write_json(folder / run_folder.CONFIG, config)
            weights = folder / "last.weights.h5"
            weights.write_text("")
            os.utime(weights, (1e9 - age, 1e9 - age))
        return tmp_path

    @pytest.mark.parametrize(
        "line,want",
        [
            ("", "digits-resnet-new"),
            ("--name=old", "digits-resnet-old"),
            ("--name=old --model=resnet", "digits-resnet-old"),
            ("--tag=", "digits-resnet"),
        ],
    )
    def test_chooses_the_run(self, runs, line, want):
        found = translate("adversary", line)
        values = programs.parse("adversary", f"--runs_dir={runs}", *found)
        assert adversary.find_run(values)[0].name == want

    def test_none_of_that_name_is_said(self, runs):
        values = programs.parse(
            "adversary", f"--runs_dir={runs}", "--tag=x", "--num_steps=2"
        )
        with pytest.raises(FileNotFoundError, match="of --tag=x --num_steps=2"):
            adversary.find_run(values)

    def test_a_run_that_is_named_has_to_have_it(self, runs):
        old = "--run=digits-resnet-old"
        values = programs.parse(
            "adversary", f"--runs_dir={runs}", old, "--tag=new"
        )
        with pytest.raises(ValueError, match="tag=old, not --tag=new"):
            adversary.find_run(values)


class TestOnlyEvaluate:
    """A finished run is tested again, and nothing is written."""

    @pytest.fixture
    def train(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(trainer.datasets, "load", lambda *a, **k: tiny())

        def call(line):
            size = "--model=madry_cnn --width=2 --epochs=1 --batch_size=8"
            words = translate("trainer", f"{size} --name=x {line}")
            values = programs.parse("trainer", f"--runs_dir={tmp_path}", *words)
            return programs.outcome(trainer.main, capsys, values)

        return call

    def test_says_what_training_said(self, train, tmp_path):
        def content():
            return {
                path: path.read_bytes()
                for path in tmp_path.rglob("*")
                if path.is_file()
            }

        status, trained, _ = train("")
        assert status == 0
        before = content()
        status, out, err = train("--only_evaluate=1")
        assert status == 0, err
        said = out.splitlines()
        assert said == trained.splitlines()[-len(said) :]
        first, second, run = said[0], said[1], said[-1]
        assert first.startswith("last weights: ")
        assert second.startswith("best weights (epoch 1): ")
        assert "of 10 test images" in first and run.endswith("madry_cnn-x/")
        assert content() == before
        # It is counted, not read in the record.
        folder = tmp_path / "cluttered_digits-madry_cnn-x"
        path = folder / "results.json"
        record = run_folder.read_json(path)
        for weights in ("last", "best"):
            record[weights]["accuracy"] = 0.123
        run_folder.write_json(path, record)
        assert train("--only_evaluate=1")[1] == out
        self.check_refusals(train, folder)

    @staticmethod
    def check_refusals(train, folder):
        def refused(line, message):
            status, out, err = train(f"--only_evaluate=1 {line}")
            assert status == 2 and not out
            assert err.count("\n") == 1 and message in err

        refused("--name=y", "There is no run in")
        refused("--width=3", "was made with width=2, not 3")
        run = run_folder.read_json(folder / run_folder.CONFIG)
        names = {**run, "class_names": ["a", "b", "d"]}
        run_folder.write_json(folder / run_folder.CONFIG, names)
        refused("", "was trained on, whose class_names is")
        run_folder.write_json(folder / run_folder.CONFIG, run)
        (folder / "results.json").unlink()
        refused("", "has not finished; continue it with --resume")


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, math.nan])
def test_a_rate_that_leaves_nothing_is_refused(rate):
    with pytest.raises(ValueError, match=r"dropout in \[0, 1\).*dropout="):
        model_backbone.create(
            "madry_cnn",
            num_classes=3,
            image_shape=(8, 8, 1),
            width=1,
            dropout=rate,
        )
