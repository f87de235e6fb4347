"""Crops, cortical scales, heads and feedback, by their definitions."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from saccade.attacks import gradient as gradient_attacks
from saccade.data import splits as image_splits
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import evaluate as robust_evaluation
from saccade.models import resnets
from saccade.training import objectives
from saccade.training import step as training_step

import glimpse
import model_backbone

SHAPE = (16, 16, 3)
# Layers and counts do not depend on the backend; TensorFlow builds them
# fastest.
structural = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="does not depend on the backend",
)


def numpy(x):
    return ops.convert_to_numpy(x)


def make(name, shape=SHAPE, **options):
    """A new model with random weights and batch statistics."""
    keras.utils.set_random_seed(0)
    model = model_backbone.create(
        name, num_classes=4, image_shape=shape, **options
    )
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if variable.dtype == "float32":
            noise = rng.random(variable.shape).astype("float32") * 0.2
            variable.assign(numpy(variable) + noise)
    return model


share = functools.cache(make)


def pictures(count=3, shape=SHAPE):
    rng = np.random.default_rng(0)
    return rng.random((count, *shape)).astype("float32")


def normalized(views):
    """`blocks.normalize` in NumPy."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((numpy(views) - mean) / std).astype("float32")


def cross_entropy(logits, labels):
    logits = np.float64(numpy(logits))
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(p[np.arange(len(labels)), labels])


# --- Coarse fixations --------------------------------------------------------


@pytest.mark.parametrize("variant", glimpse.COARSE_VARIANTS)
def test_coarse_fixations_average_the_logits_of_five_crops(variant):
    model = share("resnet_cifar", width=2, coarse_fixations=True,
                  coarse_variant=variant)  # fmt: skip
    images = pictures()
    found = glimpse.coarse_fixation(16, variant)
    look = glimpse.CoarseFixation(found.side, found.blur, found.enlarge)
    logits = []
    for gaze in glimpse.five_gazes(found.reach):
        views, _ = look(images, np.tile(gaze, (3, 1, 1)))
        features = model.get_layer("backbone")(normalized(views)[:, 0])
        logits.append(numpy(model.get_layer("logits")(features)))
    np.testing.assert_allclose(
        numpy(model(images)), np.mean(logits, 0), rtol=1e-4, atol=1e-4
    )


@structural
def test_gaze_range_sets_the_range_of_the_fixations():
    model = share("resnet_cifar", width=2, coarse_fixations=True,
                  gaze_range=5.5)  # fmt: skip
    gazes = model_backbone.glimpses(model)(pictures(1))["gazes"]
    np.testing.assert_array_equal(gazes[0], glimpse.five_gazes(5))


@pytest.mark.parametrize(
    "name,options",
    [("resnet_cifar", {"coarse_fixations": True}), ("ecnn", {})],
    ids=["coarse", "ecnn"],
)
def test_random_gazes_make_a_stochastic_model(name, options):
    model = share(name, width=2, test_gazes="random", **options)
    assert model_backbone.is_stochastic(model)
    assert not model_backbone.is_stochastic(share(name, width=2, **options))
    shown = model_backbone.glimpses(model)
    one, two = (shown(pictures())["gazes"] for _ in range(2))
    assert np.any(one != two) and np.all(one == np.rint(one))
    # All images of a batch share the gaze, so that results do not depend on the
    # order or on the rest of the batch.
    np.testing.assert_array_equal(one, np.broadcast_to(one[:1], one.shape))


@structural
def test_eot_evaluation_does_not_depend_on_the_batch_size():
    model = share(
        "resnet_cifar", width=2, coarse_fixations=True, test_gazes="random"
    )
    images = pictures(7)
    labels = model.predict(images, verbose=0).argmax(-1).astype("int32")
    labels[[1, 3]] = (labels[[1, 3]] + 1) % 4
    split = image_splits.Split("test", labels, lambda i: images[i])
    attack = gradient_attacks.PGD(epsilon=0.02, steps=2)
    found = [
        robust_evaluation.evaluate(
            model,
            split,
            evaluation_config.EvaluationConfig(attack, eot=2, batch_size=size),
            save_images=-1,
        )[1]
        for size in (3, 7)
    ]
    for name in ("adversarial", "adversarial_logits", "clean_logits"):
        small, large = (
            dict(zip(f["indices"], f[name], strict=True)) for f in found
        )
        for index, value in small.items():
            np.testing.assert_allclose(value, large[index], atol=2e-4)


# --- Cortical sampling -------------------------------------------------------


def scale_features(model, images, gazes, scales):
    """The features of each scale, given one gaze for each image."""
    look = glimpse.CorticalSampling(scales.sides, scales.radii, scales.centred)
    views = normalized(look(images, gazes[:, None])[0])
    return [
        numpy(model.get_layer(f"scale{i + 1}")(views[:, i]))
        for i in range(len(scales.sides))
    ]


@pytest.mark.parametrize("pooling", ["concat", "mean", "max"])
def test_ecnn_joins_its_scales_and_averages_five_gazes(pooling):
    model = share("ecnn", width=2, pooling=pooling)
    images, scales = pictures(), glimpse.cortical_scales(16)
    join = {
        "concat": lambda f: np.concatenate(f, axis=-1),
        "mean": lambda f: np.mean(f, axis=0),
        "max": lambda f: np.max(f, axis=0),
    }[pooling]
    logits = []
    for gaze in glimpse.five_gazes(scales.reach):
        features = scale_features(model, images, np.tile(gaze, (3, 1)), scales)
        logits.append(numpy(model.get_layer("logits")(join(features))))
    np.testing.assert_allclose(
        numpy(model(images)), np.mean(logits, 0), rtol=1e-4, atol=1e-4
    )


@structural
def test_ecnn_for_photographs_has_the_nets_of_the_handover():
    """Four ResNet-18 of width 45 on 40x40 pixels, with a last map of 5x5."""
    model = model_backbone.create(
        "ecnn", num_classes=10, image_shape=(320, 320, 3)
    )
    one = resnets.resnet18((40, 40, 3), width=45, stem_stride=1, pool_stride=1)
    head = 4 * 8 * 45 * 10 + 10
    assert model.count_params() == 4 * one.count_params() + head
    for index in range(4):
        net = model.get_layer(f"scale{index + 1}")
        assert net.input.shape[1:] == (40, 40, 3)
        assert net.get_layer("stage4").output.shape[1:] == (5, 5, 360)


@structural
def test_ecnn_for_small_photographs_has_the_nets_of_the_handover():
    model = model_backbone.create(
        "ecnn", num_classes=10, image_shape=(32, 32, 3)
    )
    for index in range(2):
        net = model.get_layer(f"scale{index + 1}")
        assert net.input.shape[1:] == (12, 12, 3)
        assert net.get_layer("stage1").output.shape[-1] == 21
        # The last stage does not halve the resolution.
        assert net.get_layer("stage3").output.shape[1:] == (6, 6, 84)


@structural
def test_single_scale_is_the_largest_one():
    model = share("ecnn", width=2, single_scale=True)
    shown = model_backbone.glimpses(model)(pictures(1))
    side = glimpse.cortical_scales(16).sides[-1]
    heights = shown["boxes"][..., 2] - shown["boxes"][..., 0]
    np.testing.assert_allclose(heights, side / 16, atol=1e-6)
    assert shown["views"].shape[1] == 5


def test_frozen_scale_does_not_move_with_the_gaze():
    model = model_backbone.create(
        "ecnn", num_classes=4, image_shape=(72, 72, 3), width=2,
        scale4_freeze=True,
    )  # fmt: skip
    images = pictures(1, (72, 72, 3))
    shown = model_backbone.glimpses(model)(images)
    np.testing.assert_array_equal(shown["gazes"][0, 3::4], np.zeros((5, 2)))
    np.testing.assert_array_equal(shown["boxes"][0, 3::4], [[0, 0, 1, 1]] * 5)
    np.testing.assert_array_equal(
        shown["gazes"][0, ::4], glimpse.five_gazes(18)
    )


def test_single_frozen_scale_is_the_image_without_random_gazes():
    model = model_backbone.create(
        "ecnn", num_classes=4, image_shape=(72, 72, 3), width=2,
        scale4_freeze=True, single_scale=True,
    )  # fmt: skip
    images = pictures(2, (72, 72, 3))
    shown = model_backbone.glimpses(model)(images)
    np.testing.assert_array_equal(shown["boxes"], [[[0, 0, 1, 1]]] * 2)
    assert shown["views"].shape[1] == 1
    np.testing.assert_allclose(
        numpy(model(images, training=False)),
        numpy(model(images[::-1].copy(), training=False))[::-1],
        atol=1e-5,
    )


@structural
def test_dropout_is_applied_to_the_joined_features():
    model = share("ecnn", width=2, dropout=0.75)
    layer = model.get_layer("dropout")
    assert layer.rate == 0.75
    joined = model.get_layer("join").output
    assert layer.input is joined and joined.shape[-1] == 16


# --- Auxiliary heads ---------------------------------------------------------


def set_seeds(model):
    """Sets the seed states of a model to those of the first training step."""
    model_backbone.key_generators(model_backbone.generators(model), 0, 0)


def values(model, images, tensors):
    """Values of tensors inside a model in the first training step."""
    set_seeds(model)
    reader = keras.Model(model.input, tensors)
    return [numpy(x) for x in reader(images, training=True)]


class TestHeads:
    labels = np.array([0, 3, 1], "int32")

    def model(self, fresh=False):
        return (make if fresh else share)("ecnn", width=2, auxiliary=True)

    @pytest.mark.parametrize("name", ["standard", "pairs"])
    def test_objective_is_the_mean_over_heads(self, name):
        model = self.model()
        clean, crafted = pictures(), 1.0 - pictures()
        attack = gradient_attacks.FGSM(epsilon=0.1)
        objective = {
            "standard": objectives.Standard(),
            "pairs": objectives.Madry(attack=attack, clean_weight=0.25),
        }[name]
        both = crafted
        if name == "pairs":
            both = np.concatenate([crafted, clean])
        names = ("average", "average1", "average2")
        heads = values(
            model, both, [model.get_layer(name).output for name in names]
        )
        adversarial = [cross_entropy(head[:3], self.labels) for head in heads]
        want = np.mean(adversarial, 0)
        if name == "pairs":
            clean_losses = [
                cross_entropy(head[3:], self.labels) for head in heads
            ]
            want = 0.75 * want + 0.25 * np.mean(clean_losses, 0)
        set_seeds(model)
        found, logits = objective.loss(
            training_step.in_training(model), clean, crafted, self.labels
        )
        np.testing.assert_allclose(numpy(found), want, rtol=1e-4)
        np.testing.assert_allclose(
            numpy(logits), heads[0][:3], rtol=1e-4, atol=1e-5
        )

    def test_step_updates_each_head_along_its_own_gradient(self):
        """For a dense layer it is the features times (probability - label)."""
        model, images = self.model(fresh=True), pictures()
        dense = [model.get_layer(f"logits{i}") for i in ("", 1, 2)]
        kernels = [layer.kernel for layer in dense]
        before = [numpy(kernel).copy() for kernel in kernels]
        optimizer = keras.optimizers.SGD(0.5)
        optimizer.build(model.trainable_variables)
        step = training_step.make_step(model, optimizer, objectives.Standard())
        logits = values(model, images, [layer.output for layer in dense])
        features = values(model, images, [layer.input for layer in dense])
        step(images, self.labels, np.arange(3, dtype="int32"), 0)
        for kernel, old, x, y in zip(
            kernels, before, features, logits, strict=True
        ):
            p = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
            grad = x.T @ (p - np.eye(4)[self.labels]) / 3
            np.testing.assert_allclose(
                numpy(kernel), old - 0.5 * grad / 3, rtol=1e-3, atol=1e-4
            )

    def test_logits_are_those_of_the_main_head(self):
        model, plain = self.model(), make("ecnn", width=2)
        for layer in plain.layers:
            if layer.variables:
                layer.set_weights(model.get_layer(layer.name).get_weights())
        np.testing.assert_allclose(
            numpy(model(pictures())), numpy(plain(pictures())), rtol=1e-5
        )

    def test_models_without_auxiliary_heads_return_logits_in_training(self):
        model = share("ecnn", width=2)
        want, _ = values(model, pictures(), [model.output, model.input])
        set_seeds(model)
        got = numpy(training_step.in_training(model)(pictures()))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# --- Branches and feedback ---------------------------------------------------


@structural
def test_branched_network_concatenates_four_narrow_nets():
    model = model_backbone.create(
        "resnet", num_classes=10, image_shape=(96, 96, 3),
        branched_network=True,
    )  # fmt: skip
    one = resnets.resnet18((96, 96, 3), width=27)
    head = 4 * 8 * 27 * 10 + 10
    assert model.count_params() - head == 4 * one.count_params()
    net = make("resnet", branched_network=True, width=2).get_layer("backbone")
    images = normalized(pictures())
    want = [numpy(net.get_layer(f"branch{i}")(images)) for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(
        numpy(net(images)), np.concatenate(want, -1), rtol=1e-5
    )
    assert np.abs(want[0] - want[1]).max() > 1e-3


def unrolled(net, images):
    """The feedback net by its definition, with the weights of its layers."""

    def conv(x, name, stride=1):
        kernel, bias = net.get_layer(name).get_weights()
        return numpy(ops.conv(x, kernel, strides=stride, padding="same")) + bias

    def norm(x, name):
        gamma, beta, mean, variance = net.get_layer(name).get_weights()
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    def block(x, name, turn, stride=1):
        own = f"{name}_pass{turn}"
        y = norm(conv(x, f"{name}_conv1", stride), f"{own}_norm1")
        y = norm(conv(np.maximum(y, 0), f"{name}_conv2"), f"{own}_norm2")
        if y.shape != x.shape:
            x = norm(conv(x, f"{name}_project", stride), f"{own}_project_norm")
        return np.maximum(x + y, 0)

    x = np.maximum(norm(conv(images, "stem_conv"), "stem_norm"), 0)
    for stage in (1, 2, 3):
        name = f"stage{stage}"
        a = block(x, f"{name}_block1", 1, 1 if stage == 1 else 2)
        c = block(a, f"{name}_block3", 1)
        back = norm(conv(c, f"{name}_feedback_conv"), f"{name}_feedback_norm")
        x = block(np.maximum(a + back, 0), f"{name}_block3", 2)
    return x.mean(axis=(1, 2))


def test_feedback_equals_its_definition():
    net = make("resnet_cifar", feedback=True, width=3).get_layer("backbone")
    images = normalized(pictures())
    np.testing.assert_allclose(
        numpy(net(images)), unrolled(net, images), rtol=1e-3, atol=1e-3
    )


@structural
def test_feedback_removes_the_weights_of_a_block():
    """A stage has two blocks and a 1x1 convolution instead of three blocks."""

    def count(**options):
        return model_backbone.create(
            "resnet_cifar", num_classes=10, image_shape=(32, 32, 3), **options
        ).count_params()

    blocks = sum(2 * (9 * f * f + f) + 2 * 4 * f for f in (16, 32, 64))
    # Two normalizations of the second pass, the connection and its
    # normalization.
    back = sum(2 * 4 * f + f * f + f + 4 * f for f in (16, 32, 64))
    assert count(feedback=True) == count() - blocks + back


@structural
@pytest.mark.parametrize("downsampling,side", [("not_last", 8), ("none", 16)])
def test_feedback_supports_downsampling(downsampling, side):
    net = make("resnet_cifar", feedback=True, width=2, dropout=0.1,
               downsampling=downsampling).get_layer("backbone")  # fmt: skip
    assert net.get_layer("stage3").output.shape[1:] == (side, side, 8)
    assert net.get_layer("dropout").rate == 0.1


# --- Bad options -------------------------------------------------------------


@pytest.mark.parametrize(
    "name,options,match",
    [
        ("resnet", {"sampling": True, "coarse_fixations": True},
         "sampling=True, coarse_fixations=True"),
        ("resnet", {"coarse_variant": "blur"}, "coarse_fixations=False"),
        ("resnet", {"coarse_variant": "blurr"}, "Did you mean blur"),
        ("resnet", {"test_gazes": "random"}, "add sampling or coarse"),
        ("resnet_cifar", {"gaze_range": 3.0}, "gaze_range=3.0"),
        ("resnet", {"auxiliary": True}, "no option 'auxiliary'"),
        ("resnet", {"feedback": True}, "no option 'feedback'"),
        ("resnet_cifar", {"branched_network": True}, "no option 'branched"),
        ("ecnn", {"sampling": True}, "no option 'sampling'"),
        ("ecnn", {"coarse_fixations": True}, "no option 'coarse_fixations'"),
        ("ecnn", {"pooling": "average"}, "pooling='average'"),
        ("ecnn", {"pooling": "maximum"}, "Did you mean max"),
        ("ecnn", {"test_gazes": "ten"}, "five, random"),
        ("ecnn", {"gaze_range": -2.0}, "gaze_range=-2"),
        ("ecnn", {"single_scale": True, "auxiliary": True}, "with auxiliary"),
        ("ecnn", {"single_scale": True, "pooling": "max"}, "with pooling"),
        ("ecnn", {"single_scale": True, "scale4_freeze": True,
                  "test_gazes": "random"}, "to freeze the fourth"),
        ("resnet", {"interpolation": "nearest"}, "Expected sampling with"),
        ("resnet_cifar", {"interpolation": "nearest",
                          "coarse_fixations": True}, "of whole pixels"),
        ("resnet", {"backbone": "resnet20", "stem_stride": 2},
         "no stem_stride with the backbone resnet20"),
        ("ecnn", {"scale4_freeze": True}, "to freeze the fourth"),
        ("resnet_cifar", {"feedback": True, "downsampling": "lst"},
         "downsampling='lst'"),
    ],
)  # fmt: skip
def test_bad_option_combinations_raise(name, options, match):
    with pytest.raises(ValueError, match=match) as error:
        model_backbone.create(
            name, num_classes=3, image_shape=(32, 32, 3), **options
        )
    assert "\n" not in str(error.value)
