"""A drift that fails at a guess is one that is not finite, and it can be seen."""

from __future__ import annotations

import logging

import pytest
import torch

from dreampropeller.dispatch.guesses import Guesses
from dreampropeller.tree import Aux, State, all_finite


def fails(step: int, y: State) -> tuple[State, Aux]:
    raise IndexError("out of range")


def test_an_empty_tensor_does_not_stand_for_the_drift() -> None:
    y = {"x": torch.ones(2), "none": torch.ones(0)}
    drift, _ = Guesses().evaluate(fails, 1, 3, y)
    assert all_finite([drift]) == [False]
    with pytest.raises(IndexError, match="out of range"):
        Guesses().evaluate(fails, 1, 3, {"none": torch.ones(0)})


def test_a_loop_that_fails_at_every_guess_says_so_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guesses = Guesses()
    with caplog.at_level(logging.WARNING):
        for step in range(150):
            guesses.evaluate(fails, 1, step, {"x": torch.ones(1)})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    for count, message in zip((1, 10, 100), said, strict=True):
        assert f"(failures so far: {count})" in message


def test_memory_that_runs_out_is_no_bad_guess() -> None:
    def runs_out(step: int, y: State) -> tuple[State, Aux]:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Guesses().evaluate(runs_out, 1, 3, {"x": torch.ones(1)})
