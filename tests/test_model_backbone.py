"""Every registered model: logits, training, save and load, glimpses."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from saccade.models import attention, blocks, registry
from saccade.training import step as training_step

import glimpse
import model_backbone

SMALL = {"width": 4}
BRANCHED = {"num_transformers": 3, "width": 4, "localization_width": 4}
S3TA = {
    "vision_width": 4,
    "num_heads": 2,
    "frequencies": 2,
    "controller_units": 8,
    "hidden_units": 8,
}
# One row for each value of each option that changes the architecture.
CASES = {
    "resnet": ("resnet", SMALL, (24, 24, 3)),
    "resnet-sampling": ("resnet", {**SMALL, "sampling": True}, (24, 24, 3)),
    "resnet-upsample": (
        "resnet",
        {**SMALL, "coarse_fixations": True, "coarse_variant": "upsample"},
        (24, 24, 3),
    ),
    "resnet-branched": (
        "resnet",
        {"width": 2, "branched_network": True, "backbone": "simple_cnn"},
        (16, 16, 3),
    ),
    "resnet-auto": ("resnet", {"backbone": "auto", **SMALL}, (32, 32, 1)),
    "resnet-pooled": (
        "resnet",
        {**SMALL, "backbone": "simple_cnn", "global_pooling": True},
        (16, 16, 1),
    ),
    "resnet_cifar": ("resnet_cifar", SMALL, (16, 16, 3)),
    "resnet_cifar-sampling": (
        "resnet_cifar",
        {**SMALL, "sampling": True, "downsampling": "none"},
        (16, 16, 3),
    ),
    "resnet_cifar-coarse": (
        "resnet_cifar",
        {**SMALL, "coarse_fixations": True},
        (16, 16, 3),
    ),
    "resnet_cifar-blur": (
        "resnet_cifar",
        {
            **SMALL,
            "coarse_fixations": True,
            "coarse_variant": "blur",
            "feedback": True,
        },
        (16, 16, 3),
    ),
    "ecnn": ("ecnn", {"width": 2}, (16, 16, 3)),
    "ecnn-auxiliary": (
        "ecnn",
        {"width": 2, "auxiliary": True, "pooling": "max", "dropout": 0.1},
        (16, 16, 1),
    ),
    "ecnn-single": ("ecnn", {"width": 2, "single_scale": True}, (20, 16, 3)),
    "ecnn-photographs": (
        "ecnn",
        {"width": 2, "scale4_freeze": True, "pooling": "mean"},
        (66, 66, 3),
    ),
    "madry_cnn": ("madry_cnn", SMALL, (12, 12, 1)),
    **{
        f"attention_mnist-{kind}": (
            "attention_mnist",
            {"attention_kind": kind},
            (20, 20, 1),
        )
        for kind in model_backbone.ATTENTIONS
    },
    "attention_mnist-restricted": (
        "attention_mnist",
        {"restricted_attention": True, "regularization": 0.01},
        (20, 20, 1),
    ),
    "parallel_transformers": ("parallel_transformers", BRANCHED, (20, 20, 1)),
    "parallel_transformers-shared": (
        "parallel_transformers",
        {**BRANCHED, "shared": True, "restricted_attention": False},
        (20, 20, 1),
    ),
    "parallel_transformers-rgb": (
        "parallel_transformers",
        {**BRANCHED, "view_size": 12, "backbone": "simple_cnn"},
        (24, 20, 3),
    ),
    "multi_gaze": ("multi_gaze", BRANCHED, (20, 20, 1)),
    "multi_gaze-shared": (
        "multi_gaze",
        {**BRANCHED, "shared": True, "initialize_fixations": False},
        (20, 20, 1),
    ),
    "multi_gaze-rgb": (
        "multi_gaze",
        {
            **BRANCHED,
            "backbone": "simple_cnn",
            "localization": "simple_cnn",
            "view_size": 16,
            "gaze_range": 5.0,
            "dropout": 0.1,
        },
        (24, 20, 3),
    ),
    "multi_gaze-grid": (
        "multi_gaze",
        {
            **BRANCHED,
            "localization": "resnet20",
            "localization_grid": 3,
            "max_ratio": 5.0,
        },
        (20, 20, 1),
    ),
    "multi_gaze-resnet18": (
        "multi_gaze",
        {
            **BRANCHED,
            "backbone": "resnet18",
            "localization": "simple_cnn",
            "num_transformers": 1,
        },
        (66, 66, 3),
    ),
    "s3ta": ("s3ta", {**S3TA, "num_steps": 2}, (16, 16, 1)),
    "s3ta-remat": (
        "s3ta",
        {**S3TA, "vision": "resnet_cifar", "num_steps": 2, "remat": True},
        (16, 16, 3),
    ),
    "s3ta-v2": (
        "s3ta",
        {
            **S3TA,
            "num_steps": 1,
            "vision": "resnet18_v2",
            "vision_strides": (1, 2, 1, 2),
            "key_channels": 5,
            "num_heads": 1,
        },
        (32, 16, 3),
    ),
    "resnet50": ("resnet50", {**SMALL, "depth": 18}, (16, 16, 3)),
    "resnet152": ("resnet152", {**SMALL, "depth": 34}, (16, 16, 3)),
    "denoise": ("denoise", {**SMALL, "depth": 18}, (16, 16, 3)),
    "resnet_se": ("resnet_se", {"width": 16, "depth": 50}, (16, 16, 3)),
    "preact_resnet18": ("preact_resnet18", SMALL, (16, 16, 3)),
    "wide_resnet": (
        "wide_resnet",
        {**SMALL, "depth": 10, "widen": 2, "dropout": 0.1},
        (16, 16, 3),
    ),
}
ALL_CASES = dict(CASES)
# The others take minutes in sum: TensorFlow's slow tests have them.
LIGHT = (
    "resnet-auto",
    "resnet_cifar",
    "madry_cnn",
    "attention_mnist-transformer",
    "parallel_transformers",
    "multi_gaze",
    "s3ta",
    "ecnn-auxiliary",
)
if keras.config.backend() != "tensorflow":
    CASES = {name: CASES[name] for name in LIGHT}


def cases(everywhere=LIGHT):
    """A parameter for each case, marked by where it runs."""
    return [
        pytest.param(
            case,
            marks=[
                *([pytest.mark.every_backend] if case in everywhere else []),
                *([] if case in LIGHT else [pytest.mark.slow]),
            ],
        )
        for case in CASES
    ]


def numpy(x):
    return ops.convert_to_numpy(x)


def make(case):
    """A fresh model and two images."""
    name, options, shape = ALL_CASES[case]
    keras.utils.set_random_seed(0)
    model = model_backbone.create(
        name, num_classes=4, image_shape=shape, **options
    )
    images = np.random.default_rng(0).random((2, *shape)).astype("float32")
    return model, images


# For tests that do not change the model.
share = functools.cache(make)


@functools.cache
def shared_logits(case):
    """The logits of the shared model of a case."""
    model, images = share(case)
    return numpy(model(images))


def test_every_registered_model_has_a_case():
    assert {name for name, _, _ in ALL_CASES.values()} == set(
        model_backbone.names()
    )


@pytest.mark.parametrize("case", cases())
def test_forward_is_finite_deterministic_logits(case):
    model, images = share(case)
    logits = shared_logits(case)
    assert logits.shape == (2, 4) and logits.dtype == np.float32
    assert np.all(np.isfinite(logits))
    np.testing.assert_array_equal(logits, numpy(model(images, training=False)))
    # Results do not depend on the rest of the batch.
    single = numpy(model(images[1:]))
    np.testing.assert_allclose(single[0], logits[1], atol=1e-4)


@pytest.mark.parametrize("case", cases())
def test_training_step_changes_every_weight(case):
    """The localization kernel starts at zero, so noise is added to weights."""
    model, images = make(case)
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        value = numpy(variable)
        noise = rng.normal(size=value.shape) * 0.1
        variable.assign((value + noise).astype("float32"))
    before = [numpy(v).copy() for v in model.trainable_variables]
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    step = training_step.make_step(model, optimizer, training_step.STANDARD)
    labels = np.array([0, 3], "int32")
    for number in range(2):
        loss, _ = step(images, labels, np.array([0, 1], "int32"), number)
        assert np.isfinite(numpy(loss))
    unchanged = [
        v.path
        for v, old in zip(model.trainable_variables, before, strict=True)
        if np.array_equal(numpy(v), old)
        # Batch normalization removes the bias of the layer before it.
        and not (v.name == "bias" and "conv" in v.path)
        and not (v.name == "bias" and "project" in v.path)
    ]
    assert not unchanged


@pytest.mark.parametrize("case", cases(everywhere=("multi_gaze", "s3ta")))
def test_save_and_load_safely(case, tmp_path):
    model, images = share(case)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", safe_mode=True)
    np.testing.assert_allclose(
        numpy(loaded(images)), shared_logits(case), atol=1e-6
    )
    model.save_weights(tmp_path / "m.weights.h5")
    other, _ = make(case)
    for variable in other.variables:
        if variable.dtype == "float32":
            variable.assign(numpy(variable) + 1.0)
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(numpy(other(images)), shared_logits(case))
    ours = model_backbone.glimpses(model)(images)
    theirs = model_backbone.glimpses(loaded)(images)
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-5)


@pytest.mark.parametrize("case", cases())
def test_glimpses_have_the_documented_shapes(case):
    model, images = share(case)
    name, options, shape = CASES[case]
    shown = model_backbone.glimpses(model)(images)
    plain = name.startswith("resnet") and not (
        options.get("sampling") or options.get("coarse_fixations")
    )
    if plain or not model_backbone.entry(name).shows:
        assert shown == {}
        return
    assert set(shown) == set(model_backbone.entry(name).shows)
    if "maps" in shown:
        maps = shown["maps"]
        count = options["num_steps"] * options["num_heads"]
        assert maps.shape[:2] == (2, count) and maps.min() >= 0
        np.testing.assert_allclose(maps.sum(axis=(2, 3)), 1.0, atol=1e-5)
        return
    count = shown["gazes"].shape[1]
    assert shown["gazes"].shape == (2, count, 2)
    assert shown["boxes"].shape == (2, count, 4)
    assert shown["boxes"].min() >= 0 and shown["boxes"].max() <= 1
    side = options.get("view_size")
    size = (side, side) if side else shape[:2]
    if options.get("coarse_fixations") or name == "ecnn":
        size = shown["views"].shape[2:4]  # tests/test_glimpse.py has them.
    assert shown["views"].shape == (2, count, *size, shape[-1])


@pytest.mark.every_backend
def test_shown_views_are_the_glimpses_at_the_shown_gazes():
    model, images = make("multi_gaze")
    shown = model_backbone.glimpses(model)(images)
    want = numpy(glimpse.retinal_warp(images, shown["gazes"]))
    np.testing.assert_allclose(shown["views"], want, atol=1e-5)
    start = np.tanh(attention.spread_fixations(3)) * 10  # Half of 20 pixels.
    np.testing.assert_allclose(shown["gazes"][0], start, atol=1e-4)


@pytest.mark.every_backend
def test_sampling_averages_the_logits_of_the_five_fixed_gazes():
    model, images = make("resnet_cifar-sampling")
    backbone, head = model.get_layer("backbone"), model.get_layer("logits")
    normalize = next(
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.Normalization)
    )
    logits = []
    for gaze in glimpse.five_gazes(4):  # A quarter of 16 pixels.
        view = ops.expand_dims(glimpse.retinal_warp(images, gaze), 1)
        view = normalize(view)[:, 0]
        logits.append(numpy(head(backbone(view, training=False))))
    np.testing.assert_allclose(
        numpy(model(images)), np.mean(logits, 0), atol=1e-4
    )


def test_shared_views_use_one_branch():
    def branches(case):
        return [
            layer.name
            for layer in make(case)[0].layers
            if layer.name.startswith("branch")
        ]

    assert branches("multi_gaze-shared") == ["branch"]
    assert branches("multi_gaze") == ["branch1", "branch2", "branch3"]


def test_stem_strides_can_be_overridden():
    def last_map(**options):
        model = model_backbone.create(
            "resnet", num_classes=3, image_shape=(32, 32, 3), width=2, **options
        )
        return model.get_layer("backbone").get_layer("stage4").output.shape[1]

    assert last_map() == 4  # Fits a small image by itself.
    assert last_map(stem_stride=2) == 2
    assert last_map(stem_stride=2, pool_stride=2) == 1


def test_madry_cnn_has_the_published_size():
    """The parameters of the code of Madry et al.; no normalization layer."""
    model = model_backbone.create(
        "madry_cnn", num_classes=10, image_shape=(28, 28, 1)
    )
    convolutions = 5 * 5 * 32 + 32 + 5 * 5 * 32 * 64 + 64
    dense = 7 * 7 * 64 * 1024 + 1024 + 1024 * 10 + 10
    assert model.count_params() == convolutions + dense == 3_274_634
    assert [type(layer).__name__ for layer in model.layers] == [
        "InputLayer",
        "Functional",
        "Dense",
    ]


def test_frozen_controls_have_their_fixed_views():
    model, images = make("attention_mnist-dummy")
    shown = model_backbone.glimpses(model)(images)
    np.testing.assert_array_equal(shown["views"][:, 0], images)
    model, images = make("attention_mnist-dummy_scaled")
    boxes = model_backbone.glimpses(model)(images)["boxes"]
    np.testing.assert_allclose(boxes[0, 0], [0.125, 0.125, 0.875, 0.875])


@pytest.mark.parametrize(
    "shape,want",
    [
        ((320, 320, 3), "resnet18"),
        ((224, 224, 3), "resnet18"),
        ((96, 96, 3), "resnet18"),
        ((64, 64, 3), "resnet20"),
        ((32, 32, 3), "resnet20"),
        ((40, 40, 1), "simple_cnn"),
        ((28, 28, 1), "simple_cnn"),
    ],
)
def test_default_backbone_depends_on_the_image_size(shape, want):
    assert blocks.fitting(shape) == want


@pytest.mark.parametrize(
    "name,options,match",
    [
        ("multigaze", {}, "model='multigaze'. Did you mean multi_gaze"),
        ("multi_gaze", {"num_transformer": 2}, "mean num_transformers"),
        ("multi_gaze", {"num_transformers": 0}, "num_transformers=0"),
        ("multi_gaze", {"backbone": "resnet19"}, "Did you mean resnet18"),
        ("attention_mnist", {"attention_kind": "retna"}, "mean retina"),
        (
            "attention_mnist",
            {"attention_kind": "dummy", "regularization": 0.01},
            "no regularization with attention=dummy",
        ),
        (
            "attention_mnist",
            {"attention_kind": "retina", "restricted_attention": True},
            "no restricted_attention with attention=retina",
        ),
        (
            "attention_mnist",
            {"gaze_range": 3.0},
            "no gaze_range with attention=transformer",
        ),
        ("resnet", {"num_classes": 1}, "at least 2 classes, got 1"),
        (
            "resnet",
            {"backbone": "resnet20", "global_pooling": True},
            "global_pooling with the backbone simple_cnn.*backbone=resnet20",
        ),
    ],
)
def test_bad_options_raise_and_suggest_similar_names(name, options, match):
    options = {"num_classes": 3, "image_shape": (8, 8, 1), **options}
    with pytest.raises(ValueError, match=match):
        model_backbone.create(name, **options)


def test_resnet_and_s3ta_of_one_width_have_the_same_vision_net():
    shape = {"num_classes": 3, "image_shape": (16, 16, 1)}
    plain = model_backbone.create(
        "resnet", **shape, backbone="simple_cnn", width=6
    )
    s3ta = model_backbone.create("s3ta", **shape, **{**S3TA, "vision_width": 6})
    stages = [
        [v.shape for v in net.trainable_variables if "stage" in v.path]
        for net in (plain, s3ta)
    ]
    assert stages[0] == stages[1]
    assert (3, 3, 1, 6) in stages[0] and (3, 3, 6, 12) in stages[0]


@pytest.mark.every_backend
def test_global_pooling_ignores_positions():
    """Shifting a spot far from the borders does not change the mean."""
    images = np.zeros((2, 32, 32, 1), "float32")
    images[0, 8:12, 8:12] = images[1, 16:20, 20:24] = 1.0
    for pooling in (True, False):
        model = model_backbone.create(
            "resnet",
            num_classes=3,
            image_shape=(32, 32, 1),
            backbone="simple_cnn",
            global_pooling=pooling,
        )
        first, shifted = ops.convert_to_numpy(model(images))
        assert np.allclose(first, shifted, atol=1e-5) == pooling


def test_registering_a_name_twice_raises():
    with pytest.raises(ValueError, match="already registered by multi_gaze"):
        registry.register("multi_gaze")(lambda: None)


@pytest.mark.every_backend
def test_plain_keras_can_fit_multi_gaze():
    model, images = make("multi_gaze")
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    history = model.fit(images, np.array([0, 1]), epochs=2, verbose=0)
    first, second = history.history["loss"]
    assert second < first < np.inf
