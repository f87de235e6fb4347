"""The fast adaptive boundary attack, which looks for the nearest error.

It walks along the decision boundary: each step linearizes the model, projects
the iterate and the clean image onto that hyperplane inside the box, and goes to
a point between them. What it finds counts if it lies within epsilon.

References:
    - [Croce and Hein, 2020](https://arxiv.org/abs/1907.02044)
"""

import dataclasses
import math
from typing import ClassVar

from keras import ops

import attack_rounds
import losses
import numerics

_TINY = 1e-30
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


def check_rounds(steps, restarts, keep):
    """Raises a ValueError, one line, if steps, restarts or keep is wrong."""
    if steps < 0 or restarts < 1:
        raise ValueError(
            "Expected steps >= 0 and restarts >= 1. Received: "
            f"steps={steps}, restarts={restarts}."
        )
    if keep not in ("first", "best"):
        raise ValueError(
            f"Expected keep to be first or best. Received: keep={keep!r}."
        )


def check_targets(num_targets):
    """Raises a ValueError, one line, if there is no class to aim at."""
    if num_targets < 1:
        raise ValueError(
            f"Expected num_targets >= 1. Received: num_targets={num_targets}."
        )


def check_untargeted(name, targets):
    """Raises a ValueError, one line, if the caller has chosen the targets."""
    if targets is not None:
        raise ValueError(
            f"Expected no targets: {name} looks for any error, through classes "
            "that it chooses itself. Take apgd or pgd to reach a given class."
        )


def aim(state, rank):
    """The class of the `rank`-th largest clean logit but the label's.

    Args:
        state: Dict with "scores", the clean logits, and "labels".
        rank: Integer or integer scalar tensor; counts round and round.

    Returns:
        Int32 tensor of shape `(batch,)`.
    """
    scores = state["scores"]
    rank = ops.mod(rank, max(scores.shape[-1] - 1, 1))
    return losses.likely_targets(scores, state["labels"], rank)


@dataclasses.dataclass(frozen=True)
class FAB(attack_rounds.Attack):
    """The fast adaptive boundary attack, targeted (FAB-T) or not.

    An example that is not felled within epsilon keeps its clean image. The loss
    of the result is the margin, at the image that is returned.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the ball, in units of the pixel range [0, 1].
        steps: Steps of one round.
        restarts: Rounds (for each target): the first from the clean image, the
            others from a random point at half of epsilon.
        targeted: Whether a round looks at the boundary to one class (those of
            largest clean logit, one after the other) or at the nearest of all
            boundaries, for which each step takes the gradients of all classes.
        num_targets: How many classes a targeted FAB aims at. A model with
            fewer other classes gets them again; `fit` avoids that.
        alpha_max: Largest weight of the clean image's projection.
        eta: Overshoot of the projections; above 1 crosses the boundary.
        beta: Where the walk goes on after an error, between image and error.
        keep: `"first"` leaves an example in peace once it has fallen within
            epsilon; `"best"` goes on and keeps its nearest error.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/1907.02044)
    """

    steps: int = 100
    restarts: int = 1
    targeted: bool = True
    num_targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    keep: str = "first"

    name: ClassVar[str] = "fab"
    can_target: ClassVar[bool] = False

    def __post_init__(self):
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
                "Expected a finite eta >= 1, an overshoot. Received: "
                f"eta={self.eta:g}."
            )

    @property
    def random(self):
        """Whether it draws noise."""
        return self.restarts > 1

    @property
    def rounds(self):
        """See `Attack.rounds`."""
        return self.restarts * (self.num_targets if self.targeted else 1)

    @property
    def steps_a_round(self):
        """See `Attack.steps_a_round`."""
        return self.steps

    def fit(self, num_classes, targeted=False):
        """See `Attack.fit`; drops the targets that do not exist."""
        del targeted  # It chooses its targets by itself.
        losses.check_loss("margin", num_classes)
        most = min(self.num_targets, num_classes - 1)
        return dataclasses.replace(self, num_targets=most)

    def ascended_loss(self, logits_fn, state):
        """See `Attack.ascended_loss`: the margin, by which it is reported."""
        labels = state["labels"]

        def evaluate(images):
            outputs = losses.outputs_of(logits_fn(images))
            value = attack_rounds.mean_loss("margin", outputs, labels)
            return value, outputs.logits

        return evaluate

    def open(self, logits_fn, images, labels, keys=None, targets=None):
        """See `Attack.open`."""
        check_untargeted(self.name, targets)
        state = self._rows(images, labels, keys, targets)
        images = state["images"]
        value, logits = self.ascended_loss(logits_fn, state)(images)
        state = self._offer(state, images, value, logits)
        distance = ops.where(state["success"], 0.0, math.inf)
        return {
            **state,
            "point": images,
            "distance": ops.cast(distance, "float32"),
            "scores": ops.cast(logits, "float32"),
            "aim": state["labels"],
        }

    def begin(self, logits_fn, state, number):
        """See `Attack.begin`."""
        del logits_fn
        images = state["images"]
        state = {**state, "point": images}
        if self.targeted:
            state["aim"] = aim(state, number // self.restarts)
        if self.restarts > 1:
            keys = numerics.fold_in(state["keys"], number)
            again = ops.not_equal(ops.mod(number, self.restarts), 0)
            start = self._start(images, keys)
            state["point"] = ops.where(again, start, images)
        return state

    def _start(self, images, keys):
        shape = tuple(images.shape[1:])
        if self.norm == "linf":
            delta = numerics.uniform(keys, shape, -1.0, 1.0)
        else:
            delta = numerics.normal(keys, shape)
        size = ops.maximum(numerics.lp_norm(delta, self.norm), 1e-12)
        radius = 0.5 * ops.cast(self.epsilon, "float32")
        delta = radius * delta / numerics.per_example(size, delta)
        return attack_rounds.perturbed(images, delta)

    def step(self, logits_fn, state, number, index):
        """See `Attack.step`."""
        del number, index
        images, point = state["images"], state["point"]
        gap, grad, flags = self._linearize(logits_fn, state)
        state = attack_rounds.mark(state, flags)
        # Both rows of a pair meet the same hyperplane: the iterate's distance
        # to it is known, the image's follows from the gradient.
        away = ops.sum(grad * (images - point), axis=(1, 2, 3))
        to_point, to_image = to_hyperplane(
            ops.stack([point, images], axis=1),
            grad,
            ops.stack([gap, gap + away], axis=1),
            self.norm,
        )
        near = ops.maximum(numerics.lp_norm(to_point, self.norm), 1e-8)
        far = ops.maximum(numerics.lp_norm(to_image, self.norm), 1e-8)
        bias = ops.minimum(near / (near + far), self.alpha_max)
        bias = numerics.per_example(bias, point)
        point = (1.0 - bias) * (point + self.eta * to_point) + bias * (
            images + self.eta * to_image
        )
        point = ops.clip(point, 0.0, 1.0)
        value, logits = self.ascended_loss(logits_fn, state)(point)
        _, wrong = losses.judge(logits, state["labels"])
        value = losses.comparable(value, logits)
        state = attack_rounds.mark(state, losses.nonfinite(logits))
        state = self._take(state, point, value, wrong)
        back = images + self.beta * (point - images)
        wrong = numerics.per_example(wrong, point)
        return {**state, "point": ops.where(wrong, back, point)}

    def _take(self, state, point, value, wrong):
        """Keeps an error within epsilon, if it is nearer than the one before.

        Rejected is what lies outside, not shrunk: that could make it right.
        """
        distance = numerics.lp_norm(point - state["images"], self.norm)
        epsilon = ops.cast(self.epsilon, "float32")
        better = ops.logical_and(wrong, distance <= epsilon)
        if self.keep == "first":
            better = ops.logical_and(better, ops.logical_not(state["success"]))
        else:
            better = ops.logical_and(better, distance < state["distance"])
        mask = numerics.per_example(better, point)
        return {
            **state,
            "best": ops.where(mask, point, state["best"]),
            "success": ops.logical_or(better, state["success"]),
            "wrong": ops.logical_or(better, state["wrong"]),
            "loss": ops.where(better, value, state["loss"]),
            "distance": ops.where(better, distance, state["distance"]),
        }

    def _linearize(self, logits_fn, state):
        """The boundary that counts, to first order around the iterate.

        Returns:
            Tuple of the other logit minus the own one, `(batch,)`, its
            gradient, of the shape of the images, and whether either was not
            finite, `(batch,)`. Both are finite.
        """
        labels, point = state["labels"], state["point"]

        def gap_to(classes):
            def gap(images):
                outputs = losses.outputs_of(logits_fn(images))
                logits = outputs.logits
                if outputs.head_logits is not None:
                    logits = ops.mean(outputs.head_logits, axis=1)
                logits = ops.cast(logits, "float32")
                return _pick(logits, classes) - _pick(logits, labels)

            value, grad, flags = numerics.value_and_grad(
                gap, point, with_flags=True
            )
            finite = ops.isfinite(value)
            value = ops.where(finite, value, ops.zeros_like(value))
            return value, grad, ops.logical_or(flags, ops.logical_not(finite))

        if self.targeted:
            return gap_to(state["aim"])

        def nearer(other, best):
            value, grad, flags = gap_to(ops.zeros_like(labels) + other)
            slope = numerics.lp_norm(grad, _DUAL[self.norm])
            distance = ops.abs(value) / (slope + 1e-12)
            own = ops.equal(labels, other)
            distance = ops.where(own, math.inf, distance)
            better = distance < best[0]
            return (
                ops.where(better, distance, best[0]),
                ops.where(better, value, best[1]),
                ops.where(numerics.per_example(better, grad), grad, best[2]),
                ops.logical_or(flags, best[3]),
            )

        zero = ops.zeros_like(state["loss"])
        clear = ops.zeros_like(state["nonfinite"])
        none = (zero + math.inf, zero, ops.zeros_like(point), clear)
        classes = state["scores"].shape[-1]
        return ops.fori_loop(0, classes, nearer, none)[1:]


def _pick(logits, classes):
    index = ops.expand_dims(ops.cast(classes, "int32"), -1)
    return ops.take_along_axis(logits, index, axis=-1)[:, 0]


# --- Hyperplane and box ------------------------------------------------------


def to_hyperplane(points, weights, gaps, norm):
    """The shortest way to a hyperplane inside the box [0, 1].

    Finds the d of smallest norm with weights . d = -gap and 0 <= point + d <=
    1; if the box does not reach that far, the d that comes nearest.

    Args:
        points: Pairs of points of the box, `(batch, 2, height, width,
            channels)`.
        weights: Normals, `(batch, height, width, channels)`, one a pair.
        gaps: Signed weights . point - offset, `(batch, 2)`.
        norm: One of `numerics.NORMS`.

    Returns:
        The ways of the first and of the second points, each of the shape of
        `weights`.
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
        length = _steepest_first(slopes, room, need)
    else:
        pace = slopes
        if norm == "linf":
            pace = ops.cast(slopes > 0, slopes.dtype)
        length = _all_at_once(slopes, pace, room, need)
    ways = ops.reshape(signs * length, (-1, 2, *weights.shape[1:]))
    return ways[:, 0], ways[:, 1]


def _all_at_once(slopes, pace, room, need):
    """Finds t so that slopes . min(t * pace, room) is `need`.

    The sum is concave, increasing and piecewise linear in t: Newton's method
    from the left never overshoots and ends at the exact root. A row's result
    does not hang on how long the others go on.
    """

    def rows_move(t, moving):
        return ops.any(moving)

    def newton(t, moving):
        free = t * pace < room
        rate = ops.where(free, slopes * pace, 0.0)
        full = ops.where(free, 0.0, slopes * room)
        left = need - ops.sum(full, axis=-1, keepdims=True)
        new = left / ops.maximum(ops.sum(rate, axis=-1, keepdims=True), _TINY)
        new = ops.where(moving, ops.clip(new, t, 1e12), t)
        return new, new > t * (1.0 + 1e-7)

    start = ops.zeros_like(need)
    t, _ = ops.while_loop(
        rows_move, newton, (start, need > 0), maximum_iterations=60
    )
    return ops.minimum(t * pace, room)


def _steepest_first(slopes, room, need):
    """Moves the entries of largest slope to their end until `need` is met.

    The last ones, all those of the slope at which it is met, go a part of the
    way.
    """
    order = ops.argsort(-slopes, axis=-1)
    falling = ops.take_along_axis(slopes, order, axis=-1)
    gains = slopes * room
    order = ops.broadcast_to(order, ops.shape(gains))
    reached = ops.cumsum(ops.take_along_axis(gains, order, axis=-1), axis=-1)
    short = ops.cast(reached < need, "int32")
    last = ops.sum(short, axis=-1, keepdims=True)
    last = ops.minimum(last, slopes.shape[-1] - 1)
    falling = ops.broadcast_to(falling, ops.shape(gains))
    edge = ops.take_along_axis(falling, last, axis=-1)
    full = slopes > edge
    partly = ops.logical_and(ops.equal(slopes, edge), slopes > 0)
    left = need - ops.sum(ops.where(full, gains, 0.0), axis=-1, keepdims=True)
    rest = ops.sum(ops.where(partly, gains, 0.0), axis=-1, keepdims=True)
    part = ops.clip(left / ops.maximum(rest, _TINY), 0.0, 1.0)
    return ops.where(full, room, ops.where(partly, part * room, 0.0))


ATTACKS = {FAB.name: FAB}
