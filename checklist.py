"""Checks that tell a robust model from one that only hides its gradients.

    checks = checklist.run(model, split, epsilon=8/255)
    print(checklist.render(checks))

A robust accuracy is an upper bound that a failed attack leaves too high. Each
check looks for one known way in which attacks fail, on a sample of images,
before (is this a model that gradient attacks can read?) and after (do the
attacks behave as attacks on a differentiable model must?), and names what to
do about it. To pass them all proves nothing; to fail one says that the numbers
of the attacks it concerns are not to be believed.

References:
    - [Carlini et al., 2019](https://arxiv.org/abs/1902.06705), the checklist
    - [Athalye et al., 2018](https://arxiv.org/abs/1802.00420), section 3.1
    - [Croce and Hein, 2020](https://arxiv.org/abs/2003.01690), whose code
      raises flags for randomized models, probabilities and zero gradients
"""

import dataclasses
import functools
import math
import textwrap

import keras
import numpy as np
from keras import ops
from scipy import stats

import attack_backbone
import attack_rounds
import crafting
import losses
import metrics
import numerics
import robust_evaluation
import spsa
import square

_SUBSET = 0xC4EC  # Tells the choice of images from other uses of the seed.
# Below this the attacks find no direction: see `numerics.ascent_direction`.
_VANISHED = 1e-30
_RATE = 0.02  # Of images that a sound model loses to one attack more.
_CALLS = 3  # Of the model, on the same images.
# Sums on an accelerator may come out in another order; AutoAttack's bound.
_ROUNDING = 1e-4
_NOISES = 20  # Random points of the ball an image is tried with.
_SPSA = {"steps": 20, "samples": 64}


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: One of `NAMES`.
        passed: Whether the model passed; None if the check was skipped.
        found: What was measured, a sentence.
        remedy: What to do if it failed (or to have it run).
    """

    name: str
    passed: bool | None
    found: str
    remedy: str


def run(
    model,
    split,
    *,
    norm="linf",
    epsilon,
    num_examples=128,
    batch_size=64,
    seed=0,
    transfer_from=None,
    eot=None,
    steps=(10, 100),
    queries=1000,
    only=None,
    report=None,
):
    """Runs the checks on images drawn from a split.

    The attacks are shared between the checks, and those that must not beat
    the white-box one are run only on the images that it leaves standing. On an
    undefended model all of it costs little more than one PGD.

    Args:
        model: A `keras.Model` from images in [0, 1] to logits; its variables
            are left as they are.
        split: An `image_splits.Split`.
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: The radius the model claims to withstand, above 0, in units of
            the pixel range [0, 1].
        num_examples: How many images are drawn.
        batch_size: Images at a time; changes the speed alone.
        seed: Integer from which all randomness comes.
        transfer_from: Another model of the same classes and images, whose
            adversarial examples are tried on this one; without it the check
            `transfer` is skipped.
        eot: Draws of a stochastic model that are averaged, None for a
            deterministic one; see `robust_evaluation.EvaluationConfig`.
        steps: Two numbers: a few steps of PGD, and many.
        queries: Queries an image of the Square attack.
        only: Names of the checks to run; None for all.
        report: Callable, called with each `Check` once it is done.

    Returns:
        List of `Check`, in the order of `NAMES`.

    Raises:
        ValueError: If a name or a number is out of range, or if the split does
            not fit the model.
    """
    wanted = NAMES if only is None else tuple(only)
    for name in wanted:
        if name not in NAMES:
            raise ValueError(
                f"Unknown check {name!r}. Expected some of {', '.join(NAMES)}."
            )
    attack_rounds.check_ball(norm, epsilon)
    few, many = steps
    if not (epsilon > 0 and num_examples >= 1 and 1 <= few < many):
        raise ValueError(
            "Expected epsilon > 0, num_examples >= 1 and steps (few, many). "
            f"Received: epsilon={epsilon:g}, num_examples={num_examples}, "
            f"steps={steps}."
        )
    robust_evaluation.check_fit(model, split)
    robust_evaluation.check_weights(model)
    order = np.random.default_rng([seed, _SUBSET]).permutation(len(split))
    subject = _Subject(
        model=model,
        split=split,
        indices=np.sort(order[:num_examples]),
        norm=norm,
        epsilon=float(epsilon),
        few=few,
        many=many,
        queries=queries,
        surrogate=transfer_from,
        batch_size=batch_size,
        seed=seed,
        eot=eot,
    )
    checks = []
    for name in NAMES:
        if name in wanted:
            checks.append(_check(name, subject))
            if report is not None:
                report(checks[-1])
    return checks


def render(checks, width=100):
    """Returns the checks as text: a line each, and remedies where they failed.

    Args:
        checks: List of `Check`.
        width: Characters of a line.
    """
    words = {True: "pass", False: "FAIL", None: "skip"}
    column = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        texts = [check.found]
        if check.passed is False:
            texts.append("-> " + check.remedy)
        head = f"{words[check.passed]}  {check.name:{column}}  "
        for text in texts:
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=head,
                subsequent_indent=" " * len(head),
            )
            head = " " * len(head)
    failed = [check.name for check in checks if check.passed is False]
    done = sum(check.passed is not None for check in checks)
    if failed:
        lines.append(
            f"{len(failed)} of {done} checks failed: {', '.join(failed)}. Do "
            "not report a robust accuracy before they are mended."
        )
    else:
        lines.append(
            f"All {done} checks passed: no sign of hidden gradients, which is "
            "no proof that there are none."
        )
    return "\n".join(lines)


# --- The model on the chosen images ------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """How the images fare under an attack.

    Attributes:
        standing: Booleans `(n,)`: still classified rightly.
        gaps: float64 `(n,)`: `metrics.log_odds_against` the label, on the
            attacked images.
    """

    standing: np.ndarray
    gaps: np.ndarray


@dataclasses.dataclass(eq=False)
class _Subject:
    """A model and the images it is checked on; every attack is run once."""

    model: keras.Model
    split: object
    indices: np.ndarray
    norm: str
    epsilon: float
    few: int
    many: int
    queries: int
    surrogate: keras.Model | None
    batch_size: int
    seed: int
    eot: int | None

    def __post_init__(self):
        self.images = np.asarray(self.split.read(self.indices), "float32")
        self.labels = np.asarray(self.split.labels)[self.indices]
        self.logits = crafting.logits(
            self.model, self.images, self.batch_size, self.reading
        )
        self.right = metrics.predictions(self.logits) == self.labels
        self.count = int(self.right.sum())
        self.gaps = metrics.log_odds_against(self.logits, self.labels)
        self._done = {}

    @property
    def reading(self):
        """How the answers of a stochastic model are read."""
        return crafting.Reading(self.eot, seed=self.seed)

    @functools.cached_property
    def calls(self):
        """The logits of several calls, float64 `(calls, n, classes)`.

        Not compiled: what a layer draws in Python would be frozen. The scope
        keeps what it assigns (the state of its noise) away from the model.
        """
        images = ops.convert_to_tensor(self.images[:32], dtype="float32")
        with keras.StatelessScope():
            calls = [
                ops.convert_to_numpy(
                    ops.stop_gradient(self.model(images, training=False))
                )
                for _ in range(_CALLS)
            ]
        return np.stack(calls).astype("float64")

    @property
    def moved(self):
        """Largest distance between two calls, in lengths of the logits.

        Of the images whose logits are finite in each call; 0 without any.
        """
        calls = self.calls[:, ~metrics.nonfinite(self.calls).any(0)]
        if not calls.size:
            return 0.0
        length = np.linalg.norm(calls[0], axis=-1) + 1e-10
        moved = np.linalg.norm(calls - calls[0], axis=-1).max(0) / length
        return float(moved.max())

    @property
    def obstacle(self):
        """Why this model cannot be attacked as it is; empty if it can."""
        if metrics.nonfinite(self.logits).any():
            return "attacks need finite logits (see finite)"
        if robust_evaluation.probabilities(self.logits):
            return "attacks need logits (see logits)"
        if self.eot is None and self.moved > _ROUNDING:
            return "a stochastic model needs eot (see deterministic)"
        if not self.count:
            return f"none of {len(self.labels)} clean images is right"
        return ""

    @property
    def allowed(self):
        """How many images may go the wrong way by chance, at 5%.

        Even on a sound model an attack breaks an image or two in a hundred
        that another leaves; the noise of a stochastic one breaks more of those
        near its decision boundary, each time it is drawn.
        """
        rate = _RATE if self.eot is None else 2 * _RATE
        return max(1, int(stats.binom.ppf(0.95, self.count, rate)))

    @property
    def keep(self):
        """Which iterates of PGD count.

        What fools one draw of a stochastic model need not fool the next, so
        its first success is no better than any other iterate.
        """
        return "first" if self.eot is None else "last"

    @property
    def diameter(self):
        """A radius within which every image reaches every other."""
        size = math.prod(self.images.shape[1:])
        return {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[
            self.norm
        ]

    def attack(self, attack, rows, surrogate=None):
        """Attacks some of the images.

        Args:
            attack: An `attack_rounds.Attack`.
            rows: Booleans `(n,)`: which images.
            surrogate: Optional model that the images are crafted on.

        Returns:
            An `_Outcome` of all the images; the others are as they were.
        """
        standing, gaps = self.right.copy(), self.gaps.copy()
        if rows.any():
            config = robust_evaluation.EvaluationConfig(
                attack=attack,
                indices=tuple(int(i) for i in self.indices[rows]),
                batch_size=self.batch_size,
                seed=self.seed,
                # Calls that differ by rounding alone are one draw.
                eot=self.eot or (1 if self.moved else None),
            )
            _, arrays = robust_evaluation.evaluate(
                self.model,
                self.split,
                config,
                surrogate=surrogate,
                save_images=-1,
            )
            place = np.searchsorted(self.indices, arrays["indices"])
            labels = arrays["labels"]
            standing[place] = arrays["adversarial_predictions"] == labels
            gaps[place] = metrics.log_odds_against(
                arrays["adversarial_logits"], labels
            )
        return _Outcome(standing, gaps)

    def pgd(self, steps, factor=1):
        """PGD within `factor * epsilon`, on all images that are right."""
        if (steps, factor) in self._done:
            return self._done[steps, factor]
        attack = attack_backbone.PGD(
            norm=self.norm,
            epsilon=min(factor * self.epsilon, self.diameter),
            steps=steps,
            keep=self.keep,
        )
        self._done[steps, factor] = self.attack(attack, self.right)
        return self._done[steps, factor]

    @property
    def whites(self):
        """Booleans `(n,)`: what stands under the white-box attacks."""
        return self.pgd(self.few).standing & self.pgd(self.many).standing

    def beyond(self, attack, rows, surrogate=None):
        """Booleans `(n,)`: which of `rows` still stand under an attack."""
        return rows & self.attack(attack, rows, surrogate).standing

    @functools.cached_property
    def peaks(self):
        """Largest entry of each loss's input gradient on the right images.

        Returns:
            Dict of arrays `(count,)`, by the name of the loss; NaN where an
            entry of the gradient is NaN or infinite.
        """
        by_name = {
            "cross_entropy": losses.cross_entropy,
            "margin": losses.margin,
        }
        if self.logits.shape[-1] >= 3:
            by_name["dlr"] = losses.dlr

        def make(logits_fn):
            def peak(loss, images, labels):
                _, grad, flags = numerics.value_and_grad(
                    lambda x: loss(
                        losses.outputs_of(logits_fn(x)).logits, labels
                    ),
                    images,
                    with_flags=True,
                )
                size = numerics.lp_norm(grad, "linf")
                return ops.where(flags, math.nan, size)

            return lambda images, labels: ops.stack(
                [peak(loss, images, labels) for loss in by_name.values()], -1
            )

        fn = crafting.compiled(self.model, "peaks", make, self.reading)
        arrays, size = (self.images, self.labels), self.batch_size
        parts = []
        for start in range(0, self.count, size):
            rows = np.flatnonzero(self.right)[start : start + size]
            padded = crafting.pad(rows, size)
            found = fn(*(array[padded] for array in arrays))
            parts.append(ops.convert_to_numpy(found)[: len(rows)])
        found = np.concatenate(parts)
        return dict(zip(by_name, found.T, strict=True))


# --- The checks --------------------------------------------------------------


def _check(name, subject):
    """Runs one check, if the model is one that it can be run on."""
    function, remedy = _CHECKS[name]
    if name not in _PRELIMINARY and subject.obstacle:
        return Check(name, None, subject.obstacle, remedy)
    passed, found = function(subject)
    return Check(name, passed, found, remedy)


def _finite(subject):
    """Looks at clean images and at random points of the ball, in one pass."""
    shape = subject.images.shape[1:]
    keys = numerics.example_keys(subject.seed, subject.indices)
    noise = numerics.random_in_ball(
        keys, shape, min(subject.epsilon, subject.diameter), subject.norm
    )
    moved = attack_rounds.perturbed(subject.images, noise)
    counts = [
        int(metrics.nonfinite(logits).sum())
        for logits in (
            subject.logits,
            crafting.logits(
                subject.model,
                ops.convert_to_numpy(moved),
                subject.batch_size,
                subject.reading,
            ),
        )
    ]
    found = (
        f"{counts[0]} of {len(subject.labels)} clean images and {counts[1]} "
        "random points of their balls have NaN or infinite logits"
    )
    return not any(counts), found


def _logits(subject):
    logits = subject.logits
    logits = logits[~metrics.nonfinite(logits)]
    if not len(logits):
        return None, "no image has finite outputs (see finite)"
    found = f"outputs lie between {logits.min():.3g} and {logits.max():.3g}"
    kind = robust_evaluation.probabilities(logits)
    if kind:
        return False, f"{found}: {kind}"
    return True, f"{found}: no probabilities"


def _deterministic(subject):
    calls = subject.calls
    predicted = metrics.predictions(calls)
    turned = (predicted != predicted[0]).any(0).sum()
    found = (
        f"{_CALLS} calls on the same {calls.shape[1]} images: logits differ by "
        f"up to {subject.moved:.2g} of their length, {turned} predictions "
        "change"
    )
    if subject.moved <= _ROUNDING:
        return True, found
    if subject.eot is not None:
        return True, f"{found}; declared: the mean of {subject.eot} draws"
    return False, found


def _zero_gradients(subject):
    counts = {
        name: int(np.sum(~(peaks > _VANISHED)))
        for name, peaks in subject.peaks.items()
    }
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    found = (
        f"images of {subject.count} whose input gradient is zero or not "
        f"finite: {listed}"
    )
    return max(counts.values()) <= subject.allowed, found


def _logit_scale(subject):
    sure = -subject.gaps[subject.right]
    lost = sure > robust_evaluation.UNDERFLOW
    lost &= subject.peaks["margin"] > _VANISHED
    count = int(np.sum(lost))
    found = (
        f"{count} of {subject.count} images are so sure (log-odds of "
        f"{np.median(sure):.3g} nats at the median) that float32 takes the "
        "gradient of the softmax for zero, while the margin has one"
    )
    return count <= subject.allowed, found


def _more_steps(subject):
    few, many = subject.pgd(subject.few), subject.pgd(subject.many)
    found = _rates(
        subject,
        (f"PGD-{subject.few}", few.standing),
        (f"PGD-{subject.many}", many.standing),
    )
    if many.standing.sum() - few.standing.sum() > subject.allowed:
        return False, found
    both = few.standing & many.standing
    if both.sum() > subject.allowed:
        gain = (few.gaps - subject.gaps)[both].mean()
        more = (many.gaps - subject.gaps)[both].mean()
        found += (
            f"; on the {both.sum()} left the log-odds move by {gain:.3g} and "
            f"{more:.3g} nats"
        )
        return bool(more > 0 and more >= 0.95 * gain), found
    return True, found


def _larger_epsilon(subject):
    factors = [1] + [
        factor
        for factor in (2, 4)
        if factor * subject.epsilon <= subject.diameter
    ]
    if len(factors) == 1:
        return None, "twice the radius is more than all images are apart"
    outcomes = [subject.pgd(subject.many, factor) for factor in factors]
    found = _rates(
        subject,
        *(
            (f"epsilon {factor * subject.epsilon:.3g}", outcome.standing)
            for factor, outcome in zip(factors, outcomes, strict=True)
        ),
    )
    for small, large in zip(outcomes, outcomes[1:], strict=False):
        if large.standing.sum() - small.standing.sum() > subject.allowed:
            return False, found
        both = small.standing & large.standing
        if both.sum() > subject.allowed:
            rise = (large.gaps - small.gaps)[both].mean()
            if not rise > 0:
                return False, (
                    f"{found}; the log-odds of the {both.sum()} left do not "
                    "rise with the radius"
                )
    return True, found


def _unbounded_epsilon(subject):
    # From the image itself: noise over all of the box would break anything,
    # with or without a gradient.
    attack = attack_backbone.PGD(
        norm=subject.norm,
        epsilon=subject.diameter,
        steps=subject.many,
        random_start=0.0,
        keep=subject.keep,
    )
    standing = subject.attack(attack, subject.right).standing
    found = _rates(subject, (f"epsilon {subject.diameter:.4g}", standing))
    return bool(standing.sum() <= max(1, 0.01 * subject.count)), found


def _black_box(subject):
    whites = subject.whites
    left = subject.beyond(
        square.Square(
            norm=subject.norm,
            epsilon=subject.epsilon,
            n_queries=subject.queries,
        ),
        whites,
    )
    names = "Square"
    if left.any() and (whites & ~left).sum() <= subject.allowed:
        names = "Square or SPSA"
        climb = spsa.SPSA(
            norm=subject.norm, epsilon=subject.epsilon, keep="first", **_SPSA
        )
        left = subject.beyond(climb, left)
    return _beats(subject, whites, left, f"without gradients ({names})")


def _transfer(subject):
    if subject.surrogate is None:
        return None, "no other model was named to transfer from"
    whites = subject.whites
    attack = attack_backbone.MIM(
        norm=subject.norm, epsilon=subject.epsilon, steps=20, keep="last"
    )
    left = subject.beyond(attack, whites, subject.surrogate)
    return _beats(subject, whites, left, "crafted on the other model")


def _single_step(subject):
    whites = subject.whites
    attack = attack_backbone.FGSM(norm=subject.norm, epsilon=subject.epsilon)
    left = subject.beyond(attack, whites)
    return _beats(subject, whites, left, "with one step (FGSM)")


def _random_noise(subject):
    whites = subject.whites
    attack = attack_backbone.PGD(
        norm=subject.norm,
        epsilon=subject.epsilon,
        steps=0,
        restarts=_NOISES,
        keep="first",
    )
    left = subject.beyond(attack, whites)
    return _beats(subject, whites, left, f"in {_NOISES} draws of noise")


def _beats(subject, before, after, how):
    """Judges an attack by what it breaks beyond the white-box ones."""
    broken = int((before & ~after).sum())
    found = (
        f"{broken} of the {before.sum()} images that stand under PGD fall "
        f"{how}; {subject.allowed} may by chance"
    )
    if not before.any():
        found = "PGD leaves no image standing that could fall"
    return broken <= subject.allowed, found


def _rates(subject, *outcomes):
    """Robust accuracies, of the images that are right when clean."""
    listed = ", ".join(
        f"{name}: {standing.sum() / subject.count:.1%}"
        for name, standing in outcomes
    )
    return f"still right of {subject.count} images: {listed}"


_MASKED = (
    "Gradients are masked: find the layer that hides them (see zero_gradients "
    "and logit_scale), attack through a differentiable stand-in for it (BPDA), "
    "and report the worst case over black-box and white-box attacks."
)
# Name: the check, a callable from a `_Subject` to (passed, found); the remedy.
_CHECKS = {
    "finite": (
        _finite,
        "Find the operation that overflows or divides by zero. An answer "
        "that is not finite counts as misclassified.",
    ),
    "logits": (
        _logits,
        "Give the attacks logits: take the softmax off the model's last layer.",
    ),
    "deterministic": (
        _deterministic,
        "Declare the model stochastic and attack the mean over its noise: "
        "--eot=20, or the `rand` version of AutoAttack.",
    ),
    "zero_gradients": (
        _zero_gradients,
        "Some layer has no gradient (rounding, a threshold, an argmax) or "
        "saturates. Attack through a differentiable stand-in (BPDA), or "
        "without gradients (Square, SPSA). If only the cross-entropy is zero, "
        "use the loss dlr or margin.",
    ),
    "logit_scale": (
        _logit_scale,
        "The attacks here follow the log-odds and see through the scale. For "
        "other programs divide the logits by their scale, or use a loss that "
        "it does not touch (dlr or margin).",
    ),
    "more_steps": (
        _more_steps,
        "PGD does not converge: try another step size, momentum or restarts, "
        "or AutoAttack, whose step size adapts; average a stochastic model's "
        "gradients (--eot=20).",
    ),
    "larger_epsilon": (
        _larger_epsilon,
        "A larger ball holds the smaller one, so the attack must be at "
        "fault: more steps, restarts, or another loss (dlr, margin).",
    ),
    "unbounded_epsilon": (
        _unbounded_epsilon,
        "Within this radius every image can become any other. " + _MASKED,
    ),
    "black_box": (_black_box, _MASKED),
    "transfer": (_transfer, _MASKED),
    "single_step": (
        _single_step,
        "One step must not beat many: the loss is curved so that PGD stops "
        "early. Use a larger step, restarts or AutoAttack. " + _MASKED,
    ),
    "random_noise": (
        _random_noise,
        "Noise must not beat gradients. " + _MASKED,
    ),
}
NAMES = tuple(_CHECKS)
_PRELIMINARY = ("finite", "logits", "deterministic")
