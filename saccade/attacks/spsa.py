"""SPSA: PGD with a gradient that is estimated from logits alone.

References:
    - [Uesato et al., 2018](https://arxiv.org/abs/1802.05666)
"""

import dataclasses
from typing import ClassVar

from keras import ops

from saccade.attacks import base as attack_base
from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import losses, settings
from saccade.attacks.base import LogitsFn
from saccade.attacks.losses import State
from saccade.core import randomness
from saccade.core.arrays import Tensor


@dataclasses.dataclass(frozen=True)
class SPSA(gradient_attacks.Iterative):
    """PGD on a gradient that is estimated from logits alone.

    Simultaneous perturbation stochastic approximation estimates the gradient
    of the loss f at the iterate x as the mean of
    (f(x + d v) - f(x - d v)) / (2 d) v over random directions v with entries
    -1 and 1. The defaults are those of the S3TA paper, after Uesato et al.:
    4096 directions and 100 steps along the sign of the estimate.

    Attributes:
        samples: Directions v in one estimate; each needs two model calls.
        radius: The distance d, in units of the pixel range.
        step_size: Length of one step; None means the rule of `PGD`.
        chunk: Directions evaluated at a time. The model is called on batches
            of 2 * chunk * images. The result depends on it only by rounding.
        l1_fraction: Fraction of the coordinates that an L1 step changes.

    References:
        - [Uesato et al., 2018](https://arxiv.org/abs/1802.05666)
        - [Zoran et al., 2020](https://arxiv.org/abs/1912.02184), section 4.2
    """

    steps: int = settings.STEPS.field(100)
    random_start: float = settings.RANDOM_START.field(0.0)
    loss: str = settings.LOSS.field("margin")
    samples: int = settings.SAMPLES.field(4096)
    radius: float = 0.01
    step_size: float | None = settings.STEP_SIZE.field(None)
    chunk: int = 32
    l1_fraction: float = settings.L1_FRACTION.field(0.01)

    name: ClassVar[str] = "spsa"
    random: ClassVar[bool] = True
    RUNTIME_PARAMETERS: ClassVar[tuple[str, ...]] = (
        "epsilon",
        "step_length",
        "steps",
        "restarts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.chunk < 1 or not self.radius > 0:
            raise ValueError(
                "Expected samples >= 1, chunk >= 1 and radius > 0. Received: "
                f"samples={self.samples}, chunk={self.chunk}, "
                f"radius={self.radius:g}."
            )
        gradient_attacks.check_fraction(self.l1_fraction)
        length = self.step_size
        if length is None:
            length = min(1.0, 2.5 / max(self.steps, 1)) * self.epsilon
        object.__setattr__(self, "step_length", length)

    def calls(self) -> int:
        """See `Attack.calls`."""
        return 2 * min(self.chunk, self.samples)

    def step(
        self,
        logits_fn: LogitsFn,
        state: State,
        round_index: int | Tensor,
        step_index: int | Tensor,
    ) -> State:
        """See `Attack.step`."""
        iterate = attack_base.perturbed(state["images"], state["delta"])
        ascended_loss = self.ascended_loss(logits_fn, state)
        if self.keep != "last":
            state = self.update_best(state, iterate, *ascended_loss(iterate))
        keys = randomness.fold_in(state["keys"], 2)
        keys = randomness.fold_in(
            randomness.fold_in(keys, round_index), step_index
        )
        grad, flags = self.estimate(logits_fn, state, iterate, keys)
        state = attack_base.mark_nonfinite(state, flags)
        delta = gradient_attacks.gradient_step(
            state["delta"],
            grad,
            state["images"],
            self,
            # A runtime parameter that is no field; see `__post_init__`.
            self.step_length,  # type: ignore[attr-defined]
        )
        return {**state, "delta": delta}

    def estimate(
        self, logits_fn: LogitsFn, state: State, images: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Estimates the gradient of the loss at `images`.

        Args:
            logits_fn: See `Attack.open`.
            state: The state, of which labels and targets are used.
            images: Tensor of shape `(batch, height, width, channels)`.
            keys: Int32 tensor of shape `(batch, 2)`.

        Returns:
            Tuple of the estimate, of the shape of `images`, and booleans
            `(batch,)`: whether the loss was not finite at any probe. The
            difference of such a pair of probes is replaced by 1 or -1, so that
            the estimate points towards the non-finite loss.
        """
        chunk = min(self.chunk, self.samples)
        shape = tuple(images.shape[1:])
        # Each row is repeated `2 * chunk` times: plus and minus of every v.
        rows = {
            key: ops.repeat(value, 2 * chunk, axis=0)
            for key, value in state.items()
            if key in ("images", "labels", "targets")
            or key.startswith("clean_")
        }
        ascended_loss = self.ascended_loss(logits_fn, rows)

        def add_chunk(
            part: int | Tensor, sums: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor]:
            total, flags = sums
            # Each direction has its own key, so that it does not depend on the
            # size of the chunks.
            indices = part * chunk + ops.arange(chunk, dtype="int32")
            v_keys = randomness.fold_in(ops.expand_dims(keys, 1), indices)
            v = randomness.signs(ops.reshape(v_keys, (-1, 2)), shape)
            v = ops.reshape(v, (-1, chunk, *shape))
            # The last chunk may be a shorter one.
            used = ops.cast(indices < self.samples, "float32")
            offsets = ops.stack([self.radius * v, -self.radius * v], axis=2)
            probes = ops.expand_dims(ops.expand_dims(images, 1), 1) + offsets
            values = losses.comparable(
                *ascended_loss(ops.reshape(probes, (-1, *shape)))
            )
            values = ops.reshape(values, (-1, chunk, 2))
            slopes = (values[..., 0] - values[..., 1]) * used
            finite = ops.isfinite(slopes)
            # The step goes towards a probe with non-finite logits.
            signs = ops.where(slopes < 0, -used, used)
            slopes = ops.where(finite, slopes, signs)
            total = total + ops.einsum("bk,bkhwc->bhwc", slopes, v)
            nonfinite = ops.any(ops.logical_not(finite), axis=1)
            return total, ops.logical_or(flags, nonfinite)

        no_flags = ops.cast(ops.zeros_like(images[:, 0, 0, 0]), "bool")
        total, flags = ops.fori_loop(
            0,
            -(-self.samples // chunk),
            add_chunk,
            (ops.zeros_like(images), no_flags),
        )
        return total / (2.0 * self.radius * self.samples), flags

    def _update_delta(
        self, state: State, grad: Tensor, step_index: int | Tensor
    ) -> State:
        raise AssertionError("SPSA overrides step, which calls this method.")


ATTACKS = {SPSA.name: SPSA}
