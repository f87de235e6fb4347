"""Adversarial attacks on a classifier that is seen only through its logits.

An attack is a frozen config and a function `attack(logits_fn, images, labels,
config, keys, targets=None)`; `ATTACKS` names them all. Images live in [0, 1]
and normalization belongs to the model. `labels` are always the true labels;
`targets`, one class an example, make the attack a targeted one.

Every attack is made of `keras.ops` loops, so that it can be compiled whole
(`numerics.compile_call`) on TensorFlow, JAX and Torch, and it draws its noise
from one key an example, so that no example's result hangs on its neighbours.
"""

import dataclasses
import math
import types
from typing import ClassVar, NamedTuple

from keras import ops

import numerics


class AttackResult(NamedTuple):
    """What every attack returns.

    Attributes:
        images: Perturbed images, float32 `(batch, height, width, channels)`,
            inside the ball and inside [0, 1].
        success: Booleans of shape `(batch,)`: classified as the target if there
            is one, otherwise misclassified.
        loss: What the attack maximized, at `images`, shape `(batch,)`: the
            cross-entropy of the true label, or minus that of the target.
    """

    images: object
    success: object
    loss: object


class _Config:
    """What the configs share: which numbers a compiled attack takes late."""

    def numbers(self):
        """Returns the numbers that may be tensors, by name; see `bind`."""
        return {name: getattr(self, name) for name in self.LATE}

    def bind(self, numbers):
        """Returns settings for an attack with `numbers` in place of its own.

        So one compiled attack serves a scan over radii, steps and restarts:
        the numbers come in as scalar tensors. They are not checked again.

        Args:
            numbers: Dict with the keys of `numbers()`.
        """
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)
        }
        return types.SimpleNamespace(**{**fields, **numbers})


def _check_ball(config):
    """Raises a ValueError, one line, if a config's threat model is wrong."""
    numerics.check_norm(config.norm)
    epsilon = config.epsilon
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(
            "Expected a finite epsilon >= 0 in units of the pixel range [0, 1]."
            f" Received: epsilon={epsilon:g}."
        )
    if config.norm == "linf" and epsilon > 1:
        raise ValueError(
            "Expected epsilon in units of the pixel range [0, 1] for the norm"
            f" linf. Received: epsilon={epsilon:g}. Write {epsilon:g}/255 if"
            " you mean steps of an 8-bit image."
        )
    if not 0 < config.l1_fraction <= 1:
        raise ValueError(
            "Expected l1_fraction in (0, 1], the part of the coordinates an L1 "
            f"step moves. Received: l1_fraction={config.l1_fraction:g}."
        )


@dataclasses.dataclass(frozen=True)
class FGSMConfig(_Config):
    """Hyperparameters of the fast gradient (sign) method.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the ball and length of the step, in units of the
            pixel range [0, 1].
        l1_fraction: Part of the coordinates that share the L1 step.
    """

    norm: str = "linf"
    epsilon: float = 8 / 255
    l1_fraction: float = 0.01

    LATE: ClassVar = ("epsilon",)

    def __post_init__(self):
        _check_ball(self)


@dataclasses.dataclass(frozen=True)
class PGDConfig(_Config):
    """Hyperparameters of projected gradient descent.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the ball, in units of the pixel range [0, 1].
        step_size: Length of one step in `norm`, in the same units. None means
            min(epsilon, 2.5 * epsilon / steps), the rule of Madry et al.: far
            enough to cross the ball, and finer with more steps.
        steps: Gradient steps of one restart.
        restarts: Independent starts; the worst case over them is kept.
        random_start: Probability that an example starts at a random point of
            the ball (uniform, then projected onto the box) instead of at the
            clean image.
        keep: `"best"` takes every iterate as a candidate, so that more steps
            of the same size are never weaker; `"last"` only the last one of
            each restart, as the published tables do.
        l1_fraction: Part of the coordinates that share an L1 step.
    """

    norm: str = "linf"
    epsilon: float = 8 / 255
    step_size: float | None = None
    steps: int = 20
    restarts: int = 1
    random_start: float = 1.0
    keep: str = "best"
    l1_fraction: float = 0.01

    LATE: ClassVar = ("epsilon", "step_length", "steps", "restarts")

    def __post_init__(self):
        object.__setattr__(self, "random_start", float(self.random_start))
        _check_ball(self)
        if self.step_size is not None and not (
            math.isfinite(self.step_size) and self.step_size >= 0
        ):
            raise ValueError(
                "Expected a finite step_size >= 0, or none for 2.5 * epsilon /"
                f" steps. Received: step_size={self.step_size:g}."
            )
        if self.steps < 0 or self.restarts < 1:
            raise ValueError(
                "Expected steps >= 0 and restarts >= 1. Received: "
                f"steps={self.steps}, restarts={self.restarts}."
            )
        if not 0 <= self.random_start <= 1:
            raise ValueError(
                "Expected random_start to be a probability in [0, 1]. "
                f"Received: random_start={self.random_start:g}."
            )
        if self.restarts > 1 and self.random_start == 0:
            raise ValueError(
                "Expected random_start > 0 with several restarts, which would"
                f" all be the same. Received: restarts={self.restarts}, "
                "random_start=0."
            )
        if self.keep not in ("best", "last"):
            raise ValueError(
                "Expected keep to be best or last. Received: "
                f"keep={self.keep!r}."
            )

    @property
    def step_length(self):
        """The step size in use: `step_size`, or the rule in its place."""
        if self.step_size is not None:
            return self.step_size
        return min(1.0, 2.5 / max(self.steps, 1)) * self.epsilon


def cross_entropy(logits, classes):
    """Cross-entropy from logits whose gradient does not vanish too early.

    It equals the usual one. Written as softplus of (log-sum-exp of the other
    logits - own logit), its gradient stays in balance and in float32's range
    for a confidence of 1 - 1e-30; the usual form rounds the probability to 1
    at 1 - 1e-8, a masked gradient of our own making.

    Args:
        logits: Tensor of shape `(batch, classes)`.
        classes: Integers of shape `(batch,)`.

    Returns:
        Tensor of shape `(batch,)`, in nats.
    """
    logits = ops.cast(logits, "float32")
    own = ops.cast(
        ops.one_hot(classes, logits.shape[-1], dtype="float32"), "bool"
    )
    others = ops.where(own, ops.full_like(logits, -math.inf), logits)
    # Not a sum with the one-hot: zero times an infinite logit is NaN.
    picked = ops.where(own, logits, ops.zeros_like(logits))
    rest = ops.logsumexp(others, axis=-1)
    return ops.softplus(rest - ops.sum(picked, axis=-1))


def fgsm(logits_fn, images, labels, config, keys=None, targets=None):
    """Takes one step of length epsilon along the gradient.

    In L-inf it is the fast gradient sign method; in L2 and L1 the same with
    the direction of that norm, projected onto the ball and the box.

    Args:
        logits_fn: Callable from images to logits, `(batch, classes)`. It binds
            the mode (inference) and the state of the model.
        images: Float32 tensor in [0, 1], `(batch, height, width, channels)`.
        labels: True labels, integers of shape `(batch,)`.
        config: An `FGSMConfig`, or what its `bind` returned.
        keys: Not used: nothing here is random.
        targets: Optional integers of shape `(batch,)`: classes to reach.

    Returns:
        An `AttackResult`; an example keeps its clean image where the step does
        not make it worse.

    References:
        - [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572)
    """
    del keys
    images, judge, objective = _prepare(logits_fn, images, labels, targets)
    (loss, logits), grad = numerics.value_and_grad(
        objective, images, has_aux=True
    )
    best = judge(images, loss, logits)
    delta = _step(ops.zeros_like(images), grad, images, config, config.epsilon)
    changed = _perturbed(images, delta)
    best = _keep_worse(best, judge(changed, *objective(changed)))
    return AttackResult(best.images, best.success, best.loss)


def pgd(logits_fn, images, labels, config, keys=None, targets=None):
    """Projected gradient descent with random starts and restarts.

    Args:
        logits_fn: Callable from images to logits, `(batch, classes)`. It binds
            the mode (inference) and the state of the model, so that a bare
            model, an ensemble and a recurrent roll-out are attacked alike.
        images: Float32 tensor in [0, 1], `(batch, height, width, channels)`.
        labels: True labels, integers of shape `(batch,)`.
        config: A `PGDConfig`, or what its `bind` returned.
        keys: Int32 `(batch, 2)` from `numerics.example_keys`, for the random
            starts; may be None if `config.random_start` is 0.
        targets: Optional integers of shape `(batch,)`: classes to reach.

    Returns:
        An `AttackResult`. Among the clean image and the candidates of all
        restarts, an example keeps one that reaches its goal; failing that, one
        that is misclassified; within these, the one of highest loss. Robust
        accuracy and target success over all restarts can both be read from it.

    Raises:
        ValueError: If a random start is wanted and there are no keys.

    References:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
    """
    if keys is None and config.random_start > 0:
        raise ValueError(
            "Expected keys (numerics.example_keys) for the random start. "
            "Received: keys=None."
        )
    images, judge, objective = _prepare(logits_fn, images, labels, targets)
    keep_all = config.keep == "best"

    def step(_, state):
        delta, best = state
        here = _perturbed(images, delta)
        (loss, logits), grad = numerics.value_and_grad(
            objective, here, has_aux=True
        )
        if keep_all:
            best = _keep_worse(best, judge(here, loss, logits))
        delta = _step(delta, grad, images, config, config.step_length)
        return delta, best

    def restart(number, best):
        delta = _start(images, config, keys, number)
        delta, best = ops.fori_loop(0, config.steps, step, (delta, best))
        last = _perturbed(images, delta)
        return _keep_worse(best, judge(last, *objective(last)))

    if keep_all and config.random_start == 0:
        # The first iterate is the clean image: no need to judge it twice.
        best = _nothing(images)
    else:
        best = judge(images, *objective(images))
    best = ops.fori_loop(0, config.restarts, restart, best)
    return AttackResult(best.images, best.success, best.loss)


def random_targets(keys, labels, num_classes):
    """Draws a target for each example, uniform over the other classes.

    Args:
        keys: Int32 tensor of shape `(batch, 2)`.
        labels: Integers of shape `(batch,)`.
        num_classes: How many classes there are, at least 2.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.
    """
    _check_classes(num_classes)
    shift = 1 + numerics.integers(keys, (), num_classes - 1)
    return ops.mod(ops.cast(labels, "int32") + shift, num_classes)


def next_targets(labels, num_classes):
    """Returns label + 1, and class 0 after the last; int32, `(batch,)`."""
    _check_classes(num_classes)
    return ops.mod(ops.cast(labels, "int32") + 1, num_classes)


def fixed_targets(labels, target, num_classes):
    """Returns one class for all; its own examples get the class after it.

    Args:
        labels: Integers of shape `(batch,)`.
        target: The class.
        num_classes: How many classes there are, at least 2.

    Returns:
        Int32 tensor of shape `(batch,)`, never equal to the label.

    Raises:
        ValueError: If there is no such class.
    """
    _check_classes(num_classes)
    if not 0 <= target < num_classes:
        raise ValueError(
            f"Expected a target class from 0 to {num_classes - 1}. "
            f"Received: {target}."
        )
    labels = ops.cast(labels, "int32")
    after = (target + 1) % num_classes
    return ops.where(
        ops.equal(labels, target),
        ops.full_like(labels, after),
        ops.full_like(labels, target),
    )


class _Candidate(NamedTuple):
    """An image an example, and how bad it is; see `_keep_worse`."""

    images: object
    success: object
    wrong: object
    loss: object


def _prepare(logits_fn, images, labels, targets):
    """Returns the images as a tensor, a judge and the objective."""
    images = ops.convert_to_tensor(images, dtype="float32")
    labels = ops.cast(labels, "int32")
    goal = labels if targets is None else ops.cast(targets, "int32")

    def objective(x):
        logits = logits_fn(x)
        loss = cross_entropy(logits, goal)
        return (loss if targets is None else -loss), logits

    def judge(x, loss, logits):
        predicted = ops.cast(ops.argmax(logits, axis=-1), "int32")
        # A NaN is a defect to report, not an adversarial example.
        valid = ops.logical_not(ops.isnan(loss))
        wrong = ops.logical_and(valid, ops.not_equal(predicted, labels))
        if targets is None:
            success = wrong
        else:
            success = ops.logical_and(valid, ops.equal(predicted, goal))
        return _Candidate(x, success, wrong, loss)

    return images, judge, objective


def _nothing(images):
    """A candidate that any other replaces."""
    loss = ops.full((ops.shape(images)[0],), -math.inf, dtype="float32")
    no = loss > 0
    return _Candidate(images, no, no, loss)


def _keep_worse(best, new):
    """Prefers success, then any misclassification, then the higher loss."""
    rank_best = _rank(best)
    rank_new = _rank(new)
    better = ops.logical_or(
        rank_new > rank_best,
        ops.logical_and(ops.equal(rank_new, rank_best), new.loss > best.loss),
    )
    mask = numerics.per_example(better, best.images)
    return _Candidate(
        ops.where(mask, new.images, best.images),
        ops.where(better, new.success, best.success),
        ops.where(better, new.wrong, best.wrong),
        ops.where(better, new.loss, best.loss),
    )


def _rank(candidate):
    return 2 * ops.cast(candidate.success, "int32") + ops.cast(
        candidate.wrong, "int32"
    )


def _perturbed(images, delta):
    """The image that is judged and returned; the sum may round out of it."""
    return ops.clip(images + delta, 0.0, 1.0)


def _step(delta, grad, images, config, length):
    room = None
    if config.norm == "l1":
        here = _perturbed(images, delta)
        room = ops.where(grad > 0, 1.0 - here, here)
        room = room / ops.maximum(length, 1e-20)
    direction = numerics.ascent_direction(
        grad, config.norm, fraction=config.l1_fraction, room=room
    )
    delta = delta + length * direction
    return numerics.project(delta, config.epsilon, config.norm, images)


def _start(images, config, keys, restart):
    """Where a restart begins: in the ball by chance, else at the image."""
    if config.random_start == 0:
        return ops.zeros_like(images)
    keys = numerics.fold_in(keys, restart)
    shape = tuple(images.shape[1:])
    delta = numerics.random_in_ball(
        numerics.fold_in(keys, 0), shape, config.epsilon, config.norm
    )
    if config.random_start < 1:
        chance = numerics.uniform(numerics.fold_in(keys, 1), ())
        moved = numerics.per_example(chance < config.random_start, delta)
        delta = ops.where(moved, delta, ops.zeros_like(delta))
    return numerics.project(delta, config.epsilon, config.norm, images)


def _check_classes(num_classes):
    if num_classes < 2:
        raise ValueError(
            "Expected at least 2 classes for a targeted attack. "
            f"Received: num_classes={num_classes}."
        )


ATTACKS = {"fgsm": (fgsm, FGSMConfig), "pgd": (pgd, PGDConfig)}
