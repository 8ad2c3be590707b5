"""Refusal of what grows with each evaluation of one step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from dreampropeller.counters import Counters, lengthened
from dreampropeller.tree import State
from dreampropeller.verification import NotReproducible, listed, names, require_equal

_SHOWN = 5
"""Paths named one by one; of more, the objects that hold them."""
Lists: TypeAlias = dict[str, tuple[Any, int]]
"""Lists by path, with their lengths before they grew."""


def refuse_growing(
    step: int,
    counters: Callable[[], Counters],
    again: Callable[[], State],
    noise: Mapping[str, float],
    lists: Lists | None = None,
    elsewhere: Collection[str] = (),
) -> tuple[Counters, Lists]:
    """Evaluate a step once more, and compare what the loss refers to.

    A list that has grown may be a log: the step is then evaluated with a longer one,
    and must not differ.

    Args:
        step: The step, which was evaluated before.
        counters: Records what the loss refers to.
        again: Evaluates the step once more, at the same state.
        noise: See `dreampropeller.verification.Probe`.
        lists: Lists that have grown at another step, which this one may read.
        elsewhere: Names to ignore that belong to an optimizer or scheduler.

    Returns:
        The record after the evaluation, and all lists that have grown.

    Raises:
        NotReproducible: A number or tensor differs, or the loss reads such a list, or
            a name to ignore is unknown.
    """
    before = counters()
    drift = again()
    after = counters()
    unknown = {*before.unknown()} & {*after.unknown()} - {*elsewhere}
    if unknown:
        raise NotReproducible(
            f"`ignore` names {names(unknown)}, which neither the module nor the loss, "
            "optimizer or scheduler refers to: write the name as the check gives it."
        )
    changed = _counts(before.changed(after), after)
    if accumulation(changed, after):
        raise NotReproducible(accumulation(changed, after))
    if changed:
        owners = {path.split(".")[0].split("[")[0] for path in changed}
        short = changed if len(changed) <= _SHOWN else sorted(owners)
        raise NotReproducible(
            f"{names(changed)} changed although step {step} was evaluated again: a "
            "count, an average or the time of evaluations, of which a solve makes "
            "others than the loop. Compute it from the step, register it as a buffer "
            "of the module, or return it as a scalar to log. If nothing reads it, "
            f"write `ignore={listed(short)}`."
        )
    grown = {**(lists or {}), **before.grown(after)}
    if grown:
        with lengthened(grown.values()):
            longer = again()
        require_equal(
            drift,
            longer,
            f"Step {step} was evaluated again with a longer {names(grown)}",
            noise,
            lambda: "Each evaluation appends to it, and the loss reads it.",
        )
    return after, grown


def accumulation(changed: Collection[str], met: Counters) -> str:
    """Why parts of an update cannot be counted, if `accelerate` counts them.

    Args:
        changed: Paths that an evaluation has changed.
        met: What the loss refers to.
    """
    for path, steps in _accelerators(met):
        if steps > 1 and f"{path}.step" in changed:
            return (
                f"The loss uses `{path}.accumulate`, which counts its calls: an update "
                f"is made after {steps} of them. Here a step is one update: write "
                "`gradient_accumulation_steps=1`, or leave `accumulate` out, and "
                f"return the mean of the losses of the {steps} batches of a step."
            )
    return ""


def _accelerators(met: Counters) -> list[tuple[str, int]]:
    """Path and parts per update of each object of `accelerate`."""
    return [
        (path, getattr(one, "gradient_accumulation_steps", 1))
        for path, one in met.others.items()
        if type(one).__name__ == "Accelerator"
        and type(one).__module__.split(".")[0] == "accelerate"
    ]


def _counts(changed: list[str], met: Counters) -> list[str]:
    """The paths without a count of `accelerate` by which every call is an update."""
    whole = [f"{path}.step" for path, steps in _accelerators(met) if steps == 1]
    return [path for path in changed if path not in whole]


def refuse_counting(model: object, again: Callable[[], object]) -> None:
    """Refuse a model whose hooks or wrappers count its calls.

    Args:
        model: The model, or what holds it as `unet`.
        again: Evaluates it once more at the same state.

    Raises:
        NotReproducible: A number or tensor that it refers to has changed.
    """
    before = Counters({"unet": getattr(model, "unet", model)})
    again()
    changed = before.changed(before.again())
    if changed:
        raise NotReproducible(
            f"One more call of the model changed {names(changed)}: a hook or wrapper "
            "counts calls (one that keeps features over several steps, for example), "
            "and parallel sampling makes more of them, in another order. Remove it, "
            "call the pipeline itself, or write `check=False` if nothing reads it."
        )
