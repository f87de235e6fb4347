"""Which published row belongs to our model, and the notes about it."""

import dataclasses
import json

import programs
import pytest

from saccade.core import run_folder
from saccade.evaluation import published
from saccade.evaluation.protocols import PROTOCOLS

adversary, _ = programs.load("adversary")
S3TA, UNTARGETED = published.S3TA, published.S3TA_UNTARGETED
RESTARTS = published.S3TA_RESTARTS
CIFAR, PHOTOGRAPHS = published.HANDOVER_CIFAR10, published.HANDOVER_IMAGENET10
RETINA = {"sampling": True, "interpolation": "nearest"}
CROP = {"coarse_fixations": True}
# Each published value, and its forms in a file or on a command line, or None.
PUBLISHED_VALUES = {
    "s3ta": {
        "vision": ("auto", "resnet152", "resnet152_v2", None),
        "vision_width": (0, "0", None),
        "vision_strides": (
            *((), [], None, (1, 2, 1, 1), [1, 2, 1, 1]),
            *(["1", "2", "1", "1"], "1,2,1,1"),
        ),
        "key_channels": (0, 32, "32", None),
        "num_heads": (4, "4", None),
        "frequencies": (4, "4", None),
        "controller_units": (1024, "1024", None),
        "hidden_units": (1024, "1024", None),
        "stem_stride": (0, 2, "2", None),
        "pool_stride": (0, 2, "2", None),
        "downsampling": ("not_last", "all", None),
        "remat": (False, True),
    },
    "denoise": {
        "depth": (152, "152", None),
        "denoising": ("stages", None),
        "width": (0, None),
        "stem_stride": (0, 2, None),
        "pool_stride": (0, 2, None),
    },
    "resnet152": {
        "depth": (152, "152", None),
        "denoising": ("none", None),
        "width": (0, "0", None),
        "stem_stride": (0, 2, None),
        "pool_stride": (0, 2, None),
        "dropout": (0, 0.0, "0.0"),
    },
    "resnet": {
        "gaze_range": (0, 0.0, "0.0", None),
        "test_gazes": ("five", None),
        "stem_stride": (0, 2, None),
        "pool_stride": (0, 2, None),
        "sampling": (False, 0, None),
        "interpolation": ("bilinear", "nearest", None),
    },
}
OTHER_VALUES = {
    "s3ta": {
        "vision": ("resnet50", "resnet152_v1", "resnet_cifar"),
        "vision_width": (32, "32"),
        "vision_strides": ([2, 2, 1, 1], ["1", "2", "2", "1"], (1, 2, 1)),
        "key_channels": (16, 64),
        "num_heads": (1, "8"),
        "frequencies": (2,),
        "controller_units": (512,),
        "hidden_units": (512, "2048"),
        "stem_stride": (1, 4),
        "pool_stride": (1,),
        "num_steps": (1, 3, 17, 1630),
    },
    "denoise": {
        "depth": (50, "101"),
        "denoising": ("none", "blocks"),
        "width": (32,),
        "stem_stride": (1,),
        "pool_stride": (1,),
    },
    "resnet152": {
        "depth": (18, "101"),
        "denoising": ("stages", "blocks"),
        "width": (32, "32"),
        "stem_stride": (1,),
        "pool_stride": (1,),
        "dropout": (0.5, "0.5"),
    },
    "resnet": {
        "gaze_range": (40.0, "40"),
        "test_gazes": ("random",),
        "stem_stride": (1,),
        "pool_stride": (1, "4"),
        "width": (32,),
        "backbone": ("resnet20",),
    },
}
ROWS = {
    "s3ta": (S3TA, "S3TA-16"),
    "denoise": (S3TA, "DENOISE"),
    "resnet152": (S3TA, "ResNet-152"),
    "resnet": (PHOTOGRAPHS, "resnet"),
}


def flatten(options):
    """Returns a triple (model, option, value) for each value."""
    return [
        (model, key, value)
        for model, values_by_key in options.items()
        for key, values in values_by_key.items()
        for value in values
    ]


@pytest.mark.parametrize(("model", "key", "value"), flatten(PUBLISHED_VALUES))
def test_published_option_values_keep_the_row(model, key, value):
    layout, line = ROWS[model]
    assert published.published_name(layout, model, {key: value}) == line


@pytest.mark.parametrize(("model", "key", "value"), flatten(OTHER_VALUES))
def test_other_option_values_have_no_published_row(model, key, value):
    layout, _ = ROWS[model]
    assert published.published_name(layout, model, {key: value}) is None


@pytest.mark.parametrize(
    ("layout", "model", "options", "steps", "line"),
    [
        (S3TA, "s3ta", {}, None, "S3TA-16"),
        (S3TA, "s3ta", None, 10, "S3TA-16"),
        (S3TA, "s3ta", {"num_steps": 2}, None, "S3TA-2"),
        (S3TA, "s3ta", {"num_steps": "4"}, 10, "S3TA-4"),
        (S3TA, "s3ta", {"num_steps": 8}, 30, "S3TA-8"),
        (S3TA, "s3ta", {"num_steps": 16}, 30, "S3TA-16-30"),
        (S3TA, "s3ta", {"num_steps": 16, "num_heads": 8}, 30, None),
        (RESTARTS, "s3ta", {}, 30, "S3TA-16-30"),
        (RESTARTS, "s3ta", {}, 10, None),
        (RESTARTS, "s3ta", {"num_steps": 4}, 30, None),
        (UNTARGETED, "s3ta", {}, 30, "S3TA-16"),
        (published.S3TA_SPSA, "s3ta", {"num_steps": 4}, None, None),
        (S3TA, "resnet152", {}, None, "ResNet-152"),
        (S3TA, "resnet152", {}, 10, "ResNet-152"),
        (S3TA, "resnet152", {}, 30, "ResNet-152-30"),
        (published.S3TA_ADAM, "resnet152", {}, 10, None),
        (UNTARGETED, "resnet152", {}, 30, "ResNet-152"),
        (S3TA, "resnet50", {}, None, None),
        (S3TA, "resnet50", {"depth": 152}, 10, "ResNet-152"),
        (S3TA, "resnet50", {"depth": "152"}, 30, "ResNet-152-30"),
        (S3TA, "resnet152", {"depth": 50}, 30, None),
        (S3TA, "resnet_se", {}, None, None),
        (S3TA, "denoise", {}, 30, "DENOISE"),
        (S3TA, "denoise", {}, None, "DENOISE"),
        (UNTARGETED, "denoise", {"depth": 152}, 30, "DENOISE [55]"),
        (CIFAR, "s3ta", {}, 30, None),
        (S3TA, "resnet", {}, None, None),
        # Tables of the handover.
        (CIFAR, "resnet_cifar", RETINA, None, "retinal sampling"),
        (PHOTOGRAPHS, "resnet", RETINA, None, "retinal sampling"),
        (PHOTOGRAPHS, "resnet", {"sampling": True}, None, None),
        (CIFAR, "resnet_cifar", {"sampling": True}, None, None),
        *(
            (
                PHOTOGRAPHS,
                "resnet",
                {"sampling": True, "interpolation": other},
                None,
                None,
            )
            for other in ("bilinear", "straight_through")
        ),
        # A table is of one network: of ResNet-18 or ResNet-20.
        (CIFAR, "resnet", RETINA, None, None),
        (PHOTOGRAPHS, "resnet_cifar", CROP, None, None),
        (PHOTOGRAPHS, "resnet", CROP, None, "coarse fixations"),
        (
            PHOTOGRAPHS,
            "resnet",
            {**CROP, "coarse_variant": None},
            None,
            "coarse fixations",
        ),
        (PHOTOGRAPHS, "resnet", {"branched_network": True}, None, None),
        *(
            (
                PHOTOGRAPHS,
                "resnet",
                {**CROP, "branched_network": True, "coarse_variant": variant},
                None,
                line,
            )
            for variant, line in (
                ("crop", "branched resnet"),
                (None, "branched resnet"),
                ("blur", None),
                ("upsample", None),
            )
        ),
        (
            PHOTOGRAPHS,
            "resnet",
            {**RETINA, "branched_network": True},
            None,
            None,
        ),
        (PHOTOGRAPHS, "ecnn", {"test_gazes": "random"}, None, None),
        (CIFAR, "ecnn", {"gaze_range": 4}, None, None),
    ],
)
def test_published_row_of_our_model(layout, model, options, steps, line):
    assert published.published_name(layout, model, options, steps) == line
    rows = published.published_rows(layout, model, options, steps)
    assert [row.name for row in rows if row.kind == "same"] == (
        [f"{line} *"] if line else []
    )


def test_row_of_another_depth_is_found():
    layout = dataclasses.replace(S3TA, published=(("ResNet-50", "1"),))
    for model, options in (("resnet50", {}), ("resnet152", {"depth": 50})):
        assert published.published_name(layout, model, options) == "ResNet-50"
    assert published.published_name(layout, "resnet152", {}) is None


def table(model, dataset="imagenet10", options=None, records=(), **more):
    name = "s3ta" if dataset == "imagenet" else "handover"
    return PROTOCOLS[name].table(
        records, model, dataset, options=options, **more
    )


def starred_rows(made):
    return [row.name for row in made.rows if row.kind == "same"]


class TestTable:
    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({}, "S3TA-16"),
            ({"num_steps": None}, "S3TA-16"),
            ({"num_steps": "4"}, "S3TA-4"),
            ({"num_steps": 3}, "S3TA-3"),
        ],
    )
    def test_our_row_names_the_steps_of_s3ta(self, options, name):
        made = table("s3ta", "imagenet", options)
        assert made.rows[0].name == f"ours: {name}"
        other = any(f"of the model {name}:" in note for note in made.notes)
        assert other == (name == "S3TA-3")

    def test_our_rows_name_several_radii(self):
        made = PROTOCOLS["s3ta"].table([], "s3ta", "mnist", epsilon=(0.1, 0.2))
        assert [row.name for row in made.rows] == [
            "ours: S3TA-16, ε = 0.1",
            "ours: S3TA-16, ε = 0.2",
        ]

    def test_training_with_30_steps_selects_its_row(self):
        assert starred_rows(table("s3ta", "imagenet")) == ["S3TA-16 *"]
        made = table("s3ta", "imagenet", attack_steps=30)
        assert starred_rows(made) == ["S3TA-16-30 *"]

    def test_note_says_denoise_is_of_another_resnet_version(self):
        (note,) = (n for n in table("denoise", "imagenet").notes if n[0] == "*")
        assert "version 1 (Xie et al., 2019); ours is of version 2" in note
        assert note.endswith("how it was trained may differ")
        (note,) = (
            n for n in table("resnet152", "imagenet").notes if n[0] == "*"
        )
        assert "same architecture" in note and "version" not in note

    @pytest.mark.parametrize(
        ("options", "noted"),
        [
            ({"sampling": True}, True),
            ({"sampling": True, "interpolation": "bilinear"}, True),
            (RETINA, False),
            ({"branched_network": True}, False),
            ({}, False),
        ],
    )
    def test_note_names_retina_without_rounding(self, options, noted):
        made = table("resnet", options=options)
        notes = " ".join(made.notes)
        assert ("--interpolation=nearest" in notes) == noted
        assert ("No published row" in notes) == (not starred_rows(made))

    @pytest.mark.parametrize(
        ("own", "evaluated", "star"),
        [
            ("five", ({}, {}), True),
            ("five", ({"test_gazes": "random"},) * 2, False),
            ("five", ({}, {"test_gazes": "random"}), False),
            ("five", ({"test_gazes": "random"}, {}), False),
            ("random", ({}, {}), False),
            ("random", ({"test_gazes": "five"},) * 2, True),
            ("random", ({"test_gazes": "five"}, {}), False),
        ],
    )
    def test_options_of_the_evaluations_override_the_run(
        self, own, evaluated, star
    ):
        configs = PROTOCOLS["handover"].evaluations((320, 320, 3), 10)
        records = [
            {**c.describe(), "num_examples": 8, "options": options}
            for c, options in zip(configs, evaluated, strict=False)
        ]
        options = {**RETINA, "test_gazes": own}
        made = table("resnet", options=options, records=records)
        assert starred_rows(made) == (["retinal sampling *"] if star else [])


@pytest.mark.parametrize(
    ("adversarial", "line"),
    [
        (None, "S3TA-16"),
        ({"objective": "madry", "steps": 10}, "S3TA-16"),
        ({"objective": "madry", "steps": 30}, "S3TA-16-30"),
        ({"objective": "noise", "steps": None}, "S3TA-16"),
    ],
)
def test_training_attack_is_read_from_the_run(tmp_path, adversarial, line):
    run = {
        "model": "s3ta",
        "dataset": "imagenet",
        "class_names": ["boa", "bee"],
        "num_classes": 2,
        "image_shape": [224, 224, 3],
        "model_options": {"vision_strides": ["1", "2", "1", "1"]},
        "adversarial": adversarial,
    }
    (tmp_path / "config.json").write_text(json.dumps(run))
    (tmp_path / "attacks").mkdir()
    config = adversary.AdversaryConfig(
        tmp_path, (), run=run_folder.read_config(tmp_path), protocol="s3ta"
    )
    adversary.show_protocol(config, [])
    lines = (tmp_path / "attacks" / "s3ta.table.csv").read_text().splitlines()
    assert [x.split(",")[1] for x in lines if x.startswith("same,")] == [line]
