"""Gradient-based attacks: FGSM, PGD, BIM, MIM and PGD with Adam.

Each is a `base.Attack`. The iterative ones share the base class
`Iterative` and differ in how a step follows from the gradient.
"""

import dataclasses
import math
from typing import Any, ClassVar, Self

from keras import ops

from saccade.attacks import base as attack_base
from saccade.attacks import losses, settings
from saccade.attacks.base import AscendedLoss, LogitsFn
from saccade.attacks.losses import State
from saccade.core import lp, randomness
from saccade.core import names as known_names
from saccade.core.arrays import Tensor

STEP_RULES = tuple(settings.STEP_RULE.choices)
KEEPS = tuple(settings.KEEP.choices)


def _check_steps(steps: int, restarts: int = 1) -> None:
    if steps < 0 or restarts < 1:
        raise ValueError(
            "Expected steps >= 0 and restarts >= 1. Received: "
            f"steps={steps}, restarts={restarts}."
        )


def _check_start(random_start: float, restarts: int) -> None:
    if not 0 <= random_start <= 1:
        raise ValueError(
            "Expected random_start to be a probability in [0, 1]. "
            f"Received: random_start={random_start:g}."
        )
    if restarts > 1 and random_start == 0:
        raise ValueError(
            "Expected random_start > 0 with several restarts, which would"
            f" all be the same. Received: restarts={restarts}, "
            "random_start=0."
        )


def _check_keep(keep: str) -> None:
    known_names.require("keep", keep, KEEPS)


def check_fraction(fraction: float) -> None:
    """Raises a ValueError, in one line, if `fraction` is not in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(
            "Expected l1_fraction in (0, 1], the fraction of the coordinates "
            f"that an L1 step changes. Received: l1_fraction={fraction:g}."
        )


def gradient_step(
    delta: Tensor,
    grad: Tensor,
    images: Tensor,
    attack: Any,
    length: float | Tensor,
) -> Tensor:
    """Takes one step along a gradient and projects the result.

    The projection is onto the norm ball and the pixel range together.

    Args:
        delta: Perturbations, `(batch, height, width, channels)`.
        grad: Gradient of the attack loss, of the shape of `delta`.
        images: Clean images, of the shape of `delta`.
        attack: An object with norm, epsilon and l1_fraction.
        length: Length of the step in the norm: a scalar, or one per image,
            `(batch,)`.

    Returns:
        The new perturbations.
    """
    length = _broadcastable(length, delta)
    room = None
    if attack.norm == "l1":
        iterate = attack_base.perturbed(images, delta)
        room = ops.where(grad > 0, 1.0 - iterate, iterate)
        room = room / ops.maximum(length, 1e-20)
    direction = lp.ascent_direction(
        grad, attack.norm, fraction=attack.l1_fraction, room=room
    )
    delta = delta + length * direction
    return lp.project(delta, attack.epsilon, attack.norm, images)


def _broadcastable(length: float | Tensor, like: Tensor) -> Tensor:
    """Reshapes a scalar or `(batch,)` length to broadcast against `like`."""
    if len(getattr(length, "shape", ())) == 0:
        return length
    return lp.per_example(length, like)


def random_start(
    images: Tensor, attack: Any, keys: Tensor | None, round_index: int | Tensor
) -> Tensor:
    """Returns the perturbations from which round `round_index` starts.

    With probability `attack.random_start` an example starts at a random point
    of the norm ball, otherwise at the clean image.
    """
    if attack.random_start == 0:
        return ops.zeros_like(images)
    keys = randomness.fold_in(keys, round_index)
    shape = tuple(images.shape[1:])
    delta = lp.random_in_ball(
        randomness.fold_in(keys, 0), shape, attack.epsilon, attack.norm
    )
    if attack.random_start < 1:
        draw = randomness.uniform(randomness.fold_in(keys, 1), ())
        is_random = lp.per_example(draw < attack.random_start, delta)
        delta = ops.where(is_random, delta, ops.zeros_like(delta))
    return lp.project(delta, attack.epsilon, attack.norm, images)


@dataclasses.dataclass(frozen=True)
class FGSM(attack_base.Attack):
    """The fast gradient (sign) method: one step of length epsilon.

    In L-inf this is the fast gradient sign method. In L2 and L1 the step has
    the ascent direction of that norm and is projected onto the norm ball and
    the pixel range. An example keeps its clean image if the step does not
    increase the loss.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the norm ball and length of the step, in units of the
            pixel range [0, 1].
        loss: One of `losses.LOSSES`.
        l1_fraction: Fraction of the coordinates that an L1 step changes.

    References:
        - [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572)
    """

    loss: str = settings.LOSS.field("cross_entropy")
    l1_fraction: float = settings.L1_FRACTION.field(0.01)

    name: ClassVar[str] = "fgsm"

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.check_loss(self.loss)
        check_fraction(self.l1_fraction)

    @property
    def keep(self) -> str:
        """See `Attack.keep`: the step also counts on misclassified images."""
        return "best"

    def open(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> State:
        """See `Attack.open`; `step` evaluates the clean image."""
        del logits_fn
        return self._initial_state(images, labels, keys, targets)

    def step(
        self,
        logits_fn: LogitsFn,
        state: State,
        round_index: int | Tensor,
        step_index: int | Tensor,
    ) -> State:
        """See `Attack.step`."""
        del round_index, step_index
        images = state["images"]
        state, value, logits, grad = self.gradient(logits_fn, state, images)
        state = self.update_best(state, images, value, logits)
        candidates = self._take_step(images, ops.zeros_like(images), grad)
        return self.update_best(
            state, candidates, *self.ascended_loss(logits_fn, state)(candidates)
        )

    def perturb(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """See `Attack.perturb`."""
        state = self._initial_state(images, labels, keys, targets)
        images = state["images"]
        delta = ops.zeros_like(images)
        if start is not None:
            delta = lp.project(start, self.epsilon, self.norm, images)
        iterate = attack_base.perturbed(images, delta)
        *_, grad = self.gradient(logits_fn, state, iterate)
        return self._take_step(images, delta, grad)

    def _take_step(self, images: Tensor, delta: Tensor, grad: Tensor) -> Tensor:
        delta = gradient_step(delta, grad, images, self, self.epsilon)
        return attack_base.perturbed(images, delta)


def _clean_attention(outputs: losses.Outputs) -> State:
    """The attention on the clean images, as entries of the state."""
    return {
        f"clean_{name}": ops.cast(value, "float32")
        for name, value in outputs.shown.items()
    }


@dataclasses.dataclass(frozen=True)
class Iterative(attack_base.Attack):
    """The base class of PGD, PGD with Adam and SPSA.

    Each restart takes steps from a start in the norm ball.

    Attributes:
        steps: Gradient steps of each restart.
        restarts: Independent starts; the worst case over them is kept.
        random_start: Probability that an example starts at a random point of
            the norm ball (uniform, then projected onto the pixel range)
            instead of at the clean image.
        keep: Which candidates are kept. `"best"`: every iterate is a
            candidate, and the success of highest loss is kept, so that more
            steps of the same size are never weaker. `"first"`: as `"best"` up
            to the first success, which is final, so that an evaluation stops
            attacking the example. `"last"`: only the last iterate of each
            restart is a candidate, as in published tables.
        loss: One of `losses.LOSSES`.
        distraction: Weight of `losses.attention_distance`, the distance
            between the model's attention on the candidate and on the clean
            image, which is added to the class loss. For models that output
            gazes, boxes or attention maps.
    """

    steps: int = settings.STEPS.field(20)
    restarts: int = settings.RESTARTS.field(1)
    random_start: float = settings.RANDOM_START.field(1.0)
    keep: str = settings.KEEP.field("best")
    loss: str = settings.LOSS.field("cross_entropy")
    distraction: float = settings.DISTRACTION.field(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "random_start", float(self.random_start))
        _check_steps(self.steps, self.restarts)
        _check_start(self.random_start, self.restarts)
        _check_keep(self.keep)
        losses.check_loss(self.loss)
        if not (math.isfinite(self.distraction) and self.distraction >= 0):
            raise ValueError(
                "Expected a finite distraction >= 0, the weight of the "
                "attention distance. Received: "
                f"distraction={self.distraction:g}."
            )

    @property
    def random(  # type: ignore[override]  # It depends on a field here.
        self,
    ) -> bool:
        """Whether the attack draws noise."""
        return self.random_start > 0

    @property
    def rounds(self) -> int:
        """See `Attack.rounds`."""
        return self.restarts

    @property
    def steps_a_round(self) -> int:
        """See `Attack.steps_a_round`."""
        return self.steps

    def ascended_loss(self, logits_fn: LogitsFn, state: State) -> AscendedLoss:
        """See `Attack.ascended_loss`; adds the attention distance."""
        if not self.distraction:
            return super().ascended_loss(logits_fn, state)
        labels, targets = state["labels"], state.get("targets")
        reference = {
            key[6:]: value
            for key, value in state.items()
            if key.startswith("clean_")
        }
        shape = tuple(state["images"].shape[1:])

        def evaluate(images: Tensor) -> tuple[Tensor, Tensor]:
            outputs = losses.outputs_of(logits_fn(images))
            value = attack_base.mean_loss(self.loss, outputs, labels, targets)
            distance = losses.attention_distance(
                outputs.shown, reference, shape
            )
            return value + self.distraction * distance, outputs.logits

        return evaluate

    def open(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> State:
        """See `Attack.open`."""
        state = self._initial_state(images, labels, keys, targets)
        state["delta"] = ops.zeros_like(state["images"])
        state = {**state, **self._optimizer_state(state["images"])}
        if not self.distraction:
            if self.keep != "last" and not self.random:
                # The first iterate is the clean image, so that the first step
                # evaluates it.
                return state
            value, logits = self.ascended_loss(logits_fn, state)(
                state["images"]
            )
            return self.update_best(state, state["images"], value, logits)
        outputs = losses.outputs_of(logits_fn(state["images"]))
        state = {**state, **_clean_attention(outputs)}
        value = attack_base.mean_loss(
            self.loss, outputs, state["labels"], state.get("targets")
        )
        return self.update_best(state, state["images"], value, outputs.logits)

    def _optimizer_state(self, images: Tensor) -> State:
        """Zero state of the optimizer, from which each round starts."""
        del images
        return {}

    def begin(
        self, logits_fn: LogitsFn, state: State, round_index: int | Tensor
    ) -> State:
        """See `Attack.begin`."""
        del logits_fn
        images = state["images"]
        delta = random_start(images, self, state["keys"], round_index)
        return {**state, **self._optimizer_state(images), "delta": delta}

    def step(
        self,
        logits_fn: LogitsFn,
        state: State,
        round_index: int | Tensor,
        step_index: int | Tensor,
    ) -> State:
        """See `Attack.step`."""
        del round_index
        iterate = attack_base.perturbed(state["images"], state["delta"])
        state, value, logits, grad = self.gradient(logits_fn, state, iterate)
        if self.keep != "last":
            state = self.update_best(state, iterate, value, logits)
        return self._update_delta(state, grad, step_index)

    def _update_delta(
        self, state: State, grad: Tensor, step_index: int | Tensor
    ) -> State:
        """Returns the state after a step along `grad`."""
        raise NotImplementedError(type(self).__name__)

    def perturb(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """See `Attack.perturb`: the last iterate of the first restart."""
        # With "last", the steps do not compute success flags.
        attack = self.bind({"keep": "last"})
        state = attack._initial_state(images, labels, keys, targets)
        if attack.distraction:
            outputs = losses.outputs_of(logits_fn(state["images"]))
            state = {**state, **_clean_attention(outputs)}
        if start is None:
            state = attack.begin(logits_fn, state, 0)
        else:
            images = state["images"]
            delta = lp.project(start, attack.epsilon, attack.norm, images)
            state = {**state, **attack._optimizer_state(images), "delta": delta}
        state = attack.advance(logits_fn, state, 0, 0, attack.steps)
        return attack_base.perturbed(state["images"], state["delta"])

    def end(
        self, logits_fn: LogitsFn, state: State, round_index: int | Tensor
    ) -> State:
        """See `Attack.end`: evaluates the last iterate."""
        del round_index
        iterate = attack_base.perturbed(state["images"], state["delta"])
        return self.update_best(
            state, iterate, *self.ascended_loss(logits_fn, state)(iterate)
        )


@dataclasses.dataclass(frozen=True)
class PGD(Iterative):
    """Projected gradient descent with random starts and restarts.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the norm ball, in units of the pixel range [0, 1].
        steps, restarts, random_start, keep, loss, distraction: See
            `Iterative`.
        step_size: Length of one step in `norm`, in the units of epsilon. None
            means min(epsilon, 2.5 * epsilon / steps), the rule of Madry et
            al.: the steps together can cross the norm ball.
        step_rule: `"fixed"`; `"at_least"`: the step size is at least
            epsilon / steps, so that few steps still reach the boundary; or
            `"decayed"`: the step size is divided by 10 after half of the
            steps, and by 100 in the last quarter.
        momentum: Decay of the accumulated gradient; each gradient is first
            scaled to mean absolute value 1 (Dong et al.). 0 is plain PGD.
        l1_fraction: Fraction of the coordinates that an L1 step changes.

    References:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
        - [Dong et al., 2018](https://arxiv.org/abs/1710.06081), momentum
        - [Gowal et al., 2020](https://arxiv.org/abs/2010.03593), step decay
    """

    step_size: float | None = settings.STEP_SIZE.field(None)
    step_rule: str = settings.STEP_RULE.field("fixed")
    momentum: float = settings.MOMENTUM.field(0.0)
    l1_fraction: float = settings.L1_FRACTION.field(0.01)

    name: ClassVar[str] = "pgd"
    RUNTIME_PARAMETERS: ClassVar[tuple[str, ...]] = (
        "epsilon",
        "step_length",
        "steps",
        "restarts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not (
            math.isfinite(self.step_size) and self.step_size >= 0
        ):
            raise ValueError(
                "Expected a finite step_size >= 0, or none for 2.5 * epsilon /"
                f" steps. Received: step_size={self.step_size:g}."
            )
        known_names.require("step_rule", self.step_rule, STEP_RULES)
        if not (math.isfinite(self.momentum) and self.momentum >= 0):
            raise ValueError(
                "Expected a finite momentum >= 0. Received: "
                f"momentum={self.momentum:g}."
            )
        check_fraction(self.l1_fraction)
        object.__setattr__(self, "step_length", self._step_length())

    def _step_length(self) -> float | Tensor:
        """The effective step size, from `step_size` and `step_rule`."""
        steps = max(self.steps, 1)
        length = self.step_size
        if length is None:
            length = min(1.0, 2.5 / steps) * self.epsilon
        if self.step_rule == "at_least":
            length = max(length, self.epsilon / steps)
        return length

    def _optimizer_state(self, images: Tensor) -> State:
        if not self.momentum:
            return {}
        return {"velocity": ops.zeros_like(images)}

    def _update_delta(
        self, state: State, grad: Tensor, step_index: int | Tensor
    ) -> State:
        # A runtime parameter that is no field; see `__post_init__`.
        length: float | Tensor = self.step_length  # type: ignore[attr-defined]
        if self.step_rule == "decayed":
            done = ops.cast(step_index, "float32")
            done = done / ops.cast(self.steps, "float32")
            length = length * ops.where(
                done < 0.5, 1.0, ops.where(done < 0.75, 0.1, 0.01)
            )
        if self.momentum:
            scale = lp.lp_norm(grad, "l1") / math.prod(grad.shape[1:])
            grad = grad / lp.per_example(ops.maximum(scale, 1e-20), grad)
            grad = self.momentum * state["velocity"] + grad
            state = {**state, "velocity": grad}
        delta = gradient_step(
            state["delta"], grad, state["images"], self, length
        )
        return {**state, "delta": delta}


@dataclasses.dataclass(frozen=True)
class BIM(PGD):
    """The basic iterative method: PGD that starts at the clean image.

    The defaults are those of Foolbox 2, which the handover used: five steps of
    size (epsilon / 0.3) * 0.1, and the first misclassified iterate is final.

    References:
        - [Kurakin et al., 2017](https://arxiv.org/abs/1607.02533)
    """

    steps: int = settings.STEPS.field(5)
    random_start: float = settings.RANDOM_START.field(0.0)
    keep: str = settings.KEEP.field("first")

    name: ClassVar[str] = "bim"

    def _step_length(self) -> float | Tensor:
        if self.step_size is None:
            return self.epsilon / 0.3 * 0.1
        return super()._step_length()


@dataclasses.dataclass(frozen=True)
class MIM(PGD):
    """The momentum iterative method: PGD with momentum 1.

    It starts at the clean image and takes ten steps of epsilon / 10, as
    published.

    References:
        - [Dong et al., 2018](https://arxiv.org/abs/1710.06081)
    """

    steps: int = settings.STEPS.field(10)
    random_start: float = settings.RANDOM_START.field(0.0)
    momentum: float = settings.MOMENTUM.field(1.0)

    name: ClassVar[str] = "mim"

    def _step_length(self) -> float | Tensor:
        if self.step_size is None:
            return self.epsilon / max(self.steps, 1)
        return super()._step_length()


@dataclasses.dataclass(frozen=True)
class PGDAdam(Iterative):
    """Projected gradient descent with Adam steps.

    The defaults are those of the S3TA supplement (section 3.2): 250 steps with
    learning rate 0.1, then 0.01 from step 100 and 0.001 from step 200. The
    attack is meant for L-inf. Adam moves all coordinates by similar amounts,
    which is a poor direction in L2 and L1, and the rates are not scaled with
    the radius. `PGD` is stronger in L2 and L1.

    Attributes:
        rates: Learning rates, in units of the pixel range.
        boundaries: Steps from which the next rate is used.

    References:
        - [Zoran et al., 2020](https://arxiv.org/abs/1912.02184), supplement
        - [Uesato et al., 2018](https://arxiv.org/abs/1802.05666)
    """

    steps: int = settings.STEPS.field(250)
    rates: tuple = (0.1, 0.01, 0.001)
    boundaries: tuple = (100, 200)

    name: ClassVar[str] = "pgd_adam"
    RUNTIME_PARAMETERS: ClassVar[tuple[str, ...]] = (
        "epsilon",
        "steps",
        "restarts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rates", "boundaries"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.rates) != len(self.boundaries) + 1 or any(
            not rate >= 0 for rate in self.rates
        ):
            raise ValueError(
                "Expected rates >= 0, one more than there are boundaries. "
                f"Received: rates={self.rates}, boundaries={self.boundaries}."
            )

    def scaled(self, factor: float | Tensor) -> Self:
        """See `Attack.scaled`; the learning rates are scaled too."""
        rates = tuple(rate * factor for rate in self.rates)
        return super().scaled(factor).bind({"rates": rates})

    def _optimizer_state(self, images: Tensor) -> State:
        zero = ops.zeros_like(images)
        return {"mean": zero, "square": zero}

    def _update_delta(
        self, state: State, grad: Tensor, step_index: int | Tensor
    ) -> State:
        # Adam does not depend on the scale of the gradient except through its
        # own epsilon.
        peak = ops.maximum(lp.lp_norm(grad, "linf"), 1e-30)
        grad = grad / lp.per_example(peak, grad)
        rate = ops.cast(self.rates[0], "float32")
        for boundary, value in zip(
            self.boundaries, self.rates[1:], strict=True
        ):
            rate = ops.where(step_index >= boundary, value, rate)
        rate = _broadcastable(rate, grad)
        count = ops.cast(step_index, "float32") + 1.0
        mean = 0.9 * state["mean"] + 0.1 * grad
        square = 0.999 * state["square"] + 0.001 * ops.square(grad)
        corrected_mean = mean / (1.0 - 0.9**count)
        corrected_rms = ops.sqrt(square / (1.0 - 0.999**count))
        delta = state["delta"] + rate * corrected_mean / (corrected_rms + 1e-8)
        delta = lp.project(delta, self.epsilon, self.norm, state["images"])
        return {**state, "mean": mean, "square": square, "delta": delta}


ATTACKS = {attack.name: attack for attack in (FGSM, PGD, BIM, MIM, PGDAdam)}
