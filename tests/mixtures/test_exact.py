"""`method="exact"` has the posterior of the partition, found by enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from dreampropeller.mixtures import split_merge
from dreampropeller.mixtures.chain import Chain
from dreampropeller.mixtures.exact import ExactChain, guarded
from dreampropeller.mixtures.family import Family, add, take
from dreampropeller.mixtures.priors import (
    DirichletProcess,
    HierarchicalDirichletProcess,
    PartitionPrior,
)
from dreampropeller.mixtures.subclusters import SubclusterChain
from tests.mixtures.exact import (
    ALPHA,
    COUNTS,
    MORE,
    Partition,
    blocks,
    diagonal,
    dp_posterior,
    effective_size,
    expected_clusters,
    gaussian,
    hdp_posterior,
    key_of,
    multinomial,
    partitions,
    points,
    total_variation,
)

FIVE = {
    "multinomial": (multinomial(), COUNTS),
    "full": (gaussian(), points(5)),
    "diagonal": (diagonal(), points(5)),
}


def chain_of(
    family: Family,
    x: np.ndarray,
    prior: PartitionPrior,
    labels: list[int] | None = None,
    group: list[int] | None = None,
) -> ExactChain:
    start = torch.tensor([0] * len(x) if labels is None else labels)
    groups = torch.tensor([0] * len(x) if group is None else group)
    return ExactChain(blocks(family, x, 3), prior, groups, 0, start, 1, rounds=1)


def labels_of(sets: Partition | list[list[int]], n: int) -> list[int]:
    return [next(k for k, own in enumerate(sets) if i in own) for i in range(n)]


def transitions(chain: ExactChain, i: int, j: int) -> dict[Partition, float]:
    """Where a proposal with anchors i and j leads, at one launch state per set."""
    a, b = int(chain.labels[i]), int(chain.labels[j])
    inside = (chain.labels == a) | (chain.labels == b)
    member = torch.where(inside, 2, -1)
    member[i], member[j] = 0, 1
    pooled = take(chain.sums, [a])
    if a != b:
        pooled = add(pooled, take(chain.sums, [b]))
    launch = split_merge.prepare(chain, member, pooled, f"{i} {j}", 1)
    rest = torch.nonzero(member == 2)[:, 0]
    rng = np.random.default_rng(0)
    found: dict[Partition, float] = defaultdict(float)
    here = key_of(chain.labels)
    options = [chain.labels == b] if a != b else []
    if a == b:
        for bits in itertools.product((0, 1), repeat=len(rest)):
            given = torch.zeros(len(member), dtype=torch.long)
            given[rest], given[j] = torch.tensor(bits, dtype=torch.long), 1
            options.append(given == 1)
    for right in options:
        sides = launch.sides(chain, "sides", right.long())
        log_a, _ = split_merge._log_ratio(chain, (a, b), sides, pooled, rng)
        chance = math.exp(sides.log_q) if a == b else 1.0
        accepted = chance * math.exp(min(0.0, log_a if a == b else -log_a))
        there = chain.labels.clone()
        there[inside] = a
        if a == b:
            there[right & inside] = chain.num_clusters
        found[key_of(there)] += accepted
        found[here] += chance - accepted
    return found


@pytest.mark.parametrize(("family", "x"), FIVE.values(), ids=FIVE)
def test_the_matrix_of_a_proposal_leaves_the_posterior(
    family: Family, x: np.ndarray
) -> None:
    exact = dp_posterior(family, x, ALPHA)
    after = dict.fromkeys(exact, 0.0)
    pairs = list(itertools.permutations(range(5), 2))
    for sets, p in exact.items():
        chain = chain_of(family, x, DirichletProcess(ALPHA), labels_of(sets, 5))
        for i, j in pairs[::7]:  # every pair's kernel is invariant by itself
            for key, chance in transitions(chain, i, j).items():
                after[key] += p * chance / len(pairs[::7])
    assert sum(after.values()) == pytest.approx(1, abs=1e-6)
    worst = max(abs(after[key] - p) for key, p in exact.items())
    assert worst < 1e-6  # q is float32


def frequencies(chain: Chain, sweeps: int) -> tuple[Counter[Partition], float]:
    """Partitions visited, and the standard error of the mean number of clusters."""
    found = Counter[Partition]()
    for _ in range(sweeps):
        chain.sweep()
        found[key_of(chain.labels)] += 1
    num = chain.history.num_clusters
    return found, float(np.std(num) / math.sqrt(effective_size(num)))


long = pytest.mark.long
SHORT_AND_LONG = [(200, 0.27), pytest.param(10_000, 0.05, marks=long)]
"""Sweeps, and the total variation they must reach; the published kernel: 0.31."""


@pytest.mark.parametrize(("sweeps", "bound"), SHORT_AND_LONG)
@pytest.mark.parametrize("name", ["multinomial", pytest.param("full", marks=long)])
def test_five_points_have_the_enumerated_posterior(
    name: str, sweeps: int, bound: float
) -> None:
    family, x = FIVE[name]
    exact = dp_posterior(family, x, ALPHA)
    chain = chain_of(family, x, DirichletProcess(ALPHA))
    found, error = frequencies(chain, sweeps)
    assert total_variation(found, exact) < bound
    mean = np.mean(chain.history.num_clusters)
    assert abs(mean - expected_clusters(exact)) < 4 * error


def test_the_enumeration_has_the_known_mean() -> None:
    exact = dp_posterior(multinomial(), COUNTS, ALPHA)
    assert len(exact) == 52
    assert expected_clusters(exact) == pytest.approx(2.8108, abs=1e-4)
    group = np.array([0, 0, 0, 1, 1])
    hierarchical = hdp_posterior(multinomial(), COUNTS, group, 1.1, 0.8)
    assert expected_clusters(hierarchical) == pytest.approx(2.1388, abs=1e-4)


@long
@pytest.mark.parametrize("n", [6, 8])
@pytest.mark.parametrize("name", ["multinomial", "full"])
def test_the_mean_number_of_clusters(n: int, name: str) -> None:
    family = FIVE[name][0]
    counts = np.concatenate([COUNTS, MORE])[:n]
    x = counts if name == "multinomial" else points(n)
    exact = dp_posterior(family, x, ALPHA)
    assert len(exact) == {6: 203, 8: 4140}[n]
    chain = chain_of(family, x, DirichletProcess(ALPHA))
    found, error = frequencies(chain, 3000)
    mean = np.mean(chain.history.num_clusters)
    assert abs(mean - expected_clusters(exact)) < 4 * error
    if n == 6:
        assert total_variation(found, exact) < 0.15


@pytest.mark.parametrize(("sweeps", "bound"), SHORT_AND_LONG)
def test_groups_have_the_enumerated_posterior(sweeps: int, bound: float) -> None:
    group = [0, 0, 0, 1, 1]
    exact = hdp_posterior(multinomial(), COUNTS, np.array(group), 1.1, 0.8)
    prior = HierarchicalDirichletProcess(1.1, 0.8, 2)
    chain = chain_of(multinomial(), COUNTS, prior, group=group)
    found, error = frequencies(chain, sweeps)
    assert total_variation(found, exact) < bound
    mean = np.mean(chain.history.num_clusters)
    assert abs(mean - expected_clusters(exact)) < 4 * error


def test_without_data_clusters_follow_the_prior() -> None:
    chain = chain_of(multinomial(), np.zeros((6, 3)), DirichletProcess(ALPHA))
    _, error = frequencies(chain, 150)
    wanted = sum(ALPHA / (ALPHA + i) for i in range(6))
    assert abs(np.mean(chain.history.num_clusters) - wanted) < 4 * error


def test_without_data_groups_follow_the_prior() -> None:
    group, none = [0, 0, 0, 1, 1], np.zeros((5, 3))
    prior = HierarchicalDirichletProcess(1.1, 0.8, 2)
    chain = chain_of(multinomial(), none, prior, group=group)
    _, error = frequencies(chain, 300)
    exact = hdp_posterior(multinomial(), none, np.array(group), 1.1, 0.8)
    wanted = expected_clusters(exact)
    assert abs(np.mean(chain.history.num_clusters) - wanted) < 4 * error


@long
def test_subclusters_are_as_far_from_the_posterior_as_documented() -> None:
    """The table of `docs/mixtures.md`: this method is no sampler of the posterior."""
    exact, zeros = dp_posterior(multinomial(), COUNTS, ALPHA), torch.zeros(5).long()
    points_of = blocks(multinomial(), COUNTS)
    chain = SubclusterChain(points_of, DirichletProcess(ALPHA), zeros, 0, zeros)
    found, error = frequencies(chain, 2000)
    assert total_variation(found, exact) == pytest.approx(0.60, abs=0.05)
    assert abs(np.mean(chain.history.num_clusters) - 1.58) < 4 * error


def test_log_joint_does_not_depend_on_the_order_of_the_points() -> None:
    order, labels = np.array([3, 0, 4, 2, 1]), np.array([0, 1, 0, 2, 1])
    for family, x in FIVE.values():
        one = chain_of(family, x, DirichletProcess(ALPHA), labels.tolist())
        moved = labels[order].tolist()
        two = chain_of(family, x[order], DirichletProcess(ALPHA), moved)
        assert two.log_joint() == pytest.approx(one.log_joint(), rel=1e-12)


def test_log_joint_is_the_enumerated_one() -> None:
    family, x = FIVE["full"]
    exact = dp_posterior(family, x, ALPHA)
    logs = {}
    for sets in partitions(5):
        chain = chain_of(family, x, DirichletProcess(ALPHA), labels_of(sets, 5))
        logs[key_of(chain.labels)] = chain.log_joint()
    total = np.logaddexp.reduce(list(logs.values()))
    for key, p in exact.items():
        assert math.exp(logs[key] - total) == pytest.approx(p, rel=1e-9)


def test_group_ratio_is_that_of_the_joint_law() -> None:
    """Equation (13) without q: the joint law of labels and top weights, both sides."""
    rng = np.random.default_rng(0)
    prior = HierarchicalDirichletProcess(1.1, 0.8, 3)
    prior.begin(2)
    left, right = np.array([2, 0, 1]), np.array([1, 3, 0])
    other = np.array([1, 1, 4])
    before = prior.log_probability(np.stack([left + right, other], 1))
    ratio, u = prior.split_ratio(0, left, right, rng)
    weight = math.exp(prior.log_beta[0])
    prior.split(0, u)
    after = prior.log_probability(np.stack([left, other, right], 1))
    p, q = 0.5 + 2, 0.5 + 2
    beta = math.lgamma(p + q) - math.lgamma(p) - math.lgamma(q)
    density = beta + (p - 1) * math.log(u) + (q - 1) * math.log(1 - u)
    # The Jacobian of (β_a, u) → (β_b, β_c) is β_a.
    assert ratio == pytest.approx(after - before + math.log(weight) - density)
    assert prior.merge_ratio(0, 2, left, right) == pytest.approx(ratio)


def test_a_batch_that_would_empty_a_cluster_stays() -> None:
    old = torch.tensor([0, 0, 1, 1, 2])
    new = torch.tensor([1, 1, 0, 1, 2])
    batch = torch.tensor([0, 0, 1, 1, 2])
    assert guarded(old, new, batch, 3).tolist() == [0, 0, 0, 1, 2]
