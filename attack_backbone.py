"""Attacks along the gradient: FGSM, PGD and its kin.

Each is an `attack_rounds.Attack`. A walk (`Iterative`) leads from a start in
the ball through it; PGD, BIM, MIM and PGD with Adam differ in how they step.
"""

import dataclasses
import math
from typing import ClassVar

from keras import ops

import attack_rounds
import losses
import numerics

STEP_RULES = ("fixed", "at_least", "decayed")
KEEPS = ("first", "best", "last")


def _check_steps(steps, restarts=1):
    if steps < 0 or restarts < 1:
        raise ValueError(
            "Expected steps >= 0 and restarts >= 1. Received: "
            f"steps={steps}, restarts={restarts}."
        )


def _check_start(random_start, restarts):
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


def _check_keep(keep):
    if keep not in KEEPS:
        raise ValueError(
            f"Expected keep to be one of {', '.join(KEEPS)}. Received: "
            f"keep={keep!r}."
        )


def check_fraction(fraction):
    """Raises a ValueError, one line, if it is no part of the coordinates."""
    if not 0 < fraction <= 1:
        raise ValueError(
            "Expected l1_fraction in (0, 1], the part of the coordinates an L1 "
            f"step moves. Received: l1_fraction={fraction:g}."
        )


def move(delta, grad, images, attack, length):
    """Steps by `length` along a gradient, then projects on ball and box.

    Args:
        delta: Perturbations, `(batch, height, width, channels)`.
        grad: Gradient of what is ascended, of that shape.
        images: Clean images, of that shape.
        attack: Anything with norm, epsilon and l1_fraction.
        length: Length of the step in the norm; a tensor may hold one an image.

    Returns:
        The new perturbations.
    """
    length = _each(length, delta)
    room = None
    if attack.norm == "l1":
        here = attack_rounds.perturbed(images, delta)
        room = ops.where(grad > 0, 1.0 - here, here)
        room = room / ops.maximum(length, 1e-20)
    direction = numerics.ascent_direction(
        grad, attack.norm, fraction=attack.l1_fraction, room=room
    )
    delta = delta + length * direction
    return numerics.project(delta, attack.epsilon, attack.norm, images)


def _each(length, like):
    """Lets a length, or one an image, broadcast against images."""
    if len(getattr(length, "shape", ())) == 0:
        return length
    return numerics.per_example(length, like)


def random_start(images, attack, keys, number):
    """Where round `number` begins: in the ball by chance, else at the image."""
    if attack.random_start == 0:
        return ops.zeros_like(images)
    keys = numerics.fold_in(keys, number)
    shape = tuple(images.shape[1:])
    delta = numerics.random_in_ball(
        numerics.fold_in(keys, 0), shape, attack.epsilon, attack.norm
    )
    if attack.random_start < 1:
        chance = numerics.uniform(numerics.fold_in(keys, 1), ())
        moved = numerics.per_example(chance < attack.random_start, delta)
        delta = ops.where(moved, delta, ops.zeros_like(delta))
    return numerics.project(delta, attack.epsilon, attack.norm, images)


@dataclasses.dataclass(frozen=True)
class FGSM(attack_rounds.Attack):
    """The fast gradient (sign) method: one step of length epsilon.

    In L-inf it is the fast gradient sign method; in L2 and L1 the same with
    the direction of that norm, projected onto the ball and the box. An example
    keeps its clean image where the step does not make it worse.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the ball and length of the step, in units of the
            pixel range [0, 1].
        loss: One of `losses.LOSSES`.
        l1_fraction: Part of the coordinates that share the L1 step.

    References:
        - [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572)
    """

    loss: str = "cross_entropy"
    l1_fraction: float = 0.01

    name: ClassVar[str] = "fgsm"

    def __post_init__(self):
        super().__post_init__()
        losses.check_loss(self.loss)
        check_fraction(self.l1_fraction)

    @property
    def keep(self):
        """See `Attack.keep`; the step counts where the image fails already."""
        return "best"

    def open(self, logits_fn, images, labels, keys=None, targets=None):
        """See `Attack.open`; the step judges the clean image."""
        del logits_fn
        return self._rows(images, labels, keys, targets)

    def step(self, logits_fn, state, number, index):
        """See `Attack.step`."""
        del number, index
        images = state["images"]
        state, value, logits, grad = self.gradient(logits_fn, state, images)
        state = self._offer(state, images, value, logits)
        changed = self._move(images, ops.zeros_like(images), grad)
        return self._offer(
            state, changed, *self.ascended_loss(logits_fn, state)(changed)
        )

    def perturb(
        self, logits_fn, images, labels, keys=None, targets=None, start=None
    ):
        """See `Attack.perturb`."""
        state = self._rows(images, labels, keys, targets)
        images = state["images"]
        delta = ops.zeros_like(images)
        if start is not None:
            delta = numerics.project(start, self.epsilon, self.norm, images)
        here = attack_rounds.perturbed(images, delta)
        *_, grad = self.gradient(logits_fn, state, here)
        return self._move(images, delta, grad)

    def _move(self, images, delta, grad):
        delta = move(delta, grad, images, self, self.epsilon)
        return attack_rounds.perturbed(images, delta)


def _attended(outputs):
    """Where the model looks on the clean image, as rows of the state."""
    return {
        f"clean_{name}": ops.cast(shown, "float32")
        for name, shown in outputs.shown.items()
    }


@dataclasses.dataclass(frozen=True)
class Iterative(attack_rounds.Attack):
    """What PGD, PGD with Adam and SPSA share: a walk from a random start.

    Attributes:
        steps: Gradient steps of one restart.
        restarts: Independent starts; the worst case over them is kept.
        random_start: Probability that an example starts at a random point of
            the ball (uniform, then projected onto the box) instead of at the
            clean image.
        keep: Which candidates count. `"best"`: every iterate, the one of
            highest loss among those that succeed, so that more steps of the
            same size are never weaker; `"first"`: the same up to the first
            success, after which an example is left in peace (so an evaluation
            need not attack it on); `"last"`: only the last iterate of each
            restart, as the published tables do.
        loss: One of `losses.LOSSES`.
        distraction: Weight of the distance by which the model's attention
            moves from where it was on the clean image
            (`losses.attention_distance`), added to the class loss. For
            models that show gazes, boxes or maps.
    """

    steps: int = 20
    restarts: int = 1
    random_start: float = 1.0
    keep: str = "best"
    loss: str = "cross_entropy"
    distraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "random_start", float(self.random_start))
        _check_steps(self.steps, self.restarts)
        _check_start(self.random_start, self.restarts)
        _check_keep(self.keep)
        losses.check_loss(self.loss)
        if not (math.isfinite(self.distraction) and self.distraction >= 0):
            raise ValueError(
                "Expected a finite distraction >= 0, the weight of the moved "
                f"attention. Received: distraction={self.distraction:g}."
            )

    @property
    def random(self):
        """Whether it draws noise."""
        return self.random_start > 0

    @property
    def rounds(self):
        """See `Attack.rounds`."""
        return self.restarts

    @property
    def steps_a_round(self):
        """See `Attack.steps_a_round`."""
        return self.steps

    def ascended_loss(self, logits_fn, state):
        """See `Attack.ascended_loss`; with the distance of the attention."""
        if not self.distraction:
            return super().ascended_loss(logits_fn, state)
        labels, targets = state["labels"], state.get("targets")
        reference = {
            key[6:]: value
            for key, value in state.items()
            if key.startswith("clean_")
        }
        shape = tuple(state["images"].shape[1:])

        def evaluate(images):
            outputs = losses.outputs_of(logits_fn(images))
            value = attack_rounds.mean_loss(self.loss, outputs, labels, targets)
            distance = losses.attention_distance(
                outputs.shown, reference, shape
            )
            return value + self.distraction * distance, outputs.logits

        return evaluate

    def open(self, logits_fn, images, labels, keys=None, targets=None):
        """See `Attack.open`."""
        state = self._rows(images, labels, keys, targets)
        state["delta"] = ops.zeros_like(state["images"])
        state = {**state, **self._memory(state["images"])}
        if not self.distraction:
            if self.keep != "last" and not self.random:
                # The first iterate is the clean image: no need to judge it
                # twice.
                return state
            value, logits = self.ascended_loss(logits_fn, state)(
                state["images"]
            )
            return self._offer(state, state["images"], value, logits)
        outputs = losses.outputs_of(logits_fn(state["images"]))
        state = {**state, **_attended(outputs)}
        value = attack_rounds.mean_loss(
            self.loss, outputs, state["labels"], state.get("targets")
        )
        return self._offer(state, state["images"], value, outputs.logits)

    def _memory(self, images):
        """What the walk remembers between steps; zero when a round begins."""
        del images
        return {}

    def begin(self, logits_fn, state, number):
        """See `Attack.begin`."""
        del logits_fn
        images = state["images"]
        delta = random_start(images, self, state["keys"], number)
        return {**state, **self._memory(images), "delta": delta}

    def step(self, logits_fn, state, number, index):
        """See `Attack.step`."""
        del number
        here = attack_rounds.perturbed(state["images"], state["delta"])
        state, value, logits, grad = self.gradient(logits_fn, state, here)
        if self.keep != "last":
            state = self._offer(state, here, value, logits)
        return self._walk(state, grad, index)

    def _walk(self, state, grad, index):
        raise NotImplementedError(type(self).__name__)

    def perturb(
        self, logits_fn, images, labels, keys=None, targets=None, start=None
    ):
        """See `Attack.perturb`: the last iterate of the first restart."""
        walk = self.bind({"keep": "last"})  # Whose steps judge nothing.
        state = walk._rows(images, labels, keys, targets)
        if walk.distraction:
            outputs = losses.outputs_of(logits_fn(state["images"]))
            state = {**state, **_attended(outputs)}
        if start is None:
            state = walk.begin(logits_fn, state, 0)
        else:
            images = state["images"]
            delta = numerics.project(start, walk.epsilon, walk.norm, images)
            state = {**state, **walk._memory(images), "delta": delta}
        state = walk.advance(logits_fn, state, 0, 0, walk.steps)
        return attack_rounds.perturbed(state["images"], state["delta"])

    def end(self, logits_fn, state, number):
        """See `Attack.end`: judges the last iterate."""
        del number
        here = attack_rounds.perturbed(state["images"], state["delta"])
        return self._offer(
            state, here, *self.ascended_loss(logits_fn, state)(here)
        )


@dataclasses.dataclass(frozen=True)
class PGD(Iterative):
    """Projected gradient descent with random starts and restarts.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the ball, in units of the pixel range [0, 1].
        steps: See below, like restarts, random_start, keep, loss and
            distraction: `Iterative`.
        step_size: Length of one step in `norm`, in the units of epsilon. None
            means min(epsilon, 2.5 * epsilon / steps), the rule of Madry et
            al.: far enough to cross the ball, and finer with more steps.
        step_rule: `"fixed"`; `"at_least"`: max(step_size, epsilon / steps), so
            that few steps still cross the ball; or `"decayed"`: a tenth from
            half of the steps on, a hundredth in the last quarter.
        momentum: Decay of the running mean of gradients, each of mean absolute
            value 1 (Dong et al.); 0 is plain PGD.
        l1_fraction: Part of the coordinates that share an L1 step.

    References:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
        - [Dong et al., 2018](https://arxiv.org/abs/1710.06081), momentum
        - [Gowal et al., 2020](https://arxiv.org/abs/2010.03593), the decay
    """

    step_size: float | None = None
    step_rule: str = "fixed"
    momentum: float = 0.0
    l1_fraction: float = 0.01

    name: ClassVar[str] = "pgd"
    RUNTIME_PARAMETERS: ClassVar[tuple] = (
        "epsilon",
        "step_length",
        "steps",
        "restarts",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.step_size is not None and not (
            math.isfinite(self.step_size) and self.step_size >= 0
        ):
            raise ValueError(
                "Expected a finite step_size >= 0, or none for 2.5 * epsilon /"
                f" steps. Received: step_size={self.step_size:g}."
            )
        if self.step_rule not in STEP_RULES:
            raise ValueError(
                f"Expected step_rule to be one of {', '.join(STEP_RULES)}. "
                f"Received: step_rule={self.step_rule!r}."
            )
        if not (math.isfinite(self.momentum) and self.momentum >= 0):
            raise ValueError(
                "Expected a finite momentum >= 0. Received: "
                f"momentum={self.momentum:g}."
            )
        check_fraction(self.l1_fraction)
        object.__setattr__(self, "step_length", self._length())

    def _length(self):
        """The step size in use: `step_size`, or the rule in its place."""
        steps = max(self.steps, 1)
        length = self.step_size
        if length is None:
            length = min(1.0, 2.5 / steps) * self.epsilon
        if self.step_rule == "at_least":
            length = max(length, self.epsilon / steps)
        return length

    def _memory(self, images):
        if not self.momentum:
            return {}
        return {"velocity": ops.zeros_like(images)}

    def _walk(self, state, grad, index):
        length = self.step_length
        if self.step_rule == "decayed":
            late = ops.cast(index, "float32") / ops.cast(self.steps, "float32")
            length = length * ops.where(
                late < 0.5, 1.0, ops.where(late < 0.75, 0.1, 0.01)
            )
        if self.momentum:
            size = numerics.lp_norm(grad, "l1") / math.prod(grad.shape[1:])
            grad = grad / numerics.per_example(ops.maximum(size, 1e-20), grad)
            grad = self.momentum * state["velocity"] + grad
            state = {**state, "velocity": grad}
        delta = move(state["delta"], grad, state["images"], self, length)
        return {**state, "delta": delta}


@dataclasses.dataclass(frozen=True)
class BIM(PGD):
    """The basic iterative method, with the handover's defaults.

    PGD from the clean image, five steps of (epsilon / 0.3) * 0.1, that ends
    for an image with the first iterate that fools, as Foolbox 2's did.

    References:
        - [Kurakin et al., 2017](https://arxiv.org/abs/1607.02533)
    """

    steps: int = 5
    random_start: float = 0.0
    keep: str = "first"

    name: ClassVar[str] = "bim"

    def _length(self):
        if self.step_size is None:
            return self.epsilon / 0.3 * 0.1
        return super()._length()


@dataclasses.dataclass(frozen=True)
class MIM(PGD):
    """The momentum iterative method: PGD with momentum 1 from the image.

    Ten steps of epsilon / 10, as published.

    References:
        - [Dong et al., 2018](https://arxiv.org/abs/1710.06081)
    """

    steps: int = 10
    random_start: float = 0.0
    momentum: float = 1.0

    name: ClassVar[str] = "mim"

    def _length(self):
        if self.step_size is None:
            return self.epsilon / max(self.steps, 1)
        return super()._length()


@dataclasses.dataclass(frozen=True)
class PGDAdam(Iterative):
    """Projected gradient descent that takes its steps with Adam.

    The default is the S3TA supplement's (section 3.2): 250 steps with rate
    0.1, 0.01 from step 100 and 0.001 from step 200 on. They made it for L-inf:
    Adam moves all coordinates alike, which in L2 and L1 is a poor direction,
    and the rates are not scaled to another radius. There `PGD` is stronger.

    Attributes:
        rates: Learning rates, in units of the pixel range.
        boundaries: Steps at which the next rate begins.

    References:
        - [Zoran et al., 2020](https://arxiv.org/abs/1912.02184), supplement
        - [Uesato et al., 2018](https://arxiv.org/abs/1802.05666)
    """

    steps: int = 250
    rates: tuple = (0.1, 0.01, 0.001)
    boundaries: tuple = (100, 200)

    name: ClassVar[str] = "pgd_adam"
    RUNTIME_PARAMETERS: ClassVar[tuple] = ("epsilon", "steps", "restarts")

    def __post_init__(self):
        super().__post_init__()
        for field in ("rates", "boundaries"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.rates) != len(self.boundaries) + 1 or any(
            not rate >= 0 for rate in self.rates
        ):
            raise ValueError(
                "Expected one rate >= 0 more than there are boundaries. "
                f"Received: rates={self.rates}, boundaries={self.boundaries}."
            )

    def scaled(self, factor):
        """See `Attack.scaled`; here the rates are the lengths of the steps."""
        rates = tuple(rate * factor for rate in self.rates)
        return super().scaled(factor).bind({"rates": rates})

    def _memory(self, images):
        zero = ops.zeros_like(images)
        return {"mean": zero, "square": zero}

    def _walk(self, state, grad, index):
        # Adam is blind to the scale of the gradient but for its epsilon.
        peak = ops.maximum(numerics.lp_norm(grad, "linf"), 1e-30)
        grad = grad / numerics.per_example(peak, grad)
        rate = ops.cast(self.rates[0], "float32")
        for boundary, value in zip(
            self.boundaries, self.rates[1:], strict=True
        ):
            rate = ops.where(index >= boundary, value, rate)
        rate = _each(rate, grad)
        count = ops.cast(index, "float32") + 1.0
        mean = 0.9 * state["mean"] + 0.1 * grad
        square = 0.999 * state["square"] + 0.001 * ops.square(grad)
        ahead = mean / (1.0 - 0.9**count)
        spread = ops.sqrt(square / (1.0 - 0.999**count))
        delta = state["delta"] + rate * ahead / (spread + 1e-8)
        delta = numerics.project(
            delta, self.epsilon, self.norm, state["images"]
        )
        return {**state, "mean": mean, "square": square, "delta": delta}


ATTACKS = {attack.name: attack for attack in (FGSM, PGD, BIM, MIM, PGDAdam)}
