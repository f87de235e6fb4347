"""The evaluations of published papers, by name.

A protocol is a list of attacks and a table. `PROTOCOLS[name].evaluations(...)`
returns the evaluations to run. `.table(records, ...)` puts the records into
the layout of the paper's table, followed by the published numbers if the data
set is the same. The module `published` holds the published tables and formats
tables.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import keras

from saccade.attacks import autoattack, spsa
from saccade.attacks import base as attack_base
from saccade.attacks import gradient as gradient_attacks
from saccade.core import metrics, ratios
from saccade.core.run_folder import Record
from saccade.evaluation import config as evaluation_config
from saccade.evaluation import published, tables

_S3TA_URL = "https://arxiv.org/abs/1912.02184"
_Radii: TypeAlias = float | Sequence[float]
# Records that agree in every setting of the attack and in the target belong to
# the same cell of a table. A record must have these keys; others count if it
# has them.
_REQUIRED_KEYS = ("attack", "norm", "epsilon", "target")
_ONLY_SPEED = ("chunk",)  # Settings that affect only the speed.
# The usual radii of the RobustBench leaderboard, by norm: for images of up to
# 64 pixels, for larger ones, and for grey ones (digits, Madry et al.).
_DEFAULT_RADII = {
    "linf": (8 / 255, 4 / 255, 0.3),
    "l2": (0.5, 3.0, None),
    "l1": (12.0, None, None),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A named set of evaluations from a paper.

    Attributes:
        name: The name.
        summary: One line that says what it runs.
        reference: Where it is published.
        make: Callable (norm, epsilon, **settings of a scan) that returns an
            attack.
        layouts: The paper's tables. Small images of other data sets use the
            first one, images above 64 pixels the last one.
        target: See `evaluation_config.EvaluationConfig`.
        num_examples: Number of images in the paper, None for all.
        remarks: Settings that the paper does not name, and our choice.
    """

    name: str
    summary: str
    reference: str
    make: Callable[..., attack_base.Attack]
    layouts: tuple[published.Layout, ...]
    target: str = "none"
    num_examples: int | None = None
    remarks: tuple[str, ...] = ()

    def evaluations(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        norm: str | None = None,
        epsilon: _Radii | None = None,
        **common: Any,
    ) -> tuple[evaluation_config.EvaluationConfig, ...]:
        """Returns the evaluations to run.

        Args:
            image_shape: Tuple (height, width, channels) of the images.
            num_classes: Number of classes of the model.
            norm: Another norm than the published one; it needs `epsilon`.
            epsilon: A radius, or several, in place of the published ones;
                step sizes scale in proportion.
            **common: Further arguments of `EvaluationConfig`, the same for
                all evaluations. Without `num_examples` and `indices`, the
                paper's number of images is used.

        Returns:
            Tuple of `evaluation_config.EvaluationConfig`.

        Raises:
            ValueError: If a norm has no published radius, or a value is
                invalid.
        """
        layout = self.layouts[0]
        if max(image_shape[:2]) > 64:
            layout = self.layouts[-1]
        norm = norm or layout.norm
        radii = self._radii(layout, image_shape, norm, epsilon)
        if common.get("num_examples") is None and not common.get("indices"):
            common["num_examples"] = self.num_examples
        attacks = [
            self._attack(norm, radius, settings, common.get("eot"))
            for radius in radii
            for _, settings in layout.scans
        ]
        return tuple(
            evaluation_config.EvaluationConfig(
                attack=attack, target=self.target, **common
            ).fit(num_classes)
            for attack in attacks
        )

    def _attack(
        self,
        norm: str,
        epsilon: float,
        settings: Mapping[str, Any],
        eot: int | None,
    ) -> attack_base.Attack:
        attack = self.make(norm, epsilon, **settings)
        if self.name == "autoattack" and (eot or 1) > 1:
            ensemble = cast(autoattack.AutoAttack, attack)
            return dataclasses.replace(ensemble, version="rand")
        if eot is not None and isinstance(attack, gradient_attacks.BIM):
            # In a single draw an iterate may be misclassified by chance.
            return dataclasses.replace(attack, keep="last")
        return attack

    def _radii(
        self,
        layout: published.Layout,
        image_shape: Sequence[int],
        norm: str,
        epsilon: _Radii | None,
    ) -> tuple[float, ...]:
        if epsilon is not None:
            return _unique_radii(epsilon)
        if layout.radii and norm == layout.norm:
            return layout.radii
        radius = None
        if not layout.radii:
            column = 1 if max(image_shape[:2]) > 64 else 0
            column = 2 if image_shape[-1] == 1 else column
            radius = _DEFAULT_RADII[norm][column]
        if radius is None:
            raise ValueError(
                f"The protocol {self.name} has no default radius in the norm "
                f"{norm} for images of shape {tuple(image_shape)}. Received: "
                "epsilon=None. Give one with --epsilon."
            )
        return (radius,)

    def table(
        self,
        records: Iterable[Record],
        model: keras.Model,
        dataset: str,
        *,
        options: Mapping[str, Any] | None = None,
        attack_steps: int | None = None,
        norm: str | None = None,
        epsilon: _Radii | None = None,
    ) -> tables.Table:
        """Puts records into the layout of the paper's table.

        Args:
            records: Iterable of records (`evaluate.evaluate`) of one
                model. Records of other evaluations are ignored; an evaluation
                without a record is shown as a dash.
            model: Our name of the model.
            dataset: Our name of its data set.
            options: Dict of the model's options, which determine its name in
                the paper.
            attack_steps: Number of steps of the attack in training; None for
                none, or unknown. Some papers have rows for 30.
            norm: The norm given to `evaluations`; None takes it from the
                records.
            epsilon: The radii given to `evaluations`; None takes them from
                the records.

        Returns:
            A `tables.Table`.
        """
        records = list(records)
        layout = self._layout(records, dataset)
        norm, radii = self._threat_model(layout, records, norm, epsilon)
        known = layout.is_published(norm, radii)
        columns = layout.columns(radii)
        row_radii = (None,) if layout.by_radius else radii
        name = published.shown_name(model, options)
        rows, used, missing = [], [], []
        for radius in row_radii:
            found = _with_clean(
                columns,
                [self._find(records, norm, c, radius) for c in columns],
            )
            row_radius = radius if len(row_radii) > 1 else None
            rows.append(_own_row(layout, name, columns, found, row_radius))
            used += [record for record in found if record is not None]
            missing += [
                layout.scan_name(column, row_radius)
                for column, record in zip(columns, found, strict=True)
                if record is None
            ]
        comparable = known and dataset == layout.dataset
        options = _options_of_attacked_model(
            options,
            used,
            lambda found: (
                published.published_name(layout, model, found, attack_steps)
                is not None
            ),
        )
        if comparable:
            rows += published.published_rows(
                layout, model, options, attack_steps
            )
        return tables.Table(
            title=layout.title(norm, radii, comparable),
            header=layout.header(columns),
            rows=tuple(rows),
            notes=(
                *_missing_note(missing, used),
                *_model_notes(layout, rows, model, options),
                *_comparison_notes(layout, rows, dataset, used),
                *_threat_model_note(layout, known, norm, radii),
                *_sample_notes(used),
                *self.remarks,
            ),
        )

    def _layout(
        self, records: Sequence[Record], dataset: str
    ) -> published.Layout:
        """The layout of the data set, or the one that fits most records."""
        for layout in self.layouts:
            if layout.dataset == dataset:
                return layout
        return max(
            self.layouts,
            key=lambda layout: len(self._threat_models(layout, records)),
        )

    def _threat_models(
        self, layout: published.Layout, records: Sequence[Record]
    ) -> list[tuple[str, float]]:
        """Pairs (norm, epsilon) of all records that fit a layout."""
        found = []
        for record in records:
            norm, epsilon = record.get("norm"), record.get("epsilon")
            if norm is None or epsilon is None:
                continue
            if any(
                self._matches(record, norm, epsilon, settings)
                for _, settings in layout.scans
            ):
                found.append((norm, epsilon))
        return found

    def _threat_model(
        self,
        layout: published.Layout,
        records: Sequence[Record],
        norm: str | None,
        epsilon: _Radii | None,
    ) -> tuple[str, tuple[float, ...]]:
        """The norm and the radii of a table."""
        if epsilon is not None:
            norm, radii = norm or layout.norm, _unique_radii(epsilon)
            known = layout.is_published(norm, radii) and layout.by_radius
            return norm, layout.radii if known else radii
        found = [
            pair
            for pair in self._threat_models(layout, records)
            if norm in (None, pair[0])
        ]
        if layout.radii and (
            not found
            or any(layout.is_published(n, (radius,)) for n, radius in found)
        ):
            return layout.norm, layout.radii
        norm = norm or (found[0][0] if found else layout.norm)
        shown = sorted({radius for n, radius in found if n == norm})
        return norm, tuple(shown)

    def _matches(
        self,
        record: Record,
        norm: str,
        epsilon: float,
        settings: Mapping[str, Any],
    ) -> bool:
        """Tests whether a record belongs to these settings."""
        if None in (record.get("norm"), record.get("epsilon")):
            return False
        attack = self._attack(norm, epsilon, settings, record.get("eot"))
        expected = evaluation_config.EvaluationConfig(
            attack=attack, target=self.target
        ).describe()
        found = dict(record)
        if found.get("version"):  # A version for few classes matches too.
            found["version"] = autoattack.published_version(found["version"])
        return all(
            _equal(found.get(key), expected[key])
            for key in _compared_keys(attack)
            if key in record or key in _REQUIRED_KEYS
        )

    def _find(
        self,
        records: Sequence[Record],
        norm: str,
        column: published.Column,
        radius: float | None,
    ) -> Record | None:
        """The matching record with the most images; None without a match."""
        _, settings, _ = column
        if settings is None:
            return None  # `_with_clean` fills in the clean accuracy.
        settings = dict(settings)
        epsilon = settings.pop("epsilon", radius)
        found = [
            record
            for record in records
            if self._matches(record, norm, epsilon, settings)
        ]
        return max(
            found,
            key=lambda record: record.get("num_examples", 0),
            default=None,
        )


def _compared_keys(attack: attack_base.Attack) -> set[str]:
    """The keys of a record that a record of this attack agrees in."""
    fields = {field.name for field in dataclasses.fields(attack)}
    # In a record, "loss" is a result, and "objective" the attack loss.
    settings = {"objective" if name == "loss" else name for name in fields}
    return ({*_REQUIRED_KEYS} | settings) - {*_ONLY_SPEED}


def _unique_radii(epsilon: _Radii) -> tuple[float, ...]:
    """Radii as a tuple without duplicates."""
    if isinstance(epsilon, (int, float)):
        epsilon = (epsilon,)
    radii = tuple(dict.fromkeys(float(radius) for radius in epsilon))
    if not radii:
        raise ValueError("Expected at least one radius. Received: epsilon=().")
    return radii


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return published.close(a, b)
    return a == b


def _with_clean(
    columns: Sequence[published.Column], found: Sequence[Record | None]
) -> list[Record | None]:
    """Fills the clean accuracy from the record with the most images."""
    others = [record for record in found if record is not None]
    best = max(
        others, key=lambda record: record.get("num_examples", 0), default=None
    )
    return [
        best if settings is None else record
        for (_, settings, _), record in zip(columns, found, strict=True)
    ]


def _options_of_attacked_model(
    options: Mapping[str, Any] | None,
    used: Sequence[Record],
    is_published: Callable[[Mapping[str, Any]], bool],
) -> Mapping[str, Any]:
    """The options of the model that was attacked.

    An evaluation may replace some options of the run. If evaluations differ in
    their options, those are returned with which the model is not a published
    one.
    """
    options = options or {}
    return min(
        ({**options, **(record.get("options") or {})} for record in used),
        key=is_published,
        default=options,
    )


def _own_row(
    layout: published.Layout,
    name: str,
    columns: Sequence[published.Column],
    found: Sequence[Record | None],
    radius: float | None,
) -> tables.Row:
    """Our row: a percentage for every record that was found."""
    name = f"ours: {name}"
    if radius is not None:
        name += f", ε = {ratios.text(radius)}"
    cells = tuple(
        tables.DASH
        if record is None or record.get(key) is None
        else layout.percent(record[key])
        for (_, _, key), record in zip(columns, found, strict=True)
    )
    return tables.Row(name, cells)


def _missing_note(
    missing: Sequence[str], used: Sequence[Record]
) -> tuple[str, ...]:
    if not missing:
        return ()
    names = "; ".join(filter(None, dict.fromkeys(missing)))
    return (f"missing: {names if used and names else 'all evaluations'}",)


def _comparison_notes(
    layout: published.Layout,
    rows: Sequence[tables.Row],
    dataset: str,
    used: Sequence[Record],
) -> tuple[str, ...]:
    """Notes on differences of the images and on doubtful numbers."""
    if not layout.dataset:
        return ()
    if dataset != layout.dataset:
        return (
            f"The table is that of {layout.source}, on {layout.dataset}; "
            f"ours is on {dataset}: not comparable.",
        )
    if all(row.kind == "ours" for row in rows):
        return ()
    notes = []
    sides = {tuple(r["image_shape"])[0] for r in used if r.get("image_shape")}
    if layout.image_size and sides - {layout.image_size}:
        notes.append(
            f"Our images have a side of {', '.join(map(str, sorted(sides)))} "
            f"pixels, the published ones of {layout.image_size}."
        )
    if layout.doubt:
        notes.append(f"? as printed: {layout.doubt}")
    return tuple(notes)


def _model_notes(
    layout: published.Layout,
    rows: Sequence[tables.Row],
    model: keras.Model,
    options: Mapping[str, Any],
) -> tuple[str, ...]:
    """Notes on the model of the published rows."""
    kinds = {row.kind for row in rows}
    if "same" in kinds:
        what = "the same architecture"
        if model == "denoise":
            what = (
                "DENOISE, which is a ResNet of version 1 (Xie et al., 2019); "
                "ours is of version 2"
            )
        return (
            f"* published numbers of {what}; how it was trained may differ",
        )
    if "published" not in kinds:
        return ()
    notes = [
        "No published row is of the model "
        f"{published.shown_name(model, options)}: the rows of other models "
        "are shown for orientation."
    ]
    retina = options.get("sampling") and any(
        row.name == "retinal sampling" for row in rows
    )
    if retina and options.get("interpolation") != "nearest":
        notes.append(
            "The published retinal sampling rounds to the nearest pixel "
            "(--interpolation=nearest)."
        )
    return tuple(notes)


def _threat_model_note(
    layout: published.Layout, known: bool, norm: str, radii: Sequence[float]
) -> tuple[str, ...]:
    if known or not layout.radii:
        return ()
    ours = ", ".join(map(ratios.text, radii))
    theirs = ", ".join(map(ratios.text, layout.radii))
    return (
        f"Radius {ours} ({norm}) in place of the published {theirs} "
        f"({layout.norm}), step sizes in proportion: not comparable.",
    )


def _sample_notes(used: Sequence[Record]) -> tuple[str, ...]:
    """Notes on the number of our images and the resulting uncertainty."""
    kinds: dict[tuple[int, str], None] = {}
    for record in used:
        number = record.get("num_examples")
        if number:
            kinds[number, record.get("split", "test")] = None
    notes = []
    for number, split in kinds:
        low, high = metrics.proportion_interval(round(number / 2), number)
        notes.append(
            f"ours: {number} {split} images, 95% intervals of at most "
            f"±{50 * (high - low):.1f} points"
        )
    for draws in sorted({r["eot"] for r in used if r.get("eot")}):
        notes.append(f"ours: mean over {draws} draws of a stochastic model")
    for version in sorted({r["version"] for r in used if r.get("version")}):
        if version != autoattack.published_version(version):
            notes.append(
                f"ours: AutoAttack {version}, without the members that are not "
                "defined for so few classes"
            )
    return tuple(notes)


# Aliases, so that users of a protocol need not import `published`.
render = tables.render
to_markdown = tables.to_markdown
to_csv = tables.to_csv

# --- Attacks ----------------------------------------------------------------


def _scaled_step(
    norm: str, epsilon: float, length: float, radius: float = published.RADIUS
) -> float:
    """A published step size, scaled in proportion to the radius."""
    if norm == "linf" and published.close(epsilon, radius):
        return length
    return length * (epsilon / radius)


def _s3ta_pgd(
    norm: str, epsilon: float, steps: int, restarts: int = 1
) -> gradient_attacks.PGD:
    length = (1.6 if steps == 10 else 1) / 255
    return gradient_attacks.PGD(
        norm=norm,
        epsilon=epsilon,
        steps=steps,
        step_size=_scaled_step(norm, epsilon, length),
        restarts=restarts,
        random_start=1.0,
        keep="last",
    )


def _s3ta_untargeted(
    norm: str, epsilon: float, steps: int
) -> attack_base.Attack:
    if norm == "linf" and published.close(epsilon, 4 / 255):
        attack = _s3ta_pgd(norm, published.RADIUS, steps)
        return dataclasses.replace(attack, epsilon=epsilon)
    return _s3ta_pgd(norm, epsilon, steps)


def _s3ta_adam(norm: str, epsilon: float) -> gradient_attacks.PGDAdam:
    return gradient_attacks.PGDAdam(
        norm=norm,
        epsilon=epsilon,
        steps=250,
        rates=tuple(
            _scaled_step(norm, epsilon, rate) for rate in (0.1, 0.01, 0.001)
        ),
        boundaries=(100, 200),
        random_start=1.0,
        keep="last",
    )


def _s3ta_spsa(norm: str, epsilon: float) -> spsa.SPSA:
    return spsa.SPSA(
        norm=norm,
        epsilon=epsilon,
        steps=100,
        samples=4096,
        step_size=_scaled_step(norm, epsilon, 1 / 255),
        random_start=1.0,
        keep="last",
    )


def _handover_bim(
    norm: str, epsilon: float, steps: int
) -> gradient_attacks.BIM:
    return gradient_attacks.BIM(norm=norm, epsilon=epsilon, steps=steps)


def _perceptual_pgd(norm: str, epsilon: float) -> gradient_attacks.PGD:
    return gradient_attacks.PGD(
        norm=norm, epsilon=epsilon, steps=10, random_start=1.0, keep="last"
    )


def _autoattack(norm: str, epsilon: float) -> autoattack.AutoAttack:
    return autoattack.AutoAttack(norm=norm, epsilon=epsilon, version="standard")


_LAST = (
    "The last iterate of each restart counts, as in the paper. Images that are "
    "misclassified without an attack stay misclassified."
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "s3ta",
            "random targets, PGD of 10, 100, 250 and 1000 steps, 16/255",
            f"{_S3TA_URL}, Table 1",
            _s3ta_pgd,
            (published.S3TA,),
            target="random",
            remarks=(_LAST,),
        ),
        Protocol(
            "s3ta_strong",
            "random targets, PGD of 5000 and 10,000 steps, 16/255",
            f"{_S3TA_URL}, supplement, Table 1",
            _s3ta_pgd,
            (published.S3TA_STRONG,),
            target="random",
            num_examples=2200,
            remarks=(_LAST,),
        ),
        Protocol(
            "s3ta_restarts",
            "random targets, PGD of 100 and 1000 steps, 1, 10, 100 restarts",
            f"{_S3TA_URL}, supplement, Table 2",
            _s3ta_pgd,
            (published.S3TA_RESTARTS,),
            target="random",
            remarks=(_LAST,),
        ),
        Protocol(
            "s3ta_adam",
            "random targets, 250 steps of PGD with Adam, 16/255",
            f"{_S3TA_URL}, supplement, Table 3",
            _s3ta_adam,
            (published.S3TA_ADAM,),
            target="random",
            remarks=(_LAST,),
        ),
        Protocol(
            "s3ta_untargeted",
            "untargeted, PGD of 200 steps, 4/255 and 16/255",
            f"{_S3TA_URL}, Table 2",
            _s3ta_untargeted,
            (published.S3TA_UNTARGETED,),
            remarks=(_LAST,),
        ),
        Protocol(
            "s3ta_spsa",
            "random targets, SPSA of 100 signed steps, 4096 directions, 16/255",
            f"{_S3TA_URL}, Table 3",
            _s3ta_spsa,
            (published.S3TA_SPSA,),
            target="random",
            num_examples=1000,
            remarks=(
                _LAST,
                "The paper does not give SPSA's step size (here 1/255, as in "
                "its other attacks), its distance d (here 0.01), or its "
                "objective (here the margin, as in Uesato et al.).",
            ),
        ),
        Protocol(
            "handover",
            "untargeted, basic iterative method with steps of eps/3, no random "
            "start; 5 steps, 20 for images above 64 pixels",
            "https://arxiv.org/abs/2006.16427, as the handover quotes it",
            _handover_bim,
            (published.HANDOVER_CIFAR10, published.HANDOVER_IMAGENET10),
        ),
        Protocol(
            "perceptual",
            "untargeted, PGD of 10 steps, 4/255 and 8/255",
            "https://arxiv.org/abs/2005.01499, Table 1",
            _perceptual_pgd,
            (published.PERCEPTUAL,),
            remarks=(
                "The paper does not give the step size; here it is ε/4. The "
                "last iterate counts.",
            ),
        ),
        Protocol(
            "autoattack",
            "AutoAttack standard (rand for several draws of a stochastic "
            "model), at the given or the usual radius",
            "https://arxiv.org/abs/2003.01690",
            _autoattack,
            (published.AUTOATTACK,),
        ),
    )
}
