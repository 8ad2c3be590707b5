r"""Random draws that do not depend on the number of workers.

Draws for all clusters come from a numpy generator keyed by (seed, sweep, stream). Draws
for a point come from its block's generator, keyed by (seed, sweep, stream, block), so a
point has the same draws for any number of workers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dreampropeller.rng import StepRandom


def generator(seed: int, sweep: int, stream: str) -> np.random.Generator:
    """The generator of a stream at a sweep."""
    key = StepRandom(seed).key(sweep, f"mixtures/{stream}")
    return np.random.Generator(np.random.Philox(key=key))


def uniforms(seed: int, sweep: int, stream: str, block: int, size: int) -> Tensor:
    """One number in [0, 1) for every point of a block, shape ``(size,)``, float32."""
    source = StepRandom(seed).generator(sweep, f"mixtures/{stream}/{block}")
    return torch.rand(size, generator=source)


def log_gamma_draws(shape: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""Logarithms of $\mathrm{Gamma}(a, 1)$ draws, without underflow at small $a$.

    If $g \sim \mathrm{Gamma}(a + 1)$ and $u \sim U(0, 1)$, then $g u^{1/a} \sim
    \mathrm{Gamma}(a)$.
    """
    tiny = np.finfo(float).tiny
    shape = np.maximum(shape, 1e-300)
    draws = rng.standard_gamma(shape + 1)
    return np.log(np.maximum(draws, tiny)) - rng.standard_exponential(shape.shape) / (
        shape
    )


def log_dirichlet(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Logarithms of Dirichlet draws over the last axis; same shape as `weights`."""
    logs = log_gamma_draws(weights, rng)
    top = logs.max(-1, keepdims=True)
    total = np.log(np.exp(logs - top).sum(-1, keepdims=True)) + top
    return logs - total
