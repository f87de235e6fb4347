"""AutoAttack: APGD, its targeted form, FAB and Square, and their ensembles.

The hyperparameters are the published ones, so that robust accuracies are
comparable with those of other papers. Each attack consists of rounds of steps
on a dict of tensors (see `base.Attack`), so that an evaluation stops
attacking an example once any of the four attacks has succeeded on it.

References:
    - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), AutoAttack
    - [Croce and Hein, 2020](https://arxiv.org/abs/1907.02044), FAB
    - [Croce and Hein, 2021](https://arxiv.org/abs/2103.01208), L1
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
from keras import ops

from saccade.attacks import base as attack_base
from saccade.attacks import fab, losses, settings, square
from saccade.attacks.base import AscendedLoss, LogitsFn
from saccade.attacks.losses import State
from saccade.core import lp, randomness
from saccade.core import names as known_names
from saccade.core.arrays import Tensor

VERSIONS = tuple(settings.VERSION.choices)
# The smallest numbers of classes for the DLR loss and its targeted form.
_DLR_CLASSES, _TARGETED_DLR_CLASSES = 3, 4


# --- APGD --------------------------------------------------------------------


@functools.lru_cache
def schedule(
    steps: int, norm: str, largereps: bool = False
) -> dict[str, np.ndarray]:
    """The settings of every step in a round of APGD.

    A round is one run of `steps` updates. With `largereps` it is three runs,
    with the radii 3, 2 and 1 epsilon. A run has one step more than updates:
    its first step only evaluates the gradient at the start.

    Args:
        steps: The number of updates in a round.
        norm: One of `lp.NORMS`.
        largereps: Whether there are three runs with decreasing radii.

    Returns:
        Dict of NumPy arrays of length `steps` plus the number of runs: "first"
        (whether a run starts), "radius" (in units of epsilon), "weight" (of the
        gradient step; the rest is momentum), "check" (whether the step is a
        checkpoint) and "window" (updates between two checkpoints).
    """
    runs = [(1.0, steps)]
    if largereps:
        part = -(-3 * steps // 10)
        first = min(part, steps)
        second = min(part, steps - first)
        runs = [(3.0, first), (2.0, second), (1.0, steps - first - second)]
    rows = []
    for radius, count in runs:
        rows.append((True, radius, 1.0, False, 0.0))
        window = max(int((0.04 if norm == "l1" else 0.22) * count), 1)
        since = 0
        for update in range(count):
            since += 1
            check = since == window
            weight = 1.0 if update == 0 else 0.75
            rows.append((False, radius, weight, check, float(window)))
            if check:
                since = 0
            if check and norm != "l1":
                shorter = window - max(int(0.03 * count), 1)
                window = max(shorter, int(0.06 * count), 1)
    names = ("first", "radius", "weight", "check", "window")
    kinds = ("bool", "float32", "float32", "bool", "float32")
    return {
        name: np.array(column, kind)
        for name, kind, column in zip(
            names, kinds, zip(*rows, strict=True), strict=True
        )
    }


@dataclasses.dataclass(frozen=True)
class APGD(attack_base.Attack):
    """Auto-PGD: PGD with momentum and an adaptive step size.

    In L-inf and L2 the first step size is 2 epsilon and the momentum is 0.75.
    At a checkpoint an example halves its step size and returns to its best
    iterate in two cases: if at most a fraction `rho` of the updates since the
    last checkpoint increased the loss, or if neither the step size nor the
    best loss has changed since then.

    In L1 a step changes two thirds as many coordinates as the perturbation of
    the best iterate has non-zero entries. At a checkpoint the step size is
    reset to epsilon if that perturbation has become sparser; otherwise it is
    divided by 1.5, down to epsilon / 10.

    All projections are onto the norm ball and the pixel range together.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the norm ball, in units of the pixel range [0, 1].
        steps: Updates in each restart.
        restarts: Independent random starts.
        loss: One of `losses.LOSSES`; `"cross_entropy"` is APGD-CE and
            `"dlr"` APGD-DLR.
        rho: Fraction of the updates that have to increase the loss.
        largereps: L1 only: the first 30% of the updates use the radius
            3 epsilon and the next 30% use 2 epsilon. Only the last 40% yield
            candidates.
        keep: `"first"` stops attacking an example once it is misclassified;
            `"best"` keeps the success of highest loss.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690)
        - [Croce and Hein, 2021](https://arxiv.org/abs/2103.01208), L1
    """

    steps: int = settings.STEPS.field(100)
    restarts: int = settings.RESTARTS.field(1)
    loss: str = settings.LOSS.field("cross_entropy")
    rho: float = 0.75
    largereps: bool = False
    keep: str = settings.KEEP.field("first")

    name: ClassVar[str] = "apgd"
    RUNTIME_PARAMETERS: ClassVar[tuple[str, ...]] = ("epsilon", "restarts")
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fab.check_rounds(self.steps, self.restarts, self.keep)
        losses.check_loss(self.loss)
        if not 0 <= self.rho <= 1:
            raise ValueError(
                "Expected rho in [0, 1], a fraction of the updates. Received: "
                f"rho={self.rho:g}."
            )
        if self.largereps and self.norm != "l1":
            raise ValueError(
                "Expected the norm l1 for largereps. Received: "
                f"norm={self.norm!r}."
            )

    @property
    def rounds(self) -> int:
        """See `Attack.rounds`."""
        return self.restarts

    @property
    def steps_a_round(self) -> int:
        """See `Attack.steps_a_round`; `schedule` explains the extra steps."""
        return self.steps + (3 if self.largereps else 1)

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
        return {**state, **self._optimizer_state(state["images"])}

    def _optimizer_state(self, start: Tensor) -> State:
        """Empty state of a round; its first step sets all but "top"."""
        zero, row = ops.zeros_like(start), ops.zeros_like(start[:, 0, 0, 0])
        memory = {
            "delta": zero,
            "grad": zero,
            "length": row,
            # The best iterate of the run, with its gradient and loss.
            "top": zero,
            "top_grad": zero,
            "top_loss": row,
        }
        if self.norm == "l1":
            # "moved": the non-zero entries of "top" at the last checkpoint.
            return {**memory, "share": row, "moved": row}
        more = {"old": zero, "value": row, "rises": row, "checked": row}
        return {**memory, **more, "reduced": ops.cast(row, "bool")}

    def begin(
        self, logits_fn: LogitsFn, state: State, round_index: int | Tensor
    ) -> State:
        """See `Attack.begin`: draws the start, which the first step evaluates.

        As published, the start is on the surface of the norm ball in L-inf and
        L2, and the projection of normal noise in L1. It is clipped to the
        pixel range.
        """
        del logits_fn
        images = state["images"]
        keys = randomness.fold_in(state["keys"], round_index)
        shape = tuple(images.shape[1:])
        radius = ops.cast(self.epsilon, "float32")
        if self.norm == "l1":
            delta = randomness.normal(keys, shape)
            radius = radius * (3.0 if self.largereps else 1.0)
        else:
            draw = randomness.normal
            if self.norm == "linf":
                draw = functools.partial(randomness.uniform, low=-1.0)
            delta = draw(keys, shape)
            size = ops.maximum(lp.lp_norm(delta, self.norm), 1e-12)
            delta = radius * delta / lp.per_example(size, delta)
            delta = ops.clip(delta, -images, 1.0 - images)
        start = lp.project(delta, radius, self.norm, images)
        return {
            **state,
            **self._optimizer_state(images),
            "delta": start,
            "top": start,
        }

    def step(
        self,
        logits_fn: LogitsFn,
        state: State,
        round_index: int | Tensor,
        step_index: int | Tensor,
    ) -> State:
        """See `Attack.step`: one update and the gradient at its result."""
        del round_index
        row = {
            name: ops.take(ops.convert_to_tensor(column), step_index, axis=0)
            for name, column in schedule(
                self.steps, self.norm, self.largereps
            ).items()
        }
        # Iterates of runs with a larger radius are not candidates.
        allowed = row["radius"] <= 1.0
        row["radius"] = row["radius"] * ops.cast(self.epsilon, "float32")
        delta = self._next_iterate(state, row)
        iterate = attack_base.perturbed(state["images"], delta)
        state, value, logits, grad = self.gradient(logits_fn, state, iterate)
        state = self.update_best(
            state,
            iterate,
            self._candidate_loss(value, logits, state),
            logits,
            allowed,
        )
        value = losses.comparable(value, logits)
        state = self._update_run(state, row, delta, value, grad)
        return self.checkpoint(state, row)

    def _candidate_loss(
        self, value: Tensor, logits: Tensor, state: State
    ) -> Tensor:
        """The loss by which candidates of all rounds are compared."""
        del logits, state
        return value

    def _next_iterate(self, state: State, row: State) -> Tensor:
        """Returns the perturbation at which the next gradient is taken."""
        images, delta, grad = state["images"], state["delta"], state["grad"]

        def project(delta: Tensor) -> Tensor:
            return lp.project(delta, row["radius"], self.norm, images)

        length = lp.per_example(state["length"], delta)
        if self.norm == "l1":
            step = length * sparse_direction(grad, state["share"])
            # A run with a smaller radius starts at the best iterate of the run
            # before it.
            return project(ops.where(row["first"], state["top"], delta + step))
        step = length * lp.ascent_direction(grad, self.norm)
        updated = project(delta + step)
        updated = project(
            delta
            + row["weight"] * (updated - delta)
            + (1.0 - row["weight"]) * (delta - state["old"])
        )
        return ops.where(row["first"], delta, updated)

    def _update_run(
        self,
        state: State,
        row: State,
        delta: Tensor,
        value: Tensor,
        grad: Tensor,
    ) -> State:
        """Returns the state with the new iterate.

        The first step of a run also resets what the run before it has stored.

        Args:
            state: The state.
            row: The settings of this step, from `schedule`.
            delta: The new perturbation.
            value: The loss there, `(batch,)`.
            grad: The gradient there.
        """
        first = row["first"]
        better = ops.logical_or(first, value > state["top_loss"])
        mask = lp.per_example(better, delta)
        initial_length = (1.0 if self.norm == "l1" else 2.0) * row["radius"]
        new = {
            "delta": delta,
            "grad": grad,
            "length": ops.where(first, initial_length, state["length"]),
            "top": ops.where(mask, delta, state["top"]),
            "top_grad": ops.where(mask, grad, state["top_grad"]),
            "top_loss": ops.where(better, value, state["top_loss"]),
        }
        if self.norm == "l1":
            size = float(math.prod(delta.shape[1:]))
            share, nonzero = 0.2, size
            if self.largereps:
                nonzero = count_nonzero(delta)
                share = nonzero / size / 1.5
            new["share"] = ops.where(first, share, state["share"])
            new["moved"] = ops.where(first, nonzero, state["moved"])
        else:
            increased = ops.cast(value > state["value"], "float32")
            new["old"] = state["delta"]
            new["value"] = value
            new["rises"] = ops.where(first, 0.0, state["rises"] + increased)
            new["checked"] = ops.where(first, value, state["checked"])
            new["reduced"] = ops.logical_or(first, state["reduced"])
        return {**state, **new}

    def checkpoint(self, state: State, row: State) -> State:
        """Updates the step sizes and returns examples to their best iterates.

        It has an effect only if this step is a checkpoint.

        Args:
            state: The state after the update of this step.
            row: The settings of this step, from `schedule`.
        """
        check, top_loss = row["check"], state["top_loss"]
        if self.norm == "l1":
            size = math.prod(state["delta"].shape[1:])
            nonzero = count_nonzero(state["top"])
            go_back = nonzero < 0.95 * state["moved"]
            shorter = ops.maximum(state["length"] / 1.5, row["radius"] / 10.0)
            length = ops.where(go_back, row["radius"], shorter)
            new = {"share": nonzero / size / 1.5, "moved": nonzero}
        else:
            slow = state["rises"] <= self.rho * row["window"]
            stuck = ops.logical_and(
                ops.logical_not(state["reduced"]), state["checked"] >= top_loss
            )
            go_back = ops.logical_or(slow, stuck)
            length = ops.where(go_back, 0.5 * state["length"], state["length"])
            new = {"rises": ops.zeros_like(top_loss)}
            new |= {"reduced": go_back, "checked": top_loss}
        new["length"] = length
        new = {k: ops.where(check, v, state[k]) for k, v in new.items()}
        go_back = ops.logical_and(check, go_back)
        go_back = lp.per_example(go_back, state["delta"])
        for name in ("delta", "grad"):
            best = state["top" if name == "delta" else "top_grad"]
            new[name] = ops.where(go_back, best, state[name])
        return {**state, **new}


def count_nonzero(delta: Tensor) -> Tensor:
    """Returns the number of non-zero entries of each example, `(batch,)`.

    The count is exact. The authors' program computes the perturbation as a
    difference of images, so that it also counts entries that are zero up to
    rounding, about twice as many at the start. The trajectories differ because
    of that, but neither attack is stronger (see "L1 beside the authors'
    program" in the README).
    """
    nonzero = ops.cast(ops.not_equal(delta, 0.0), "float32")
    return ops.sum(ops.reshape(nonzero, (-1, math.prod(delta.shape[1:]))), -1)


def sparse_direction(grad: Tensor, share: Tensor) -> Tensor:
    """A step of L1 norm 1 on the entries of largest absolute gradient.

    Args:
        grad: Tensor of shape `(batch, height, width, channels)`.
        share: Fraction of the entries to change, `(batch,)`; at least one
            entry is changed.

    Returns:
        Tensor of the shape of `grad`; zero for an example whose gradient is
        zero. Entries that tie with the smallest selected one are all changed.
    """
    size = math.prod(grad.shape[1:])
    flat = ops.reshape(grad, (-1, size))
    position = ops.clip(ops.floor((1.0 - share) * size), 0, size - 1)
    position = ops.expand_dims(ops.cast(position, "int32"), -1)
    ascending = ops.sort(ops.abs(flat), axis=-1)
    threshold = ops.take_along_axis(ascending, position, axis=-1)
    signs = ops.where(ops.abs(flat) >= threshold, ops.sign(flat), 0.0)
    count = ops.sum(ops.abs(signs), axis=-1, keepdims=True)
    return ops.reshape(signs / ops.maximum(count, 1.0), ops.shape(grad))


@dataclasses.dataclass(frozen=True)
class APGDT(APGD):
    """Targeted APGD: APGD on the targeted DLR loss, for several targets.

    Any misclassification is a success. The attack chooses the targets itself:
    the classes other than the label with the largest logits on the clean
    image, one after the other. Candidates are compared by the untargeted DLR
    loss, which is also the loss in the result.

    Attributes:
        restarts: Random starts for each target.
        loss: `"dlr"`, in its targeted form.
        num_targets: The number of target classes. If the model has fewer other
            classes, they are targeted repeatedly; `fit` avoids that.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), eq. 7
    """

    loss: str = settings.LOSS.field("dlr")
    num_targets: int = 9

    name: ClassVar[str] = "apgd_t"
    can_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        fab.check_targets(self.num_targets)
        if self.loss != "dlr":
            raise ValueError(
                "Expected loss to be dlr, in its targeted form. Received: "
                f"loss={self.loss!r}."
            )

    @property
    def rounds(self) -> int:
        """See `Attack.rounds`."""
        return self.num_targets * self.restarts

    def fit(self, num_classes: int, targeted: bool = False) -> Self:
        """See `Attack.fit`; at most one target for each other class."""
        del targeted  # The attack chooses its targets itself.
        try:
            losses.check_loss("dlr", num_classes, targeted=True)
        except ValueError as error:
            raise ValueError(
                f"{error} Take apgd or fab for fewer classes."
            ) from None
        most = min(self.num_targets, num_classes - 1)
        return dataclasses.replace(self, num_targets=most)

    def open(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> State:
        """See `Attack.open`."""
        fab.check_untargeted(self.name, targets)
        state = self._initial_state(images, labels, keys, targets)
        outputs = losses.outputs_of(logits_fn(state["images"]))
        logits = ops.cast(outputs.logits, "float32")
        value = self._candidate_loss(None, logits, state)
        state = self.update_best(state, state["images"], value, logits)
        state = {**state, **self._optimizer_state(state["images"])}
        return {**state, "scores": logits, "aim": state["labels"]}

    def begin(
        self, logits_fn: LogitsFn, state: State, round_index: int | Tensor
    ) -> State:
        """See `Attack.begin`."""
        state = super().begin(logits_fn, state, round_index)
        rank = round_index // self.restarts
        return {**state, "aim": fab.target_of_rank(state, rank)}

    def ascended_loss(self, logits_fn: LogitsFn, state: State) -> AscendedLoss:
        """See `Attack.ascended_loss`."""
        return super().ascended_loss(
            logits_fn, {**state, "targets": state["aim"]}
        )

    def _candidate_loss(
        self, value: Tensor, logits: Tensor, state: State
    ) -> Tensor:
        del value
        return losses.loss("dlr", logits, state["labels"])


# --- The ensembles -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AutoAttack(attack_base.Attack):
    """The ensembles of Croce and Hein, with their hyperparameters.

    The versions are:

    - `"standard"`: APGD-CE, APGD-T, FAB-T and Square. Each attacks only the
      examples on which the attacks before it failed.
    - `"plus"`: with more restarts, APGD-DLR and untargeted FAB.
    - `"rand"`: APGD-CE and APGD-DLR, for models that draw noise. The
      evaluation averages each gradient over `eot` draws.

    The DLR loss needs three classes and its targeted form four. For a model
    with fewer classes, `fit` returns an ensemble without the attacks that are
    undefined, and names it in the version: `"standard_2_classes"` is APGD-CE,
    FAB-T and Square; `"standard_3_classes"` has untargeted APGD-DLR instead of
    APGD-T.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the norm ball, in units of the pixel range [0, 1].
        version: One of `VERSIONS`, or a version that `fit` returned.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690)
        - [Croce and Hein, 2021](https://arxiv.org/abs/2103.01208), L1
    """

    version: str = settings.VERSION.field("standard")

    name: ClassVar[str] = "autoattack"
    random: ClassVar[bool] = True
    can_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (*VERSIONS, *_FEW_CLASSES):
            raise known_names.unknown("version", self.version, VERSIONS)

    @property
    def eot(self) -> int | None:
        """Draws of a stochastic model for each gradient; None means one."""
        return 20 if self._base == "rand" else None

    @property
    def _base(self) -> str:
        """The published version, without the suffix for few classes."""
        return published_version(self.version)

    def members(self) -> tuple[attack_base.Attack, ...]:
        """The attacks of the version, in the order in which they run."""
        make = {"standard": _standard, "plus": _plus, "rand": _rand}
        threat_model = {"norm": self.norm, "epsilon": self.epsilon}
        members = make[self._base](threat_model)
        classes = _FEW_CLASSES.get(self.version)
        return members if classes is None else _defined(members, classes)

    def fit(self, num_classes: int, targeted: bool = False) -> Self:
        """See `Attack.fit`; each member is fitted later, by the evaluation.

        Returns:
            This ensemble, or the one without the members that are undefined
            for so few classes.
        """
        del targeted  # The ensemble is untargeted.
        if num_classes < 2:
            losses.check_loss("cross_entropy", num_classes)
        version = self._base
        if num_classes < _TARGETED_DLR_CLASSES:
            few = f"{version}_{num_classes}_classes"
            version = few if few in _FEW_CLASSES else version
        if self.version in _FEW_CLASSES and self.version != version:
            raise ValueError(
                f"Expected a model of {_FEW_CLASSES[self.version]} classes for "
                f"version={self.version}. Received: num_classes={num_classes}. "
                f"Take version={self._base}."
            )
        return dataclasses.replace(self, version=version)

    def __call__(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> attack_base.AttackResult:
        """Runs all members on the whole batch; see `Attack.__call__`.

        Returns:
            An `AttackResult`. Each example has the image and the loss of the
            first member that succeeds on it. If none does, it has those of the
            first member.
        """
        fab.check_untargeted(self.name, targets)
        best: attack_base.AttackResult | None = None
        for rank, member in enumerate(self.members()):
            member_keys = (
                None if keys is None else randomness.fold_in(keys, rank)
            )
            new = member(logits_fn, images, labels, member_keys)
            if best is None:
                best = new
                continue
            take = ops.logical_and(new.success, ops.logical_not(best.success))
            mask = lp.per_example(take, new.images)
            best = attack_base.AttackResult(
                ops.where(mask, new.images, best.images),
                ops.logical_or(best.success, new.success),
                ops.where(take, new.loss, best.loss),
            )
        return cast(attack_base.AttackResult, best)  # Has members.


def _standard(threat_model: dict[str, Any]) -> tuple[attack_base.Attack, ...]:
    l1 = threat_model["norm"] == "l1"
    return (
        APGD(**threat_model, restarts=5 if l1 else 1, largereps=l1),
        APGDT(**threat_model, num_targets=5 if l1 else 9, largereps=l1),
        fab.FAB(**threat_model),
        square.Square(**threat_model),
    )


def _plus(threat_model: dict[str, Any]) -> tuple[attack_base.Attack, ...]:
    return (
        APGD(**threat_model, restarts=5),
        APGD(**threat_model, restarts=5, loss="dlr"),
        fab.FAB(**threat_model, restarts=5, targeted=False),
        square.Square(**threat_model),
        APGDT(**threat_model),
        fab.FAB(**threat_model),
    )


def published_version(version: str) -> str:
    """Returns a version without the suffix that `fit` adds for few classes."""
    return version.partition("_")[0]


def _rand(threat_model: dict[str, Any]) -> tuple[attack_base.Attack, ...]:
    return APGD(**threat_model), APGD(**threat_model, loss="dlr")


# The versions for few classes and their numbers of classes. "rand" has no
# targeted member, so that three classes are enough for it.
_FEW_CLASSES = {
    f"{version}_{classes}_classes": classes
    for version in VERSIONS
    for classes in (2, 3)
    if (version, classes) != ("rand", 3)
}


def _defined(
    members: Sequence[attack_base.Attack], classes: int
) -> tuple[attack_base.Attack, ...]:
    """Returns the members that are defined for 2 or 3 classes.

    This follows the advice of the authors' program: no DLR loss for two
    classes; for three, the untargeted DLR loss instead of the targeted one.
    """
    found: list[attack_base.Attack] = []
    # Every version begins with APGD-CE.
    restarts = cast(APGD, members[0]).restarts
    for member in members:
        if isinstance(member, APGDT):
            member = APGD(
                member.norm,
                member.epsilon,
                restarts=restarts,
                loss="dlr",
                largereps=member.largereps,
            )
        is_dlr = getattr(member, "loss", None) == "dlr"
        if is_dlr and (classes < _DLR_CLASSES or member in found):
            continue  # The version "plus" already has APGD-DLR.
        found.append(member)
    return tuple(found)


ATTACKS = {attack.name: attack for attack in (APGD, APGDT, AutoAttack)}
