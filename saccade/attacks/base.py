"""The base class of all attacks: a threat model, and rounds of steps.

An attack is a frozen object that holds its hyperparameters. Calling it on
`(logits_fn, images, labels, keys, targets)` returns an `AttackResult`.
Images are in [0, 1]. Normalization belongs to the model, which an attack
accesses only through its logits. `labels` are always the true labels;
`targets`, one class for each example, make the attack targeted.

An attack calls `open` once, and then, for each round (a restart or a target
class), `begin`, `step` repeatedly, and `end`. All of them take and return a
state, a dict of tensors with one row for each example. `Attack.__call__` runs
them in one graph, for training. `crafting` runs the same methods in chunks and
drops misclassified examples between two chunks. The code is `keras.ops`, on
TensorFlow, JAX and Torch. All noise comes from one key for each example, so
results do not depend on the rest of the batch.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import keras
import numpy as np
from keras import ops

from saccade.attacks import losses, settings
from saccade.attacks.losses import Outputs, State
from saccade.core import compilation, gradients, lp
from saccade.core.arrays import Tensor

# What an attack knows of a model: images to logits, `(batch, classes)`, or to
# `losses.Outputs`. `at_step` binds the noise of a stochastic one.
LogitsFn: TypeAlias = Callable[[Tensor], Tensor | Outputs]
# Images to the attack loss, `(batch,)`, and the logits.
AscendedLoss: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


class AttackResult(NamedTuple):
    """The result of an attack.

    Attributes:
        images: Perturbed images, float32 `(batch, height, width, channels)`,
            inside the norm ball and inside [0, 1].
        success: Booleans of shape `(batch,)`: whether the image is classified
            as the target if there is one, otherwise whether it is
            misclassified. Non-finite logits count as a success.
        loss: The attack loss at `images`, shape `(batch,)`; infinity where the
            logits are not finite.
    """

    images: Tensor
    success: Tensor
    loss: Tensor


@dataclasses.dataclass(frozen=True)
class Attack:
    """A threat model, and rounds of steps: the base class of all attacks.

    A subclass implements at least `step`. The state is a dict of tensors whose
    first dimension is the batch. `open` creates these entries:

    - "images", "labels", "keys", and "targets" if there are any;
    - "best", the best candidate so far, with its "success", "wrong" (whether
      it is misclassified) and "loss";
    - "nonfinite": whether any logit or gradient entry was NaN or infinite at
      any image that the attack evaluated.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the norm ball, in units of the pixel range [0, 1].
    """

    norm: str = settings.NORM.field("linf")
    epsilon: float = settings.EPSILON.field(8 / 255)

    name: ClassVar[str] = ""
    # Numbers that a compiled attack takes as tensors. Evaluating several
    # values of them compiles once; see `bind`.
    RUNTIME_PARAMETERS: ClassVar[tuple[str, ...]] = ("epsilon",)
    # Whether the attack draws noise, and whether it accepts targets.
    random: ClassVar[bool] = False
    can_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_threat_model(self.norm, self.epsilon)

    # --- Methods that subclasses override ---

    @property
    def keep(self) -> str:
        """Which candidates are kept; see `gradient_attacks.Iterative`."""
        return "first"

    @property
    def rounds(self) -> int:
        """The number of rounds: restarts, target classes, or both."""
        return 1

    @property
    def steps_a_round(self) -> int:
        """The number of steps in each round."""
        return 1

    def members(self) -> tuple["Attack", ...]:
        """The attacks to run in sequence; an ensemble has several."""
        return (self,)

    def fit(self, num_classes: int, targeted: bool = False) -> Self:
        """Returns the attack adapted to the model's number of classes.

        Args:
            num_classes: The number of classes.
            targeted: Whether the attack is given targets.

        Raises:
            ValueError: If the attack loss needs more classes.
        """
        losses.check_loss(self._loss, num_classes, targeted)
        return self

    def calls(self) -> int:
        """Model calls per image in one step, from which batch sizes follow."""
        return 1

    def open(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> State:
        """Creates the state of a batch. The clean image is a candidate.

        Args:
            logits_fn: Callable from images to logits, `(batch, classes)`, or
                to `losses.Outputs`. It calls the model in inference mode and
                may wrap anything: one model, an ensemble, or the steps of a
                recurrent model.
            images: Float32 in [0, 1], `(batch, height, width, channels)`.
            labels: True labels, integers of shape `(batch,)`.
            keys: Int32 `(batch, 2)` from `randomness.example_keys`; may be None
                if the attack draws no noise.
            targets: Optional integers of shape `(batch,)`: target classes.

        Returns:
            The state, a dict.
        """
        state = self._initial_state(images, labels, keys, targets)
        value, logits = self.ascended_loss(logits_fn, state)(state["images"])
        return self.update_best(state, state["images"], value, logits)

    def begin(
        self, logits_fn: LogitsFn, state: State, round_index: int | Tensor
    ) -> State:
        """Starts round `round_index`, an integer or a scalar tensor."""
        del logits_fn, round_index
        return state

    def step(
        self,
        logits_fn: LogitsFn,
        state: State,
        round_index: int | Tensor,
        step_index: int | Tensor,
    ) -> State:
        """Takes step `step_index` of round `round_index`."""
        raise NotImplementedError(type(self).__name__)

    def end(
        self, logits_fn: LogitsFn, state: State, round_index: int | Tensor
    ) -> State:
        """Finishes round `round_index`."""
        del logits_fn, round_index
        return state

    def ascended_loss(self, logits_fn: LogitsFn, state: State) -> AscendedLoss:
        """Returns a callable from images to (attack loss, logits)."""
        labels, targets = state["labels"], state.get("targets")

        def evaluate(images: Tensor) -> tuple[Tensor, Tensor]:
            outputs = losses.outputs_of(logits_fn(images))
            value = mean_loss(self._loss, outputs, labels, targets)
            return value, outputs.logits

        return evaluate

    # --- Methods that all attacks share ---

    @property
    def _loss(self) -> str:
        """The name of the attack loss; some attacks have a field for it."""
        return getattr(self, "loss", "cross_entropy")

    def __call__(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> AttackResult:
        """Attacks a batch; see `open` for the arguments.

        Returns:
            An `AttackResult`. Each example gets the best of the clean image
            and the candidates of all rounds. A success is better than any
            other misclassified image, which is better than a correctly
            classified one; among equals the higher loss is better. With
            `keep="first"` the first success is final.

        Raises:
            ValueError: If images are not floats in [0, 1], or if a label or a
                target is not a class of the model. Inside a compiled function
                only the types are checked, since values are not known there.
        """
        logits_fn = check_inputs(logits_fn, images, labels, targets)
        state = self.open(logits_fn, images, labels, keys, targets)

        def run_round(round_index: int | Tensor, state: State) -> State:
            state = self.begin(
                at_step(logits_fn, round_index, 0), state, round_index
            )
            state = self.advance(
                logits_fn, state, round_index, 0, self.steps_a_round
            )
            return self.end(
                at_step(logits_fn, round_index, self.steps_a_round),
                state,
                round_index,
            )

        state = ops.fori_loop(0, self.rounds, run_round, state)
        return AttackResult(state["best"], state["success"], state["loss"])

    def perturb(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Takes the steps of one round and returns the last iterate.

        Training needs no success flags, so this method omits the model calls
        that only compute them.

        Args:
            logits_fn: See `open`. Its outputs may hold the attack loss itself
                (`losses.Outputs.ascended`).
            images, labels, keys, targets: See `open`.
            start: Optional perturbations of the shape of `images`. They are
                projected and replace the attack's own start.

        Returns:
            The last iterate: float32 of the shape of `images`, inside the norm
            ball and inside [0, 1].

        Raises:
            NotImplementedError: If the attack is not gradient-based.
        """
        raise NotImplementedError(
            "Expected an attack that implements perturb, such as pgd. "
            f"Received: {type(self).__name__}."
        )

    def advance(
        self,
        logits_fn: LogitsFn,
        state: State,
        round_index: int | Tensor,
        first: int | Tensor,
        count: int | Tensor,
    ) -> State:
        """Takes `count` steps of round `round_index`, from step `first`."""

        def body(offset: int | Tensor, state: State) -> State:
            step_index = first + offset
            fn = at_step(logits_fn, round_index, step_index)
            return self.step(fn, state, round_index, step_index)

        return ops.fori_loop(0, count, body, state)

    def runtime_parameters(self) -> dict[str, Any]:
        """Returns the values of `RUNTIME_PARAMETERS`, by name; see `bind`."""
        return {name: getattr(self, name) for name in self.RUNTIME_PARAMETERS}

    def bind(self, parameters: Mapping[str, Any]) -> Self:
        """Returns a copy of this attack with other runtime parameters.

        The values may be scalar tensors, so that one compiled attack serves
        many radii and numbers of steps or restarts. They are not validated.

        Args:
            parameters: Dict with the keys of `runtime_parameters()`.
        """
        bound = copy.copy(self)
        for name, value in parameters.items():
            object.__setattr__(bound, name, value)
        return bound

    def scaled(self, factor: float | Tensor) -> Self:
        """Returns this attack with radius and step size times `factor`.

        Args:
            factor: At most 1: a float, a scalar tensor (a schedule of the
                radius in training), or one value per image, `(batch,)`.
        """
        parameters = self.runtime_parameters()
        return self.bind(
            {
                name: parameters[name] * factor
                for name in ("epsilon", "step_length")
                if name in parameters
            }
        )

    def _initial_state(
        self,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None,
        targets: Tensor | None,
    ) -> State:
        images = ops.convert_to_tensor(images, dtype="float32")
        labels = ops.cast(labels, "int32")
        if keys is None:
            if self.random:
                raise ValueError(
                    f"Expected keys (randomness.example_keys) for {self.name}, "
                    "which draws noise. Received: keys=None."
                )
            keys = ops.stack([labels, labels], axis=-1)
        false = ops.cast(ops.zeros_like(labels), "bool")
        state = {
            "images": images,
            "labels": labels,
            "keys": ops.cast(keys, "int32"),
            "best": images,
            "success": false,
            "wrong": false,
            "nonfinite": false,
            "loss": ops.full_like(images[:, 0, 0, 0], -math.inf),
        }
        if targets is not None:
            state["targets"] = ops.cast(targets, "int32")
        return state

    def gradient(
        self, logits_fn: LogitsFn, state: State, iterate: Tensor
    ) -> tuple[State, Tensor, Tensor, Tensor]:
        """Evaluates the attack loss and its gradient at `iterate`.

        Args:
            logits_fn: See `open`.
            state: The state.
            iterate: Images of the shape of `state["images"]`.

        Returns:
            Tuple of the state, in which examples with a non-finite gradient
            are marked; the attack loss `(batch,)`; the logits; and the
            gradient, finite and of the shape of the images.
        """
        (value, logits), grad, flags = gradients.value_and_grad(
            self.ascended_loss(logits_fn, state),
            iterate,
            has_aux=True,
            with_flags=True,
        )
        return mark_nonfinite(state, flags), value, logits, grad

    def update_best(
        self,
        state: State,
        images: Tensor,
        value: Tensor,
        logits: Tensor,
        allowed: bool | Tensor = True,
    ) -> State:
        """Compares candidates with the best so far and keeps the better.

        Args:
            state: The state.
            images: Candidates, of the shape of `state["images"]`.
            value: Their attack loss, `(batch,)`.
            logits: Their logits, `(batch, classes)`.
            allowed: Booleans, scalar or `(batch,)`; other candidates are never
                kept.

        Returns:
            The new state.
        """
        success, misclassified = losses.judge(
            logits, state["labels"], state.get("targets")
        )
        value = losses.comparable(value, logits)
        state = mark_nonfinite(state, losses.nonfinite(logits))
        return losses.update_best(
            state,
            images,
            ops.where(allowed, value, -math.inf),
            ops.logical_and(success, allowed),
            ops.logical_and(misclassified, allowed),
            self.keep,
        )


def mark_nonfinite(state: State, flags: Tensor) -> State:
    """Returns the state with "nonfinite" also set where `flags` are true."""
    return {**state, "nonfinite": ops.logical_or(state["nonfinite"], flags)}


def at_step(
    logits_fn: LogitsFn, round_index: int | Tensor, step_index: int | Tensor
) -> LogitsFn:
    """Binds the noise of a stochastic model to a round and a step.

    Args:
        logits_fn: A `logits_fn`. If it has a method `at_step(round_index,
            step_index)`, this returns the `logits_fn` with the noise of that
            step.
        round_index: The round, an integer or a scalar tensor.
        step_index: The step, an integer or a scalar tensor.
    """
    if not hasattr(logits_fn, "at_step"):
        return logits_fn
    return logits_fn.at_step(round_index, step_index)


def mean_loss(
    name: str,
    outputs: losses.Outputs,
    labels: Tensor,
    targets: Tensor | None = None,
) -> Tensor:
    """The attack loss of `Outputs`: `(batch,)`.

    It is `outputs.ascended` if that is set. Otherwise it is `losses.loss`,
    averaged over the head logits if there are any.
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


def check_inputs(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
) -> LogitsFn:
    """Validates the inputs of an attack.

    Args:
        logits_fn: See `Attack.open`.
        images, labels, targets: See `Attack.open`.

    Returns:
        The `logits_fn`, wrapped: it raises a ValueError if a label or a target
        is not a class of its logits.

    Raises:
        ValueError: If images are not floats in [0, 1] or a class is negative.
    """
    _check_type("images", images, "float", "floats in [0, 1]")
    values = compilation.concrete(images)
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
        values = compilation.concrete(classes)
        if values is None or not values.size:
            continue
        if values.min() < 0:
            raise ValueError(
                f"Expected {name} >= 0. Received: {values.min()} in {name}."
            )
        highest = max(highest, int(values.max()))
    return _CheckedLogits(logits_fn, highest)


def _check_type(name: str, values: Tensor, kind: str, description: str) -> None:
    dtype = getattr(values, "dtype", None)
    if dtype is None:
        dtype = np.asarray(values).dtype
    dtype = keras.backend.standardize_dtype(dtype)
    if kind not in dtype:
        raise ValueError(
            f"Expected {name} to be {description}. Received: {name} of dtype "
            f"{dtype}."
        )


class _CheckedLogits:
    """A `logits_fn` that raises if its logits lack the class `highest`."""

    def __init__(self, logits_fn: LogitsFn, highest: int) -> None:
        self.logits_fn, self.highest = logits_fn, highest

    def at_step(
        self, round_index: int | Tensor, step_index: int | Tensor
    ) -> "_CheckedLogits":
        """See `at_step`."""
        return _CheckedLogits(
            at_step(self.logits_fn, round_index, step_index), self.highest
        )

    def __call__(self, images: Tensor) -> Tensor | losses.Outputs:
        outputs = losses.outputs_of(self.logits_fn(images))
        classes = outputs.logits.shape[-1]
        if self.highest >= classes:
            raise ValueError(
                f"Expected labels and targets from 0 to {classes - 1}, the "
                f"classes of the model. Received: {self.highest}."
            )
        return outputs


def check_threat_model(norm: str, epsilon: float) -> None:
    """Raises a ValueError, in one line, if norm or epsilon is invalid."""
    lp.check_norm(norm)
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


def perturbed(images: Tensor, delta: Tensor) -> Tensor:
    """Returns images + delta, clipped to [0, 1].

    The model is evaluated on this image, and attacks return it. The sum of a
    projected `delta` may exceed [0, 1] by a rounding error.
    """
    return ops.clip(images + delta, 0.0, 1.0)
