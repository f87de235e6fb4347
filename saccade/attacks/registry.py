"""Every attack by name."""

from saccade.attacks import autoattack, fab, spsa, square
from saccade.attacks import gradient as gradient_attacks

ATTACKS = {
    **gradient_attacks.ATTACKS,
    **spsa.ATTACKS,
    **square.ATTACKS,
    **fab.ATTACKS,
    **autoattack.ATTACKS,
}
