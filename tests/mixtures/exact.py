"""Exact posteriors of partitions by enumeration, the oracle of the samplers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from scipy.special import gammaln

from dreampropeller.mixtures.blocks import Blocks
from dreampropeller.mixtures.family import Family
from dreampropeller.mixtures.gaussian import DiagonalGaussian, FullGaussian
from dreampropeller.mixtures.multinomial import Multinomial

Partition = tuple[tuple[int, ...], ...]

COUNTS = np.array([[3, 0, 1], [2, 1, 0], [0, 3, 1], [0, 1, 2], [1, 1, 1]], float)
MORE = np.array([[3, 0, 1], [0, 2, 2], [1, 4, 0]], float)
ALPHA = 1.3


def multinomial() -> Multinomial:
    return Multinomial(torch.tensor([0.6, 0.9, 0.5]))


def points(n: int, dim: int = 2) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(size=(n, dim)) + 2.2 * (np.arange(n) % 2)[:, None]


def gaussian(dim: int = 2) -> FullGaussian:
    psi = 0.8 * torch.eye(dim) + 0.1
    return FullGaussian(torch.full((dim,), 0.7), 0.3, dim + 1.5, psi)


def diagonal(dim: int = 2) -> DiagonalGaussian:
    return DiagonalGaussian(torch.full((dim,), 0.7), 0.3, 2.5, torch.full((dim,), 0.9))


def partitions(n: int) -> Iterator[list[list[int]]]:
    """All set partitions of 0 .. n - 1."""

    def extend(i: int, sets: list[list[int]]) -> Iterator[list[list[int]]]:
        if i == n:
            yield [list(own) for own in sets]
            return
        for own in sets:
            own.append(i)
            yield from extend(i + 1, sets)
            own.pop()
        sets.append([i])
        yield from extend(i + 1, sets)
        sets.pop()

    yield from extend(0, [])


def as_key(sets: Iterable[Sequence[int]]) -> Partition:
    return tuple(sorted(tuple(sorted(int(i) for i in own)) for own in sets))


def key_of(labels: torch.Tensor) -> Partition:
    values = labels.tolist()
    return as_key(
        [[i for i, v in enumerate(values) if v == k] for k in sorted(set(values))]
    )


def marginals(family: Family, x: np.ndarray) -> Callable[[Sequence[int]], float]:
    """Log marginal likelihood of any subset of the points, all computed at once."""
    n = len(x)
    subsets = [s for r in range(1, n + 1) for s in itertools.combinations(range(n), r)]
    block = family.block(x)
    found = {}
    for s in subsets:
        key = torch.full((n,), -1)
        key[list(s)] = 0
        found[s] = float(family.log_marginal(family.statistics(block, key, 1))[0])
    return lambda own: found[tuple(sorted(own))]


def normalise(logs: dict[Partition, float]) -> dict[Partition, float]:
    top = max(logs.values())
    total = sum(math.exp(v - top) for v in logs.values())
    return {key: math.exp(v - top) / total for key, v in logs.items()}


def dp_posterior(family: Family, x: np.ndarray, alpha: float) -> dict[Partition, float]:
    """Equation (2)."""
    f = marginals(family, x)
    return normalise(
        {
            as_key(sets): len(sets) * math.log(alpha)
            + sum(math.lgamma(len(own)) + f(own) for own in sets)
            for sets in partitions(len(x))
        }
    )


def stirling(n: int) -> np.ndarray:
    """Unsigned Stirling numbers of the first kind up to n."""
    s = np.zeros((n + 1, n + 1))
    s[0, 0] = 1
    for i in range(1, n + 1):
        s[i, 1:] = s[i - 1, :-1] + (i - 1) * s[i - 1, 1:]
    return s


def hdp_posterior(
    family: Family, x: np.ndarray, group: np.ndarray, gamma: float, alpha: float
) -> dict[Partition, float]:
    """Equation (12) summed over all table counts."""
    f, s = marginals(family, x), stirling(len(x))
    logs = {}
    for sets in partitions(len(x)):
        cells = [(k, int(np.sum(group[own] == j))) for j in np.unique(group)
                 for k, own in enumerate(sets)]  # fmt: skip
        cells = [(k, n) for k, n in cells if n]
        total = 0.0
        for tables in itertools.product(*[range(1, n + 1) for _, n in cells]):
            per = np.zeros(len(sets))
            weight = 1.0
            for (k, n), m in zip(cells, tables, strict=True):
                per[k] += m
                weight *= s[n, m] * alpha**m
            top = gammaln(gamma) - gammaln(gamma + per.sum()) + gammaln(per).sum()
            total += weight * math.exp(top)
        data = sum(f(own) for own in sets)
        logs[as_key(sets)] = math.log(total) + len(sets) * math.log(gamma) + data
    return normalise(logs)


def expected_clusters(posterior: dict[Partition, float]) -> float:
    return sum(len(key) * p for key, p in posterior.items())


def total_variation(found: Counter[Partition], exact: dict[Partition, float]) -> float:
    n = sum(found.values())
    return 0.5 * sum(abs(found[key] / n - p) for key, p in exact.items())


def effective_size(values: Sequence[int]) -> float:
    """Effective sample size by batch means, at most the number of values."""
    v = np.asarray(values, float)
    size = max(int(len(v) ** 0.5), 1)
    batches = v[: len(v) // size * size].reshape(-1, size).mean(1)
    spread = batches.var(ddof=1) * size
    return len(v) * min(v.var() / spread, 1.0) if spread else len(v)


def blocks(family: Family, x: np.ndarray, size: int = 16384) -> Blocks:
    return Blocks(family, x, size=size)
