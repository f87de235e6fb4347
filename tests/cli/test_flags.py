"""Flags are generated from the fields of dataclasses; the choices are true."""

import dataclasses
import pathlib
import re

import pytest
from absl import flags

from saccade.attacks import base as attack_base
from saccade.attacks import gradient as gradient_attacks
from saccade.attacks import registry as attack_registry
from saccade.attacks import settings as attack_settings
from saccade.cli import catalogue, flags_page
from saccade.cli import flags as program_flags
from saccade.core import lp, sampling
from saccade.core import settings as core_settings
from saccade.core.settings import setting
from saccade.data import augment
from saccade.models import options as model_options
from saccade.models import registry, resnets, s3ta
from saccade.training import objectives, settings

import glimpse
import model_backbone  # noqa: F401 -- registers models.


@dataclasses.dataclass(frozen=True)
class Config:
    """A field of each kind."""

    count: int = setting(3, "How many.", minimum=1, maximum=9)
    rate: float = setting(0.5, "How fast.", minimum=0.0, below_maximum=True)
    name: str = setting("a", "Which one.", choices={"a": "first", "b": ""})
    fast: bool = setting(False, "Whether.", flag="quick")
    radius: float | None = setting(None, "How far.", "none", ratio=True)
    radii: tuple[float, ...] | None = setting(None, "How far.", "none")
    steps: tuple[int, ...] | None = setting(None, "How often.", "none")
    words: list[str] | None = setting(None, "What.", "none")
    places: tuple[str, ...] = setting(("here",), "Where.")
    no_flag: int = 7


@pytest.fixture
def values():
    found = flags.FlagValues()
    program_flags.define(Config, found)
    return found


def test_flags_that_are_not_given_have_the_defaults_of_the_fields(values):
    values(["program"])
    assert program_flags.read(Config, values) == Config()
    assert "no_flag" not in values and "fast" not in values


def test_values_are_read_with_the_type_of_the_field(values):
    line = "--count=2 --rate=0.25 --name=b --quick --radius=8/255 "
    line += "--radii=1/255,0.5 --steps=1,20 --words=x,y "
    line += "--places=a,b"
    values(["program", *line.split()])
    assert program_flags.read(Config, values) == Config(
        count=2,
        rate=0.25,
        name="b",
        fast=True,
        radius=8 / 255,
        radii=(1 / 255, 0.5),
        steps=(1, 20),
        words=["x", "y"],
        places=("a", "b"),
    )


@pytest.mark.parametrize(
    "word,message",
    [
        ("--count=0", r"--count=0: .*\[1, 9\]"),
        ("--count=10", r"--count=10: .*\[1, 9\]"),
        ("--rate=-1", "--rate=-1"),
        ("--radius=x", "--radius=x: expected a number or a ratio like 8/255"),
        ("--radii=1,x", "--radii=1,x: expected a number or a ratio"),
        ("--steps=1.5", "--steps=1.5: expected whole numbers like 10,100"),
    ],
)
def test_values_that_cannot_be_read_are_refused(values, word, message):
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        values(["program", word])


def test_an_unknown_choice_is_refused_with_the_near_names(values):
    values(["program", "--name=c"])
    with pytest.raises(ValueError, match="--name to be one of a, b.*--name=c"):
        program_flags.read(Config, values)


def test_overrides_are_none_unless_given():
    values = flags.FlagValues()
    program_flags.define(Config, values, prefix="adv_", unset=True)
    values(["program", "--adv_count=2", "--noadv_quick"])
    found = program_flags.given(Config, values, prefix="adv_")
    assert found == {"count": 2, "fast": False}


def test_help_has_the_meaning_the_choices_and_the_default(values):
    assert values["name"].help == "Which one: a (first) or b."
    assert values["radius"].help == "How far. By default none."


@pytest.mark.parametrize("name", sorted(attack_registry.ATTACKS))
def test_a_setting_of_an_attack_is_the_same_in_every_attack(name):
    """A subclass that changes a default must keep the setting."""
    shared = {
        **core_settings.of(gradient_attacks.PGD),
        **core_settings.of(attack_base.Attack),
    }
    attack = attack_registry.ATTACKS[name]
    fields = {field.name for field in dataclasses.fields(attack)}
    found = core_settings.of(attack)
    assert fields & set(shared) <= set(found)
    for field in found.keys() & shared.keys():
        assert found[field] == shared[field]


@pytest.mark.parametrize(
    "choices,known",
    [
        (attack_settings.NORM.choices, lp.NORMS),
        (model_options.BACKBONES, resnets.BACKBONES),
        (model_options.OPTIONS["vision"].choices, s3ta.VISIONS),
        (
            model_options.OPTIONS["interpolation"].choices,
            sampling.INTERPOLATIONS,
        ),
        (
            model_options.OPTIONS["coarse_variant"].choices,
            glimpse.COARSE_VARIANTS,
        ),
        (
            core_settings.of(settings.RecipeSettings)["augmentation"].choices,
            augment.AUGMENTATIONS,
        ),
        (
            core_settings.of(settings.AdversarialSettings)["objective"].choices,
            objectives.OBJECTIVES,
        ),
        (
            core_settings.of(settings.AdversarialSettings)["attack"].choices,
            objectives.ATTACKS,
        ),
    ],
)
def test_choices_are_the_names_that_the_code_knows(choices, known):
    assert sorted(choices) == sorted(known)


def in_help(value):
    """A default as `--help` writes it: a switch as 0 or 1."""
    if isinstance(value, (bool, int, float)):
        return f"{float(value):g}"
    return value


# Help does not import Keras, so it cannot read the signatures of the builders.
@pytest.mark.parametrize(
    "name", sorted(model_options.OPTIONS.keys() - {"depth", "vision_strides"})
)
def test_help_has_the_default_of_every_builder(name):
    words = re.findall(r"[\w.]+", model_options.OPTIONS[name].by_default)
    builders = map(registry.entry, registry.names())
    found = [b.defaults[name] for b in builders if name in b.defaults]
    assert found
    for value in found:
        assert in_help(value) in words


def test_help_has_the_default_depth_and_strides():
    words = model_options.OPTIONS["depth"].by_default
    for model in registry.names():
        depth = registry.entry(model).defaults.get("depth")
        named = f"{model} {catalogue.MODELS[model]} {words}"
        assert depth is None or str(depth) in re.split(r"\D+", named)
    strides = ",".join(map(str, s3ta.STRIDES))
    words = model_options.OPTIONS["vision_strides"].by_default
    assert words.startswith(strides)


@pytest.mark.parametrize(
    "name", ["samples", "n_queries", "l1_fraction", "distraction", "momentum"]
)
def test_help_has_the_default_of_every_attack(name):
    found = set()
    for attack in attack_registry.ATTACKS.values():
        for field in dataclasses.fields(attack):
            if field.name == name:
                words = core_settings.of(attack)[name].by_default
                found.add(field.default)
                assert in_help(field.default) in re.findall(r"[\w.]+", words)
    assert found


@pytest.mark.parametrize(
    "name,objective",
    [
        *(("weight", name) for name in ("trades", "mart", "alp", "llr")),
        *(("clean_weight", name) for name in ("madry", "fast", "alp")),
        *(("steps", name) for name in ("madry", "trades", "mart", "llr")),
        ("slope_weight", "llr"),
    ],
)
def test_help_has_the_default_of_every_objective(name, objective):
    row = core_settings.of(settings.AdversarialSettings)[name]
    default = getattr(objectives.AdversarialConfig(objective), name)
    assert in_help(default) in re.findall(r"\d[\d.]*", row.by_default)


def test_the_options_that_make_a_model_smaller_exist():
    assert {*model_options.SIZES} <= {*model_options.OPTIONS}


def test_the_page_of_flags_is_the_generated_one():
    page = pathlib.Path(__file__).parents[2] / "docs" / "flags.md"
    assert page.read_text() == flags_page.page(["trainer", "adversary"]), (
        "run make docs-flags"
    )
