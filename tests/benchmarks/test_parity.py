"""Each library gets the same attack, in the norm that is asked for."""

import sys
import types

import numpy as np
import programs
import pytest

from saccade.attacks import autoattack
from saccade.cli import flags as program_flags
from saccade.data import splits as image_splits
from saccade.evaluation import evaluate as robust_evaluation

parity, _ = programs.load("parity")
SHAPE = (4, 4, 1)


@pytest.fixture
def flags():
    """Parses parity.py's flags; those of an L1 comparison by default."""

    def parse(*more):
        usual = ("--run=nowhere", "--norm=l1", "--epsilon=10")
        values = programs.parse("parity", *usual, *more)
        return program_flags.read(parity.ParityFlags, values)

    return parse


@pytest.fixture
def asked(monkeypatch):
    """Stands in for the evaluation; returns what it was asked for."""
    found = []

    def evaluate(model, split, config, **_):
        found.append(config)
        return {}, {"adversarial": split.read(range(len(split)))}

    monkeypatch.setattr(robust_evaluation, "evaluate", evaluate)
    return found


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_our_attacks_are_the_members_of_autoattack(flags, asked, norm):
    given = flags(f"--norm={norm}", "--queries=70", "--seed=3")
    split = image_splits.Split(
        "test", np.zeros(2, "int32"), lambda i: np.zeros((len(i), *SHAPE))
    )
    context = parity.Context(epsilon=0.5, classes=10)
    for name in parity.ATTACKS:
        parity.ours(given, "saccade", name, None, split, range(2), context)
    attacks = {config.attack.name: config.attack for config in asked}
    members = autoattack.AutoAttack(norm, 0.5).members()
    for member in members[:3]:
        assert attacks[member.name] == member
    assert attacks["square"].n_queries == 70
    assert {a.norm for a in attacks.values()} == {norm}
    assert {config.seed for config in asked} == {3}


def test_pyautoattack_is_given_the_norm_and_the_members(flags, monkeypatch):
    made = []

    class AutoAttack:
        """Notes what it is told, and finds nothing."""

        def __init__(self, net, **settings):
            self.settings, self.attacks_to_run = settings, None
            self.square = types.SimpleNamespace(n_queries=5000)
            made.append(self)

        def run_standard_evaluation(self, x, y, batch_size):
            assert batch_size == len(x)
            return x, y

    fake = types.SimpleNamespace(AutoAttack=AutoAttack)
    monkeypatch.setitem(sys.modules, "pyautoattack", fake)
    given = flags("--queries=70", "--seed=3")
    context = parity.Context(epsilon=10.0, classes=10)
    run = parity.run_pyautoattack(given, "autoattack", None, None, context)
    images = np.zeros((2, 1, 4, 4))
    assert run(images, np.zeros(2)) is images
    assert made[0].settings == {
        "norm": "L1",
        "eps": 10.0,
        "seed": 3,
        "version": "standard",
    }
    assert made[0].attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert made[0].square.n_queries == 70
    assert parity.run_pyautoattack(given, "pgd", None, None, context) is None


def test_results_of_two_norms_have_names_of_their_own(flags):
    names = {parity.result_path(flags(), "saccade/apgd").name}
    names.add(parity.result_path(flags("--norm=l2"), "saccade/apgd").name)
    # The results of earlier versions, which had no norm, are still found.
    linf = flags("--norm=linf", "--epsilon=0.3")
    found = parity.result_path(linf, "saccade/apgd").name
    assert found == "saccade-apgd-eps0.3-500.json"
    assert len(names) == 2


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--norm=l3"], "linf"),
        (["--norm=linf", "--epsilon=10"], "--epsilon"),
        (["--epsilon=0"], "--epsilon"),
    ],
)
def test_bad_input_is_one_line(flags, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        parity.check(flags(*arguments))
    assert "\n" not in str(error.value)
