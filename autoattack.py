"""AutoAttack: APGD, its targeted form, FAB and Square, and their ensembles.

The hyperparameters are the published ones: a robust accuracy from here can be
set beside those of other papers. What is new is only the form: rounds of steps
on a dict of tensors (see `attack_rounds`), so that an evaluation drops the
examples that have fallen, whichever of the four felled them.

References:
    - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), AutoAttack
    - [Croce and Hein, 2020](https://arxiv.org/abs/1907.02044), FAB
    - [Croce and Hein, 2021](https://arxiv.org/abs/2103.01208), all of it in L1
"""

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
from keras import ops

import attack_rounds
import fab
import losses
import numerics
import square

VERSIONS = ("standard", "plus", "rand")
# Fewer classes than these have no DLR loss, and no targeted one.
_DLR_CLASSES, _TARGETED_DLR_CLASSES = 3, 4


# --- APGD --------------------------------------------------------------------


@functools.lru_cache
def schedule(steps, norm, largereps=False):
    """The timetable of a round of APGD, one row a step.

    A round is one run of `steps` moves, or, with `largereps`, three, in balls
    of 3, 2 and 1 epsilon. A run has one step more than it has moves: its first
    takes the gradient where the run begins.

    Args:
        steps: How many moves.
        norm: One of `numerics.NORMS`.
        largereps: Whether there are three balls.

    Returns:
        Dict of NumPy arrays of length `steps` plus the number of runs: "first"
        (a run begins), "radius" (of its ball, in epsilons), "weight" (of the
        gradient step; the rest is momentum), "check" (a checkpoint) and
        "window" (moves between the last checkpoint and the next).
    """
    runs = [(1.0, steps)]
    if largereps:
        part = -(-3 * steps // 10)
        most = min(part, steps - min(part, steps))
        runs = [(3.0, min(part, steps)), (2.0, most)]
        runs.append((1.0, steps - runs[0][1] - most))
    rows = []
    for radius, count in runs:
        rows.append((True, radius, 1.0, False, 0.0))
        window = max(int((0.04 if norm == "l1" else 0.22) * count), 1)
        since = 0
        for move in range(count):
            since += 1
            check = since == window
            weight = 1.0 if move == 0 else 0.75
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
class APGD(attack_rounds.Attack):
    """Auto-PGD: momentum, and a step size that halves where it stalls.

    L-inf and L2: steps of 2 epsilon at first, momentum 0.75; at a checkpoint a
    row halves its step and goes back to its best iterate if no more than `rho`
    of the moves since the last one went up, or if neither step nor best loss
    has changed. L1: the step is shared between as many coordinates as two
    thirds of those the best iterate has moved; it grows back to epsilon when
    the iterate gets sparser, and shrinks (1.5-fold, to epsilon / 10) otherwise.
    All projections are onto ball and box together.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the ball, in units of the pixel range [0, 1].
        steps: Moves of one restart.
        restarts: Independent random starts.
        loss: One of `losses.LOSSES`; `"cross_entropy"` is APGD-CE and
            `"dlr"` APGD-DLR.
        rho: Part of the moves that have to go up.
        largereps: L1 only: the first 30% of the moves in a ball of 3 epsilon,
            the next 30% in one of 2 epsilon; only the last 40% make candidates.
        keep: `"first"` leaves an example in peace once it has fallen; `"best"`
            keeps the success of highest loss.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690)
        - [Croce and Hein, 2021](https://arxiv.org/abs/2103.01208), L1
    """

    steps: int = 100
    restarts: int = 1
    loss: str = "cross_entropy"
    rho: float = 0.75
    largereps: bool = False
    keep: str = "first"

    name: ClassVar[str] = "apgd"
    RUNTIME_PARAMETERS: ClassVar[tuple] = ("epsilon", "restarts")
    random: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        fab.check_rounds(self.steps, self.restarts, self.keep)
        losses.check_loss(self.loss)
        if not 0 <= self.rho <= 1:
            raise ValueError(
                "Expected rho in [0, 1], a part of the moves. Received: "
                f"rho={self.rho:g}."
            )
        if self.largereps and self.norm != "l1":
            raise ValueError(
                "Expected the norm l1 for largereps. Received: "
                f"norm={self.norm!r}."
            )

    @property
    def rounds(self):
        """See `Attack.rounds`."""
        return self.restarts

    @property
    def steps_a_round(self):
        """See `Attack.steps_a_round`; `schedule` says why it is not `steps`."""
        return self.steps + (3 if self.largereps else 1)

    def open(self, logits_fn, images, labels, keys=None, targets=None):
        """See `Attack.open`."""
        state = super().open(logits_fn, images, labels, keys, targets)
        return {**state, **self._memory(state["images"])}

    def _memory(self, start):
        """What a round remembers; its first step sets all but "top"."""
        zero, row = ops.zeros_like(start), ops.zeros_like(start[:, 0, 0, 0])
        memory = {
            "delta": zero,
            "grad": zero,
            "length": row,
            # The best iterate of the run, its gradient and its loss.
            "top": zero,
            "top_grad": zero,
            "top_loss": row,
        }
        if self.norm == "l1":
            return {**memory, "share": row, "moved": row}
        more = {"old": zero, "value": row, "rises": row, "checked": row}
        return {**memory, **more, "reduced": ops.cast(row, "bool")}

    def begin(self, logits_fn, state, number):
        """See `Attack.begin`: goes to the start, which the first step judges.

        As published: on the surface of the ball in L-inf and L2, in L1 the
        projection of normal noise; each clipped to the box.
        """
        del logits_fn
        images = state["images"]
        keys = numerics.fold_in(state["keys"], number)
        shape = tuple(images.shape[1:])
        radius = ops.cast(self.epsilon, "float32")
        if self.norm == "l1":
            delta = numerics.normal(keys, shape)
            radius = radius * (3.0 if self.largereps else 1.0)
        else:
            draw = numerics.normal
            if self.norm == "linf":
                draw = functools.partial(numerics.uniform, low=-1.0)
            delta = draw(keys, shape)
            size = ops.maximum(numerics.lp_norm(delta, self.norm), 1e-12)
            delta = radius * delta / numerics.per_example(size, delta)
            delta = ops.clip(delta, -images, 1.0 - images)
        start = numerics.project(delta, radius, self.norm, images)
        return {**state, **self._memory(images), "delta": start, "top": start}

    def step(self, logits_fn, state, number, index):
        """See `Attack.step`: one move, its gradient, and the bookkeeping."""
        del number
        row = {
            name: ops.take(ops.convert_to_tensor(column), index, axis=0)
            for name, column in schedule(
                self.steps, self.norm, self.largereps
            ).items()
        }
        # A candidate is one that lies in the ball of epsilon itself.
        allowed = row["radius"] <= 1.0
        row["radius"] = row["radius"] * ops.cast(self.epsilon, "float32")
        delta = self._moved(state, row)
        here = attack_rounds.perturbed(state["images"], delta)
        state, value, logits, grad = self.gradient(logits_fn, state, here)
        worth = self._worth(value, logits, state)
        state = self._offer(state, here, worth, logits, allowed)
        value = losses.comparable(value, logits)
        state = self._remember(state, row, delta, value, grad)
        return self._checkpoint(state, row)

    def _worth(self, value, logits, state):
        """The loss by which candidates of all rounds are compared."""
        del logits, state
        return value

    def _moved(self, state, row):
        """Where the next gradient is taken."""
        images, delta, grad = state["images"], state["delta"], state["grad"]

        def project(delta):
            return numerics.project(delta, row["radius"], self.norm, images)

        length = numerics.per_example(state["length"], delta)
        if self.norm == "l1":
            step = length * sparse_direction(grad, state["share"])
            # A run in a smaller ball begins at the best iterate of the larger.
            return project(ops.where(row["first"], state["top"], delta + step))
        step = length * numerics.ascent_direction(grad, self.norm)
        ahead = project(delta + step)
        ahead = project(
            delta
            + row["weight"] * (ahead - delta)
            + (1.0 - row["weight"]) * (delta - state["old"])
        )
        return ops.where(row["first"], delta, ahead)

    def _remember(self, state, row, delta, value, grad):
        """Takes in the new iterate; a run that begins forgets the one before.

        Args:
            state: The rows.
            row: This step's row of the `schedule`.
            delta: The new iterate.
            value: Its loss, `(batch,)`.
            grad: Its gradient.
        """
        first = row["first"]
        better = ops.logical_or(first, value > state["top_loss"])
        mask = numerics.per_example(better, delta)
        longest = (1.0 if self.norm == "l1" else 2.0) * row["radius"]
        new = {
            "delta": delta,
            "grad": grad,
            "length": ops.where(first, longest, state["length"]),
            "top": ops.where(mask, delta, state["top"]),
            "top_grad": ops.where(mask, grad, state["top_grad"]),
            "top_loss": ops.where(better, value, state["top_loss"]),
        }
        if self.norm == "l1":
            size = float(math.prod(delta.shape[1:]))
            share, moved = 0.2, size
            if self.largereps:
                moved = count_moved(delta)
                share = moved / size / 1.5
            new["share"] = ops.where(first, share, state["share"])
            new["moved"] = ops.where(first, moved, state["moved"])
        else:
            rise = ops.cast(value > state["value"], "float32")
            new["old"] = state["delta"]
            new["value"] = value
            new["rises"] = ops.where(first, 0.0, state["rises"] + rise)
            new["checked"] = ops.where(first, value, state["checked"])
            new["reduced"] = ops.logical_or(first, state["reduced"])
        return {**state, **new}

    def _checkpoint(self, state, row):
        """Decides on step sizes, and who goes back to the best iterate."""
        check, top_loss = row["check"], state["top_loss"]
        if self.norm == "l1":
            size = math.prod(state["delta"].shape[1:])
            moved = count_moved(state["top"])
            back = moved < 0.95 * state["moved"]
            shorter = ops.maximum(state["length"] / 1.5, row["radius"] / 10.0)
            length = ops.where(back, row["radius"], shorter)
            new = {"share": moved / size / 1.5, "moved": moved}
        else:
            slow = state["rises"] <= self.rho * row["window"]
            stuck = ops.logical_and(
                ops.logical_not(state["reduced"]), state["checked"] >= top_loss
            )
            back = ops.logical_or(slow, stuck)
            length = ops.where(back, 0.5 * state["length"], state["length"])
            new = {"rises": ops.zeros_like(top_loss)}
            new |= {"reduced": back, "checked": top_loss}
        new["length"] = length
        new = {k: ops.where(check, v, state[k]) for k, v in new.items()}
        back = ops.logical_and(check, back)
        back = numerics.per_example(back, state["delta"])
        for name in ("delta", "grad"):
            best = state["top" if name == "delta" else "top_grad"]
            new[name] = ops.where(back, best, state[name])
        return {**state, **new}


def count_moved(delta):
    """Returns how many entries of each example are not zero, `(batch,)`.

    The count is exact. The authors' program adds and subtracts perturbations
    to and from the image, so that it also counts entries that are zero up to
    rounding, about twice as many at the start. The walks differ by that, but
    neither is stronger (see "L1 beside the authors' program" in the README).
    """
    moved = ops.cast(ops.not_equal(delta, 0.0), "float32")
    return ops.sum(ops.reshape(moved, (-1, math.prod(delta.shape[1:]))), -1)


def sparse_direction(grad, share):
    """The step of L1 norm 1 on the entries of largest gradient.

    Args:
        grad: Tensor of shape `(batch, height, width, channels)`.
        share: Part of the entries that move, `(batch,)`; at least one does.

    Returns:
        Tensor of the shape of `grad`, zero where that is all zero; entries of
        equal gradient at the edge all move.
    """
    size = math.prod(grad.shape[1:])
    flat = ops.reshape(grad, (-1, size))
    place = ops.clip(ops.floor((1.0 - share) * size), 0, size - 1)
    place = ops.expand_dims(ops.cast(place, "int32"), -1)
    rising = ops.sort(ops.abs(flat), axis=-1)
    least = ops.take_along_axis(rising, place, axis=-1)
    signs = ops.where(ops.abs(flat) >= least, ops.sign(flat), 0.0)
    count = ops.sum(ops.abs(signs), axis=-1, keepdims=True)
    return ops.reshape(signs / ops.maximum(count, 1.0), ops.shape(grad))


@dataclasses.dataclass(frozen=True)
class APGDT(APGD):
    """Targeted APGD: the targeted DLR loss, one likely class after another.

    Still an attack for any error: the targets are its own, the classes of
    largest logit on the clean image but the label. Candidates are compared by
    the untargeted DLR loss, which is also the loss of the result.

    Attributes:
        restarts: Random starts for each target.
        loss: `"dlr"`, in its targeted form.
        num_targets: How many classes are aimed at. A model with fewer other
            classes gets them again, from another start; `fit` avoids that.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), eq. 7
    """

    loss: str = "dlr"
    num_targets: int = 9

    name: ClassVar[str] = "apgd_t"
    can_target: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        fab.check_targets(self.num_targets)
        if self.loss != "dlr":
            raise ValueError(
                "Expected loss to be dlr, in its targeted form. Received: "
                f"loss={self.loss!r}."
            )

    @property
    def rounds(self):
        """See `Attack.rounds`."""
        return self.num_targets * self.restarts

    def fit(self, num_classes, targeted=False):
        """See `Attack.fit`; drops the targets that do not exist."""
        del targeted  # It chooses its targets by itself.
        try:
            losses.check_loss("dlr", num_classes, targeted=True)
        except ValueError as error:
            raise ValueError(
                f"{error} Take apgd (or fab) for fewer classes."
            ) from None
        most = min(self.num_targets, num_classes - 1)
        return dataclasses.replace(self, num_targets=most)

    def open(self, logits_fn, images, labels, keys=None, targets=None):
        """See `Attack.open`."""
        fab.check_untargeted(self.name, targets)
        state = self._rows(images, labels, keys, targets)
        outputs = losses.outputs_of(logits_fn(state["images"]))
        logits = ops.cast(outputs.logits, "float32")
        value = self._worth(None, logits, state)
        state = self._offer(state, state["images"], value, logits)
        state = {**state, **self._memory(state["images"])}
        return {**state, "scores": logits, "aim": state["labels"]}

    def begin(self, logits_fn, state, number):
        """See `Attack.begin`."""
        state = super().begin(logits_fn, state, number)
        rank = number // self.restarts
        return {**state, "aim": fab.aim(state, rank)}

    def ascended_loss(self, logits_fn, state):
        """See `Attack.ascended_loss`."""
        return super().ascended_loss(
            logits_fn, {**state, "targets": state["aim"]}
        )

    def _worth(self, value, logits, state):
        del value
        return losses.loss("dlr", logits, state["labels"])


# --- The ensembles -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AutoAttack(attack_rounds.Attack):
    """The ensembles of Croce and Hein, with their hyperparameters.

    `"standard"`: APGD-CE, APGD-T, FAB-T and Square, each on what the ones
    before have left. `"plus"`: more restarts, and APGD-DLR and untargeted FAB.
    `"rand"`: APGD-CE and APGD-DLR, for models that draw noise; each gradient
    is then the mean over `eot` draws, which the evaluation takes.

    The DLR loss needs three classes, its targeted form four. For a model of
    fewer, `fit` returns an ensemble without the members that are not defined,
    whose version says so: `"standard_2_classes"` is APGD-CE, FAB-T and Square;
    `"standard_3_classes"` has the untargeted APGD-DLR in the place of APGD-T.

    Attributes:
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: Radius of the ball, in units of the pixel range [0, 1].
        version: One of `VERSIONS`, or one of those that `fit` returns.

    References:
        - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690)
        - [Croce and Hein, 2021](https://arxiv.org/abs/2103.01208), L1
    """

    version: str = "standard"

    name: ClassVar[str] = "autoattack"
    random: ClassVar[bool] = True
    can_target: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.version not in (*VERSIONS, *_FEW_CLASSES):
            raise ValueError(
                f"Expected version to be one of {', '.join(VERSIONS)}. "
                f"Received: version={self.version!r}."
            )

    @property
    def eot(self):
        """Draws of a stochastic model behind each gradient; None: one."""
        return 20 if self._base == "rand" else None

    @property
    def _base(self):
        """The published version."""
        return published_version(self.version)

    def members(self):
        """The published attacks, in their order; see the class for fewer."""
        make = {"standard": _standard, "plus": _plus, "rand": _rand}
        ball = {"norm": self.norm, "epsilon": self.epsilon}
        members = make[self._base](ball)
        classes = _FEW_CLASSES.get(self.version)
        return members if classes is None else _defined(members, classes)

    def fit(self, num_classes, targeted=False):
        """See `Attack.fit`; the members are fitted one by one, later.

        Returns:
            The ensemble, or that of the members that are defined for as few
            classes.
        """
        del targeted  # It looks for any error.
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

    def __call__(self, logits_fn, images, labels, keys=None, targets=None):
        """Runs all members on the whole batch; see `Attack.__call__`.

        Returns:
            An `AttackResult`. An example has the image and the loss of the
            first member that succeeds, or of the first member of all.
        """
        fab.check_untargeted(self.name, targets)
        best = None
        for rank, member in enumerate(self.members()):
            own = None if keys is None else numerics.fold_in(keys, rank)
            new = member(logits_fn, images, labels, own)
            if best is None:
                best = new
                continue
            take = ops.logical_and(new.success, ops.logical_not(best.success))
            mask = numerics.per_example(take, new.images)
            best = attack_rounds.AttackResult(
                ops.where(mask, new.images, best.images),
                ops.logical_or(best.success, new.success),
                ops.where(take, new.loss, best.loss),
            )
        return best


def _standard(ball):
    wide = ball["norm"] == "l1"
    return (
        APGD(**ball, restarts=5 if wide else 1, largereps=wide),
        APGDT(**ball, num_targets=5 if wide else 9, largereps=wide),
        fab.FAB(**ball),
        square.Square(**ball),
    )


def _plus(ball):
    return (
        APGD(**ball, restarts=5),
        APGD(**ball, restarts=5, loss="dlr"),
        fab.FAB(**ball, restarts=5, targeted=False),
        square.Square(**ball),
        APGDT(**ball),
        fab.FAB(**ball),
    )


def published_version(version):
    """Returns the version that one for few classes is a part of."""
    return version.partition("_")[0]


def _rand(ball):
    return APGD(**ball), APGD(**ball, loss="dlr")


# The versions for fewer classes, by name; "rand" has nothing targeted.
_FEW_CLASSES = {
    f"{version}_{classes}_classes": classes
    for version in VERSIONS
    for classes in (2, 3)
    if (version, classes) != ("rand", 3)
}


def _defined(members, classes):
    """Returns the members that are defined for so few classes.

    As the authors' program advises: no DLR loss for two classes; for three,
    the untargeted DLR loss in the place of the targeted one.
    """
    found = []
    for member in members:
        if isinstance(member, APGDT):
            member = APGD(
                member.norm,
                member.epsilon,
                restarts=members[0].restarts,
                loss="dlr",
                largereps=member.largereps,
            )
        ratio = getattr(member, "loss", None) == "dlr"
        if ratio and (classes < _DLR_CLASSES or member in found):
            continue  # Version plus has APGD-DLR already.
        found.append(member)
    return tuple(found)


ATTACKS = {attack.name: attack for attack in (APGD, APGDT, AutoAttack)}
