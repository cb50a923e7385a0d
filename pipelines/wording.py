"""Words of reports."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one.

    Args:
        number: how many.
        noun: in the singular; its plural ends in s.

    Example:
        >>> counted(1, "seed"), counted(3_000, "seed")
        ('1 seed', '3,000 seeds')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
