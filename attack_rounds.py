"""What an attack is: a ball, and rounds of steps on what is seen of a model.

An attack is a frozen object that holds its hyperparameters; calling it on
`(logits_fn, images, labels, keys, targets)` returns an `AttackResult`.
Images live in [0, 1] and normalization belongs to the model, which is seen only
through its logits. `labels` are always the true labels; `targets`, one class an
example, make the attack a targeted one.

Inside, an attack is `open`, then for each of its rounds (restarts, or targets)
`begin`, `step` by step, `end`, on a dict of tensors with one row an example.
`Attack.__call__` strings them together in one graph, for training; `crafting`
runs the same pieces in chunks and drops the examples that have fallen in
between. All of it is `keras.ops` on TensorFlow, JAX and Torch, and all noise
comes from one key an example: no result hangs on a neighbour.
"""

import copy
import dataclasses
import math
from typing import ClassVar, NamedTuple

import keras
import numpy as np
from keras import ops

import losses
import numerics


class AttackResult(NamedTuple):
    """What every attack returns.

    Attributes:
        images: Perturbed images, float32 `(batch, height, width, channels)`,
            inside the ball and inside [0, 1].
        success: Booleans of shape `(batch,)`: classified as the target if there
            is one, otherwise misclassified. Logits that are not finite are a
            success.
        loss: What the attack maximized, at `images`, shape `(batch,)`;
            infinity where the logits are not finite.
    """

    images: object
    success: object
    loss: object


@dataclasses.dataclass(frozen=True)
class Attack:
    """What every attack has: a threat model, and rounds of steps.

    A subclass gives `step` at least. Its state is a dict of tensors whose
    first dimension is the batch; `open` makes "images", "labels", "keys",
    "targets" (if there are any), the best candidate so far ("best",
    "success", "wrong", "loss"), and "nonfinite": whether a logit, or an entry
    of the gradient, was NaN or infinite at any image that was tried.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the ball, in units of the pixel range [0, 1].
    """

    norm: str = "linf"
    epsilon: float = 8 / 255

    name: ClassVar[str] = ""
    # Numbers that a compiled attack takes as tensors, so that a scan over them
    # compiles once; see `bind`.
    RUNTIME_PARAMETERS: ClassVar[tuple] = ("epsilon",)
    # Whether it draws noise, whether it can aim.
    random: ClassVar[bool] = False
    can_target: ClassVar[bool] = True

    def __post_init__(self):
        check_ball(self.norm, self.epsilon)

    # --- What a subclass fills in ---

    @property
    def keep(self):
        """Which candidates count; see `attack_backbone.Iterative`."""
        return "first"

    @property
    def rounds(self):
        """How many rounds: restarts, or targets."""
        return 1

    @property
    def steps_a_round(self):
        """How many steps a round has."""
        return 1

    def members(self):
        """The attacks that run one after the other; an ensemble has several."""
        return (self,)

    def fit(self, num_classes, targeted=False):
        """Returns the attack for a model of so many classes.

        Args:
            num_classes: How many classes there are.
            targeted: Whether the attack gets targets.

        Raises:
            ValueError: If its objective needs more classes.
        """
        losses.check_loss(self._loss, num_classes, targeted)
        return self

    def calls(self):
        """Forward-sized calls of one step on one image, for batch sizes."""
        return 1

    def open(self, logits_fn, images, labels, keys=None, targets=None):
        """Makes the state of a batch; the clean image is the first candidate.

        Args:
            logits_fn: Callable from images to logits, `(batch, classes)`, or
                to `losses.Outputs`. It binds the mode (inference) and the
                state of the model, so that a bare model, an ensemble and a
                recurrent roll-out are attacked alike.
            images: Float32 in [0, 1], `(batch, height, width, channels)`.
            labels: True labels, integers of shape `(batch,)`.
            keys: Int32 `(batch, 2)` from `numerics.example_keys`; may be None
                if the attack draws nothing.
            targets: Optional integers of shape `(batch,)`: classes to reach.

        Returns:
            The state, a dict.
        """
        state = self._rows(images, labels, keys, targets)
        value, logits = self.ascended_loss(logits_fn, state)(state["images"])
        return self._offer(state, state["images"], value, logits)

    def begin(self, logits_fn, state, number):
        """Prepares round `number`, an integer or a scalar tensor."""
        del logits_fn, number
        return state

    def step(self, logits_fn, state, number, index):
        """Takes step `index` of round `number`."""
        raise NotImplementedError(type(self).__name__)

    def end(self, logits_fn, state, number):
        """Finishes round `number`."""
        del logits_fn, number
        return state

    def ascended_loss(self, logits_fn, state):
        """Returns a callable from images to (what is ascended, the logits)."""
        labels, targets = state["labels"], state.get("targets")

        def evaluate(images):
            outputs = losses.outputs_of(logits_fn(images))
            value = mean_loss(self._loss, outputs, labels, targets)
            return value, outputs.logits

        return evaluate

    # --- What all share ---

    @property
    def _loss(self):
        """The name of what is ascended; attacks with a choice have a field."""
        return getattr(self, "loss", "cross_entropy")

    def __call__(self, logits_fn, images, labels, keys=None, targets=None):
        """Attacks a batch; see `open` for the arguments.

        Returns:
            An `AttackResult`. Among the clean image and the candidates of all
            rounds, an example keeps one that reaches its goal; failing that,
            one that is misclassified; within these, the one of highest loss
            (or the first success, if `keep` says so).

        Raises:
            ValueError: If images are not floats in [0, 1], or if a label or a
                target is no class of the model. Inside a compiled function
                only the types are checked, since values are not known there.
        """
        logits_fn = checked(logits_fn, images, labels, targets)
        state = self.open(logits_fn, images, labels, keys, targets)

        def run_round(number, state):
            state = self.begin(at(logits_fn, number, 0), state, number)
            state = self.advance(
                logits_fn, state, number, 0, self.steps_a_round
            )
            return self.end(
                at(logits_fn, number, self.steps_a_round), state, number
            )

        state = ops.fori_loop(0, self.rounds, run_round, state)
        return AttackResult(state["best"], state["success"], state["loss"])

    def perturb(
        self, logits_fn, images, labels, keys=None, targets=None, start=None
    ):
        """Takes the steps of one round and judges nothing, for training.

        An image that is trained on needs no verdict, so this saves the calls
        of the model that only tell how an example stands.

        Args:
            logits_fn: See `open`, like the other arguments. It may name what
                is ascended (`losses.Outputs.ascended`).
            images, labels, keys, targets: See `open`.
            start: Optional perturbations, of the shape of `images`, to start
                from (projected) in place of the attack's own start.

        Returns:
            Where the round ended: float32 of the shape of `images`, inside
            the ball and inside [0, 1].

        Raises:
            NotImplementedError: If it is no walk along gradients.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not perturb without judging."
        )

    def advance(self, logits_fn, state, number, first, count):
        """Takes `count` steps of round `number`, from step `first` on."""

        def body(index, state):
            index = first + index
            fn = at(logits_fn, number, index)
            return self.step(fn, state, number, index)

        return ops.fori_loop(0, count, body, state)

    def numbers(self):
        """Returns the numbers that may be tensors, by name; see `bind`."""
        return {name: getattr(self, name) for name in self.RUNTIME_PARAMETERS}

    def bind(self, numbers):
        """Returns this attack with `numbers` in place of its own.

        So one compiled attack serves a scan over radii, steps and restarts:
        the numbers come in as scalar tensors. They are not checked again.

        Args:
            numbers: Dict with the keys of `numbers()`.
        """
        bound = copy.copy(self)
        for name, value in numbers.items():
            object.__setattr__(bound, name, value)
        return bound

    def scaled(self, factor):
        """Returns this attack with its radius and its steps in proportion.

        Args:
            factor: At most 1: a float, a scalar tensor (while the radius grows
                in training), or one an image, `(batch,)`.
        """
        numbers = self.numbers()
        return self.bind(
            {
                name: numbers[name] * factor
                for name in ("epsilon", "step_length")
                if name in numbers
            }
        )

    def _rows(self, images, labels, keys, targets):
        images = ops.convert_to_tensor(images, dtype="float32")
        labels = ops.cast(labels, "int32")
        if keys is None:
            if self.random:
                raise ValueError(
                    f"Expected keys (numerics.example_keys) for {self.name}, "
                    "which draws noise. Received: keys=None."
                )
            keys = ops.stack([labels, labels], axis=-1)
        nothing = ops.cast(ops.zeros_like(labels), "bool")
        state = {
            "images": images,
            "labels": labels,
            "keys": ops.cast(keys, "int32"),
            "best": images,
            "success": nothing,
            "wrong": nothing,
            "nonfinite": nothing,
            "loss": ops.full_like(images[:, 0, 0, 0], -math.inf),
        }
        if targets is not None:
            state["targets"] = ops.cast(targets, "int32")
        return state

    def gradient(self, logits_fn, state, here):
        """Evaluates what is ascended and its gradient at `here`.

        Args:
            logits_fn: See `open`.
            state: The rows.
            here: Images, of the shape of "images".

        Returns:
            Tuple of the state, in which examples whose gradient was not
            finite are marked, what is ascended `(batch,)`, the logits, and
            the gradient, finite and of the shape of the images.
        """
        (value, logits), grad, flags = numerics.value_and_grad(
            self.ascended_loss(logits_fn, state),
            here,
            has_aux=True,
            with_flags=True,
        )
        return mark(state, flags), value, logits, grad

    def _offer(self, state, images, value, logits, allowed=True):
        """Puts forward candidates; those not `allowed` are never kept."""
        success, wrong = losses.judge(
            logits, state["labels"], state.get("targets")
        )
        value = losses.comparable(value, logits)
        state = mark(state, losses.nonfinite(logits))
        return losses.offer(
            state,
            images,
            ops.where(allowed, value, -math.inf),
            ops.logical_and(success, allowed),
            ops.logical_and(wrong, allowed),
            self.keep,
        )


def mark(state, flags):
    """Marks examples for which something was not finite; returns the state."""
    return {**state, "nonfinite": ops.logical_or(state["nonfinite"], flags)}


def at(logits_fn, number, index):
    """Binds the noise of a stochastic model to a round and a step.

    Args:
        logits_fn: A `logits_fn`; if it has a method `at(number, index)`, that
            returns the one whose noise belongs to this step.
        number: The round, an integer or a scalar tensor.
        index: The step, likewise.
    """
    return (
        logits_fn.at(number, index) if hasattr(logits_fn, "at") else logits_fn
    )


def mean_loss(name, outputs, labels, targets=None):
    """The loss of `losses.loss`, over all answers if there are several.

    If the outputs say themselves what is ascended, it is that.
    """
    if outputs.ascended is not None:
        return outputs.ascended
    if outputs.head_logits is None:
        return losses.loss(name, outputs.logits, labels, targets)
    count = outputs.head_logits.shape[1]
    flat = ops.reshape(outputs.head_logits, (-1, outputs.head_logits.shape[-1]))
    labels = ops.repeat(labels, count, axis=0)
    if targets is not None:
        targets = ops.repeat(targets, count, axis=0)
    values = losses.loss(name, flat, labels, targets)
    return ops.mean(ops.reshape(values, (-1, count)), axis=-1)


def checked(logits_fn, images, labels, targets=None):
    """Refuses inputs on which the result of an attack would mean nothing.

    Args:
        logits_fn: See `Attack.open`, like the other arguments.
        images, labels, targets: See `Attack.open`.

    Returns:
        A `logits_fn` that refuses labels and targets outside its classes.

    Raises:
        ValueError: If images are not floats in [0, 1] or a class is negative.
    """
    _check_type("images", images, "float", "floats in [0, 1]")
    values = numerics.concrete(images)
    # A NaN fails every comparison.
    if values is not None and values.size:
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                "Expected images in [0, 1]. Received: pixels from "
                f"{low:g} to {high:g}. Divide 8-bit pixels by 255."
            )
    highest = -1
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is None:
            continue
        _check_type(name, classes, "int", "integer class ids")
        values = numerics.concrete(classes)
        if values is None or not values.size:
            continue
        if values.min() < 0:
            raise ValueError(
                f"Expected {name} >= 0. Received: {values.min()} in {name}."
            )
        highest = max(highest, int(values.max()))
    return _InClasses(logits_fn, highest)


def _check_type(name, values, wanted, described):
    dtype = getattr(values, "dtype", None)
    if dtype is None:
        dtype = np.asarray(values).dtype
    dtype = keras.backend.standardize_dtype(dtype)
    if wanted not in dtype:
        raise ValueError(
            f"Expected {name} to be {described}. Received: {name} of dtype "
            f"{dtype}."
        )


class _InClasses:
    """A `logits_fn` that refuses class ids which its logits do not have."""

    def __init__(self, logits_fn, highest):
        self.logits_fn, self.highest = logits_fn, highest

    def at(self, number, index):
        """See `at`."""
        return _InClasses(at(self.logits_fn, number, index), self.highest)

    def __call__(self, images):
        outputs = losses.outputs_of(self.logits_fn(images))
        classes = outputs.logits.shape[-1]
        if self.highest >= classes:
            raise ValueError(
                f"Expected labels and targets from 0 to {classes - 1}, the "
                f"classes of the model. Received: {self.highest}."
            )
        return outputs


def check_ball(norm, epsilon):
    """Raises a ValueError, one line, if a threat model is wrong."""
    numerics.check_norm(norm)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(
            "Expected a finite epsilon >= 0 in units of the pixel range [0, 1]."
            f" Received: epsilon={epsilon:g}."
        )
    if norm == "linf" and epsilon > 1:
        raise ValueError(
            "Expected epsilon in units of the pixel range [0, 1] for the norm"
            f" linf. Received: epsilon={epsilon:g}. Write {epsilon:g}/255 if"
            " you mean steps of an 8-bit image."
        )


def perturbed(images, delta):
    """The image that is judged and returned; the sum may round out of it."""
    return ops.clip(images + delta, 0.0, 1.0)
