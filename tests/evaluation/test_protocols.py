"""Protocols run the papers' attacks and show the papers' tables."""

import csv
import dataclasses
import io
import json

import keras
import numpy as np
import pytest
from keras import layers

from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import spsa
from saccade.core import metrics
from saccade.data import splits as image_splits
from saccade.evaluation import evaluate as robust_evaluation
from saccade.evaluation import published, tables
from saccade.evaluation.protocols import PROTOCOLS

PHOTOGRAPH, SMALL, DIGIT = (224, 224, 3), (32, 32, 3), (28, 28, 1)
NAMES = sorted(PROTOCOLS)
# Rows as printed in the papers; only the separators differ.
PUBLISHED = {
    "s3ta": """
ResNet-152|70.66%|53.48%|7.63%|36.91%|43.48%|32.50%|50.93%|29.5%|55.84%
S3TA-2|72.30%|55.08%|9.06%|40.13%|40.31%|36.56%|46.56%|33.97%|50.40%
S3TA-4|72.48%|56.78%|9.10%|42.54%|39.37%|40.00%|44.33%|37.99%|47.50%
S3TA-8|72.14%|56.02%|9.50%|42.63%|39.06%|40.17%|44.01%|38.48%|47.09%
S3TA-16|72.54%|57.45%|9.33%|44.19%|38.83%|40.71%|44.82%|38.70%|48.16%
ResNet-152-30|63.62%|53.30%|6.56%|39.56%|34.62%|37.56%|38.68%|36.18%|41.37%
DENOISE|66.02%|56.33%|5.00%|45.84%|27.36%|44.19%|30.66%|43.39%|32.54%
S3TA-16-30|64.55%|55.08%|3.79%|47.18%|21.87%|46.65%|23.52%|46.11%|24.91%
""",
    "s3ta_strong": """
ResNet-152|28.12%|58.03%|27.64%|58.79%
S3TA-2|32.85%|52.50%|32.63%|52.94%
S3TA-4|35.67%|50.57%|35.43%|50.96%
S3TA-8|36.20%|50.75%|35.44%|51.91%
S3TA-16|37.36%|49.50%|36.96%|50.23%
ResNet-152-30|36.69%|41.33%|36.78%|41.25%
DENOISE|42.76%|33.83%|42.99%|33.88%
S3TA-16-30|46.11%|24.91%|46.20%|24.68%
""",
    "s3ta_restarts": """
ResNet-152-30|39.77%|39.37%|39.15%|37.41%|36.51%|35.75%
DENOISE|46.16%|44.68%|44.68%|43.57%|41.91%|41.37%
S3TA-16-30|47.76%|47.27%|47.09%|46.74%|46.09%|45.78%
""",
    "s3ta_adam": """
ResNet-152-30|26.38%|42.94%
DENOISE|32.99%|35.04%
S3TA-16-30|36.83%|27.00%
""",
    "s3ta_untargeted": """
ResNet-152|39.7%|6.3%
DENOISE [55]|38.9%|7.5%
LLR [42]|47.0%|6.1%
S3TA-16|46.75%|9.8%
""",
    "s3ta_spsa": """
ResNet-152|61.90%|2.20%
DENOISE [55]|63.70%|1.90%
S3TA-16|59.60%|1.90%
""",
    "perceptual": """
Natural|90.88|0.01|0.00
AT-1|90.95|34.33|4.53
AT-2|90.88|50.76|14.41
AT-4|89.79|61.28|27.30
AT-8|87.25|73.99|47.37
""",
    "handover cifar10": """
| resnet_cifar | 88.1 | 69.8 | 11.4 | 0.5 |
| coarse fixations | 87.7 | 70.7 | 11.7 | 0.5 |
| retinal sampling | 88.9 | 82.1 | 43.8 | 11.8 |
| cortical (ECNN) | 85.2 | 77.8 | 40.1 | 11.5 |
""",
    "handover imagenet10": """
| resnet | 89.4 | 78.4 | 20.0 | 1.6 | 0 |
| coarse fixations | 91.2 | 80.8 | 16.4 | 1.2 | 0 |
| coarse, blurred | 89.0 | 78.4 | 21.4 | 2.8 | 0 |
| retinal sampling | 90.2 | 86.4 | 43.4 | 7.6 | 0.4 |
| cortical (ECNN) | 85.2 | 78.8 | 52.0 | 23.2 | 2.0 |
| cortical, auxiliary | 88.6 | 82.0 | 42.8 | 11.8 | 1.0 |
| branched resnet | 88.8 | 76.2 | 10.6 | 0.8 | 0 |
""",
}


def record(config, robust=0.5, success=0.25, clean=0.875, number=200, **more):
    """Returns a record as an evaluation would write it, after JSON."""
    low, high = metrics.proportion_interval(round(robust * number), number)
    made = {
        **config.describe(),
        "num_examples": number,
        "split": "test",
        "clean_accuracy": clean,
        "robust_accuracy": robust,
        "robust_accuracy_interval": [low, high],
        "attack_success": success,
        "loss": 2.5,
        **more,
    }
    return json.loads(json.dumps(made))


def run(name, shape=PHOTOGRAPH, classes=1000, **settings):
    """Returns the evaluations of a protocol and a record of each."""
    configs = PROTOCOLS[name].evaluations(shape, classes, **settings)
    return configs, [
        record(config, robust=0.5 - i / 64, success=0.25 + i / 64)
        for i, config in enumerate(configs)
    ]


def own_rows(table):
    return [row for row in table.rows if row.kind == "ours"]


class TestPublishedNumbers:
    @pytest.mark.parametrize("which", sorted(PUBLISHED))
    def test_numbers_are_as_printed_in_the_papers(self, which):
        name, _, dataset = which.partition(" ")
        layouts = {x.dataset: x for x in PROTOCOLS[name].layouts}
        layout = layouts[dataset] if dataset else PROTOCOLS[name].layouts[0]
        lines = PUBLISHED[which].strip().splitlines()
        printed = [
            [cell.strip() for cell in line.strip("| ").split("|")]
            for line in lines
        ]
        ours = [
            [name, *(cell.rstrip("?") for cell in layout.cells(numbers))]
            for name, numbers in layout.published
        ]
        assert ours == printed

    @pytest.mark.parametrize("name", NAMES)
    def test_rows_have_one_number_per_column(self, name):
        for layout in PROTOCOLS[name].layouts:
            columns = layout.columns(layout.radii)
            assert {len(n.split()) for _, n in layout.published} <= {
                len(columns)
            }
            doubtful = any("?" in numbers for _, numbers in layout.published)
            assert doubtful == bool(layout.doubt)

    def test_numbers_agree_with_the_text_of_the_paper(self):
        numbers = {
            name: [float(n.rstrip("?")) for n in numbers.split()]
            for name, numbers in published.S3TA.published
        }
        # "more robust against a 1000 PGD attack steps than a ResNet-152 model
        # is against a 100 attack steps"
        assert numbers["S3TA-16"][7] > numbers["ResNet-152"][3]
        # "more robust than a ResNet-152 trained with 30 PGD steps"
        for column in (1, 3, 5, 7):
            assert numbers["S3TA-16"][column] > numbers["ResNet-152-30"][column]
        # "about 25% lower than that of DENOISE"
        ratio = numbers["S3TA-16-30"][8] / numbers["DENOISE"][8]
        assert 0.7 < ratio < 0.8
        for line in numbers.values():
            assert line[1] > line[3] > line[5] > line[7]
            assert line[2] < line[4] < line[6] < line[8]


class TestEvaluations:
    def attacks(self, name, shape=PHOTOGRAPH, **settings):
        configs = PROTOCOLS[name].evaluations(shape, 1000, **settings)
        return [config.attack for config in configs]

    def test_s3ta_attacks(self):
        attacks = self.attacks("s3ta")
        assert [a.steps for a in attacks] == [10, 100, 250, 1000]
        lengths = [a.step_length * 255 for a in attacks]
        assert lengths == pytest.approx([1.6, 1, 1, 1])
        for attack in attacks:
            assert (attack.norm, attack.loss) == ("linf", "cross_entropy")
            assert attack.epsilon == 16 / 255
            assert (attack.random_start, attack.restarts) == (1.0, 1)
            assert attack.keep == "last"

    @pytest.mark.parametrize("name", NAMES)
    def test_targets_and_number_of_images(self, name):
        for config in PROTOCOLS[name].evaluations(PHOTOGRAPH, 1000):
            untargeted = ("s3ta_untargeted", "handover", "perceptual")
            targeted = name not in (*untargeted, "autoattack")
            assert config.target == ("random" if targeted else "none")
            expected = {"s3ta_strong": 2200, "s3ta_spsa": 1000}.get(name)
            assert config.num_examples == expected

    def test_s3ta_strong_and_restarts_attacks(self):
        strong = self.attacks("s3ta_strong")
        assert [a.steps for a in strong] == [5000, 10000]
        restarts = [
            (a.steps, a.restarts) for a in self.attacks("s3ta_restarts")
        ]
        assert restarts == [
            (100, 1),
            (100, 10),
            (100, 100),
            (1000, 1),
            (1000, 10),
            (1000, 100),
        ]
        for attack in (*strong, *self.attacks("s3ta_restarts")):
            assert attack.step_length == 1 / 255

    def test_s3ta_adam_attack(self):
        (attack,) = self.attacks("s3ta_adam")
        assert isinstance(attack, gradient_attacks.PGDAdam)
        assert (attack.steps, attack.boundaries) == (250, (100, 200))
        assert attack.rates == (0.1, 0.01, 0.001)

    def test_s3ta_untargeted_attacks(self):
        attacks = self.attacks("s3ta_untargeted")
        assert [a.epsilon for a in attacks] == [4 / 255, 16 / 255]
        assert {a.steps for a in attacks} == {200}
        assert {a.step_length for a in attacks} == {1 / 255}

    def test_s3ta_spsa_attack(self):
        (attack,) = self.attacks("s3ta_spsa")
        assert isinstance(attack, spsa.SPSA)
        assert (attack.samples, attack.steps) == (4096, 100)
        assert (attack.epsilon, attack.step_length) == (16 / 255, 1 / 255)

    @pytest.mark.parametrize(
        ("shape", "steps", "radii"),
        [
            (SMALL, 5, [0.001, 0.005, 0.01]),
            (DIGIT, 5, [0.001, 0.005, 0.01]),
            ((320, 320, 3), 20, [0.001, 0.005, 0.01, 0.02]),
        ],
    )
    def test_handover_attacks_depend_on_image_size(self, shape, steps, radii):
        attacks = self.attacks("handover", shape)
        assert [a.epsilon for a in attacks] == radii
        for attack in attacks:
            assert isinstance(attack, gradient_attacks.BIM)
            assert (attack.steps, attack.random_start) == (steps, 0)
            length = attack.epsilon / 0.3 * 0.1
            assert attack.step_length == pytest.approx(length)

    def test_perceptual_attacks(self):
        attacks = self.attacks("perceptual")
        assert [a.epsilon for a in attacks] == [4 / 255, 8 / 255]
        assert {a.steps for a in attacks} == {10}

    @pytest.mark.parametrize(
        ("shape", "norm", "radius"),
        [
            (SMALL, None, 8 / 255),
            (PHOTOGRAPH, "linf", 4 / 255),
            (DIGIT, "linf", 0.3),
            (SMALL, "l2", 0.5),
        ],
    )
    def test_autoattack_default_radius_depends_on_norm_and_images(
        self, shape, norm, radius
    ):
        (attack,) = self.attacks("autoattack", shape, norm=norm)
        assert attack.version == "standard"
        assert (attack.norm, attack.epsilon) == (norm or "linf", radius)

    def test_autoattack_version_is_rand_for_several_draws(self):
        (attack,) = self.attacks("autoattack", SMALL, eot=20)
        assert attack.version == "rand"
        (attack,) = self.attacks("autoattack", SMALL, eot=1)
        assert attack.version == "standard"

    def test_common_settings_apply_to_all_evaluations(self):
        common = {
            "batch_size": 7,
            "seed": 3,
            "num_examples": 11,
            "craft_dtype": "bfloat16",
        }
        for name in NAMES:
            for config in PROTOCOLS[name].evaluations(SMALL, 10, **common):
                for key, value in common.items():
                    assert getattr(config, key) == value

    def test_indices_override_the_number_of_images(self):
        indices = (5, 2, 9)
        (config,) = PROTOCOLS["s3ta_spsa"].evaluations(
            SMALL, 10, indices=indices
        )
        assert (config.indices, config.num_examples) == (indices, None)

    @pytest.mark.parametrize("name", [n for n in NAMES if n != "autoattack"])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_step_size_is_proportional_to_the_radius(self, name, norm):
        once, twice = (
            self.attacks(name, norm=norm, epsilon=epsilon)
            for epsilon in (0.2, 0.4)
        )
        assert len(once) == len(twice)
        for a, b in zip(once, twice, strict=True):
            assert (a.norm, a.epsilon, b.epsilon) == (norm, 0.2, 0.4)
            assert a.steps == b.steps
            if name == "s3ta_adam":
                assert b.rates == pytest.approx([2 * r for r in a.rates])
            else:
                assert b.step_length == pytest.approx(2 * a.step_length)

    def test_every_radius_is_evaluated_once(self):
        attacks = self.attacks("s3ta", epsilon=(0.1, 0.2, 0.1))
        assert [(a.epsilon, a.steps) for a in attacks] == [
            (radius, steps)
            for radius in (0.1, 0.2)
            for steps in (10, 100, 250, 1000)
        ]

    def test_norm_without_a_default_radius_is_refused(self):
        for name in NAMES:
            with pytest.raises(ValueError, match="--epsilon") as raised:
                PROTOCOLS[name].evaluations(DIGIT, 10, norm="l2")
            assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match="at least one radius"):
            PROTOCOLS["s3ta"].evaluations(DIGIT, 10, epsilon=())

    def test_too_few_classes_are_refused(self):
        with pytest.raises(ValueError, match="classes"):
            PROTOCOLS["autoattack"].evaluations(SMALL, 1)

    def test_autoattack_version_for_few_classes_fills_the_table(self):
        (config,) = PROTOCOLS["autoattack"].evaluations(SMALL, 2)
        record = {
            **config.describe(),
            "robust_accuracy": 0.25,
            "clean_accuracy": 0.5,
            "num_examples": 9,
        }
        assert record["version"] == "standard_2_classes"
        table = PROTOCOLS["autoattack"].table([record], "mine", "folder")
        assert "25.0" in str(table.rows)
        assert any("standard_2_classes" in note for note in table.notes)

    def test_protocol_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            PROTOCOLS["s3ta"].target = "none"


class TestTable:
    @pytest.mark.parametrize("name", NAMES)
    def test_complete_records_fill_every_cell(self, name):
        protocol = PROTOCOLS[name]
        layout = protocol.layouts[-1]
        configs, records = run(name)
        table = protocol.table(records, "mine", layout.dataset)
        first, *rest = table.rows
        assert first.kind == "ours" and "mine" in first.name
        assert [row.name for row in rest] == [n for n, _ in layout.published]
        for line in (*table.header, *((r.name, *r.cells) for r in table.rows)):
            assert len(line) == len(table.header[0])
        assert tables.DASH not in first.cells
        assert not any("missing" in note for note in table.notes)
        # The numbers of all evaluations are in the table, in order.
        numbers = [float(cell.rstrip("%")) for cell in first.cells]
        if layout.clean:
            assert numbers.pop(0) == 87.5
        keys = [key for _, key in layout.measures]
        expected = [100 * r[key] for r in records for key in keys]
        assert numbers == pytest.approx(expected, abs=0.051)
        assert len(configs) * len(keys) == len(numbers)

    def test_header_has_two_rows(self):
        table = PROTOCOLS["s3ta"].table(run("s3ta")[1], "s3ta", "imagenet")
        groups, heads = table.header
        assert groups[:4] == (
            "Model",
            "Nominal Accuracy",
            "10 steps",
            "10 steps",
        )
        assert heads[:4] == ("", "", "Top-1", "Attack Success")
        assert groups[-1] == "1000 steps"
        table = PROTOCOLS["s3ta_restarts"].table([], "s3ta", "imagenet")
        assert table.header == (
            ("Attack steps", *["100 steps"] * 3, *["1000 steps"] * 3),
            ("Random restarts", *["1", "10", "100"] * 2),
        )

    def test_missing_records_leave_dashes_and_a_note(self):
        _, records = run("s3ta")
        table = PROTOCOLS["s3ta"].table(records[1:3], "s3ta", "imagenet")
        (row,) = own_rows(table)
        dash = tables.DASH
        assert row.cells == (
            "87.50%",
            *(dash, dash),
            *("48.44%", "26.56%"),
            *("46.88%", "28.12%"),
            *(dash, dash),
        )
        assert "missing: 10 steps; 1000 steps" in table.notes

    @pytest.mark.parametrize("name", NAMES)
    def test_no_records_leave_only_dashes(self, name):
        table = PROTOCOLS[name].table([], "mine", "imagenet")
        for row in own_rows(table):
            assert set(row.cells) <= {tables.DASH}
        missing_all = "missing: all evaluations" in table.notes
        assert missing_all or name == "autoattack"
        assert tables.render(table)

    @pytest.mark.parametrize(
        "change",
        [
            {"target": "none"},
            {"keep": "best"},
            {"epsilon": 8 / 255},
            {"norm": "l2"},
            {"attack": "bim"},
            {"steps": 101},
            {"step_size": 2 / 255},
            {"restarts": 2},
            {"objective": "dlr"},
        ],
    )
    def test_record_with_other_settings_fills_no_cell(self, change):
        _, records = run("s3ta")
        changed = {**records[1], **change}
        table = PROTOCOLS["s3ta"].table(
            [records[0], changed], "s3ta", "imagenet"
        )
        (row,) = own_rows(table)
        assert row.cells[1] != tables.DASH
        assert set(row.cells[3:]) == {tables.DASH}

    def test_record_matches_for_any_seed_and_result(self):
        _, records = run("s3ta")
        records[1]["seed"], records[1]["loss"] = 7, "any text"
        table = PROTOCOLS["s3ta"].table(records, "s3ta", "imagenet")
        assert own_rows(table)[0].cells[3] == "48.44%"

    def test_record_with_most_images_is_used(self):
        _, (small,) = run("s3ta_adam")
        large = {**small, "num_examples": 5000, "robust_accuracy": 0.125}
        for records in ([small, large], [large, small]):
            table = PROTOCOLS["s3ta_adam"].table(records, "s3ta", "imagenet")
            assert own_rows(table)[0].cells[0] == "12.50%"
            assert any("5000 test images" in note for note in table.notes)

    @pytest.mark.parametrize(
        ("model", "options", "dataset", "published_name"),
        [
            ("resnet_cifar", {}, "cifar10", "resnet_cifar"),
            (
                "resnet_cifar",
                {"sampling": True, "interpolation": "nearest"},
                "cifar10",
                "retinal sampling",
            ),
            ("resnet", None, "imagenet10", "resnet"),
            (
                "resnet",
                {"coarse_fixations": True, "coarse_variant": "blur"},
                "imagenet10",
                "coarse, blurred",
            ),
            (
                "resnet_cifar",
                {"coarse_fixations": True},
                "cifar10",
                "coarse fixations",
            ),
            (
                "resnet",
                {"coarse_fixations": True, "coarse_variant": "upsample"},
                "imagenet10",
                None,
            ),
            (
                "resnet",
                {"branched_network": True, "coarse_fixations": True},
                "imagenet10",
                "branched resnet",
            ),
            (
                "resnet",
                {"branched_network": True, "sampling": True},
                "imagenet10",
                None,
            ),
            ("resnet_cifar", {"feedback": True}, "cifar10", None),
            ("ecnn", {}, "cifar10", "cortical (ECNN)"),
            ("ecnn", {"pooling": "max"}, "cifar10", None),
            ("ecnn", {"dropout": 0.75}, "imagenet10", None),
            ("ecnn", {"auxiliary": 1}, "imagenet10", "cortical, auxiliary"),
            ("resnet_cifar", {"width": 32}, "cifar10", None),
            ("multi_gaze", {}, "imagenet10", None),
        ],
    )
    def test_row_of_the_same_model_has_a_star(
        self, model, options, dataset, published_name
    ):
        table = PROTOCOLS["handover"].table([], model, dataset, options=options)
        same = [row for row in table.rows if row.kind == "same"]
        assert [row.name for row in same] == (
            [f"{published_name} *"] if published_name else []
        )
        starred = any(note.startswith("*") for note in table.notes)
        assert starred == bool(published_name)

    def test_published_rows_are_left_out_for_other_data(self):
        for name in NAMES:
            configs, records = run(name, DIGIT, 10, epsilon=(0.1, 0.2))
            table = PROTOCOLS[name].table(records, "cnn", "mnist")
            assert {row.kind for row in table.rows} == {"ours"}
            cells = [c for row in table.rows for c in row.cells]
            assert tables.DASH not in cells
            if name != "autoattack":
                assert any("mnist: not compar" in n for n in table.notes)
                assert any("0.1, 0.2" in note for note in table.notes)
            by_radius = PROTOCOLS[name].layouts[0].by_radius
            assert len(table.rows) == (1 if by_radius else 2)

    def test_published_rows_are_left_out_for_other_radii(self):
        _, records = run("perceptual", SMALL, 10, epsilon=(2 / 255, 4 / 255))
        table = PROTOCOLS["perceptual"].table(
            records, "resnet_cifar", "cifar10", epsilon=(2 / 255, 4 / 255)
        )
        assert {row.kind for row in table.rows} == {"ours"}
        assert table.header[1][2:] == ("ε = 2/255", "ε = 4/255")

    def test_given_radii_determine_what_is_missing(self):
        _, records = run("s3ta", DIGIT, 10, epsilon=0.1)
        table = PROTOCOLS["s3ta"].table(
            records[:3], "cnn", "mnist", epsilon=(0.1, 0.2)
        )
        assert [row.name for row in own_rows(table)] == [
            "ours: cnn, ε = 0.1",
            "ours: cnn, ε = 0.2",
        ]
        (note,) = (n for n in table.notes if n.startswith("missing"))
        assert "1000 steps, ε = 0.1" in note and "10 steps, ε = 0.2" in note
        assert "100 steps, ε = 0.1" not in note

    def test_handover_layout_of_unknown_data_set_follows_records(self):
        for shape, corner in (
            (SMALL, "CIFAR-10, 5 steps"),
            ((320, 320, 3), "ImageNet10, 20 steps"),
        ):
            _, records = run("handover", shape, 10)
            table = PROTOCOLS["handover"].table(records, "resnet", "folder")
            assert table.header[0][0] == corner
            assert tables.DASH not in table.rows[0].cells

    def test_autoattack_table_of_a_stochastic_model(self):
        _, records = run("autoattack", SMALL, 10, eot=20)
        table = PROTOCOLS["autoattack"].table(records, "noisy", "cifar10")
        assert own_rows(table)[0].cells == ("87.50%", "50.00%")
        assert any("20 draws" in note for note in table.notes)

    def test_note_gives_the_confidence_interval(self):
        _, records = run("s3ta_adam")
        table = PROTOCOLS["s3ta_adam"].table(records, "s3ta", "imagenet")
        low, high = metrics.proportion_interval(100, 200)
        wide = f"±{50 * (high - low):.1f} points"
        assert any("200 test" in n and wide in n for n in table.notes)

    def test_note_names_another_image_size(self):
        _, records = run("s3ta_adam")
        records[0]["image_shape"] = [320, 320, 3]
        table = PROTOCOLS["s3ta_adam"].table(records, "s3ta", "imagenet")
        assert any("320" in n and "224" in n for n in table.notes)


@pytest.mark.parametrize("name", ["perceptual", "handover", "s3ta_adam"])
def test_real_evaluations_fill_the_table(name):
    shape, classes = (4, 4, 1), 4
    model = keras.Sequential(
        [keras.Input(shape), layers.Flatten(), layers.Dense(classes)]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=(16, classes)), np.zeros(classes)])
    images = rng.random((20, *shape)).astype("float32")
    labels = model.predict(images, verbose=0).argmax(-1).astype("int32")
    labels[:2] = (labels[:2] + 1) % classes  # Two clean errors.
    split = image_splits.Split("test", labels, lambda i: images[i])
    configs = PROTOCOLS[name].evaluations(shape, classes, batch_size=20)
    records = [
        json.loads(
            json.dumps(robust_evaluation.evaluate(model, split, config)[0])
        )
        for config in configs
    ]
    table = PROTOCOLS[name].table(records, "linear", "mnist")
    (row,) = own_rows(table)
    assert tables.DASH not in row.cells
    assert not any("missing" in note for note in table.notes)
    if name != "s3ta_adam":
        clean, *robust = (float(cell) for cell in row.cells)
        assert clean == 90
        assert robust == [
            pytest.approx(100 * r["robust_accuracy"]) for r in records
        ]


class TestFormats:
    @pytest.fixture(params=NAMES)
    def table(self, request):
        _, records = run(request.param)
        protocol = PROTOCOLS[request.param]
        dataset = protocol.layouts[-1].dataset
        return protocol.table(records[:-1], "resnet", dataset)

    def test_text_has_every_cell_in_its_row(self, table):
        lines = tables.render(table).splitlines()
        assert lines[0] == table.title
        for row in table.rows:
            (line,) = (x for x in lines if x.startswith(f" {row.name}  "))
            assert line.split()[len(row.name.split()) :] == list(row.cells)
        text = " ".join(" ".join(lines).split())
        for note in table.notes:
            assert note in text

    def test_text_is_at_most_120_columns_wide(self, table):
        assert max(map(len, tables.render(table).splitlines())) <= 120

    def test_csv_has_every_number(self, table):
        head, *lines = csv.reader(io.StringIO(tables.to_csv(table)))
        assert len(head) == len(set(head)) == 1 + len(table.header[0])
        assert [line[0] for line in lines] == [r.kind for r in table.rows]
        for line, row in zip(lines, table.rows, strict=True):
            for field, cell in zip(line[2:], row.cells, strict=True):
                if cell == tables.DASH:
                    assert field == ""
                else:
                    assert float(field) == float(cell.rstrip("?%"))

    def test_markdown_has_a_row_per_model(self, table):
        lines = tables.to_markdown(table).splitlines()
        grid = [line for line in lines if line.startswith("|")]
        assert len(grid) == 2 + len(table.rows)
        assert {line.replace("\\|", "").count("|") for line in grid} == {
            len(table.header[0]) + 1
        }
        assert set(grid[1]) <= set("|-: ")
        assert sum("**ours" in line for line in grid) == len(own_rows(table))


def test_protocol_names():
    assert set(PROTOCOLS) == {
        "s3ta",
        "s3ta_strong",
        "s3ta_restarts",
        "s3ta_adam",
        "s3ta_untargeted",
        "s3ta_spsa",
        "handover",
        "perceptual",
        "autoattack",
    }
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.summary and protocol.reference
