"""What kind of number an argument is; bools are none."""

from __future__ import annotations


def is_number(value: object) -> bool:
    """Whether a value is a real number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
