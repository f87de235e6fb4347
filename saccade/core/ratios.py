"""How a radius or a step size is written: `8/255`, 0.05."""

_SHORT = 5  # A decimal of so many characters is not written as a ratio.


def levels(value: float) -> float | None:
    """Returns k if a value should be written as k/255, otherwise None.

    k may have one decimal. Short decimals stay as they are, although 0.2, for
    example, is 51/255.

    Examples:
        >>> levels(8 / 255), levels(0.5 / 255), levels(0.2)
        (8.0, 0.5, None)
    """
    found = round(value * 255, 6)
    short = len(f"{value:.6g}") <= _SHORT
    exact = abs(found * 10 - round(found * 10)) < 1e-4
    return round(found, 1) if exact and 0 < found < 255 and not short else None


def text(value: float) -> str:
    """Writes a radius for a reader.

    Examples:
        >>> text(8 / 255), text(0.05), text(1.23456)
        ('8/255', '0.05', '1.235')
    """
    found = levels(value)
    return f"{found:g}/255" if found else f"{value:.4g}"


def with_decimal(value: float) -> str:
    """Writes a radius for a table in which radii of both forms are compared.

    Examples:
        >>> with_decimal(8 / 255), with_decimal(0.05)
        ('0.03137 (8/255)', '0.05')
    """
    decimal = f"{value:.4g}"
    return f"{decimal} ({text(value)})" if levels(value) else decimal


def in_file_name(value: float) -> str:
    """Writes a radius for the name of a folder.

    Only whole k become k_255, and only if value is k/255 up to rounding:
    folders of earlier versions have these names.

    Examples:
        >>> in_file_name(8 / 255), in_file_name(0.05), in_file_name(0.5 / 255)
        ('8_255', '0.05', '0.00196078')
    """
    found = levels(value)
    if found and found % 1 == 0 and abs(value * 255 - found) < 1e-9:
        return f"{found:g}_255"
    return f"{value:.6g}"
