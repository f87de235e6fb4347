"""Errors for unknown names, which list the near ones."""

import difflib
from collections.abc import Collection, Iterable


def near(name: str, known: Iterable[str]) -> str:
    """Returns "Did you mean ...?" for a misspelt name, or an empty text."""
    matches = difflib.get_close_matches(str(name), list(known), 3, 0.5)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""


def require_known(flag: str, value: str, known: Collection[str]) -> None:
    """Raises a ValueError with the near names if a flag's value is unknown."""
    if value not in known:
        raise ValueError(
            f"Unknown --{flag}={value}.{near(value, known)} "
            f"Known: {', '.join(known)}."
        )
