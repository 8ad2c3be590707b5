r"""Randomness as a function of the step, not of the call.

A drift must have the same value whenever and wherever it is evaluated. Every random
number is therefore drawn from a generator whose seed is a hash of *(seed, step,
stream)*: repeated evaluation, another order or another process changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch


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
