"""Published tables for comparison, and the formatting of tables.

A `Layout` is a table of a paper: its columns and its numbers. A `Table` holds
strings in such a layout; `protocols` makes it, and `render`, `to_markdown` and
`to_csv` format it.

The numbers are transcribed as printed. A `?` after a number marks an entry that
contradicts another place of the same paper; `Layout.doubt` says why.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from saccade.core import ratios
from saccade.evaluation import tables

# Heads, the settings of an attack (None: no attack), the key of the record.
Column: TypeAlias = tuple[tuple[str, ...], Mapping[str, Any] | None, str]

_ZORAN = "Zoran et al., 2020"
_HANDOVER = "the handover's published results"
RADIUS = 16 / 255  # The radius of all S3TA tables except S3TA_UNTARGETED.


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published table: its columns and its numbers.

    Attributes:
        source: Paper and table number.
        caption: What the table measures.
        dataset: Our name of its data set; empty if no numbers are published.
        image_size: Side of its images in pixels.
        corner: Heads of the first column.
        scans: Pairs (heads, settings of an attack), one for each evaluation.
        measures: Pairs (head, key of the record): the columns that each
            evaluation fills.
        radii: The published radii, for pixels in [0, 1].
        by_radius: Whether radii are columns with the head `radius_head`;
            otherwise every radius is a row.
        radius_head: Head of a radius, with `{}` for its value.
        clean: Heads of the column of clean accuracy; empty for none.
        published: Pairs (model, numbers in percent as printed).
        doubt: What is wrong with the numbers marked with `?`.
        decimals: Number of decimals of a percentage.
        sign: Suffix of a percentage.
        norm: The norm of the threat model.
    """

    source: str
    caption: str
    dataset: str = ""
    image_size: int = 0
    corner: tuple[str, ...] = ("Model",)
    scans: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...] = (((), {}),)
    measures: tuple[tuple[str, str], ...] = (("", "robust_accuracy"),)
    radii: tuple[float, ...] = ()
    by_radius: bool = False
    radius_head: str = "ε = {}"
    clean: tuple[str, ...] = ()
    published: tuple[tuple[str, str], ...] = ()
    doubt: str = ""
    decimals: int = 2
    sign: str = "%"
    norm: str = "linf"

    def title(self, norm: str, radii: Sequence[float], comparable: bool) -> str:
        """Returns the title of a table: its content and its source.

        Args:
            norm: The norm of the threat model.
            radii: The radii of the table.
            comparable: Whether the published numbers are shown too.
        """
        threat_model = "" if norm == self.norm and self.dataset else norm
        if not self.by_radius and len(radii) == 1:
            threat_model = f"{threat_model} ε = {ratios.text(radii[0])}"
        source = self.source if comparable else f"layout of {self.source}"
        content = filter(None, (self.caption, threat_model.strip()))
        return f"{', '.join(content)} ({source})"

    def scan_name(self, column: Column, radius: float | None = None) -> str:
        """Returns a readable name of the evaluation that fills a column.

        Args:
            column: One of `columns`.
            radius: The radius of the row, if there are several.
        """
        heads, settings, key = column
        if settings is None:
            return ""
        if self.by_radius:
            heads = heads[-1:]
        elif any(head for head, k in self.measures if k == key):
            heads = heads[:-1]
        if len(heads) > 1 and len(self.corner) > 1:
            # The second head is only a number; append its unit, "restarts".
            unit = self.corner[1].split()[-1]
            heads = (heads[0], f"{heads[1]} {unit}")
        at = ""
        if radius is not None:
            at = self.radius_head.format(ratios.text(radius))
        return ", ".join(filter(None, (*heads, at)))

    def columns(self, radii: Sequence[float]) -> list[Column]:
        """Returns a triple (heads, settings, key of the record) per column.

        The settings are None for the clean accuracy. They hold "epsilon" if
        radii are columns.
        """
        columns: list[Column] = []
        if self.clean:
            columns.append((self.clean, None, "clean_accuracy"))
        for radius in radii if self.by_radius else (None,):
            for heads, settings in self.scans:
                for head, key in self.measures:
                    names = [*heads, head]
                    if radius is not None:
                        names.append(
                            self.radius_head.format(ratios.text(radius))
                        )
                        settings = {**settings, "epsilon": radius}
                    named = tuple(name for name in names if name)
                    columns.append((named, settings, key))
        return columns

    def header(self, columns: Sequence[Column]) -> tuple[tuple[str, ...], ...]:
        """Returns the header rows, all of one length, with the corner."""
        heads = [self.corner, *(heads for heads, _, _ in columns)]
        depth = max(len(head) for head in heads)
        heads = [head + ("",) * (depth - len(head)) for head in heads]
        return tuple(zip(*heads, strict=True))

    def percent(self, value: float) -> str:
        """Formats a proportion in the style of the table."""
        return f"{100 * value:.{self.decimals}f}{self.sign}"

    def cells(self, numbers: str) -> tuple[str, ...]:
        """Returns the cells of a published row."""
        return tuple(
            number.replace("?", "") + self.sign + "?" * number.endswith("?")
            for number in numbers.split()
        )

    def is_published(self, norm: str, radii: Sequence[float]) -> bool:
        """Tests whether the published numbers are for this threat model."""
        return norm == self.norm and all(
            any(close(radius, known) for known in self.radii)
            for radius in radii
        )


def close(a: float, b: float) -> bool:
    """Tests whether two settings are equal up to rounding."""
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)


# --- The published row of a model --------------------------------------------
_SWITCHED_OPTIONS = (
    "sampling",
    "coarse_fixations",
    "branched_network",
    "auxiliary",
)
# Triples (model, options, name in the published table); the model without
# options comes first. Switches that are not listed are off.
_RETINA = {"sampling": True, "interpolation": "nearest"}
_CROP = {"coarse_fixations": True, "coarse_variant": "crop"}
_BLUR = {"coarse_fixations": True, "coarse_variant": "blur"}
_MODEL_ROWS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("resnet", {}, "resnet"),
    ("resnet", _RETINA, "retinal sampling"),
    ("resnet", _CROP, "coarse fixations"),
    ("resnet", _BLUR, "coarse, blurred"),
    # In the published program the four branches see the crop.
    ("resnet", {**_CROP, "branched_network": True}, "branched resnet"),
    ("resnet_cifar", {}, "resnet_cifar"),
    ("resnet_cifar", _RETINA, "retinal sampling"),
    ("resnet_cifar", _CROP, "coarse fixations"),
    ("ecnn", {}, "cortical (ECNN)"),
    ("ecnn", {"auxiliary": True}, "cortical, auxiliary"),
)
# Values of options with which a model is the published one; any other value
# makes it another model. The first value is the default.
_PUBLISHED_VALUES: dict[str, Any] = {
    "width": (0,),
    "stem_stride": (0, 2),
    "pool_stride": (0, 2),
    "backbone": ("auto", "resnet18"),
    "downsampling": ("all",),
    "denoising": ("none",),
    "feedback": (False,),
    "pooling": ("concat",),
    "single_scale": (False,),
    "scale4_freeze": (False,),
    "dropout": (0.0,),
    "gaze_range": (0.0,),
    "test_gazes": ("five",),
}
# Further such values of one model; they override those above.
_PUBLISHED_VALUES_OF: dict[str, dict[str, Any]] = {
    "s3ta": {
        "vision": ("auto", "resnet152", "resnet152_v2"),
        "vision_width": (0,),
        "vision_strides": ((), (1, 2, 1, 1)),
        "key_channels": (0, 32),
        "num_heads": (4,),
        "frequencies": (4,),
        "controller_units": (1024,),
        "hidden_units": (1024,),
        # It has an effect only in vision nets for small images, and those
        # differ from the published model anyway.
        "downsampling": ("all", "not_last", "none"),
    },
    "denoise": {"depth": (152,), "denoising": ("stages",)},
}


def shown_name(model: str, options: Mapping[str, Any] | None = None) -> str:
    """Returns the name of our model in a table; that of S3TA has its steps.

    Args:
        model: Our name of a model.
        options: Dict of the model's options.
    """
    if model != "s3ta":
        return model
    return f"S3TA-{_normalized((options or {}).get('num_steps')) or 16}"


def published_name(
    layout: Layout,
    model: str,
    options: Mapping[str, Any] | None = None,
    attack_steps: int | None = None,
) -> str | None:
    """Returns the row of a published table for our model, or None.

    Args:
        layout: A `Layout`.
        model: Our name of a model.
        options: Dict of the model's options. Lists and numbers may be strings,
            as in a file or on a command line.
        attack_steps: Number of steps of the attack in training; None for none,
            or unknown. With 30 it is the row whose name ends in "-30", if the
            table has one.
    """
    options = {
        key: _normalized(value)
        for key, value in (options or {}).items()
        if value is not None
    }
    allowed = {**_PUBLISHED_VALUES, **_PUBLISHED_VALUES_OF.get(model, {})}
    if any(
        options.get(k, values[0]) not in values for k, values in allowed.items()
    ):
        return None
    printed = {name.split(" [")[0]: name for name, _ in layout.published}
    row = _row_name(printed, model, options)
    if attack_steps == 30 and f"{row}-30" in printed:
        row = f"{row}-30"
    return None if row is None else printed.get(row)


def _row_name(
    printed: Mapping[str, Any], model: str, options: Mapping[str, Any]
) -> str | None:
    """The published name of our model with these options, or None."""
    if model == "s3ta":
        return shown_name(model, options)
    if model == "denoise":
        return "DENOISE"
    if model in ("resnet50", "resnet152"):
        return f"ResNet-{options.get('depth') or model.removeprefix('resnet')}"
    rows = [
        (needed, name) for ours, needed, name in _MODEL_ROWS if ours == model
    ]
    # A table is of one network and its variants, ResNet-18 or ResNet-20.
    if not rows or rows[0][1] not in printed:
        return None
    return next((n for needed, n in rows if _matches(options, needed)), None)


def _matches(options: Mapping[str, Any], needed: Mapping[str, Any]) -> bool:
    """Tests for the needed options, with all other switches off."""
    options = {"coarse_variant": "crop", **options}
    return all(options.get(key) == value for key, value in needed.items()) and (
        not any(
            options.get(key) for key in set(_SWITCHED_OPTIONS) - set(needed)
        )
    )


def _normalized(value: Any) -> Any:
    """Converts strings and lists of an option to numbers and tuples."""
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    if isinstance(value, (list, tuple)):
        return tuple(map(_normalized, value))
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def published_rows(
    layout: Layout,
    model: str,
    options: Mapping[str, Any] | None = None,
    attack_steps: int | None = None,
) -> list[tables.Row]:
    """Returns the published rows; the one of our model is marked with a star.

    Args:
        layout: A `Layout`.
        model: Our name of a model.
        options: See `published_name`.
        attack_steps: See `published_name`.
    """
    same = published_name(layout, model, options, attack_steps)
    return [
        tables.Row(
            f"{name} *" if name == same else name,
            layout.cells(numbers),
            "same" if name == same else "published",
        )
        for name, numbers in layout.published
    ]


# --- The published tables ---------------------------------------------------

_TOP_1_AND_SUCCESS = (
    ("Top-1", "robust_accuracy"),
    ("Attack Success", "attack_success"),
)
_IMAGENET: dict[str, Any] = {
    "dataset": "imagenet",
    "image_size": 224,
    "radii": (RADIUS,),
}

S3TA = Layout(
    source=f"{_ZORAN}, Table 1",
    caption="Random targeted PGD attacks",
    clean=("Nominal Accuracy",),
    scans=tuple(
        ((f"{steps} steps",), {"steps": steps})
        for steps in (10, 100, 250, 1000)
    ),
    measures=_TOP_1_AND_SUCCESS,
    published=(
        (
            "ResNet-152",
            "70.66 53.48 7.63 36.91 43.48 32.50 50.93 29.5 55.84",
        ),
        ("S3TA-2", "72.30 55.08? 9.06 40.13 40.31 36.56 46.56 33.97 50.40"),
        ("S3TA-4", "72.48 56.78 9.10 42.54 39.37 40.00 44.33 37.99 47.50"),
        ("S3TA-8", "72.14 56.02 9.50 42.63 39.06 40.17 44.01 38.48 47.09"),
        ("S3TA-16", "72.54 57.45 9.33 44.19 38.83 40.71 44.82 38.70 48.16"),
        (
            "ResNet-152-30",
            "63.62 53.30 6.56 39.56 34.62 37.56 38.68 36.18 41.37",
        ),
        ("DENOISE", "66.02 56.33 5.00 45.84 27.36 44.19 30.66 43.39 32.54"),
        (
            "S3TA-16-30",
            "64.55 55.08? 3.79 47.18 21.87 46.65 23.52 46.11? 24.91?",
        ),
    ),
    doubt="S3TA-2 and S3TA-16-30 share one number at 10 steps, and S3TA-16-30 "
    "has the same two at 1000 steps as at 5000 in the supplement, on other "
    "images.",
    **_IMAGENET,
)

S3TA_STRONG = Layout(
    source=f"{_ZORAN}, supplement, Table 1",
    caption="Extra strong random targeted PGD attacks",
    scans=(
        (("5000 steps",), {"steps": 5000}),
        (("10,000 steps",), {"steps": 10000}),
    ),
    measures=(
        ("Top-1 Accuracy", "robust_accuracy"),
        ("Attack Success Rate", "attack_success"),
    ),
    published=(
        ("ResNet-152", "28.12 58.03 27.64 58.79"),
        ("S3TA-2", "32.85 52.50 32.63 52.94"),
        ("S3TA-4", "35.67 50.57 35.43 50.96"),
        ("S3TA-8", "36.20 50.75 35.44 51.91"),
        ("S3TA-16", "37.36 49.50 36.96 50.23"),
        ("ResNet-152-30", "36.69 41.33 36.78 41.25"),
        ("DENOISE", "42.76 33.83 42.99 33.88"),
        ("S3TA-16-30", "46.11? 24.91? 46.20 24.68"),
    ),
    doubt="Table 1 of the paper has the same two numbers for S3TA-16-30 at "
    "1000 steps, on other images.",
    **_IMAGENET,
)

S3TA_RESTARTS = Layout(
    source=f"{_ZORAN}, supplement, Table 2",
    caption="Random targeted PGD with restarts, Top-1",
    corner=("Attack steps", "Random restarts"),
    scans=tuple(
        (
            (f"{steps} steps", str(restarts)),
            {"steps": steps, "restarts": restarts},
        )
        for steps in (100, 1000)
        for restarts in (1, 10, 100)
    ),
    published=(
        ("ResNet-152-30", "39.77 39.37 39.15 37.41 36.51 35.75"),
        ("DENOISE", "46.16 44.68? 44.68? 43.57 41.91 41.37"),
        ("S3TA-16-30", "47.76 47.27 47.09 46.74 46.09 45.78"),
    ),
    doubt="DENOISE has the same number with 10 and with 100 restarts; all "
    "others decrease.",
    **_IMAGENET,
)

S3TA_ADAM = Layout(
    source=f"{_ZORAN}, supplement, Table 3",
    caption="Random targeted PGD with Adam, 250 steps",
    measures=(
        ("Top-1", "robust_accuracy"),
        ("Success rate", "attack_success"),
    ),
    published=(
        ("ResNet-152-30", "26.38 42.94"),
        ("DENOISE", "32.99 35.04"),
        ("S3TA-16-30", "36.83 27.00"),
    ),
    **_IMAGENET,
)

S3TA_UNTARGETED = Layout(
    source=f"{_ZORAN}, Table 2",
    caption="Untargeted attacks at 200 PGD steps",
    dataset="imagenet",
    image_size=224,
    scans=(((), {"steps": 200}),),
    radii=(4 / 255, RADIUS),
    by_radius=True,
    radius_head="Top-1 ε = {}",
    published=(
        ("ResNet-152", "39.7 6.3"),
        ("DENOISE [55]", "38.9 7.5"),
        ("LLR [42]", "47.0 6.1"),
        ("S3TA-16", "46.75? 9.8?"),
    ),
    doubt="the text of the paper calls this model S3TA-16-30.",
)

S3TA_SPSA = Layout(
    source=f"{_ZORAN}, Table 3",
    caption="Random targeted SPSA, batch 4096, 100 iterations",
    measures=_TOP_1_AND_SUCCESS,
    published=(
        ("ResNet-152", "61.90 2.20"),
        ("DENOISE [55]", "63.70 1.90"),
        ("S3TA-16", "59.60 1.90"),
    ),
    **_IMAGENET,
)

_HANDOVER_STYLE: dict[str, Any] = {
    "source": _HANDOVER,
    "by_radius": True,
    "radius_head": "eps {}",
    "clean": ("clean",),
    "decimals": 1,
    "sign": "",
}

HANDOVER_CIFAR10 = Layout(
    caption="Basic iterative method, L-inf, untargeted, 5 steps of eps/3",
    dataset="cifar10",
    image_size=32,
    corner=("CIFAR-10, 5 steps",),
    scans=(((), {"steps": 5}),),
    radii=(0.001, 0.005, 0.01),
    published=(
        ("resnet_cifar", "88.1 69.8 11.4 0.5"),
        ("coarse fixations", "87.7 70.7 11.7 0.5"),
        ("retinal sampling", "88.9 82.1 43.8 11.8"),
        ("cortical (ECNN)", "85.2 77.8 40.1 11.5"),
    ),
    **_HANDOVER_STYLE,
)

HANDOVER_IMAGENET10 = Layout(
    caption="Basic iterative method, L-inf, untargeted, 20 steps of eps/3",
    dataset="imagenet10",
    image_size=320,
    corner=("ImageNet10, 20 steps",),
    scans=(((), {"steps": 20}),),
    radii=(0.001, 0.005, 0.01, 0.02),
    published=(
        ("resnet", "89.4 78.4 20.0 1.6 0"),
        ("coarse fixations", "91.2 80.8 16.4 1.2 0"),
        ("coarse, blurred", "89.0 78.4 21.4 2.8 0"),
        ("retinal sampling", "90.2 86.4 43.4 7.6 0.4"),
        ("cortical (ECNN)", "85.2 78.8 52.0 23.2 2.0"),
        ("cortical, auxiliary", "88.6 82.0 42.8 11.8 1.0"),
        ("branched resnet", "88.8 76.2 10.6 0.8 0"),
    ),
    **_HANDOVER_STYLE,
)

_PERCEPTUAL_HEAD = "Adversarial Accuracy (10 step PGD attack)"
PERCEPTUAL = Layout(
    source="Aggarwal et al., 2020, Table 1",
    caption="Adversarial robustness of different models",
    dataset="cifar10",
    image_size=32,
    clean=(_PERCEPTUAL_HEAD, "ε = 0"),
    scans=(((_PERCEPTUAL_HEAD,), {}),),
    radii=(4 / 255, 8 / 255),
    by_radius=True,
    published=(
        ("Natural", "90.88? 0.01 0.00"),
        ("AT-1", "90.95 34.33 4.53"),
        ("AT-2", "90.88? 50.76 14.41"),
        ("AT-4", "89.79 61.28 27.30"),
        ("AT-8", "87.25 73.99 47.37"),
    ),
    doubt="Natural and AT-2 have the same clean accuracy, but the text of the "
    "paper mentions a slight drop.",
    sign="",
)

AUTOATTACK = Layout(
    source="Croce and Hein, 2020",
    caption="AutoAttack",
    clean=("Clean",),
    by_radius=True,
    radius_head="Robust, ε = {}",
)
