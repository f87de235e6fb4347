"""SPSA, which climbs a gradient that it estimates from the logits alone.

References:
    - [Uesato et al., 2018](https://arxiv.org/abs/1802.05666)
"""

import dataclasses
from typing import ClassVar

from keras import ops

import attack_backbone
import attack_rounds
import losses
import numerics


@dataclasses.dataclass(frozen=True)
class SPSA(attack_backbone.Iterative):
    """PGD on a gradient that is estimated from logits alone.

    Simultaneous perturbation stochastic approximation: the mean, over random
    directions v of +-1 entries, of (f(x + d v) - f(x - d v)) / (2 d) v,
    with f the loss, taken at the current iterate. The form of Uesato et al. as
    the S3TA paper uses it: 4096 directions, 100 iterations of signed steps.

    Attributes:
        samples: Directions v of one estimate; each costs two calls.
        radius: The distance d, in units of the pixel range.
        step_size: Length of one step; None is the rule of `PGD`.
        chunk: Directions held in memory at a time: it bounds the batch of the
            model to 2 * chunk * images, and changes the sums by rounding only.
        l1_fraction: Part of the coordinates that share an L1 step.

    References:
        - [Uesato et al., 2018](https://arxiv.org/abs/1802.05666)
        - [Zoran et al., 2020](https://arxiv.org/abs/1912.02184), section 4.2
    """

    steps: int = 100
    random_start: float = 0.0
    loss: str = "margin"
    samples: int = 4096
    radius: float = 0.01
    step_size: float | None = None
    chunk: int = 32
    l1_fraction: float = 0.01

    name: ClassVar[str] = "spsa"
    random: ClassVar[bool] = True
    RUNTIME_PARAMETERS: ClassVar[tuple] = (
        "epsilon",
        "step_length",
        "steps",
        "restarts",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.samples < 1 or self.chunk < 1 or not self.radius > 0:
            raise ValueError(
                "Expected samples >= 1, chunk >= 1 and radius > 0. Received: "
                f"samples={self.samples}, chunk={self.chunk}, "
                f"radius={self.radius:g}."
            )
        attack_backbone.check_fraction(self.l1_fraction)
        length = self.step_size
        if length is None:
            length = min(1.0, 2.5 / max(self.steps, 1)) * self.epsilon
        object.__setattr__(self, "step_length", length)

    def calls(self):
        """See `Attack.calls`."""
        return 2 * min(self.chunk, self.samples)

    def step(self, logits_fn, state, number, index):
        """See `Attack.step`."""
        here = attack_rounds.perturbed(state["images"], state["delta"])
        ascended_loss = self.ascended_loss(logits_fn, state)
        if self.keep != "last":
            state = self._offer(state, here, *ascended_loss(here))
        keys = numerics.fold_in(state["keys"], 2)
        keys = numerics.fold_in(numerics.fold_in(keys, number), index)
        grad, flags = self.estimate(logits_fn, state, here, keys)
        state = attack_rounds.mark(state, flags)
        delta = attack_backbone.move(
            state["delta"], grad, state["images"], self, self.step_length
        )
        return {**state, "delta": delta}

    def estimate(self, logits_fn, state, images, keys):
        """Estimates the gradient of the loss at `images`.

        Args:
            logits_fn: See `Attack.open`.
            state: The rows: labels, and targets if there are any.
            images: Tensor of shape `(batch, height, width, channels)`.
            keys: Int32 tensor of shape `(batch, 2)`.

        Returns:
            Tuple of the estimate, of the shape of `images`, and booleans
            `(batch,)`: where a probe had no finite loss. Such a probe counts
            as one of higher loss, by 1.
        """
        chunk = min(self.chunk, self.samples)
        shape = tuple(images.shape[1:])
        # Each row stands `2 * chunk` times: for every v, plus and minus.
        rows = {
            key: ops.repeat(value, 2 * chunk, axis=0)
            for key, value in state.items()
            if key in ("images", "labels", "targets")
            or key.startswith("clean_")
        }
        ascended_loss = self.ascended_loss(logits_fn, rows)

        def add(part, sums):
            total, flags = sums
            # Each direction has a key, so that it is the same in any chunk.
            wanted = part * chunk + ops.arange(chunk, dtype="int32")
            drawn = numerics.fold_in(ops.expand_dims(keys, 1), wanted)
            v = numerics.signs(ops.reshape(drawn, (-1, 2)), shape)
            v = ops.reshape(v, (-1, chunk, *shape))
            # The last part may be a shorter one.
            used = ops.cast(wanted < self.samples, "float32")
            both = ops.stack([self.radius * v, -self.radius * v], axis=2)
            probes = ops.expand_dims(ops.expand_dims(images, 1), 1) + both
            values = losses.comparable(
                *ascended_loss(ops.reshape(probes, (-1, *shape)))
            )
            values = ops.reshape(values, (-1, chunk, 2))
            slopes = (values[..., 0] - values[..., 1]) * used
            finite = ops.isfinite(slopes)
            # A probe without a finite answer is one to go to.
            signs = ops.where(slopes < 0, -used, used)
            slopes = ops.where(finite, slopes, signs)
            total = total + ops.einsum("bk,bkhwc->bhwc", slopes, v)
            broken = ops.any(ops.logical_not(finite), axis=1)
            return total, ops.logical_or(flags, broken)

        none = ops.cast(ops.zeros_like(images[:, 0, 0, 0]), "bool")
        total, flags = ops.fori_loop(
            0,
            -(-self.samples // chunk),
            add,
            (ops.zeros_like(images), none),
        )
        return total / (2.0 * self.radius * self.samples), flags

    def _walk(self, state, grad, index):
        raise AssertionError("SPSA has no gradient to walk along.")


ATTACKS = {SPSA.name: SPSA}
