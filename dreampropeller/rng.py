r"""Randomness as a function of the step, not of the call.

A drift must have the same value whenever and wherever it is evaluated. Every random
number is therefore drawn from a generator whose seed is a hash of *(seed, step,
stream)*: repeated evaluation, another order or another process changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Random numbers of a step with an axis over its views.

    Args:
        generator: Their source; None: the global generator.
        device: Device of the source.
        total: Number of views that numbers are drawn for; None: as many as asked.
        part: The views whose numbers are returned; None: all.
    """

    generator: torch.Generator | None
    device: torch.device | str = "cpu"
    total: int | None = None
    part: slice | None = None

    def rand(self, *shape: int, axis: int = 0) -> Tensor:
        """Uniform numbers from 0 to 1.

        Args:
            *shape: The shape.
            axis: The axis over the views.
        """
        return self._drawn(torch.rand, shape, axis)

    def randn(self, *shape: int, axis: int = 0) -> Tensor:
        """Normal numbers; arguments as for `rand`."""
        return self._drawn(torch.randn, shape, axis)

    def randint(self, low: int, high: int, *shape: int, axis: int = 0) -> Tensor:
        """Integers from `low` to `high` − 1; further arguments as for `rand`."""
        return self._drawn(functools.partial(torch.randint, low, high), shape, axis)

    def _drawn(
        self, draw: Callable[..., Tensor], shape: tuple[int, ...], axis: int
    ) -> Tensor:
        if self.total is None or self.part is None:
            return draw(shape, generator=self.generator, device=self.device)
        asked = len(range(self.total)[self.part])
        if shape[axis] != asked:
            raise ValueError(
                f"Random numbers of shape {shape} were asked for by a shard with "
                f"{asked} views: axis {axis} is not that of the views. Pass the right "
                "`axis`, or draw numbers of the step itself from "
                "`StepRandom.generator`."
            )
        whole = (*shape[:axis], self.total, *shape[axis + 1 :])
        found = draw(whole, generator=self.generator, device=self.device)
        return found[(slice(None),) * axis + (self.part,)]


@dataclass(frozen=True)
class StepRandom:
    """Generators keyed by (seed, step, stream).

    Args:
        seed: The seed of the run.

    Example:
        >>> noise = StepRandom(0)
        >>> x = torch.randn(3, generator=noise.generator(7, "noise"))
        >>> torch.equal(x, torch.randn(3, generator=noise.generator(7, "noise")))
        True
    """

    seed: int

    def key(self, step: int, stream: str) -> int:
        """The 63-bit seed of a stream at a step."""
        text = f"{self.seed}/{step}/{stream}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(
        self, step: int, stream: str, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """A fresh generator for a stream at a step.

        Args:
            step: The step on the trajectory.
            stream: Name of the random numbers, such as "camera" or "noise". Different
                streams are independent, so adding one never shifts another.
            device: Device of the generator. CPU and GPU generators of the same key
                draw different numbers: draw on CPU what must not depend on the device.
        """
        return torch.Generator(device).manual_seed(self.key(step, stream))

    def draws(
        self, step: int, stream: str | None, device: torch.device | str = "cpu"
    ) -> Draws:
        """Random numbers for each view of a step, of which a shard takes its own.

        Equal to those drawn from `generator` with the same shapes.

        Args:
            step: The step on the trajectory.
            stream: Name of the random numbers; None: the global generator, as `scope`
                has seeded it.
            device: Device of the numbers.
        """
        if stream is None:
            return Draws(None, device)
        return Draws(self.generator(step, stream, device), device)

    @contextlib.contextmanager
    def scope(self, step: int, stream: str = "global") -> Iterator[None]:
        """Seed the *global* generators inside the block, and restore them after it.

        For code that draws without a generator argument (dropout, `torch.randn`,
        Python's `random`, numpy where it is loaded). Slower than `generator`, and it
        replays only code that draws in the same order each time.
        """
        key = self.key(step, stream)
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        numpy = sys.modules.get("numpy")
        python_state = random.getstate()
        numpy_state = numpy.random.get_state() if numpy else None
        cpu_state = torch.default_generator.get_state()
        cuda_states = torch.cuda.get_rng_state_all() if cuda else []
        # Not `torch.manual_seed`: where CUDA sleeps it records a traceback, at 1 ms.
        torch.default_generator.manual_seed(key)
        if cuda:
            torch.cuda.manual_seed_all(key)
        random.seed(key)
        if numpy:
            numpy.random.seed(key % 2**32)
        try:
            yield
        finally:
            torch.default_generator.set_state(cpu_state)
            if cuda:
                torch.cuda.set_rng_state_all(cuda_states)
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


STREAM = "random/"
"""Prefix of the entries of a drift that hold the states of the global generators."""


def streams() -> dict[str, Tensor]:
    """The states of the global generators, as integers."""
    _, words, gauss = random.getstate()
    found = {
        "torch": torch.default_generator.get_state(),
        "python": torch.tensor([*words, gauss is not None, _bits(gauss or 0.0)]),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, words, *rest, gauss = numpy.random.get_state()
        found["numpy"] = torch.tensor([*words.tolist(), *rest, _bits(gauss)])
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return {STREAM + name: state for name, state in found.items()}


def set_streams(states: Mapping[str, Tensor]) -> None:
    """Put the global generators into recorded states; those not recorded stay."""
    if STREAM + "torch" in states:
        torch.default_generator.set_state(states[STREAM + "torch"].cpu())
    if STREAM + "python" in states:
        *words, has_gauss, bits = states[STREAM + "python"].tolist()
        random.setstate((3, tuple(words), _number(bits) if has_gauss else None))
    if STREAM + "numpy" in states and "numpy" in sys.modules:
        *words, place, has_gauss, bits = states[STREAM + "numpy"].tolist()
        state = ("MT19937", words, place, has_gauss, _number(bits))
        sys.modules["numpy"].random.set_state(state)
    if STREAM + "cuda" in states:
        torch.cuda.set_rng_state(states[STREAM + "cuda"].cpu())


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
