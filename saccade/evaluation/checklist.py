"""Checks for gradient masking: is a model robust, or do attacks on it fail?

    checks = run(model, split, epsilon=8/255)
    print(render(checks))

An attack gives an upper bound of the robust accuracy, which is too high if the
attack fails. Each check tests one known cause of failure on a sample of images.
The first checks ask whether gradient attacks can be applied to the model at
all, the others whether the attacks behave as they must on a differentiable
model. Each check suggests a remedy. Passing all of them does not prove that a
model is robust. If one fails, the results of the attacks that it concerns are
not reliable.

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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops
from scipy import stats

from saccade.attacks import base as attack_base
from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import losses, runner, spsa, square
from saccade.attacks.base import LogitsFn
from saccade.core import gradients, lp, metrics, randomness
from saccade.core import names as known_names
from saccade.core.arrays import Tensor
from saccade.data import splits as image_splits
from saccade.evaluation import checks as evaluation_checks
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import evaluate as robust_evaluation
from saccade.evaluation import tally as evaluation_tally

# Separates the random choice of images from other uses of the seed.
_SUBSET_STREAM = 0xC4EC
# Gradients below this count as zero: see `lp.ascent_direction`.
_ZERO_GRADIENT = 1e-30
# Fraction of images that one more attack misclassifies on a sound model.
_Finding: TypeAlias = tuple[bool | None, str]  # Whether it passed, and why.
_CHANCE_RATE = 0.02
_CALLS = 3  # Number of calls of the model on the same images.
# An accelerator may compute sums in another order; AutoAttack's tolerance.
_ROUNDING = 1e-4
_NOISE_DRAWS = 20  # Number of random perturbations of each image.
_SPSA_SETTINGS: dict[str, Any] = {"steps": 20, "samples": 64}


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: One of `NAMES`.
        passed: Whether the model passed; None if the check was skipped.
        found: The measurement, or why the check was skipped; one sentence.
        remedy: What to do if the check failed.
    """

    name: str
    passed: bool | None
    found: str
    remedy: str


def run(
    model: keras.Model,
    split: image_splits.Split,
    *,
    norm: str = "linf",
    epsilon: float,
    num_examples: int = 128,
    batch_size: int = 64,
    seed: int = 0,
    transfer_from: keras.Model | None = None,
    eot: int | None = None,
    steps: tuple[int, int] = (10, 100),
    queries: int = 1000,
    only: Iterable[str] | None = None,
    report: Callable[[Check], Any] | None = None,
) -> list[Check]:
    """Runs the checks on images drawn from a split.

    Checks share the results of the white-box attack (PGD). Attacks that must
    not be stronger are run only on the images that remain correct under PGD,
    so that all checks of an undefended model cost little more than one PGD.

    Args:
        model: A `keras.Model` from images in [0, 1] to logits; its variables
            do not change.
        split: An `image_splits.Split`.
        norm: One of `"l1"`, `"l2"`, `"linf"`.
        epsilon: The radius at which the model is claimed to be robust, above
            0, for pixels in [0, 1].
        num_examples: Number of images to draw.
        batch_size: Number of images at a time; affects only the speed.
        seed: Integer from which all randomness is derived.
        transfer_from: Another model of the same classes and images, whose
            adversarial examples are tried on this one. Without it the check
            `transfer` is skipped.
        eot: Number of draws of a stochastic model to average, None for a
            deterministic one; see `evaluation_config.EvaluationConfig`.
        steps: Two numbers of PGD steps: few and many.
        queries: Number of queries per image of the Square attack.
        only: Names of the checks to run; None for all.
        report: Callable, called with each finished `Check`.

    Returns:
        List of `Check`, in the order of `NAMES`.

    Raises:
        ValueError: If a name or a number is out of range, or if the split does
            not fit the model.
    """
    selected = NAMES if only is None else tuple(only)
    for name in selected:
        known_names.require("check", name, NAMES)
    attack_base.check_threat_model(norm, epsilon)
    few, many = steps
    if not (epsilon > 0 and num_examples >= 1 and 1 <= few < many):
        raise ValueError(
            "Expected epsilon > 0, num_examples >= 1 and steps (few, many). "
            f"Received: epsilon={epsilon:g}, num_examples={num_examples}, "
            f"steps={steps}."
        )
    evaluation_checks.check_fit(model, split)
    evaluation_checks.check_weights(model)
    order = np.random.default_rng([seed, _SUBSET_STREAM]).permutation(
        len(split)
    )
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
        if name in selected:
            checks.append(_run_check(name, subject))
            if report is not None:
                report(checks[-1])
    return checks


def render(checks: Sequence[Check], width: int = 100) -> str:
    """Formats the checks: one line each, and the remedies of failed ones.

    Args:
        checks: List of `Check`.
        width: Largest number of characters in a line.
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
            "not report a robust accuracy before this is fixed."
        )
    else:
        lines.append(
            f"All {done} checks passed: no sign of gradient masking. This does "
            "not prove that there is none."
        )
    return "\n".join(lines)


# --- The model on the chosen images ------------------------------------------


@dataclasses.dataclass(frozen=True)
class _AttackOutcome:
    """The result of an attack on the images of a `_Subject`.

    Attributes:
        correct: Booleans `(n,)`: which images are classified correctly.
        gaps: float64 `(n,)`: `metrics.log_odds_against` the label, on the
            adversarial images.
    """

    correct: np.ndarray
    gaps: np.ndarray


@dataclasses.dataclass(eq=False)
class _Subject:
    """A model and the images on which it is checked; each PGD runs once."""

    model: keras.Model
    split: image_splits.Split
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

    def __post_init__(self) -> None:
        self.images = np.asarray(self.split.read(self.indices), "float32")
        self.labels = np.asarray(self.split.labels)[self.indices]
        self.logits = runner.logits(
            self.model, self.images, self.batch_size, self.reading
        )
        # Images that are correct without an attack, and their number.
        self.clean_correct = metrics.predictions(self.logits) == self.labels
        self.count = int(self.clean_correct.sum())
        self.gaps = metrics.log_odds_against(self.logits, self.labels)
        self._pgd_outcomes: dict[tuple[int, float], _AttackOutcome] = {}

    @property
    def reading(self) -> runner.Reading:
        """How logits of a stochastic model are averaged."""
        return runner.Reading(self.eot, seed=self.seed)

    @functools.cached_property
    def calls(self) -> np.ndarray:
        """The logits of several calls, float64 `(calls, n, classes)`.

        The calls are not compiled, because compilation would freeze random
        numbers that a layer draws in Python. The stateless scope keeps the
        calls from changing the model's variables.
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
    def call_difference(self) -> float:
        """Largest difference between two calls relative to the logits' norm.

        Only images whose logits are finite in each call count; 0 if there are
        none.
        """
        calls = self.calls[:, ~metrics.nonfinite(self.calls).any(0)]
        if not calls.size:
            return 0.0
        norms = np.linalg.norm(calls[0], axis=-1) + 1e-10
        differences = np.linalg.norm(calls - calls[0], axis=-1).max(0)
        return float((differences / norms).max())

    @property
    def obstacle(self) -> str:
        """Why this model cannot be attacked; an empty string if it can."""
        if metrics.nonfinite(self.logits).any():
            return "attacks need finite logits (see finite)"
        if evaluation_checks.probabilities(self.logits):
            return "attacks need logits (see logits)"
        if self.eot is None and self.call_difference > _ROUNDING:
            return "a stochastic model needs eot (see deterministic)"
        if not self.count:
            return f"none of {len(self.labels)} clean images is correct"
        return ""

    @property
    def tolerance(self) -> int:
        """Number of images that may contradict a check by chance.

        Even on a sound model an attack misclassifies an image or two in a
        hundred on which a stronger attack fails. Each new noise of a
        stochastic model changes the prediction of further images near the
        decision boundary. This is the 95% quantile of a binomial distribution.
        """
        rate = _CHANCE_RATE if self.eot is None else 2 * _CHANCE_RATE
        return max(1, int(stats.binom.ppf(0.95, self.count, rate)))

    @property
    def keep(self) -> str:
        """Which iterate PGD returns.

        An iterate that is misclassified in one draw of a stochastic model may
        be correct in the next, so the first success means little there.
        """
        return "first" if self.eot is None else "last"

    @property
    def diameter(self) -> float:
        """The radius within which every image can become any other image."""
        size = math.prod(self.images.shape[1:])
        return {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[
            self.norm
        ]

    def attack(
        self,
        attack: attack_base.Attack,
        rows: np.ndarray,
        surrogate: keras.Model | None = None,
    ) -> _AttackOutcome:
        """Attacks some of the images.

        Args:
            attack: A `base.Attack`.
            rows: Booleans `(n,)`: which images to attack.
            surrogate: Optional model on which the attack is made.

        Returns:
            An `_AttackOutcome` of all images; images that are not attacked
            keep their clean result.
        """
        correct, gaps = self.clean_correct.copy(), self.gaps.copy()
        if rows.any():
            config = evaluation_config.EvaluationConfig(
                attack=attack,
                indices=tuple(int(i) for i in self.indices[rows]),
                batch_size=self.batch_size,
                seed=self.seed,
                # If calls differ only by rounding, a single draw is enough.
                eot=self.eot or (1 if self.call_difference else None),
            )
            _, arrays = robust_evaluation.evaluate(
                self.model,
                self.split,
                config,
                surrogate=surrogate,
                save_images=-1,
            )
            positions = np.searchsorted(self.indices, arrays["indices"])
            labels = arrays["labels"]
            correct[positions] = arrays["adversarial_predictions"] == labels
            gaps[positions] = metrics.log_odds_against(
                arrays["adversarial_logits"], labels
            )
        return _AttackOutcome(correct, gaps)

    def pgd(self, steps: int, factor: float = 1) -> _AttackOutcome:
        """PGD with radius `factor * epsilon` on all correct clean images."""
        if (steps, factor) in self._pgd_outcomes:
            return self._pgd_outcomes[steps, factor]
        attack = gradient_attacks.PGD(
            norm=self.norm,
            epsilon=min(factor * self.epsilon, self.diameter),
            steps=steps,
            keep=self.keep,
        )
        self._pgd_outcomes[steps, factor] = self.attack(
            attack, self.clean_correct
        )
        return self._pgd_outcomes[steps, factor]

    @property
    def white_box_correct(self) -> np.ndarray:
        """Booleans `(n,)`: images correct under both white-box attacks."""
        return self.pgd(self.few).correct & self.pgd(self.many).correct

    def still_correct(
        self,
        attack: attack_base.Attack,
        rows: np.ndarray,
        surrogate: keras.Model | None = None,
    ) -> np.ndarray:
        """Booleans `(n,)`: which of `rows` are correct under an attack."""
        return rows & self.attack(attack, rows, surrogate).correct

    @functools.cached_property
    def largest_gradients(self) -> dict[str, np.ndarray]:
        """Largest entry of each loss's input gradient on correct images.

        Returns:
            Dict of arrays `(count,)`, by the name of the loss; NaN where an
            entry of the gradient is NaN or infinite.
        """
        by_name: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "cross_entropy": losses.cross_entropy,
            "margin": losses.margin,
        }
        if self.logits.shape[-1] >= 3:
            by_name["dlr"] = losses.dlr

        def make(logits_fn: LogitsFn) -> Callable[..., Tensor]:
            def largest_gradient(
                loss: Callable[[Tensor, Tensor], Tensor],
                images: Tensor,
                labels: Tensor,
            ) -> Tensor:
                _, grad, flags = gradients.value_and_grad(
                    lambda x: loss(
                        losses.outputs_of(logits_fn(x)).logits, labels
                    ),
                    images,
                    with_flags=True,
                )
                size = lp.lp_norm(grad, "linf")
                return ops.where(flags, math.nan, size)

            return lambda images, labels: ops.stack(
                [
                    largest_gradient(loss, images, labels)
                    for loss in by_name.values()
                ],
                -1,
            )

        fn = runner.compiled(
            self.model, "largest_gradients", make, self.reading
        )
        arrays, size = (self.images, self.labels), self.batch_size
        parts = []
        for start in range(0, self.count, size):
            rows = np.flatnonzero(self.clean_correct)[start : start + size]
            padded = runner.pad(rows, size)
            found = fn(*(array[padded] for array in arrays))
            parts.append(ops.convert_to_numpy(found)[: len(rows)])
        found = np.concatenate(parts)
        return dict(zip(by_name, found.T, strict=True))


# --- The checks --------------------------------------------------------------


def _run_check(name: str, subject: _Subject) -> Check:
    """Runs one check; skips it if the model cannot be attacked."""
    function, remedy = _CHECKS[name]
    if name not in _PRELIMINARY and subject.obstacle:
        return Check(name, None, subject.obstacle, remedy)
    passed, found = function(subject)
    return Check(name, passed, found, remedy)


def _finite(subject: _Subject) -> _Finding:
    """Checks the logits of clean and of randomly perturbed images."""
    shape = subject.images.shape[1:]
    keys = randomness.example_keys(subject.seed, subject.indices)
    noise = lp.random_in_ball(
        keys, shape, min(subject.epsilon, subject.diameter), subject.norm
    )
    noisy = attack_base.perturbed(subject.images, noise)
    counts = [
        int(metrics.nonfinite(logits).sum())
        for logits in (
            subject.logits,
            runner.logits(
                subject.model,
                ops.convert_to_numpy(noisy),
                subject.batch_size,
                subject.reading,
            ),
        )
    ]
    found = (
        f"{counts[0]} of {len(subject.labels)} clean images and {counts[1]} "
        "randomly perturbed ones have NaN or infinite logits"
    )
    return not any(counts), found


def _logits(subject: _Subject) -> _Finding:
    logits = subject.logits
    logits = logits[~metrics.nonfinite(logits)]
    if not len(logits):
        return None, "no image has finite outputs (see finite)"
    found = f"outputs lie between {logits.min():.3g} and {logits.max():.3g}"
    kind = evaluation_checks.probabilities(logits)
    if kind:
        return False, f"{found}: {kind}"
    return True, f"{found}: they are not probabilities"


def _deterministic(subject: _Subject) -> _Finding:
    calls = subject.calls
    predicted = metrics.predictions(calls)
    changed = (predicted != predicted[0]).any(0).sum()
    found = (
        f"{_CALLS} calls on the same {calls.shape[1]} images: logits differ by "
        f"up to {subject.call_difference:.2g} of their norm, {changed} "
        "predictions change"
    )
    if subject.call_difference <= _ROUNDING:
        return True, found
    if subject.eot is not None:
        return True, f"{found}; attacks use the mean of {subject.eot} draws"
    return False, found


def _zero_gradients(subject: _Subject) -> _Finding:
    counts = {
        name: int(np.sum(~(largest_gradients > _ZERO_GRADIENT)))
        for name, largest_gradients in subject.largest_gradients.items()
    }
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    found = (
        f"images (of {subject.count}) whose input gradient is zero or not "
        f"finite: {listed}"
    )
    return max(counts.values()) <= subject.tolerance, found


def _logit_scale(subject: _Subject) -> _Finding:
    log_odds = -subject.gaps[subject.clean_correct]
    underflow = log_odds > evaluation_tally.UNDERFLOW
    underflow &= subject.largest_gradients["margin"] > _ZERO_GRADIENT
    count = int(np.sum(underflow))
    found = (
        f"{count} of {subject.count} images have such large log-odds (median "
        f"{np.median(log_odds):.3g} nats) that the gradient of the softmax is "
        "zero in float32, while that of the margin is not"
    )
    return count <= subject.tolerance, found


def _more_steps(subject: _Subject) -> _Finding:
    few, many = subject.pgd(subject.few), subject.pgd(subject.many)
    found = _rates(
        subject,
        (f"PGD-{subject.few}", few.correct),
        (f"PGD-{subject.many}", many.correct),
    )
    if many.correct.sum() - few.correct.sum() > subject.tolerance:
        return False, found
    both = few.correct & many.correct
    if both.sum() > subject.tolerance:
        gain = (few.gaps - subject.gaps)[both].mean()
        more = (many.gaps - subject.gaps)[both].mean()
        found += (
            f"; on the {both.sum()} robust images the log-odds change by "
            f"{gain:.3g} and {more:.3g} nats"
        )
        return bool(more > 0 and more >= 0.95 * gain), found
    return True, found


def _larger_epsilon(subject: _Subject) -> _Finding:
    factors = [1] + [
        factor
        for factor in (2, 4)
        if factor * subject.epsilon <= subject.diameter
    ]
    if len(factors) == 1:
        return None, "twice the radius exceeds the distance of any two images"
    outcomes = [subject.pgd(subject.many, factor) for factor in factors]
    found = _rates(
        subject,
        *(
            (f"epsilon {factor * subject.epsilon:.3g}", outcome.correct)
            for factor, outcome in zip(factors, outcomes, strict=True)
        ),
    )
    for small, large in zip(outcomes, outcomes[1:], strict=False):
        if large.correct.sum() - small.correct.sum() > subject.tolerance:
            return False, found
        both = small.correct & large.correct
        if both.sum() > subject.tolerance:
            rise = (large.gaps - small.gaps)[both].mean()
            if not rise > 0:
                return False, (
                    f"{found}; the log-odds of the {both.sum()} robust images "
                    "against the label do not rise with the radius"
                )
    return True, found


def _unbounded_epsilon(subject: _Subject) -> _Finding:
    # It starts at the image: a random start anywhere in [0, 1] would be
    # misclassified even without a gradient.
    attack = gradient_attacks.PGD(
        norm=subject.norm,
        epsilon=subject.diameter,
        steps=subject.many,
        random_start=0.0,
        keep=subject.keep,
    )
    correct = subject.attack(attack, subject.clean_correct).correct
    found = _rates(subject, (f"epsilon {subject.diameter:.4g}", correct))
    return bool(correct.sum() <= max(1, 0.01 * subject.count)), found


def _black_box(subject: _Subject) -> _Finding:
    white_box_correct = subject.white_box_correct
    remaining = subject.still_correct(
        square.Square(
            norm=subject.norm,
            epsilon=subject.epsilon,
            n_queries=subject.queries,
        ),
        white_box_correct,
    )
    names = "Square"
    few_broken = (white_box_correct & ~remaining).sum() <= subject.tolerance
    if remaining.any() and few_broken:
        names = "Square or SPSA"
        attack = spsa.SPSA(
            norm=subject.norm,
            epsilon=subject.epsilon,
            keep="first",
            **_SPSA_SETTINGS,
        )
        remaining = subject.still_correct(attack, remaining)
    return _compare_with_white_box(
        subject, white_box_correct, remaining, f"without gradients ({names})"
    )


def _transfer(subject: _Subject) -> _Finding:
    if subject.surrogate is None:
        return None, "no other model was given to transfer from"
    white_box_correct = subject.white_box_correct
    attack = gradient_attacks.MIM(
        norm=subject.norm, epsilon=subject.epsilon, steps=20, keep="last"
    )
    remaining = subject.still_correct(
        attack, white_box_correct, subject.surrogate
    )
    return _compare_with_white_box(
        subject, white_box_correct, remaining, "crafted on the other model"
    )


def _single_step(subject: _Subject) -> _Finding:
    white_box_correct = subject.white_box_correct
    attack = gradient_attacks.FGSM(norm=subject.norm, epsilon=subject.epsilon)
    remaining = subject.still_correct(attack, white_box_correct)
    return _compare_with_white_box(
        subject, white_box_correct, remaining, "with one step (FGSM)"
    )


def _random_noise(subject: _Subject) -> _Finding:
    white_box_correct = subject.white_box_correct
    attack = gradient_attacks.PGD(
        norm=subject.norm,
        epsilon=subject.epsilon,
        steps=0,
        restarts=_NOISE_DRAWS,
        keep="first",
    )
    remaining = subject.still_correct(attack, white_box_correct)
    how = f"by {_NOISE_DRAWS} draws of random noise"
    return _compare_with_white_box(subject, white_box_correct, remaining, how)


def _compare_with_white_box(
    subject: _Subject, before: np.ndarray, after: np.ndarray, how: str
) -> _Finding:
    """Counts the images that an attack breaks and the white-box ones do not.

    Args:
        subject: The `_Subject`.
        before: Booleans `(n,)`: images correct under the white-box attacks.
        after: Booleans `(n,)`: those still correct under the other attack.
        how: Description of the other attack.

    Returns:
        Tuple (passed, found) of a check.
    """
    broken = int((before & ~after).sum())
    found = (
        f"{broken} of the {before.sum()} images robust under PGD are "
        f"misclassified {how}; {subject.tolerance} may be by chance"
    )
    if not before.any():
        found = "PGD leaves no image correct"
    return broken <= subject.tolerance, found


def _rates(subject: _Subject, *outcomes: tuple[str, np.ndarray]) -> str:
    """Formats robust accuracies over the images that are correct when clean."""
    listed = ", ".join(
        f"{name}: {correct.sum() / subject.count:.1%}"
        for name, correct in outcomes
    )
    return f"still correct of {subject.count} images: {listed}"


_MASKED = (
    "Gradients are masked: find the layer that hides them (see zero_gradients "
    "and logit_scale), attack through a differentiable approximation of it "
    "(BPDA), and report the worst case over black-box and white-box attacks."
)
# For each name, a callable from a `_Subject` to (passed, found), and a remedy.
_CHECKS = {
    "finite": (
        _finite,
        "Find the operation that overflows or divides by zero. Images with "
        "non-finite logits count as misclassified.",
    ),
    "logits": (
        _logits,
        "Attacks need logits: remove the softmax from the model's last layer.",
    ),
    "deterministic": (
        _deterministic,
        "Attack the mean over the noise of a stochastic model: --eot=20, or "
        "the `rand` version of AutoAttack.",
    ),
    "zero_gradients": (
        _zero_gradients,
        "Some layer has no gradient (rounding, a threshold, an argmax) or "
        "saturates. Attack through a differentiable approximation (BPDA), or "
        "without gradients (Square, SPSA). If only the gradient of the "
        "cross-entropy is zero, use the loss dlr or margin.",
    ),
    "logit_scale": (
        _logit_scale,
        "The attacks here use the log-odds and do not depend on the scale. For "
        "other programs divide the logits by their scale, or use a loss that "
        "does not underflow (dlr or margin).",
    ),
    "more_steps": (
        _more_steps,
        "PGD does not converge: try another step size, momentum or restarts, "
        "or AutoAttack, whose step size adapts; average a stochastic model's "
        "gradients (--eot=20).",
    ),
    "larger_epsilon": (
        _larger_epsilon,
        "A larger radius allows every perturbation of a smaller one, so the "
        "attack fails: use more steps, restarts, or another loss (dlr, "
        "margin).",
    ),
    "unbounded_epsilon": (
        _unbounded_epsilon,
        "Within this radius every image can become any other. " + _MASKED,
    ),
    "black_box": (_black_box, _MASKED),
    "transfer": (_transfer, _MASKED),
    "single_step": (
        _single_step,
        "One step must not be stronger than many: PGD gets stuck in a local "
        "maximum. Use a larger step, restarts or AutoAttack. " + _MASKED,
    ),
    "random_noise": (
        _random_noise,
        "Random noise must not be stronger than gradients. " + _MASKED,
    ),
}
NAMES = tuple(_CHECKS)
_PRELIMINARY = ("finite", "logits", "deterministic")
