"""Geweke's test: prior simulation and the chain with renewed data agree in law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dreampropeller.mixtures.blocks import Blocks
from dreampropeller.mixtures.exact import ExactChain
from dreampropeller.mixtures.family import Family, take
from dreampropeller.mixtures.priors import (
    DirichletProcess,
    HierarchicalDirichletProcess,
    PartitionPrior,
)
from tests.mixtures.exact import effective_size, gaussian

GROUP = torch.tensor([0, 0, 1, 1])
ROUNDS = 3000


def data(family: Family, labels: torch.Tensor, rng: np.random.Generator) -> np.ndarray:
    """Points given labels only: components from the prior."""
    none = family.statistics(
        family.block(np.zeros((1, family.dim))), torch.tensor([-1]), 1
    )
    params = family.draw(take(none, [0] * (int(labels.max()) + 1)), rng)
    return family.simulate(params, labels, rng)


def crp(alpha: float, n: int, rng: np.random.Generator) -> torch.Tensor:
    labels = [0]
    for i in range(1, n):
        weights = np.append(np.bincount(labels), alpha)
        labels.append(int(rng.choice(len(weights), p=weights / (alpha + i))))
    return torch.tensor(labels)


def franchise(gamma: float, alpha: float, rng: np.random.Generator) -> torch.Tensor:
    """Labels of the Chinese restaurant franchise."""
    dishes: list[int] = []  # of all tables
    labels = []
    for group in GROUP.unique():
        tables: list[int] = []
        seats: list[int] = []
        for i in range(int((group == GROUP).sum())):
            weights = np.append(np.bincount(seats, minlength=len(tables)), alpha)
            at = int(rng.choice(len(weights), p=weights / (alpha + i)))
            if at == len(tables):
                top = np.append(np.bincount(dishes), gamma)
                tables.append(int(rng.choice(len(top), p=top / top.sum())))
                dishes.append(tables[-1])
            seats.append(at)
            labels.append(tables[at])
    return torch.tensor(labels)


def summary(family: Family, x: np.ndarray, labels: torch.Tensor) -> list[float]:
    first = torch.where(labels == labels[0], 0, -1)
    own = family.statistics(family.block(x), first, 1)
    return [
        float(labels.max() + 1),
        float(np.tanh(x / 3).mean()),
        float(np.log1p(x**2).mean()),
        float(np.tanh(x[0] / 3) @ np.tanh(x[1] / 3)),
        float(own["n"][0]),
    ]


def successive(prior: PartitionPrior, group: torch.Tensor, start: torch.Tensor) -> list:
    family, rng = gaussian(), np.random.default_rng(1)
    chain = ExactChain(
        Blocks(family, data(family, start, rng)), prior, group, 0, start, 1, rounds=1
    )
    found = []
    for _ in range(ROUNDS):
        chain.sweep()
        params = family.draw(chain.sums, rng)
        x = family.simulate(params, chain.labels, rng)
        found.append(summary(family, x, chain.labels))
        chain.blocks = Blocks(family, x)
        chain.sums = chain.gather(chain.labels, chain.num_clusters)
    return found


def agree(forward: list, chain: list) -> None:
    for a, b in zip(np.array(forward).T, np.array(chain).T, strict=True):
        error = math.hypot(
            a.std() / math.sqrt(len(a)), b.std() / math.sqrt(effective_size(list(b)))
        )
        assert abs(a.mean() - b.mean()) < 4 * error


pytestmark = pytest.mark.long


@pytest.mark.parametrize("sampled", [False, True])
def test_dirichlet_process(sampled: bool) -> None:
    family, rng = gaussian(), np.random.default_rng(0)
    forward = []
    for _ in range(6000):
        alpha = rng.gamma(3) / 2 if sampled else 1.5
        labels = crp(alpha, 4, rng)
        forward.append(summary(family, data(family, labels, rng), labels))
    prior = DirichletProcess((3.0, 2.0) if sampled else 1.5)
    group = torch.zeros(4, dtype=torch.long)
    agree(forward, successive(prior, group, crp(1.5, 4, rng)))


def test_hierarchical_dirichlet_process_with_sampled_concentrations() -> None:
    family, rng = gaussian(), np.random.default_rng(0)
    forward = []
    for _ in range(6000):
        labels = franchise(rng.gamma(3) / 2, rng.gamma(4) / 3, rng)
        forward.append(summary(family, data(family, labels, rng), labels))
    prior = HierarchicalDirichletProcess((3.0, 2.0), (4.0, 3.0), 2)
    agree(forward, successive(prior, GROUP, franchise(1.5, 1.3, rng)))
