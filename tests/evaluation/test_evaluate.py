"""Evaluations count every image once and do not depend on batches or order."""

import dataclasses
import gc
import json
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops
from toys import Jitter

from saccade.attacks import autoattack, losses, runner, square
from saccade.attacks import base as attack_base
from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import registry as attack_registry
from saccade.core import compilation, randomness, run_folder
from saccade.data import splits as image_splits
from saccade.evaluation import resume as evaluation_state
from saccade.evaluation import tally as evaluation_tally
from saccade.evaluation.config import EvaluationConfig
from saccade.evaluation.evaluate import accuracy, evaluate

SHAPE = (6, 6, 1)
NUM_CLASSES = 4
PGD = gradient_attacks.PGD(epsilon=0.05, steps=4)


def array(x):
    return ops.convert_to_numpy(x)


def make_split(count=37, seed=0):
    """Noisy images with one bright quadrant, which is their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, count).astype("int32")
    images = rng.random((count, *SHAPE)) * 0.7
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[3 * row : 3 * row + 3, 3 * column : 3 * column + 3] += 0.15
    images = np.clip(images, 0, 1).astype("float32")
    return image_splits.Split("test", labels, lambda i: images[i]), images


@pytest.fixture(scope="module")
def model():
    """Classifies by the brightest quadrant, after batch normalization."""
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.BatchNormalization(),
            layers.AveragePooling2D(3),
            layers.Flatten(),
            layers.Dense(NUM_CLASSES),
        ]
    )
    gamma, beta, mean, variance, kernel, bias = model.get_weights()
    rng = np.random.default_rng(0)
    kernel = 20 * np.eye(4) + rng.normal(size=kernel.shape)
    model.set_weights([gamma, beta, mean + 0.4, variance, kernel, bias])
    return model


def forward(model, images):
    return array(model(ops.convert_to_tensor(images), training=False))


@pytest.mark.every_backend
@pytest.mark.parametrize("batch_size", [1, 7, 37, 100])
def test_accuracy_counts_every_image_once(model, batch_size):
    split, images = make_split()
    found = accuracy(model, split, batch_size)
    logits = forward(model, images)
    want = keras.losses.sparse_categorical_crossentropy(
        split.labels, logits, from_logits=True
    )
    assert found["num_examples"] == 37
    assert found["accuracy"] == np.mean(logits.argmax(-1) == split.labels)
    assert found["loss"] == pytest.approx(float(array(want).mean()), abs=1e-4)
    assert 0.5 < found["accuracy"] < 1.0  # Some images are misclassified.


@pytest.mark.parametrize(
    "norm,epsilon",
    [
        pytest.param("linf", 0.05, marks=pytest.mark.every_backend),
        ("l2", 0.4),
        ("l1", 2.0),
    ],
)
@pytest.mark.parametrize("target", ["none", "random", "next", 2])
def test_record_agrees_with_the_returned_images(model, norm, epsilon, target):
    split, images = make_split()
    attack = gradient_attacks.PGD(norm=norm, epsilon=epsilon, steps=3)
    config = EvaluationConfig(attack, target=target, batch_size=16)
    record, arrays = evaluate(model, split, config, save_images=-1)
    labels, out = arrays["labels"], arrays["adversarial"]
    np.testing.assert_array_equal(np.sort(arrays["indices"]), np.arange(37))
    np.testing.assert_array_equal(arrays["clean"], images[arrays["indices"]])
    np.testing.assert_array_equal(labels, split.labels[arrays["indices"]])
    clean = forward(model, arrays["clean"]).argmax(-1) == labels
    predicted = forward(model, out).argmax(-1)
    robust = predicted == labels
    success = ~robust if target == "none" else predicted == arrays["targets"]
    assert record["num_examples"] == 37
    assert record["clean_accuracy"] == clean.mean()
    assert record["robust_accuracy"] == robust.mean() < clean.mean()
    assert record["attack_success"] == success.mean()
    assert record["attack_success_on_correct"] == success[clean].mean()
    assert record["pixel_range"] == [out.min(), out.max()]
    assert record["nonfinite_answers"] == record["nonfinite_crafting"] == 0
    assert 0.5 * epsilon < record["largest_norm"] <= epsilon * (1 + 1e-5)
    if target == "none":
        assert np.all(arrays["targets"] == -1)
    else:
        assert np.all(arrays["targets"] != labels)
    json.dumps(record)


@pytest.mark.every_backend
def test_batch_size_and_order_do_not_change_results(model):
    split, images = make_split()
    attack = gradient_attacks.PGD(epsilon=0.05, steps=3, restarts=2)

    def run(split, **fields):
        config = EvaluationConfig(attack, target="random", **fields)
        record, arrays = evaluate(model, split, config, save_images=-1)
        order = np.argsort(arrays["indices"])
        return record, arrays["adversarial"][order], arrays["targets"][order]

    record, want, targets = run(split, batch_size=37)
    for size in (1, 10):
        other, got, targets_again = run(split, batch_size=size)
        np.testing.assert_array_equal(targets_again, targets)
        np.testing.assert_allclose(got, want, atol=1e-6)
        for key in ("robust_accuracy", "attack_success", "largest_norm"):
            assert other[key] == pytest.approx(record[key], abs=1e-6)


@pytest.fixture(scope="module")
def summing():
    """A net with long sums, whose rounding depends on the order of terms."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(67, activation="relu"),
            layers.Dense(NUM_CLASSES),
        ]
    )


@pytest.mark.every_backend
def test_logits_are_bitwise_equal_for_every_batch_size(summing):
    # Up to 32 rows: XLA shares the sums of larger batches among threads.
    _, images = make_split(32)
    want = runner.logits(summing, images, 32)
    for size in (1, 2, 3, 5, 7, 13):
        got = runner.logits(summing, images, size)
        np.testing.assert_array_equal(got, want, err_msg=f"size {size}")
    # A single image is left over, as at the end of a data set.
    got = runner.logits(summing, images[:17], 16)
    np.testing.assert_array_equal(got, want[:17])


@pytest.mark.parametrize(
    "norm,epsilon",
    [
        pytest.param("linf", 0.05, marks=pytest.mark.every_backend),
        ("l1", 2.0),
    ],
)
def test_square_attack_does_not_depend_on_batch_size(summing, norm, epsilon):
    split, _ = make_split(12)
    # With the net's own predictions as labels, all clean images are correct
    # and some remain robust.
    labels = runner.logits(summing, split.read(range(12)), 12).argmax(-1)
    split = image_splits.Split("test", labels.astype("int32"), split.read)
    attack = square.Square(norm=norm, epsilon=epsilon, n_queries=30)
    found = {}
    for size in (1, 12):
        config = EvaluationConfig(attack, batch_size=size)
        record, arrays = evaluate(summing, split, config, save_images=-1)
        found[size] = record["robust_accuracy"], arrays
    assert found[1][0] == found[12][0]
    for name, values in found[12][1].items():
        np.testing.assert_array_equal(found[1][1][name], values, err_msg=name)


@pytest.mark.every_backend
def test_seed_determines_the_adversarial_images(model):
    split, _ = make_split()
    found = []
    for seed in (0, 0, 1):
        config = EvaluationConfig(PGD, batch_size=37, seed=seed)
        _, arrays = evaluate(model, split, config, save_images=-1)
        found.append(arrays["adversarial"][np.argsort(arrays["indices"])])
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])


def test_subsets_are_random_and_nested(model):
    split, _ = make_split()
    chosen = []
    for count in (5, 12):
        config = EvaluationConfig(PGD, num_examples=count)
        record, arrays = evaluate(model, split, config)
        assert record["num_examples"] == count
        chosen.append(arrays["all_indices"])
    np.testing.assert_array_equal(chosen[1][:5], chosen[0])
    assert sorted(chosen[0]) != list(range(5))


def test_save_images_limits_only_the_returned_images(model):
    split, _ = make_split()
    config = EvaluationConfig(PGD, batch_size=8)
    whole_record, whole = evaluate(model, split, config, save_images=-1)
    record, arrays = evaluate(model, split, config, save_images=11)
    none, empty = evaluate(model, split, config, save_images=0)
    for name, values in arrays.items():
        kept = 37 if name.startswith("all_") else 11
        np.testing.assert_array_equal(values, whole[name][:kept])
    assert len(empty["clean"]) == 0 and len(empty["all_labels"]) == 37
    for key in ("robust_accuracy", "largest_norm", "loss"):
        assert record[key] == whole_record[key] == none[key]


@pytest.mark.every_backend
def test_evaluation_does_not_change_model_variables(model):
    split, _ = make_split()
    before = [array(v).copy() for v in model.variables]
    evaluate(model, split, EvaluationConfig(PGD, batch_size=10))
    accuracy(model, split)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)


@pytest.mark.every_backend
def test_attacks_with_other_settings_share_compiled_functions(
    model, monkeypatch
):
    """Radius, steps and restarts are arguments of one compiled function."""
    split, _ = make_split(8)
    made = []
    compile_call = runner.compilation.compile_call
    monkeypatch.setattr(
        runner.compilation,
        "compile_call",
        lambda *args, **more: made.append(args) or compile_call(*args, **more),
    )
    model = keras.models.clone_model(model)
    norms = []
    for epsilon, steps, restarts in ((0.1, 2, 1), (0.2, 3, 1), (0.2, 3, 2)):
        attack = gradient_attacks.PGD(
            epsilon=epsilon, steps=steps, restarts=restarts
        )
        record, arrays = evaluate(model, split, EvaluationConfig(attack))
        norms.append(record["largest_norm"])
    assert norms == pytest.approx([0.1, 0.2, 0.2], rel=1e-5)
    assert len(made) == 5  # Four parts of the attack and the forward pass.


def test_attack_result_does_not_depend_on_earlier_attacks(model):
    split, _ = make_split()
    fresh = keras.models.clone_model(model)
    fresh.set_weights(model.get_weights())
    attack = gradient_attacks.PGD(epsilon=0.03, steps=5, restarts=3)
    config = EvaluationConfig(attack, batch_size=37)
    evaluate(model, split, EvaluationConfig(PGD, batch_size=37))
    record, arrays = evaluate(model, split, config)
    again, alone = evaluate(fresh, split, config)
    np.testing.assert_array_equal(arrays["adversarial"], alone["adversarial"])
    settings = again["steps"], again["restarts"], again["step_size"]
    assert settings == (5, 3, pytest.approx(0.015))


@pytest.mark.every_backend
def test_accuracy_uses_the_current_weights(model):
    split, _ = make_split()
    model = keras.models.clone_model(model)
    first = accuracy(model, split)
    model.set_weights([w * 0 - 1 for w in model.get_weights()])
    assert accuracy(model, split) != first


@pytest.mark.every_backend
def test_compiled_functions_do_not_keep_the_model_alive(model):
    split, _ = make_split(4)
    model = keras.models.clone_model(model)
    accuracy(model, split)
    function = runner.compiled(model, "f", lambda fn: fn)
    assert runner.compiled(model, "f", lambda fn: fn) is function  # Kept.
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_progress_is_reported_and_context_is_in_the_record(model, monkeypatch):
    split, _ = make_split()
    monkeypatch.setattr(evaluation_state, "GROUP_BYTES", 1)
    calls = []
    config = EvaluationConfig(PGD, batch_size=10)
    record, _ = evaluate(
        model,
        split,
        config,
        context={"dataset": "quadrants"},
        progress=lambda done, total, record: calls.append(
            (done, total, record)
        ),
    )
    done = [c[0] for c in calls]
    assert {10, 20, 30, 37} <= set(done) and done == sorted(done)
    assert all(c[1] == 37 for c in calls)
    assert calls[-1][2]["robust_accuracy"] == record["robust_accuracy"]
    assert record["dataset"] == "quadrants"


def test_fgsm_record(model):
    split, _ = make_split()
    config = EvaluationConfig(gradient_attacks.FGSM(epsilon=0.1))
    record, _ = evaluate(model, split, config)
    assert record["attack"] == "fgsm" and record["epsilon"] == 0.1
    assert record["robust_accuracy"] < record["clean_accuracy"]


def test_split_that_does_not_fit_the_model_is_refused(model):
    labels = np.array([0, 7], "int32")
    many = image_splits.Split(
        "test", labels, lambda i: np.zeros((len(i), *SHAPE))
    )
    with pytest.raises(ValueError, match="4 classes.*label 7.*another data"):
        accuracy(model, many)
    large = image_splits.Split(
        "test", labels % 2, lambda i: np.zeros((len(i), 8, 8, 1))
    )
    with pytest.raises(ValueError, match=r"\(6, 6, 1\).*\(8, 8, 1\)"):
        evaluate(model, large, EvaluationConfig(PGD))
    none = image_splits.Split("test", labels[:0], lambda i: None)
    with pytest.raises(ValueError, match="no images"):
        accuracy(model, none)
    split, _ = make_split()
    with pytest.raises(ValueError, match="from 0 to 3. Received: 9"):
        evaluate(model, split, EvaluationConfig(PGD, target=9))


@pytest.mark.parametrize(
    "fields",
    [
        dict(target="nearest"),
        dict(target=-1),
        dict(num_examples=0),
        dict(batch_size=0),
        dict(seed=-1),
        dict(eot=0),
        dict(read_outs="first"),
        dict(craft_dtype="float16"),
    ],
)
def test_invalid_settings_are_named_in_the_error(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=name) as caught:
        EvaluationConfig(PGD, **fields)
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


FAST = [
    gradient_attacks.PGD(epsilon=0.04, steps=12, restarts=2, keep="first"),
    gradient_attacks.PGDAdam(
        epsilon=0.04, steps=8, boundaries=(3, 5), keep="first"
    ),
    square.Square(epsilon=0.04, n_queries=40),
]


@pytest.mark.every_backend
@pytest.mark.parametrize("attack", FAST, ids=lambda a: a.name)
@pytest.mark.parametrize("target", ["none", "least_likely"])
def test_dropping_successful_rows_does_not_change_results(
    model, attack, target, monkeypatch
):
    """Compares with a single call of the attack that keeps every row."""
    split, images = make_split()
    config = EvaluationConfig(attack, target=target, batch_size=8)
    rows = []
    apply = runner.Crafter.apply
    monkeypatch.setattr(
        runner.Crafter,
        "apply",
        lambda self, piece, state, active, *n: (
            rows.append(len(active)) or apply(self, piece, state, active, *n)
        ),
    )
    _, arrays = evaluate(model, split, config, save_images=-1)
    order = arrays["indices"]
    if target == "none":
        # Clean errors are dropped first, then successful rows.
        assert rows[-1] < rows[0] < 37
    keys = randomness.fold_in(randomness.example_keys(0, order), 0)
    targets = None if target == "none" else arrays["targets"]

    def logits_fn(x):
        return model(x, training=False)

    whole = compilation.compile_call(
        lambda x, y, k, t=None: attack(logits_fn, x, y, k, t), model.variables
    )
    given = (images[order], split.labels[order], keys)
    result = whole(*given, *(() if targets is None else (targets,)))
    want, success = array(result.images), array(result.success)
    wrong = arrays["clean_predictions"] != arrays["labels"]
    untouched = wrong if target == "none" else np.zeros_like(wrong)
    np.testing.assert_array_equal(
        arrays["adversarial"][untouched], arrays["clean"][untouched]
    )
    np.testing.assert_allclose(
        arrays["adversarial"][~untouched], want[~untouched], atol=1e-6
    )
    classes = arrays["labels"] if targets is None else targets
    equal = arrays["adversarial_predictions"] == classes
    np.testing.assert_array_equal(equal ^ (targets is None), success)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "after", [0, pytest.param(1, marks=pytest.mark.every_backend), 5]
)
def test_killed_evaluation_resumes_with_identical_results(
    model, tmp_path, monkeypatch, after
):
    split, _ = make_split()
    config = EvaluationConfig(FAST[0], target="random", batch_size=8)
    monkeypatch.setattr(evaluation_state, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(evaluation_state.State, "PAUSE", 0.0)
    monkeypatch.setattr(evaluation_state.State, "SHARE", 1e9)
    want, arrays = evaluate(model, split, config, save_images=-1)
    write, left = run_folder.atomic_write, [after]

    def die(path, *arguments, **settings):
        write(path, *arguments, **settings)
        left[0] -= path.suffix == ".npz"
        if left[0] < 0:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "atomic_write", die)
        with pytest.raises(Killed):
            evaluate(model, split, config, state_dir=tmp_path)
    steps = []
    advance = runner.Crafter.apply
    monkeypatch.setattr(
        runner.Crafter,
        "apply",
        lambda self, *args: steps.append(args[0]) or advance(self, *args),
    )
    got, again = evaluate(
        model, split, config, state_dir=tmp_path, save_images=-1
    )
    assert steps[0] != "open"  # It resumed instead of starting again.
    for name, values in arrays.items():
        np.testing.assert_array_equal(again[name], values)
    assert {**got, "seconds": 0} == {**want, "seconds": 0}
    steps.clear()
    evaluate(model, split, config, state_dir=tmp_path)
    assert not steps  # All groups are finished, so nothing is attacked.


# Results of a group of two images, as an evaluation saves them.
RESULTS = {
    **{n: np.zeros((2, 3), "float32") for n in evaluation_tally.Tally.IMAGES},
    **{n: np.arange(2) for n in evaluation_tally.Tally.EXAMPLES},
    "seconds": np.ones(1),
}


@pytest.mark.parametrize("name", attack_registry.ATTACKS)
def test_state_of_every_attack_is_recognized(name, tmp_path):
    """JSON turns settings that are tuples into lists; they still compare."""
    folder = tmp_path / "state"
    config = EvaluationConfig(attack_registry.ATTACKS[name]())
    evaluation_state.State(folder, config.describe()).finish(0, RESULTS)
    resumed = evaluation_state.State(folder, config.describe())
    found = resumed.finished(0, RESULTS["indices"])
    assert found.keys() == RESULTS.keys()
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(evaluation_state.StateError, match="another seed"):
        evaluation_state.State(folder, other.describe())


def test_state_of_another_surrogate_is_refused(model, tmp_path):
    split, _ = make_split()
    config = EvaluationConfig(PGD)
    for digest in ("first", "first", "then"):
        context = {"surrogate": "other", "surrogate_sha256": digest}
        if digest == "then":
            with pytest.raises(
                evaluation_state.StateError, match="surrogate_sha256"
            ):
                evaluate(
                    model, split, config, context=context, state_dir=tmp_path
                )
        else:
            evaluate(model, split, config, context=context, state_dir=tmp_path)


def test_state_of_another_evaluation_or_damaged_is_refused(model, tmp_path):
    split, _ = make_split()
    evaluate(model, split, EvaluationConfig(PGD), state_dir=tmp_path)
    other = EvaluationConfig(PGD, seed=1)
    with pytest.raises(evaluation_state.StateError, match="another .*seed"):
        evaluate(model, split, other, state_dir=tmp_path)
    path = tmp_path / "group-00000.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(evaluation_state.StateError, match="is damaged") as e:
        evaluate(model, split, EvaluationConfig(PGD), state_dir=tmp_path)
    assert "\n" not in str(e.value) and path.name in str(e.value)


def test_indices_select_images_and_are_checked(model):
    split, _ = make_split()
    config = EvaluationConfig(PGD, indices=(7, 3, 30))
    record, arrays = evaluate(model, split, config)
    assert list(arrays["all_indices"]) == [7, 3, 30]
    assert record["num_examples"] == 3 and record["indices"] == [7, 3, 30]
    with pytest.raises(ValueError, match="0 to 36.*99"):
        evaluate(model, split, EvaluationConfig(PGD, indices=(99,)))
    for indices in ((), (1, 1)):
        with pytest.raises(ValueError, match="indices"):
            EvaluationConfig(PGD, indices=indices)
    with pytest.raises(ValueError, match="not both"):
        EvaluationConfig(PGD, indices=(1,), num_examples=1)


def test_pixels_outside_0_to_1_are_refused(model):
    split, images = make_split()
    for wrong in (images * 255, images - 1, images * np.nan):
        bad = image_splits.Split("test", split.labels, lambda i, w=wrong: w[i])
        with pytest.raises(ValueError, match=r"\[0, 1\].*test split") as error:
            evaluate(model, bad, EvaluationConfig(PGD))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_model_that_returns_probabilities_is_refused(model, activation):
    split, _ = make_split()
    last = layers.Activation(activation)
    with pytest.raises(ValueError, match=f"Remove the {activation}"):
        evaluate(keras.Sequential([model, last]), split, EvaluationConfig(PGD))


def test_constant_zero_outputs_count_as_logits(model):
    split, _ = make_split()
    zero = keras.Sequential(
        [model, layers.Dense(4, kernel_initializer="zeros")]
    )
    record, _ = evaluate(zero, split, EvaluationConfig(PGD))
    assert record["clean_accuracy"] == np.mean(split.labels == 0)


@pytest.fixture
def noisy(model):
    return keras.Sequential([keras.Input(SHAPE), Jitter(), *model.layers])


def test_stochastic_model_without_eot_is_refused(noisy):
    split, _ = make_split()
    with pytest.raises(ValueError, match="stochastic.*--eot=20"):
        evaluate(noisy, split, EvaluationConfig(PGD))


@pytest.mark.every_backend
def test_eot_averages_draws_and_is_repeatable(noisy, model):
    split, images = make_split()
    before = [array(v).copy() for v in noisy.variables]
    config = EvaluationConfig(PGD, eot=8, batch_size=37)
    record, arrays = evaluate(noisy, split, config, save_images=-1)
    _, again = evaluate(noisy, split, config, save_images=-1)
    np.testing.assert_array_equal(arrays["adversarial"], again["adversarial"])
    for variable, value in zip(noisy.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)
    # The mean over eight draws is nearer to the noiseless model than one is.
    one = runner.logits(noisy, images, 37, runner.Reading(1))
    many = runner.logits(noisy, images, 37, runner.Reading(8))
    clean = forward(model, images)
    assert np.mean((many - clean) ** 2) < 0.5 * np.mean((one - clean) ** 2)
    assert record["robust_accuracy"] < record["clean_accuracy"]
    assert record["eot"] == 8


@pytest.mark.every_backend
def test_clean_and_adversarial_images_share_their_noise(noisy):
    """With epsilon 0, noise alone must not change any prediction."""
    split, _ = make_split()
    no_change = gradient_attacks.PGD(epsilon=0.0, steps=1, keep="last")
    config = EvaluationConfig(no_change, eot=2, batch_size=12)
    record, _ = evaluate(noisy, split, config)
    assert 0 < record["clean_accuracy"] < 1
    assert record["robust_accuracy"] == record["clean_accuracy"]


@pytest.mark.every_backend
def test_noise_differs_between_steps_and_from_the_final_check(noisy):
    """An attack that knows the noise of the final check would be too strong."""
    _, images = make_split(5)
    whole = runner.compiled(
        noisy,
        "two steps",
        lambda fn: (
            lambda x: (
                fn.at_step(0, 1)(x).logits,
                fn.at_step(0, 2)(x).logits,
            )
        ),
        runner.Reading(1),
    )
    first, second = (array(values) for values in whole(images))
    verdict = runner.logits(noisy, images, 5, runner.Reading(1))
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - verdict).max() > 1e-3
    again, _ = (array(values) for values in whole(images))
    np.testing.assert_array_equal(first, again)


@pytest.mark.every_backend
def test_surrogate_is_attacked_and_model_decides_success(model):
    split, _ = make_split()
    blind = keras.models.clone_model(model)
    blind.set_weights([0 * w for w in model.get_weights()])
    config = EvaluationConfig(gradient_attacks.PGD(epsilon=0.04, steps=5))
    own, _ = evaluate(model, split, config)
    other, arrays = evaluate(
        model, split, config, surrogate=blind, save_images=-1
    )
    verdicts = forward(model, arrays["adversarial"]).argmax(-1)
    np.testing.assert_array_equal(verdicts, arrays["adversarial_predictions"])
    assert own["robust_accuracy"] < other["robust_accuracy"]


def test_attack_continues_after_success_on_the_surrogate_only(model):
    """The surrogate misclassifies every image, the model does not."""
    split, _ = make_split()
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    shifted = keras.Sequential([copy, RotateClasses()])
    config = EvaluationConfig(FAST[0], batch_size=37)
    record, arrays = evaluate(
        model, split, config, surrogate=shifted, save_images=-1
    )
    correct = arrays["clean_predictions"] == arrays["labels"]
    norms = np.abs(arrays["adversarial"] - arrays["clean"]).max((1, 2, 3))
    assert np.all(norms[correct] > 0.02)


class RotateClasses(layers.Layer):
    """Shifts all logits by one class."""

    def call(self, x):
        return ops.roll(x, 1, axis=-1)


@pytest.mark.every_backend
def test_bfloat16_attack_is_verified_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = make_small()
    finally:
        keras.config.set_dtype_policy("float32")
    whole = make_small()
    half.set_weights(whole.get_weights())
    split, _ = make_split()
    attack = gradient_attacks.PGD(epsilon=0.05, steps=5, keep="first")
    config = EvaluationConfig(attack, craft_dtype="bfloat16")
    record, arrays = evaluate(whole, split, config, surrogate=half)
    assert arrays["adversarial"].dtype == np.float32
    assert record["craft_dtype"] == "bfloat16"
    assert record["largest_norm"] <= 0.05 * (1 + 1e-6)
    verdicts = forward(whole, arrays["adversarial"]).argmax(-1)
    np.testing.assert_array_equal(verdicts, arrays["adversarial_predictions"])
    exact, _ = evaluate(whole, split, EvaluationConfig(attack))
    gap = record["robust_accuracy"] - exact["robust_accuracy"]
    assert abs(gap) <= 0.1 and exact["robust_accuracy"] < 1


def make_small():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.AveragePooling2D(3),
            layers.Flatten(),
            layers.Dense(NUM_CLASSES, use_bias=False),
        ]
    )
    model.set_weights([20 * np.eye(4, dtype="float32")])
    return model


class ReadOuts(layers.Layer):
    """Reports three read-out steps; the last one is the model's output."""

    def call(self, logits):
        return logits, ops.stack([-logits, 2 * logits, logits], axis=1)

    def shown(self, inputs, outputs):
        return {"step_logits": outputs[1]}


@pytest.mark.every_backend
def test_all_read_outs_are_averaged_in_the_loss():
    base = make_small()
    images = keras.Input(SHAPE)
    logits, _ = ReadOuts()(base(images))
    model = keras.Model(images, logits)
    split, x = make_split()
    seen = {}
    for read_outs in ("last", "all"):
        reading = runner.Reading(read_outs=read_outs)
        fn = runner.compiled(
            model,
            "loss",
            lambda f: (
                lambda x, y: attack_base.mean_loss(
                    "cross_entropy", losses.outputs_of(f(x)), y
                )
            ),
            reading,
        )
        seen[read_outs] = array(fn(x, split.labels))
    z = forward(model, x)
    parts = [
        array(losses.cross_entropy(ops.convert_to_tensor(k * z),
                                       split.labels))
        for k in (-1, 2, 1)
    ]  # fmt: skip
    np.testing.assert_allclose(seen["last"], parts[2], rtol=1e-5)
    np.testing.assert_allclose(seen["all"], np.mean(parts, 0), rtol=1e-5)
    config = EvaluationConfig(PGD, read_outs="all")
    record, _ = evaluate(model, split, config)
    assert record["read_outs"] == "all"


@pytest.mark.every_backend
def test_ensemble_is_at_least_as_strong_as_its_members(model):
    """It misclassifies at least the images of the union of its members."""
    from saccade.attacks import autoattack

    split, _ = make_split(20)
    ensemble = autoattack.AutoAttack(epsilon=0.03, version="rand")
    assert len(ensemble.members()) == 2
    _, arrays = evaluate(model, split, EvaluationConfig(ensemble))
    misclassified = (
        arrays["all_adversarial_predictions"] != arrays["all_labels"]
    )
    either = np.zeros_like(misclassified)
    for member in ensemble.members():
        _, alone = evaluate(model, split, EvaluationConfig(member))
        either |= alone["all_adversarial_predictions"] != alone["all_labels"]
    assert misclassified.sum() >= either.sum() > 0


PGD_DLR = gradient_attacks.PGD(loss="dlr")


@pytest.mark.parametrize(
    "fields,classes,match",
    [
        (dict(attack=PGD_DLR), 2, "at least 3 classes"),
        (dict(attack=PGD_DLR, target="next"), 3, "at least 4 classes"),
        (dict(attack=PGD_DLR, target=1), 2, "at least 4 classes"),
        (dict(attack=autoattack.APGDT()), 3, "at least 4 classes"),
        (dict(target=7), 3, "from 0 to 2. Received: 7"),
    ],
)
def test_settings_that_need_more_classes_are_refused(fields, classes, match):
    config = EvaluationConfig(**fields)
    with pytest.raises(ValueError, match=match) as raised:
        config.fit(classes)
    assert "\n" not in str(raised.value)
    assert config.fit(10) is config


def test_autoattack_version_names_its_restriction_to_few_classes():
    config = EvaluationConfig(autoattack.AutoAttack())
    assert config.fit(2).describe()["version"] == "standard_2_classes"
    assert config.fit(4) == config
