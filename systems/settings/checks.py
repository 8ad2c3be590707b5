"""Checks of settings, shared by the config classes."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a number that is too small, and values that are not numbers.

    Raises:
        ValueError: Names the setting and the least value.
    """
    if not value >= least:
        raise ValueError(f"`{name}` is {value}: write {least} or more.")


def check_range(name: str, value: Sequence[float], least: float, most: float) -> None:
    """Refuse a range that is reversed or out of bounds.

    Raises:
        ValueError: Names the setting and its bounds.
    """
    if not least <= value[0] <= value[1] <= most:
        raise ValueError(
            f"`{name}` is {list(value)}: write `[low, high]` with "
            f"{least} ≤ low ≤ high ≤ {most}."
        )


def between(name: str, value: float, least: float, most: float) -> None:
    """Refuse a number out of bounds.

    Raises:
        ValueError: Names the setting and its bounds.
    """
    if not least <= value <= most:
        raise ValueError(f"`{name}` is {value}: write a number from {least} to {most}.")


def check_color(name: str, value: Sequence[float]) -> None:
    """Refuse a colour with a channel out of bounds.

    Raises:
        ValueError: Names the setting and its bounds.
    """
    if not all(0 <= channel <= 1 for channel in value):
        raise ValueError(f"`{name}` is {list(value)}: write channels from 0 to 1.")


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a word that is not in the list.

    Raises:
        ValueError: Names the setting and the list.
    """
    if value not in allowed:
        raise ValueError(f"`{name}` is `{value}`: write {' or '.join(allowed)}.")
