"""The Square attack: random search over squares, from logits alone.

Each query changes one random square of the current perturbation and keeps the
change if it increases the loss. The attack uses no gradients. If it succeeds
where gradient-based attacks fail, the gradients of the model are masked.

In L-inf a square is set to +epsilon or -epsilon, with one sign per channel. In
L2 and L1 a peaked pattern is added to the square. Its norm comes from the
unused part of epsilon and from a second square, which is set to zero.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from keras import ops

from saccade.attacks import base as attack_base
from saccade.attacks import losses, settings
from saccade.attacks.base import LogitsFn
from saccade.attacks.losses import State
from saccade.core import lp, randomness
from saccade.core.arrays import Tensor

# With 10000 queries, the area of the squares is halved after each of these.
_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Square(attack_base.Attack):
    """The Square attack, as AutoAttack runs it.

    The published programs differ from each other and from the papers in three
    points. Here a square may lie at every position, including the last row and
    column; each example draws its own squares; and the start in L2 and L1
    tiles the whole image, whatever its shape.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the norm ball, in units of the pixel range [0, 1].
        n_queries: Model calls in one restart. The first one evaluates the
            start: vertical stripes in L-inf, a tiling with the pattern in L2
            and L1.
        p_init: Fraction of the pixels that a square covers at first. It is
            halved along the published schedule, rescaled to `n_queries`.
        restarts: Independent runs.
        loss: One of `losses.LOSSES`; with targets, its targeted form.
            AutoAttack uses the margin, and the cross-entropy with targets.
        spared: The number of last rows and columns that no square reaches: 0
            in the paper. The authors' program and other libraries exclude the
            last position when they draw one, which corresponds to 1.

    References:
        - [Andriushchenko et al., 2020](https://arxiv.org/abs/1912.00049),
          algorithms 1 to 3
        - [Croce and Hein, 2021](https://arxiv.org/abs/2103.01208), for L1
    """

    n_queries: int = settings.QUERIES.field(5000)
    p_init: float = 0.8
    restarts: int = settings.RESTARTS.field(1)
    loss: str = settings.LOSS.field("margin")
    spared: int = 0

    name: ClassVar[str] = "square"
    RUNTIME_PARAMETERS: ClassVar[tuple[str, ...]] = (
        "epsilon",
        "n_queries",
        "restarts",
    )
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_queries < 1 or self.restarts < 1:
            raise ValueError(
                "Expected n_queries >= 1 and restarts >= 1. Received: "
                f"n_queries={self.n_queries}, restarts={self.restarts}."
            )
        if not 0 < self.p_init <= 1:
            raise ValueError(
                "Expected p_init in (0, 1], the fraction of the pixels in the "
                f"first squares. Received: p_init={self.p_init:g}."
            )
        if self.spared < 0:
            raise ValueError(
                "Expected spared >= 0, the rows and columns without squares. "
                f"Received: spared={self.spared}."
            )
        losses.check_loss(self.loss)

    @property
    def rounds(self) -> int:
        """See `Attack.rounds`."""
        return self.restarts

    @property
    def steps_a_round(self) -> int:
        """See `Attack.steps_a_round`."""
        return self.n_queries

    def open(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> State:
        """See `Attack.open`."""
        state = super().open(logits_fn, images, labels, keys, targets)
        lowest = ops.full_like(state["loss"], -math.inf)
        return {**state, "current": state["images"], "value": lowest}

    def begin(
        self, logits_fn: LogitsFn, state: State, round_index: int | Tensor
    ) -> State:
        """See `Attack.begin`: creates the start, which step 0 evaluates."""
        del logits_fn
        keys = randomness.fold_in(
            randomness.fold_in(state["keys"], round_index), 0
        )
        start = _stripes if self.norm == "linf" else _tiles
        lowest = ops.full_like(state["value"], -math.inf)
        current = start(state["images"], self, keys)
        return {**state, "current": current, "value": lowest}

    def step(
        self,
        logits_fn: LogitsFn,
        state: State,
        round_index: int | Tensor,
        step_index: int | Tensor,
    ) -> State:
        """See `Attack.step`: one query."""
        keys = randomness.fold_in(state["keys"], round_index)
        keys = randomness.fold_in(keys, ops.cast(step_index, "int32") + 1)
        propose = _propose_linf if self.norm == "linf" else _propose_l1_l2
        proposed = propose(state, self, keys, self.stage(step_index))
        is_start = ops.equal(step_index, 0)
        proposed = ops.where(is_start, state["current"], proposed)
        value, logits = self.ascended_loss(logits_fn, state)(proposed)
        success, _ = losses.judge(logits, state["labels"], state.get("targets"))
        value = losses.comparable(value, logits)
        accepted = ops.logical_or(value > state["value"], success)
        mask = lp.per_example(accepted, proposed)
        state = self.update_best(state, proposed, value, logits)
        return {
            **state,
            "current": ops.where(mask, proposed, state["current"]),
            "value": ops.where(accepted, value, state["value"]),
        }

    def stage(self, index: int | Tensor) -> Tensor:
        """The number of times the area has been halved by query `index`."""
        index = ops.cast(index, "int32")
        # floor(index * 10000 / n_queries) > last, without large integers.
        whole, rest = self.n_queries // 10_000, self.n_queries % 10_000
        return sum(
            ops.cast(
                index
                >= (last + 1) * whole + ((last + 1) * rest + 9_999) // 10_000,
                "int32",
            )
            for last in _SCHEDULE
        )

    def sides(self, height: int, width: int) -> list[int]:
        """Returns the side of the squares at each stage, a list of integers.

        Args:
            height, width: Height and width of the images, in pixels.
        """
        most = min(height, width)
        sides = []
        for stage in range(len(_SCHEDULE) + 1):
            area = self.p_init * height * width / 2**stage
            side = round(math.sqrt(area))
            if self.norm != "linf":  # The pattern needs an odd side >= 3.
                side = max(side, 3)
                side += 1 - side % 2
                side = min(side, most - 1 + most % 2)
            sides.append(min(max(side, 1), most))
        return sides


ATTACKS = {Square.name: Square}


# --- Starts ------------------------------------------------------------------


def _stripes(images: Tensor, attack: Square, keys: Tensor) -> Tensor:
    """Vertical stripes of +-epsilon, one sign per column and channel."""
    signs = randomness.signs(keys, (1, *images.shape[2:]))
    return attack_base.perturbed(images, attack.epsilon * signs)


def _tiles(images: Tensor, attack: Square, keys: Tensor) -> Tensor:
    """A tiling with the pattern, at least five tiles along each side.

    Each tile is transposed with probability 1/2, and each of its channels has
    a random sign.
    """
    height, width, channels = images.shape[1:]
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    upright = np.tile(pattern(side, attack.norm), (rows, columns))
    lying = np.tile(pattern(side, attack.norm).T, (rows, columns))
    signs = randomness.signs(
        randomness.fold_in(keys, 0), (rows, columns, channels)
    )
    turned = randomness.uniform(randomness.fold_in(keys, 1), (rows, columns, 1))

    def grow(x: Tensor) -> Tensor:
        return ops.repeat(ops.repeat(x, side, axis=1), side, axis=2)

    delta = grow(signs) * ops.where(
        grow(turned) < 0.5,
        ops.convert_to_tensor(upright[..., None]),
        ops.convert_to_tensor(lying[..., None]),
    )
    top = (height - rows * side) // 2
    left = (width - columns * side) // 2
    delta = ops.pad(
        delta,
        (
            (0, 0),
            (top, height - rows * side - top),
            (left, width - columns * side - left),
            (0, 0),
        ),
    )
    if attack.norm == "l1":
        # Every tile and channel has norm 1, usually far more than epsilon
        # together. If it is less, the tiles are scaled up to epsilon.
        scale = ops.cast(attack.epsilon, "float32") / (rows * columns)
        delta = delta * ops.maximum(scale, 1.0)
    return _project(images, delta, attack)


# --- Proposals ---------------------------------------------------------------


def _propose_linf(
    state: State, attack: Square, keys: Tensor, stage: Tensor
) -> Tensor:
    """L-inf: sets one square to +-epsilon, with one sign per channel."""
    images = state["images"]
    height, width, channels = images.shape[1:]
    sides = _int_tensor(attack.sides(height, width))
    side = ops.take(sides, stage)
    row, column, _ = _draw_square(keys, height, width, side, attack.spared)
    inside = ops.logical_and(row >= 0, column >= 0)
    inside = ops.expand_dims(inside, -1)
    signs = randomness.signs(randomness.fold_in(keys, 1), (1, 1, channels))
    painted = attack_base.perturbed(images, attack.epsilon * signs)
    return ops.where(inside, painted, state["current"])


def _propose_l1_l2(
    state: State, attack: Square, keys: Tensor, stage: Tensor
) -> Tensor:
    """L2 and L1: adds the pattern to one square and clears another."""
    images, norm = state["images"], attack.norm
    height, width, channels = images.shape[1:]
    sides = attack.sides(height, width)
    side = ops.take(_int_tensor(sides), stage)
    delta = state["current"] - images
    (row, column, first), (*_, second) = (
        _draw_square(
            randomness.fold_in(keys, i), height, width, side, attack.spared
        )
        for i in (0, 1)
    )
    zero = ops.zeros_like(delta)

    signs = randomness.signs(randomness.fold_in(keys, 2), (1, 1, channels))
    turned = randomness.uniform(randomness.fold_in(keys, 3), (1, 1)) < 0.5
    peaks = _peaks(sides, norm, stage, row, column, turned)
    before = ops.where(first, delta, zero)
    new = signs * peaks + before / (_channel_norm(before, norm) + _TINY)
    new = ops.where(first, new, zero)
    new = new / (_channel_norm(new, norm) + _TINY)

    both = ops.where(ops.logical_or(first, second), delta, zero)
    spent = lp.per_example(lp.lp_norm(delta, norm), delta)
    held = _channel_norm(both, norm)
    epsilon = ops.cast(attack.epsilon, "float32")
    if norm == "l2":
        unused = ops.maximum(ops.square(epsilon) - ops.square(spent), 0.0)
        budget = ops.sqrt(unused / channels + ops.square(held))
    else:
        # This exceeds epsilon. The projection reduces all entries of the image
        # alike, which sets the smallest to zero.
        unused = ops.maximum(epsilon - spent, 0.0)
        budget = channels * (unused / channels + held)
    delta = ops.where(first, budget * new, ops.where(second, zero, delta))
    return _project(images, delta, attack)


def _project(images: Tensor, delta: Tensor, attack: Square) -> Tensor:
    """Projects onto the L2 sphere or L1 ball, and into the pixel range."""
    if attack.norm == "l1":
        delta = lp.project(delta, attack.epsilon, "l1", images)
    else:
        length = ops.maximum(lp.lp_norm(delta, "l2"), _TINY)
        epsilon = ops.cast(attack.epsilon, "float32")
        delta = delta * lp.per_example(epsilon / length, delta)
    return attack_base.perturbed(images, delta)


def _draw_square(
    keys: Tensor, height: int, width: int, side: Tensor, spared: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the position of a square for each example, uniformly.

    The last `spared` positions along each axis are excluded, unless no other
    would remain.

    Returns:
        Tuple of the row inside the square for each image row, int32 `(batch,
        height, 1)`; the column for each image column, `(batch, 1, width)`;
        both -1 outside the square; and a boolean mask of the square, `(batch,
        height, width, 1)`.
    """
    draws = randomness.uniform(randomness.fold_in(keys, 0), (2,))

    def offsets(draw: Tensor, length: int) -> Tensor:
        last = ops.maximum(length - side - spared, 0)
        count = ops.cast(last + 1, "float32")
        first = ops.cast(ops.floor(draw * count), "int32")
        first = ops.minimum(first, last)  # The product may round up.
        offset = ops.arange(length, dtype="int32") - ops.expand_dims(first, -1)
        inside = ops.logical_and(offset >= 0, offset < side)
        return ops.where(inside, offset, -ops.ones_like(offset))

    row = ops.expand_dims(offsets(draws[:, 0], height), 2)
    column = ops.expand_dims(offsets(draws[:, 1], width), 1)
    mask = ops.logical_and(row >= 0, column >= 0)
    return row, column, ops.expand_dims(mask, -1)


def _peaks(
    sides: list[int],
    norm: str,
    stage: Tensor,
    row: Tensor,
    column: Tensor,
    turned: Tensor,
) -> Tensor:
    """The pattern at each pixel; values outside the square are undefined."""
    most = max(sides)
    table = np.zeros((len(sides), most, most), "float32")
    for index, side in enumerate(sides):
        table[index, :side, :side] = pattern(side, norm)
    row, column = ops.maximum(row, 0), ops.maximum(column, 0)
    position = ops.where(turned, column * most + row, row * most + column)
    table = ops.convert_to_tensor(table.reshape(len(sides), -1))
    peaks = ops.take(ops.take(table, stage, axis=0), position)
    return ops.expand_dims(peaks, -1)


def _channel_norm(delta: Tensor, norm: str) -> Tensor:
    if norm == "l1":
        return ops.sum(ops.abs(delta), axis=(1, 2), keepdims=True)
    return ops.sqrt(ops.sum(ops.square(delta), axis=(1, 2), keepdims=True))


def _int_tensor(values: Sequence[int]) -> Tensor:
    return ops.convert_to_tensor(np.array(values, "int32"))


def pattern(side: int, norm: str) -> np.ndarray:
    """The pattern of a square: a positive peak above a negative one.

    Args:
        side: Side of the square, in pixels.
        norm: `"l2"` or `"l1"`. The pattern has norm 1, and steeper peaks for
            L1.

    Returns:
        Float32 NumPy array of shape `(side, side)`.

    References:
        - [Andriushchenko et al., 2020](https://arxiv.org/abs/1912.00049),
          equation 2
    """
    order, power = (2, 2) if norm == "l2" else (1, 4)

    def unit(x: np.ndarray) -> np.ndarray:
        length = np.sum(np.abs(x) ** order) ** (1 / order)
        return x / length if x.size else x

    def peak(height: int) -> np.ndarray:
        rows = np.abs(np.arange(height) - height // 2)[:, None]
        columns = np.abs(np.arange(side) - side // 2)[None]
        farthest = max(height, side) // 2
        terms = np.arange(1, farthest + 2) ** -float(power)
        # Entry d holds the sum of the terms from d on.
        tails = np.cumsum(terms[::-1])[::-1]
        return unit(tails[np.maximum(rows, columns)])

    upper = side // 2
    both = np.concatenate([peak(upper), -peak(side - upper)])
    return unit(both).astype("float32")
