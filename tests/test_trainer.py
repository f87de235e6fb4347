"""The training program: flags to a config, and a config to a run."""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys

import keras
import numpy as np
import programs
import pytest

from saccade.attacks import gradient as gradient_attacks
from saccade.cli import command_line
from saccade.core import settings as core_settings
from saccade.data import splits as image_splits
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import evaluate as robust_evaluation
from saccade.models import options as model_options
from saccade.training import checkpoints, engines, objectives, recipes, settings

import datasets
import model_backbone
import trainer

ROOT = pathlib.Path(trainer.__file__).parent
MODEL_OPTIONS = model_options.OPTIONS
ADVERSARIAL = core_settings.of(settings.AdversarialSettings)
STEP = core_settings.of(settings.StepSettings)
HANDOVER = [
    "--model=parallel_transformers --dataset=imagenet10 --sampling=0 "
    "--coarse_fixations=0 --augment=1 --auxiliary=0 --restricted_attention=1 "
    "--shared=0 --epochs=400 --num_transformers=5",
    "--model=multi_gaze --dataset=imagenet10 --sampling=0 "
    "--coarse_fixations=0 --augment=1 --auxiliary=0 --shared=0 --epochs=400 "
    "--num_transformers=5",
]


def parse(line):
    values = programs.parse("trainer", *shlex.split(line))
    return trainer.config_from_flags(values)


def tiny(size=12, classes=3):
    rng = np.random.default_rng(0)

    def split(name, count):
        labels = (np.arange(count) % classes).astype("int32")
        images = rng.random((count, size, size, 1)).astype("float32") / 2
        images += labels[:, None, None, None] / 6
        return image_splits.Split(name, labels, lambda i: images[i])

    return image_splits.Dataset(
        name="cluttered_digits",
        class_names=tuple("abc"[:classes]),
        image_shape=(size, size, 1),
        train=split("train", 24),
        validation=split("validation", 9),
        test=split("test", 10),
    )


def config(tmp_path, line=""):
    return parse(
        f"--runs_dir={tmp_path} --width=2 --localization_width=2 "
        f"--num_transformers=2 --epochs=2 --batch_size=8 {line}"
    )


def adversarial(tmp_path, line=""):
    return parse(
        f"--runs_dir={tmp_path} --model=madry_cnn --width=2 --dropout=0.2 "
        f"--epochs=2 --batch_size=8 --adv_train=1 --adv_steps=2 {line}"
    )


def history(folder):
    """The rows of a run's `history.csv`."""
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


class TestFlags:
    def test_defaults_are_multi_gaze_on_cluttered_digits(self):
        found = parse("")
        assert (found.model, found.dataset) == (
            "multi_gaze",
            "cluttered_digits",
        )
        assert found.recipe == recipes.RECIPES["cluttered_digits"]
        assert found.model_options == {}

    @pytest.mark.parametrize("line", HANDOVER)
    def test_command_lines_of_the_handover_are_accepted(self, line):
        found = parse(line + " --data_dir=somewhere")
        assert found.recipe == recipes.RECIPES["imagenet10"]
        assert found.recipe.epochs == 400 and found.recipe.batch_size == 32
        assert found.recipe.augmentation == "photographs"
        options = found.model_options
        assert options["num_transformers"] == 5 and options["shared"] is False
        assert set(options) <= set(model_backbone.entry(found.model).options)

    @pytest.mark.parametrize(
        "line,field,want",
        [
            ("--epochs=7", "epochs", 7),
            ("--batch_size=9", "batch_size", 9),
            ("--optimizer=sgd", "optimizer", "sgd"),
            ("--learning_rate=0.5", "learning_rate", 0.5),
            ("--schedule=constant", "schedule", "constant"),
            ("--warmup=2", "warmup", 2.0),
            ("--momentum=0.5", "momentum", 0.5),
            ("--weight_decay=0.1", "weight_decay", 0.1),
            ("--l2=0.1", "l2", 0.1),
            ("--ema=0.9", "ema", 0.9),
            ("--label_smoothing=0.2", "label_smoothing", 0.2),
            ("--schedule=cyclic", "schedule", "cyclic"),
            ("--read_out_curriculum=0:2,9:4", "read_outs", ((0, 2), (9, 4))),
            ("--augmentation=digits", "augmentation", "digits"),
            ("--augment=0", "augmentation", "none"),
        ],
    )
    def test_recipe_settings_can_be_overridden(self, line, field, want):
        assert getattr(parse(line).recipe, field) == want

    @pytest.mark.parametrize("name", sorted(MODEL_OPTIONS))
    def test_every_model_option_flag_is_an_option_of_some_model(self, name):
        known = {
            option
            for model in model_backbone.names()
            for option in model_backbone.entry(model).options
        }
        assert name in known

    def test_every_option_of_every_model_has_a_flag(self):
        for model in model_backbone.names():
            options = model_backbone.entry(model).options
            assert set(options) <= set(MODEL_OPTIONS)

    @pytest.mark.parametrize(
        "line,match",
        [
            ("--model=multigaze", "Did you mean multi_gaze"),
            ("--dataset=imagnet10", "imagenet10"),
            ("--optimizer=adm", "optimizer='adm'. Did you mean adam"),
            ("--learning_rate=-1", r"learning_rate in \(0, inf\)"),
            ("--adv_train=1 --adv_attack=pdg", "fgsm, pgd, bim, mim, pgd_adam"),
            ("--adv_objective=trads", "madry, fast, trades, mart, alp, llr"),
            ("--adv_objective=noise --adv_epsilon=0.1", "of noise: sigma"),
            ("--adv_objective=trades --adv_epsilon=0", "Expected epsilon > 0"),
            ("--adv_train=1 --adv_norm=l2", "an epsilon with the norm l2"),
            ("--adv_train=1 --adv_epsilon=eps", "a ratio like 8/255"),
            ("--adv_train=1 --adv_clean_weight=1", "clean_weight=1"),
            ("--recipe=s3at", "--recipe=s3at. Did you mean s3ta"),
            ("--read_out_curriculum=4", "pairs of an epoch and a step"),
            ("--ema=1", r"ema in \[0, 1\).*ema=1"),
            (
                "--adv_train=1 --adv_replays=4 --adv_steps=7",
                "no settings of the attack with --adv_replays.*--adv_steps=7",
            ),
            (
                "--adv_train=1 --adv_replays=4 --adv_loss=margin",
                "no settings of the attack with.*--adv_loss=margin",
            ),
            (
                "--adv_objective=fast --adv_replays=4",
                "replace the one step of fast",
            ),
            (
                "--adv_objective=fast --robust_validation=0",
                "detects when the model overfits.*--robust_validation=0",
            ),
        ],
    )
    def test_bad_values_raise(self, line, match):
        with pytest.raises(ValueError, match=match):
            parse(line)

    @pytest.mark.parametrize("dataset", datasets.names())
    def test_adversarial_training_has_defaults_by_data_set(self, dataset):
        line = f"--dataset={dataset} --data_dir=somewhere"
        assert parse(line).adversarial is None
        found = parse(f"{line} --adv_train=1")
        assert found.adversarial == objectives.CONFIGS[dataset]
        assert found.recipe == recipes.ADVERSARIAL_RECIPES[dataset]

    def test_adversarial_training_on_cifar_has_the_settings_of_the_handover(
        self,
    ):
        found = parse("--dataset=cifar10 --adv_train=1")
        assert found.recipe == recipes.Recipe(
            optimizer="sgd",
            learning_rate=0.1,
            momentum=0.9,
            batch_size=64,
            epochs=165,
            drops=((85, 0.1), (125, 0.01)),
            augmentation="small_photographs",
        )
        attack = found.adversarial.build(10).attack
        assert attack.norm == "linf" and attack.random_start == 1
        assert (attack.epsilon, attack.steps) == (8 / 255, 5)
        assert attack.step_length == pytest.approx(8 / 255 / 3)

    def test_every_setting_of_adversarial_training_has_a_flag(self):
        fields = dataclasses.fields(objectives.AdversarialConfig)
        assert set(ADVERSARIAL) == {field.name for field in fields}
        found = parse(
            "--adv_objective=alp --adv_attack=pgd --adv_norm=l2 "
            "--adv_epsilon=1/2 --adv_epsilon_per_image=1 --adv_steps=3 "
            "--adv_step_size=1/8 --adv_step_rule=decayed --adv_momentum=0.5 "
            "--adv_l1_fraction=0.1 --adv_random_start=0.8 "
            "--adv_target=random --adv_loss=margin --adv_train_mode=1 "
            "--adv_clean_weight=0.4 --adv_weight=0.3"
        )
        assert found.adversarial == objectives.AdversarialConfig(
            objective="alp",
            attack="pgd",
            norm="l2",
            epsilon=0.5,
            epsilon_per_image=True,
            steps=3,
            step_size=0.125,
            step_rule="decayed",
            momentum=0.5,
            l1_fraction=0.1,
            random_start=0.8,
            target="random",
            loss="margin",
            train_mode=True,
            clean_weight=0.4,
            weight=0.3,
        )

    def test_slope_weight_is_for_llr_and_sigma_for_noise(self):
        found = parse("--adv_objective=llr --adv_slope_weight=2")
        found = found.adversarial
        assert (found.weight, found.slope_weight) == (4.0, 2.0)
        found = parse("--adv_objective=noise --adv_sigma=16/255").adversarial
        assert found.sigma == 16 / 255 and found.epsilon is None

    @pytest.mark.parametrize("name", objectives.OBJECTIVES)
    def test_adv_objective_implies_adversarial_training(self, name):
        """The radius is that of the data set; noise uses it as sigma."""
        found = parse(f"--dataset=mnist --data_dir=x --adv_objective={name}")
        assert found.adversarial.objective == name
        radius = found.adversarial.epsilon or found.adversarial.sigma
        assert radius == objectives.CONFIGS["mnist"].epsilon
        assert found.recipe == recipes.ADVERSARIAL_RECIPES["mnist"]

    @pytest.mark.parametrize("name", ["trades", "llr", "noise"])
    def test_training_with_each_objective(self, name, tmp_path):
        """Label smoothing of the recipe is passed to the objective."""
        size = "" if name == "noise" else "--adv_steps=1"
        chosen = parse(
            f"--runs_dir={tmp_path} --model=madry_cnn --width=2 --epochs=1 "
            f"--batch_size=8 --adv_objective={name} {size} "
            "--label_smoothing=0.1 --robust_validation=4"
        )
        objective = trainer.objective_of(chosen, tiny())
        assert type(objective) is objectives.OBJECTIVES[name]
        assert objective.label_smoothing == 0.1
        record = trainer.run(chosen, tiny())
        assert record["best_validation_robust_accuracy"] is not None

    def test_prints_a_summary_before_training(self, tmp_path, capsys):
        """Warnings included: the drops of the rate are too close together."""
        chosen = adversarial(
            tmp_path, "--schedule=steps --adv_epsilon_warmup=2"
        )
        recipe = dataclasses.replace(chosen.recipe, drops=((0.8, 0.1),))
        trainer.run(dataclasses.replace(chosen, recipe=recipe), tiny())
        output = capsys.readouterr().out.splitlines()
        heads = [line.split()[0] for line in output]
        assert heads[:8] == (
            "run data images model objective recipe device memory".split()
        )
        assert heads[8:10] == ["warning", "warning"]
        assert "less than one epoch apart" in output[8]
        assert "the radius never reaches epsilon" in output[9]
        assert heads[10] == "epoch"

    def test_local_linearity_is_not_rematerialized_on_tensorflow(self):
        """TensorFlow's own error comes late and is hard to understand."""
        line = "--model=s3ta --vision=simple_cnn --remat=1 --adv_objective=llr"
        chosen = parse(line)
        if keras.config.backend() == "tensorflow":
            with pytest.raises(ValueError, match="remat=True.*jax or torch"):
                trainer.objective_of(chosen, tiny())
        else:
            assert trainer.objective_of(chosen, tiny()).weight == 4.0

    @pytest.mark.parametrize("name", sorted(ADVERSARIAL))
    def test_adversarial_flags_need_adv_train(self, name):
        with pytest.raises(ValueError, match=f"adv_{name}=1.*add --adv_train"):
            parse(f"--adv_train=0 --adv_{name}=1")

    @pytest.mark.parametrize("name", sorted(STEP))
    def test_flags_of_the_step_need_adv_train(self, name):
        value = {"craft_dtype": "bfloat16"}.get(name, 1)
        with pytest.raises(ValueError, match=f"adv_{name}=.*add --adv_train"):
            parse(f"--adv_{name}={value}")
        also = {"awp_warmup": "--adv_awp=1"}.get(name, "")
        found = parse(f"--adv_train=1 --adv_{name}={value} {also}").step
        assert getattr(found, name) == value

    @pytest.mark.parametrize("name", recipes.NAMED)
    def test_named_recipe_includes_its_attack(self, name):
        line = f"--recipe={name} --dataset=cifar10"
        found = parse(line)
        assert found.recipe == recipes.NAMED[name]
        assert found.adversarial == recipes.ADVERSARIAL[name]
        assert found.recipe_name == name and found.robust_validation == 500
        clean = parse(f"{line} --adv_train=0")
        assert clean.adversarial is None
        assert clean.recipe == found.recipe and not clean.robust_validation

    def test_named_recipe_can_be_overridden(self):
        found = parse("--recipe=s3ta --batch_size=256 --adv_steps=30")
        assert found.recipe.learning_rate == 0.05
        assert found.adversarial.steps == 30
        assert found.adversarial.step_size == 1 / 255
        found = parse("--recipe=at_cifar10 --adv_epsilon=1/255")
        assert found.adversarial.step_size == pytest.approx(2 / 255 / 8)

    def test_s3ta_on_imagenet_uses_the_recipe_of_its_paper(self):
        line = "--model=s3ta --dataset=imagenet --data_dir=somewhere"
        assert parse(line).recipe_name == "s3ta_16"
        assert parse(f"{line} --num_steps=4").recipe_name == "s3ta"
        assert parse(f"{line} --recipe=advex").recipe_name == "advex"

    @pytest.mark.parametrize(
        "line,side,resize",
        [
            ("--model=s3ta --dataset=imagenet", 224, "central_crop"),
            (
                "--model=s3ta --dataset=imagenet --image_size=128",
                *(128, "central_crop"),
            ),
            (
                "--model=resnet152 --dataset=imagenet --recipe=s3ta "
                "--resize=short_side",
                *(224, "short_side"),
            ),
            ("--model=resnet --dataset=imagenet", None, None),
            ("--model=s3ta --recipe=s3ta --dataset=cifar10", None, None),
        ],
    )
    def test_recipes_of_papers_set_the_images(self, line, side, resize):
        """From 224 pixels S3TA computes a map of 28x28."""
        found = parse(f"{line} --data_dir=somewhere")
        assert (found.image_size, found.resize) == (side, resize)

    @pytest.mark.parametrize(
        "line,want",
        [
            ("--adv_train=1", "stop"),
            ("--adv_objective=fast", "restore"),
            ("--adv_objective=fast --on_collapse=stop", "stop"),
        ],
    )
    def test_fast_training_restores_by_default(self, line, want):
        assert parse(line).on_collapse == want

    def test_replays_divide_the_epochs(self):
        line = "--dataset=cifar10 --adv_train=1 --adv_replays=5"
        found = parse(line).recipe
        assert (found.epochs, found.drops[0]) == (33, (17, 0.1))
        found = parse("--recipe=at_svhn --adv_replays=4 --adv_epsilon_warmup=2")
        assert found.recipe.epochs == 3  # 9 passes, rounded up.
        assert found.step.epsilon_warmup == 0.5


class TestRun:
    def test_writes_all_files_of_a_run(self, tmp_path):
        chosen = config(tmp_path, "--tag=x --seed=5")
        record = trainer.run(chosen, tiny())
        folder = tmp_path / "cluttered_digits-multi_gaze-x"
        assert {path.name for path in folder.iterdir()} >= {
            "config.json",
            "best.weights.h5",
            "last.weights.h5",
            "history.csv",
            "state.npz",
            "model.keras",
            "results.json",
            "logs",
        }
        written = json.loads((folder / "config.json").read_text())
        assert written["seed"] == 5 and written["class_names"] == list("abc")
        assert written["recipe"]["epochs"] == 2
        assert written["provenance"]["versions"]["keras"]
        assert json.loads((folder / "results.json").read_text()) == record
        assert record["best"]["num_examples"] == 10
        for weights in ("last", "best"):
            classes = record[weights]["per_class"]
            share = sum(classes["clean_correct"]) / 10
            assert share == record[weights]["accuracy"]
            assert sum(classes["num_examples"]) == 10
            counts = record[weights]["confusion"]["clean"]
            assert np.sum(counts) == 10
            correct = np.diagonal(counts).tolist()
            assert correct == classes["clean_correct"]
        # Compared with the accuracy of the rebuilt model.
        model, _ = checkpoints.load_run(folder)
        data = tiny().test
        logits = model.predict(data.read(np.arange(10)), verbose=0)
        want = np.mean(logits.argmax(-1) == data.labels)
        assert record["best"]["accuracy"] == pytest.approx(want)

    def test_training_is_reproducible_and_depends_on_the_seed(self, tmp_path):
        def weights(line):
            chosen = config(tmp_path, line)
            trainer.run(chosen, tiny())
            model, _ = checkpoints.load_run(chosen.folder, "last")
            return np.concatenate([w.ravel() for w in model.get_weights()])

        first, again = weights("--tag=a"), weights("--tag=b")
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, weights("--tag=c --seed=1"))

    @pytest.mark.parametrize("resume", [False, True])
    def test_a_failure_before_the_first_save_leaves_no_new_folder(
        self, tmp_path, monkeypatch, resume
    ):
        chosen = config(tmp_path)
        if resume:
            trainer.run(chosen, tiny())
            (chosen.folder / "state.npz").unlink()

        def fail():
            raise ValueError("not so")

        monkeypatch.setattr(engines, "engine_class", fail)
        with pytest.raises(ValueError, match="not so"):
            trainer.run(chosen, tiny(), resume=resume)
        assert chosen.folder.exists() == resume
        kept = [p for p in tmp_path.iterdir() if p.name != ".compiled"]
        assert resume or not kept

    def test_existing_run_is_not_overwritten(self, tmp_path, capsys):
        chosen = config(tmp_path)
        trainer.run(chosen, tiny())
        weights = chosen.folder / "best.weights.h5"
        before = weights.read_bytes()
        with pytest.raises(SystemExit) as stopped:
            trainer.run(chosen, tiny())
        assert stopped.value.code == 2
        line = capsys.readouterr().err
        assert "holds a run already" in line and line.count("\n") == 1
        assert weights.read_bytes() == before
        trainer.run(chosen, tiny(), overwrite=True)

    def test_resume_needs_the_same_settings(self, tmp_path, capsys):
        trainer.run(config(tmp_path), tiny())
        with pytest.raises(SystemExit):
            trainer.run(config(tmp_path, "--seed=4"), tiny(), resume=True)
        assert "seed was 0, now 4" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            trainer.run(config(tmp_path, "--tag=y"), tiny(), resume=True)
        assert "holds no run to resume" in capsys.readouterr().err

    def test_resume_of_a_finished_run_changes_nothing(self, tmp_path):
        chosen = config(tmp_path)
        first = trainer.run(chosen, tiny())
        again = trainer.run(chosen, tiny(), resume=True)
        assert first["last"] == again["last"]

    def test_adversarial_training_resumes_bit_for_bit(
        self, tmp_path, capsys, monkeypatch
    ):
        line = "--adv_target=random --tag="
        whole = adversarial(tmp_path, line + "whole")
        trainer.run(whole, tiny())
        written = json.loads((whole.folder / "config.json").read_text())
        given = {"epsilon": 0.1, "steps": 2, "target": "random"}
        assert given.items() <= written["adversarial"].items()
        part = adversarial(tmp_path, line + "part")
        asked = iter([False, True])  # Stops in the middle of an epoch.
        with monkeypatch.context() as patch:
            patch.setattr(
                command_line,
                "stop_signals",
                lambda: contextlib.nullcontext(asked.__next__),
            )
            with pytest.raises(SystemExit) as stopped:
                trainer.run(part, tiny())
        assert stopped.value.code == 130
        assert "stopped at step 2" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            changed = adversarial(tmp_path, line + "part --adv_epsilon=0.2")
            trainer.run(changed, tiny(), resume=True)
        output = capsys.readouterr().err
        assert "settings: adversarial.epsilon was 0.1, now 0.2." in output
        trainer.run(part, tiny(), resume=True)
        first, again = (
            np.load(chosen.folder / "state.npz") for chosen in (whole, part)
        )
        for name in set(first.files) - {"progress"}:
            np.testing.assert_array_equal(first[name], again[name])
        rows = [
            json.loads(str(state["progress"]))["history"]
            for state in (first, again)
        ]
        for a, b in zip(*rows, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}

    def test_validation_has_clean_and_robust_accuracy(self, tmp_path):
        """Compared with an evaluation of the saved weights."""
        line = "--epochs=1 --robust_validation=7 --robust_validation_steps=3"
        chosen = adversarial(tmp_path, line)
        record = trainer.run(chosen, tiny())
        model, _ = checkpoints.load_run(chosen.folder, "last")
        held = tiny().validation
        clean = robust_evaluation.accuracy(model, held)
        attacked, _ = robust_evaluation.evaluate(
            model,
            held,
            evaluation_config.EvaluationConfig(
                gradient_attacks.PGD(epsilon=0.1, steps=3, keep="first"),
                num_examples=7,
            ),
        )
        row = history(chosen.folder)[0]
        wanted = attacked["robust_accuracy"]
        assert float(row["validation_robust_accuracy"]) == wanted
        assert float(row["validation_accuracy"]) == clean["accuracy"]
        assert float(row["validation_loss"]) == pytest.approx(clean["loss"])
        assert record["best_validation_robust_accuracy"] == wanted

    @pytest.mark.parametrize(
        "line,match",
        [
            ("--adv_train=1", "images for adversarial training"),
            ("--robust_validation=5", "images for --robust_validation=5"),
            (
                "--validation_fraction=0.01",
                "Received: validation_fraction=0.01",
            ),
        ],
    )
    def test_missing_validation_images_raise_one_line(
        self, tmp_path, capsys, line, match
    ):
        data = dataclasses.replace(tiny(), validation=None)
        chosen = config(tmp_path, "--validation_fraction=0 " + line)
        with pytest.raises(SystemExit) as stopped:
            trainer.run(chosen, data)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert match in error and error.count("\n") == 1
        assert not chosen.folder.exists()

    def test_validation_fraction_0_ignores_the_split_of_the_data_set(
        self, tmp_path, capsys
    ):
        chosen = config(tmp_path, "--validation_fraction=0 --adv_train=1")
        with pytest.raises(SystemExit) as stopped:
            trainer.run(chosen, tiny())
        assert stopped.value.code == 2
        assert "validation_fraction=0 of" in capsys.readouterr().err

    def test_run_with_every_option_of_the_step(self, tmp_path):
        chosen = adversarial(
            tmp_path,
            "--adv_craft_dtype=bfloat16 --adv_awp=0.01 --l2=1e-4 --ema=0.5 "
            "--adv_awp_warmup=0.5 --adv_epsilon_warmup=1 "
            "--label_smoothing=0.1 --epochs=1",
        )
        record = trainer.run(chosen, tiny())
        written = json.loads((chosen.folder / "config.json").read_text())
        assert written["step"] == {
            "epsilon_warmup": 1.0,
            "craft_dtype": "bfloat16",
            "awp": 0.01,
            "awp_warmup": 0.5,
            "replays": 0,
        }
        assert record["ended"] is None and record["step"] == written["step"]
        assert record["objective"]["train_mode"] is False
        # The averaged weights are validated and saved.
        model, _ = checkpoints.load_run(chosen.folder, "last")
        held = robust_evaluation.accuracy(model, tiny().validation)
        row = history(chosen.folder)[0]
        assert float(row["validation_loss"]) == pytest.approx(held["loss"])

    def test_free_training_repeats_each_batch(self, tmp_path):
        line = "--recipe=at_mnist --adv_replays=2 --learning_rate=1e-3"
        chosen = parse(
            f"--runs_dir={tmp_path} --model=madry_cnn --width=2 --epochs=3 "
            f"--batch_size=8 {line}"
        )
        trainer.run(chosen, tiny())
        rows = history(chosen.folder)
        # Two epochs of 24 images in batches of 8, each batch twice.
        assert [row["step"] for row in rows] == ["6", "12"]

    @pytest.mark.parametrize("choice", ["stop", "restore"])
    def test_collapse_is_reported(self, tmp_path, capsys, monkeypatch, choice):
        scores = iter([0.9, 0.2])

        def validate(model):
            return {"accuracy": next(scores), "loss": 1.0}

        monkeypatch.setattr(trainer, "validation_of", lambda *_: validate)
        chosen = adversarial(tmp_path, f"--on_collapse={choice}")
        reason = "validation accuracy fell from 90.0% to 20.0%"
        if choice == "restore":
            record = trainer.run(chosen, tiny())
            assert record["ended"] == {"epoch": 2, "step": 6, "reason": reason}
            assert record["best_epoch"] == 1
            assert record["best"] == record["last"]
            return
        with pytest.raises(SystemExit) as stopped:
            trainer.run(chosen, tiny())
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"{reason} at step 6" in error and error.count("\n") == 1
        assert not (chosen.folder / "results.json").exists()
        assert (chosen.folder / "last.weights.h5").exists()

    def test_full_disk_is_one_line(self, tmp_path, capsys, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device", "state.npz")

        monkeypatch.setattr(checkpoints, "save_state", full)
        with pytest.raises(SystemExit) as stopped:
            trainer.run(config(tmp_path), tiny())
        assert stopped.value.code == 2
        assert "No space left on device" in capsys.readouterr().err

    def test_batch_larger_than_the_data_is_one_line(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            trainer.run(config(tmp_path, "--batch_size=100"), tiny())
        assert "batch of 100 images" in capsys.readouterr().err


def call(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "trainer.py", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--model=resnt"], "Did you mean resnet"),
        (["--epochs=many"], "--epochs=many"),
        (["--epoch=3"], "epochs"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path):
    """In a new process; the next test has more cases without one."""
    done = call(*arguments, f"--runs_dir={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line,message",
    [
        ("--dataset=imagenet10", "the files of imagenet10"),
        (
            "--dataset=mnist --data_dir=/nowhere",
            "/nowhere, which does not exist",
        ),
        ("--auxiliary=1", "no option 'auxiliary'"),
        ("--adv_objective=mart --adv_epsilon=0", "Expected epsilon > 0"),
        (
            "--model=s3ta --vision=simple_cnn --num_steps=2 "
            "--read_out_curriculum=0:1,1:9",
            "1 to 2. Received: read_out=9",
        ),
        ("--read_out_curriculum=0:1", "Expected a recurrent model"),
        ("--on_collapse=wait", "--on_collapse=wait"),
        ("--distribute=all", "none, mirrored, multi_worker, tpu"),
    ],
)
def test_bad_settings_are_one_line(line, message, tmp_path, capsys):
    values = programs.parse(
        "trainer", *shlex.split(line), f"--runs_dir={tmp_path}"
    )
    status, _, output = programs.outcome(trainer.main, capsys, values)
    assert status == 2 and message in output
    assert output.count("\n") == 1 and "Traceback" not in output
    assert not list(tmp_path.iterdir())
