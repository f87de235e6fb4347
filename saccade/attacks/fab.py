"""The fast adaptive boundary attack, which finds near misclassified images.

Each step linearizes the model at the iterate, which gives a hyperplane for the
decision boundary. It projects the iterate and the clean image onto that
hyperplane inside the pixel range, and continues from a point between the two.
A misclassified iterate is a success if it lies within epsilon.

References:
    - [Croce and Hein, 2020](https://arxiv.org/abs/1907.02044)
"""

import dataclasses
import math
from typing import ClassVar, Self

from keras import ops

from saccade.attacks import base as attack_base
from saccade.attacks import losses, settings
from saccade.attacks.base import AscendedLoss, LogitsFn
from saccade.attacks.losses import State
from saccade.core import gradients, lp, randomness
from saccade.core.arrays import Tensor

_TINY = 1e-30
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


def check_rounds(steps: int, restarts: int, keep: str) -> None:
    """Raises a ValueError, in one line, if an argument is invalid."""
    if steps < 0 or restarts < 1:
        raise ValueError(
            "Expected steps >= 0 and restarts >= 1. Received: "
            f"steps={steps}, restarts={restarts}."
        )
    if keep not in ("first", "best"):
        raise ValueError(
            f"Expected keep to be first or best. Received: keep={keep!r}."
        )


def check_targets(num_targets: int) -> None:
    """Raises a ValueError, in one line, if there is no target class."""
    if num_targets < 1:
        raise ValueError(
            f"Expected num_targets >= 1. Received: num_targets={num_targets}."
        )


def check_untargeted(name: str, targets: Tensor | None) -> None:
    """Raises a ValueError, in one line, if the caller passes targets."""
    if targets is not None:
        raise ValueError(
            f"Expected no targets: {name} is untargeted and chooses its target "
            "classes itself. Take apgd or pgd for targets of your own."
        )


def target_of_rank(state: State, rank: int | Tensor) -> Tensor:
    """Returns the class with the `rank`-th largest clean logit.

    The label is not counted.

    Args:
        state: Dict with "scores", the clean logits, and "labels".
        rank: Integer or integer scalar tensor. After the last class it starts
            again from the first.

    Returns:
        Int32 tensor of shape `(batch,)`.
    """
    scores = state["scores"]
    rank = ops.mod(rank, max(scores.shape[-1] - 1, 1))
    return losses.likely_targets(scores, state["labels"], rank)


@dataclasses.dataclass(frozen=True)
class FAB(attack_base.Attack):
    """The fast adaptive boundary attack, targeted (FAB-T) or not.

    An example without a misclassified iterate within epsilon keeps its clean
    image. The loss in the result is the margin at the returned image.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the norm ball, in units of the pixel range [0, 1].
        steps: Steps of one round.
        restarts: Rounds for each target. The first starts at the clean image,
            the others at a random point at distance epsilon / 2.
        targeted: Whether each round considers the decision boundary to one
            target class, in the order of the clean logits. Otherwise each step
            considers the boundaries to all classes and uses the nearest, which
            needs the gradients of all classes.
        num_targets: The number of target classes of targeted FAB. If the model
            has fewer other classes, they are targeted repeatedly; `fit` avoids
            that.
        alpha_max: Largest weight of the clean image's projection.
        eta: Overshoot of the projections; above 1 they cross the boundary.
        beta: Position between the clean image (0) and a misclassified iterate
            (1) from which the search continues.
        keep: `"first"` stops attacking an example once it is misclassified
            within epsilon; `"best"` continues and keeps the nearest
            misclassified iterate.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/1907.02044)
    """

    steps: int = settings.STEPS.field(100)
    restarts: int = settings.RESTARTS.field(1)
    targeted: bool = True
    num_targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    keep: str = settings.KEEP.field("first")

    name: ClassVar[str] = "fab"
    can_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounds(self.steps, self.restarts, self.keep)
        check_targets(self.num_targets)
        if not (0 <= self.alpha_max <= 1 and 0 <= self.beta <= 1):
            raise ValueError(
                "Expected alpha_max and beta in [0, 1]. Received: "
                f"alpha_max={self.alpha_max:g}, beta={self.beta:g}."
            )
        if not (math.isfinite(self.eta) and self.eta >= 1):
            raise ValueError(
                "Expected a finite eta >= 1, the overshoot. Received: "
                f"eta={self.eta:g}."
            )

    @property
    def random(  # type: ignore[override]  # It depends on a field here.
        self,
    ) -> bool:
        """Whether the attack draws noise."""
        return self.restarts > 1

    @property
    def rounds(self) -> int:
        """See `Attack.rounds`."""
        return self.restarts * (self.num_targets if self.targeted else 1)

    @property
    def steps_a_round(self) -> int:
        """See `Attack.steps_a_round`."""
        return self.steps

    def fit(self, num_classes: int, targeted: bool = False) -> Self:
        """See `Attack.fit`; at most one target for each other class."""
        del targeted  # The attack chooses its targets itself.
        losses.check_loss("margin", num_classes)
        most = min(self.num_targets, num_classes - 1)
        return dataclasses.replace(self, num_targets=most)

    def ascended_loss(self, logits_fn: LogitsFn, state: State) -> AscendedLoss:
        """See `Attack.ascended_loss`: the margin, as in the result."""
        labels = state["labels"]

        def evaluate(images: Tensor) -> tuple[Tensor, Tensor]:
            outputs = losses.outputs_of(logits_fn(images))
            value = attack_base.mean_loss("margin", outputs, labels)
            return value, outputs.logits

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
        check_untargeted(self.name, targets)
        state = self._initial_state(images, labels, keys, targets)
        images = state["images"]
        value, logits = self.ascended_loss(logits_fn, state)(images)
        state = self.update_best(state, images, value, logits)
        distance = ops.where(state["success"], 0.0, math.inf)
        return {
            **state,
            "point": images,
            "distance": ops.cast(distance, "float32"),
            "scores": ops.cast(logits, "float32"),
            "aim": state["labels"],
        }

    def begin(
        self, logits_fn: LogitsFn, state: State, round_index: int | Tensor
    ) -> State:
        """See `Attack.begin`."""
        del logits_fn
        images = state["images"]
        state = {**state, "point": images}
        if self.targeted:
            state["aim"] = target_of_rank(state, round_index // self.restarts)
        if self.restarts > 1:
            keys = randomness.fold_in(state["keys"], round_index)
            is_restart = ops.not_equal(ops.mod(round_index, self.restarts), 0)
            start = self._random_start(images, keys)
            state["point"] = ops.where(is_restart, start, images)
        return state

    def _random_start(self, images: Tensor, keys: Tensor) -> Tensor:
        shape = tuple(images.shape[1:])
        if self.norm == "linf":
            delta = randomness.uniform(keys, shape, -1.0, 1.0)
        else:
            delta = randomness.normal(keys, shape)
        size = ops.maximum(lp.lp_norm(delta, self.norm), 1e-12)
        radius = 0.5 * ops.cast(self.epsilon, "float32")
        delta = radius * delta / lp.per_example(size, delta)
        return attack_base.perturbed(images, delta)

    def step(
        self,
        logits_fn: LogitsFn,
        state: State,
        round_index: int | Tensor,
        step_index: int | Tensor,
    ) -> State:
        """See `Attack.step`."""
        del round_index, step_index
        images, point = state["images"], state["point"]
        gap, grad, flags = self._linearize(logits_fn, state)
        state = attack_base.mark_nonfinite(state, flags)
        # The iterate and the image are projected onto the same hyperplane. The
        # gap at the image follows from the linearization at the iterate.
        image_offset = ops.sum(grad * (images - point), axis=(1, 2, 3))
        to_point, to_image = to_hyperplane(
            ops.stack([point, images], axis=1),
            grad,
            ops.stack([gap, gap + image_offset], axis=1),
            self.norm,
        )
        point_distance = lp.lp_norm(to_point, self.norm)
        point_distance = ops.maximum(point_distance, 1e-8)
        image_distance = lp.lp_norm(to_image, self.norm)
        image_distance = ops.maximum(image_distance, 1e-8)
        alpha = point_distance / (point_distance + image_distance)
        alpha = ops.minimum(alpha, self.alpha_max)
        alpha = lp.per_example(alpha, point)
        point = (1.0 - alpha) * (point + self.eta * to_point) + alpha * (
            images + self.eta * to_image
        )
        point = ops.clip(point, 0.0, 1.0)
        value, logits = self.ascended_loss(logits_fn, state)(point)
        _, misclassified = losses.judge(logits, state["labels"])
        value = losses.comparable(value, logits)
        state = attack_base.mark_nonfinite(state, losses.nonfinite(logits))
        state = self._keep_nearest(state, point, value, misclassified)
        closer = images + self.beta * (point - images)
        misclassified = lp.per_example(misclassified, point)
        return {**state, "point": ops.where(misclassified, closer, point)}

    def _keep_nearest(
        self, state: State, point: Tensor, value: Tensor, misclassified: Tensor
    ) -> State:
        """Keeps a misclassified iterate within epsilon if it is nearer.

        Points outside epsilon are rejected rather than projected, because a
        projected point may be classified correctly.
        """
        distance = lp.lp_norm(point - state["images"], self.norm)
        epsilon = ops.cast(self.epsilon, "float32")
        better = ops.logical_and(misclassified, distance <= epsilon)
        if self.keep == "first":
            better = ops.logical_and(better, ops.logical_not(state["success"]))
        else:
            better = ops.logical_and(better, distance < state["distance"])
        mask = lp.per_example(better, point)
        return {
            **state,
            "best": ops.where(mask, point, state["best"]),
            "success": ops.logical_or(better, state["success"]),
            "wrong": ops.logical_or(better, state["wrong"]),
            "loss": ops.where(better, value, state["loss"]),
            "distance": ops.where(better, distance, state["distance"]),
        }

    def _linearize(
        self, logits_fn: LogitsFn, state: State
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Linearizes the decision boundary of this step at the iterate.

        Returns:
            Tuple of the other class's logit minus the label's, `(batch,)`; its
            gradient, of the shape of the images; and whether either was not
            finite, `(batch,)`. Non-finite values have been replaced by finite
            ones.
        """
        labels, point = state["labels"], state["point"]

        def gap_to(classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            def gap(images: Tensor) -> Tensor:
                outputs = losses.outputs_of(logits_fn(images))
                logits = outputs.logits
                if outputs.head_logits is not None:
                    logits = ops.mean(outputs.head_logits, axis=1)
                logits = ops.cast(logits, "float32")
                return _pick(logits, classes) - _pick(logits, labels)

            value, grad, flags = gradients.value_and_grad(
                gap, point, with_flags=True
            )
            finite = ops.isfinite(value)
            value = ops.where(finite, value, ops.zeros_like(value))
            return value, grad, ops.logical_or(flags, ops.logical_not(finite))

        if self.targeted:
            return gap_to(state["aim"])

        def keep_nearer(
            other: int | Tensor, best: tuple[Tensor, ...]
        ) -> tuple[Tensor, ...]:
            value, grad, flags = gap_to(ops.zeros_like(labels) + other)
            slope = lp.lp_norm(grad, _DUAL[self.norm])
            distance = ops.abs(value) / (slope + 1e-12)
            is_label = ops.equal(labels, other)
            distance = ops.where(is_label, math.inf, distance)
            better = distance < best[0]
            return (
                ops.where(better, distance, best[0]),
                ops.where(better, value, best[1]),
                ops.where(lp.per_example(better, grad), grad, best[2]),
                ops.logical_or(flags, best[3]),
            )

        zero = ops.zeros_like(state["loss"])
        no_flags = ops.zeros_like(state["nonfinite"])
        initial = (zero + math.inf, zero, ops.zeros_like(point), no_flags)
        classes = state["scores"].shape[-1]
        return ops.fori_loop(0, classes, keep_nearer, initial)[1:]


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    index = ops.expand_dims(ops.cast(classes, "int32"), -1)
    return ops.take_along_axis(logits, index, axis=-1)[:, 0]


# --- Projection onto a hyperplane inside the pixel range ----------------------


def to_hyperplane(
    points: Tensor, weights: Tensor, gaps: Tensor, norm: str
) -> tuple[Tensor, Tensor]:
    """Projects points onto a hyperplane inside the box [0, 1].

    Finds the d of smallest norm with weights . d = -gap and
    0 <= point + d <= 1. If there is none, finds the d in the box that comes
    nearest to the hyperplane.

    Args:
        points: Pairs of points of the box, `(batch, 2, height, width,
            channels)`.
        weights: Normals of the hyperplanes, one for each pair, `(batch,
            height, width, channels)`.
        gaps: Signed weights . point - offset, `(batch, 2)`.
        norm: One of `lp.NORMS`.

    Returns:
        Tuple of d for the first and for the second points, each of the shape
        of `weights`.
    """
    size = math.prod(weights.shape[1:])
    points = ops.reshape(points, (-1, 2, size))
    flat = ops.reshape(weights, (-1, 1, size))
    gaps = ops.expand_dims(gaps, -1)
    signs = -ops.sign(gaps) * ops.sign(flat)
    room = ops.where(signs > 0, 1.0 - points, points)
    room = ops.maximum(room, 0.0)
    # In units of the largest weight, so that squares stay in range.
    slopes = ops.abs(flat)
    peak = ops.maximum(ops.max(slopes, axis=-1, keepdims=True), _TINY)
    slopes, need = slopes / peak, ops.abs(gaps) / peak
    if norm == "l1":
        length = _largest_first(slopes, room, need)
    else:
        direction = slopes
        if norm == "linf":
            direction = ops.cast(slopes > 0, slopes.dtype)
        length = _along_direction(slopes, direction, room, need)
    shifts = ops.reshape(signs * length, (-1, 2, *weights.shape[1:]))
    return shifts[:, 0], shifts[:, 1]


def _along_direction(
    slopes: Tensor, direction: Tensor, room: Tensor, need: Tensor
) -> Tensor:
    """Finds t so that slopes . min(t * direction, room) is `need`.

    The sum is concave, increasing and piecewise linear in t, so that Newton's
    method from the left never overshoots and ends at the exact root. A row
    does not change after it has converged, so that its result does not depend
    on the other rows.
    """

    def any_active(t: Tensor, active: Tensor) -> Tensor:
        return ops.any(active)

    def newton(t: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        free = t * direction < room
        rate = ops.where(free, slopes * direction, 0.0)
        full = ops.where(free, 0.0, slopes * room)
        left = need - ops.sum(full, axis=-1, keepdims=True)
        new = left / ops.maximum(ops.sum(rate, axis=-1, keepdims=True), _TINY)
        new = ops.where(active, ops.clip(new, t, 1e12), t)
        return new, new > t * (1.0 + 1e-7)

    start = ops.zeros_like(need)
    t, _ = ops.while_loop(
        any_active, newton, (start, need > 0), maximum_iterations=60
    )
    return ops.minimum(t * direction, room)


def _largest_first(slopes: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Moves the entries of largest slope by all their room until `need` is met.

    The last entries, all those of the slope at which `need` is met, move by
    the same fraction of their room.
    """
    order = ops.argsort(-slopes, axis=-1)
    descending = ops.take_along_axis(slopes, order, axis=-1)
    gains = slopes * room
    order = ops.broadcast_to(order, ops.shape(gains))
    reached = ops.cumsum(ops.take_along_axis(gains, order, axis=-1), axis=-1)
    insufficient = ops.cast(reached < need, "int32")
    last = ops.sum(insufficient, axis=-1, keepdims=True)
    last = ops.minimum(last, slopes.shape[-1] - 1)
    descending = ops.broadcast_to(descending, ops.shape(gains))
    threshold = ops.take_along_axis(descending, last, axis=-1)
    full = slopes > threshold
    partly = ops.logical_and(ops.equal(slopes, threshold), slopes > 0)
    left = need - ops.sum(ops.where(full, gains, 0.0), axis=-1, keepdims=True)
    rest = ops.sum(ops.where(partly, gains, 0.0), axis=-1, keepdims=True)
    part = ops.clip(left / ops.maximum(rest, _TINY), 0.0, 1.0)
    return ops.where(full, room, ops.where(partly, part * room, 0.0))


ATTACKS = {FAB.name: FAB}
