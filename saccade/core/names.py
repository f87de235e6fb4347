"""Errors for unknown names, which list the known and the near ones."""

import difflib
from collections.abc import Collection, Iterable


def near(name: object, known: Iterable[object]) -> str:
    """Returns " Did you mean ...?" for a misspelt name, or an empty text.

    Examples:
        >>> near("resnt", ["resnet", "ecnn"])
        ' Did you mean resnet?'
    """
    folded = {str(other).lower(): other for other in known}
    found = difflib.get_close_matches(str(name).lower(), folded, 3, 0.5)
    matches = [str(folded[key]) for key in found]
    return f" Did you mean {' or '.join(matches)}?" if matches else ""


def unknown(
    field: str,
    value: object,
    known: Iterable[object],
    also: str = "",
    *,
    similar: Iterable[object] = (),
) -> ValueError:
    """Returns the error for a value that is not one of the known names.

    Args:
        field: Name of the argument, of the flag with its dashes, or of an
            environment variable.
        value: The value.
        known: The names that are known.
        also: What else is possible, appended to the list of names.
        similar: Further names to suggest that are too many to list.

    Examples:
        >>> print(unknown("p", "l3", ("l1", "linf")))
        Expected p to be one of l1, linf. Received: p='l3'. Did you mean l1?
        >>> print(unknown("--seed", "x", ("0",), " or a file"))
        Expected --seed to be one of 0 or a file. Received: --seed=x.
    """
    names = [str(name) for name in known]
    argument = not (field.startswith("--") or field.isupper())
    shown = repr(value) if argument else value
    return ValueError(
        f"Expected {field} to be one of {', '.join(names) or 'none'}{also}. "
        f"Received: {field}={shown}.{near(value, (*names, *similar))}"
    )


def require(field: str, value: object, known: Collection[object]) -> None:
    """Raises `unknown` if the value of an argument is not a known name."""
    if value not in known:
        raise unknown(field, value, known)


def require_known(flag: str, value: object, known: Collection[object]) -> None:
    """Raises `unknown` if the value of a flag is not a known name."""
    require(f"--{flag}", value, known)
