r"""The published fast sampler: every cluster carries two sub-clusters that it may split
into.

A sweep draws labels and sub-labels in one pass. A cluster whose sub-clusters have had
time to settle proposes to split into them, with

$$H = \frac{p(z')}{p(z)} \frac{f(X_l) f(X_r)}{f(X)\, q}, \qquad \text{for the Dirichlet
  process}\ \ \frac{p(z')}{p(z)} = \alpha\, \frac{\Gamma(n_l) \Gamma(n_r)}{\Gamma(n)},$$

where $q$ is the probability of the sub-labels drawn. The published code leaves $q$ out,
and so never cuts a set that looks like one broad Gaussian (50 overlapping clusters in
two dimensions: 1 found). Two clusters merge with $1/H$ at their labels, in which $q$ is
the probability that their two components, drawn in this sweep, divide their points so.
As $f(X_l) f(X_r)\, p(z') / q$ estimates the evidence of two components, both moves
compare it with that of one. The published merge takes the probability of a *random*
division for $q$, and so never joins two halves of a Gaussian.

All clusters propose in the same sweep, and a cluster that loses its points is deleted.
This mixes fast and **does not leave the posterior invariant**: `ExactChain` does.

New sub-clusters are the two halves of their cluster, first across the direction of
largest variance, and every other time in a random direction if it has been refused.

References:
    Chang and Fisher, "Parallel sampling of DP mixture models using sub-cluster splits",
    NIPS 2013. Dinari et al., DPMMSubClusters.jl (the published code).
"""  # noqa: D205

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreampropeller.mixtures.blocks import Blocks
from dreampropeller.mixtures.chain import Chain
from dreampropeller.mixtures.family import Params, Statistics, add, join, take, total
from dreampropeller.mixtures.passes import subcluster_pass
from dreampropeller.mixtures.priors import PartitionPrior
from dreampropeller.mixtures.random import log_dirichlet

SETTLE = 4
"""Sweeps that sub-clusters settle in before their cluster may split or merge."""
TINY = 0.02
"""A cluster with this share of another's points joins it without disturbing it."""
RESTART = 10
"""Sweeps after which sub-clusters that were refused begin anew."""
_PER_CLUSTER = ("age", "tries", "since")


class SubclusterChain(Chain):
    """Labels and sub-labels; `sums` has two rows per cluster, left and right."""

    def __init__(
        self,
        blocks: Blocks,
        prior: PartitionPrior,
        group: Tensor,
        seed: int,
        labels: Tensor,
    ) -> None:
        super().__init__(blocks, prior, group, seed, labels)
        self.sub = torch.zeros_like(self.labels)
        self.refresh()
        self.age = np.zeros(self.num_clusters, int)  # sweeps; 0: no sub-clusters yet
        self.tries = np.zeros(self.num_clusters, int)
        self.since = np.zeros(self.num_clusters, int)  # sweeps since the last move
        self.log_q = [0.0] * self.num_clusters
        self.pair_q: dict[tuple[int, int], float] = {}  # of the pairs that may merge
        self.moved = 0  # the last sweep in which a split or merge was accepted

    def statistics(self) -> Statistics:
        """The statistics of the clusters."""
        left = torch.arange(0, 2 * self.num_clusters, 2)
        return add(take(self.sums, left), take(self.sums, left + 1))

    def refresh(self) -> None:
        """Compute the statistics of the sub-clusters anew."""
        self.sums = self.gather(2 * self.labels + self.sub, 2 * self.num_clusters)

    def sweep(self, *, moves: bool = True, best: bool = False) -> None:
        """One sweep; `best` takes the likeliest labels instead of drawing them."""
        rng = self.rng("sweep")
        self.prior.resample(self.counts(), rng)
        self.family.resample(self.statistics(), rng)
        self._assign(rng, moves, best)
        self._remove_empty()
        if moves:
            before = self.num_clusters
            counts = self.count(2 * self.labels + self.sub, 2 * self.num_clusters)
            joined = self._merges(counts, rng)
            divided = self._splits(counts, joined, rng)
            if joined or divided:
                self._rearrange(joined, divided, before)
                self.moved = self.sweeps + 1
        self.record()

    def _assign(self, rng: np.random.Generator, moves: bool, best: bool) -> None:
        whole = self.statistics()
        pairs = self._pairs(whole) if moves else []
        log_weights = self.prior.log_weights(self.counts(), rng)
        params = self.family.draw(whole, rng)
        halves, log_halves = self._halves(whole, rng)
        found = self.map(
            subcluster_pass,
            {},
            params=params,
            log_weights=log_weights,
            halves=halves,
            log_halves=log_halves,
            pairs=pairs,
            best=best,
        )
        self.labels = torch.cat([result["label"] for result in found])
        self.sub = torch.cat([result["sub"] for result in found])
        self.sums = total([result["statistics"] for result in found])
        log_q = total([{"log_q": result["log_q"]} for result in found])["log_q"]
        self.log_q = log_q.tolist()
        pair_q = total([{"pair_q": result["pair_q"]} for result in found])["pair_q"]
        self.pair_q = dict(zip(pairs, pair_q.tolist(), strict=True))
        self.age += 1
        self.since += 1

    def _halves(
        self, whole: Statistics, rng: np.random.Generator
    ) -> tuple[Params, Tensor]:
        """Sub-components and their log weights, both ``(clusters, 2, ...)``."""
        sizes = self.sums["n"].view(-1, 2).numpy()
        fresh = (self.age == 0) | (sizes.min(1) == 0)
        self.age[fresh] = 0
        new = torch.from_numpy(np.flatnonzero(fresh))
        drawn = self.family.draw(self.sums, rng)
        params = {
            name: value.view(self.num_clusters, 2, *value.shape[1:])
            for name, value in drawn.items()
        }
        if len(new):
            principal = torch.from_numpy(self.tries % 2 == 0)[new]
            halves = self.family.halves(take(whole, new), rng, principal)
            for side, half in enumerate(halves):
                for name, value in half.items():
                    params[name][new, side] = value
        weights = torch.from_numpy(log_dirichlet(sizes + self.prior.mass / 2, rng))
        weights[new] = math.log(0.5)
        return params, weights

    def _remove_empty(self) -> None:
        sizes = self.sums["n"].view(-1, 2).sum(1)
        keep = torch.nonzero(sizes > 0)[:, 0]
        if len(keep) == self.num_clusters:
            return
        to = torch.zeros(self.num_clusters, dtype=torch.long)
        to[keep] = torch.arange(len(keep))
        self.labels = to[self.labels]
        self.sums = take(self.sums, torch.stack([2 * keep, 2 * keep + 1], 1).ravel())
        self.log_q = [self.log_q[k] for k in keep.tolist()]
        self.pair_q = {
            (int(to[a]), int(to[b])): value
            for (a, b), value in self.pair_q.items()
            if sizes[a] > 0 and sizes[b] > 0
        }
        for name in _PER_CLUSTER:
            setattr(self, name, getattr(self, name)[keep.numpy()])
        self.num_clusters = len(keep)
        self.prior.remove(keep.tolist())

    def _pairs(self, whole: Statistics) -> list[tuple[int, int]]:
        """The pairs that would merge if their division were certain ($q = 1$)."""
        ready = np.flatnonzero(self.since + 1 >= SETTLE)
        if len(ready) < 2:
            return []
        first, second = (ready[side] for side in np.triu_indices(len(ready), 1))
        odds = self._merge_odds(whole, self.counts(), first, second)
        close = odds > 0
        return list(zip(first[close].tolist(), second[close].tolist(), strict=True))

    def _merge_odds(
        self,
        whole: Statistics,
        cells: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
    ) -> np.ndarray:
        r"""$\ln (1/H)$ of merging pairs, with $q = 1$, shape ``(pairs,)``."""
        f = self.family.log_marginal(whole).numpy()
        gain = _marginal_of_unions(self, whole, first, second) - f[first] - f[second]
        prior = [
            self.prior.merge_ratio(a, b, cells[:, a], cells[:, b])
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ]
        return gain - prior

    def _merges(
        self, counts: np.ndarray, rng: np.random.Generator
    ) -> list[tuple[int, int]]:
        """The pairs that merge; a cluster is in at most one."""
        if not self.pair_q:
            return []
        first, second = np.array(list(self.pair_q)).T
        cells = counts.reshape(self.groups, -1, 2).sum(2)
        odds = self._merge_odds(self.statistics(), cells, first, second)
        odds = odds + np.array(list(self.pair_q.values()))
        chance = np.log(1 - rng.random(len(first)))
        sizes = cells.sum(0).tolist()
        joined: list[tuple[int, int]] = []
        hosts: set[int] = set()
        used: set[int] = set()
        for at in np.argsort(-odds):
            a, b = int(first[at]), int(second[at])
            if sizes[a] < sizes[b]:
                a, b = b, a
            tiny = sizes[b] <= TINY * sizes[a]
            if not chance[at] < odds[at] or used & {a, b}:  # NaN must not pass
                continue
            if b in hosts or (a in hosts and not tiny):
                continue
            joined.append((a, b))
            hosts.add(a)
            used |= {b} if tiny else {a, b}
        return joined

    def _splits(
        self,
        counts: np.ndarray,
        joined: list[tuple[int, int]],
        rng: np.random.Generator,
    ) -> list[tuple[int, float]]:
        """The clusters that split, and the left side's share of the top weight."""
        f = self.family.log_marginal(self.sums).view(-1, 2).sum(1)
        f = (f - self.family.log_marginal(self.statistics())).tolist()
        busy = {k for pair in joined for k in pair}
        divided = []
        for k in range(self.num_clusters):
            left, right = counts[:, 2 * k], counts[:, 2 * k + 1]
            chance = math.log(1 - rng.random())
            if k in busy or self.age[k] < SETTLE or not left.sum() or not right.sum():
                continue
            ratio, share = self.prior.split_ratio(k, left, right, rng)
            if chance < ratio + f[k] - self.log_q[k]:
                divided.append((k, share))
            elif self.age[k] >= RESTART:
                self.age[k] = 0
                self.tries[k] += 1
        return divided

    def _rearrange(
        self,
        joined: list[tuple[int, int]],
        divided: list[tuple[int, float]],
        num: int,
    ) -> None:
        """Apply the moves: every sub-cluster gets a new cluster and a new side."""
        sides: list[list[tuple[int, ...]]]
        sides = [[(2 * k,), (2 * k + 1,)] for k in range(num)]
        sizes = self.sums["n"].view(-1, 2).sum(1).tolist()
        for a, b in joined:
            if sizes[b] <= TINY * sizes[a]:
                sides[a][0] += (2 * b, 2 * b + 1)
            else:
                sides[a] = [(2 * a, 2 * a + 1), (2 * b, 2 * b + 1)]
        for k, share in divided:
            sides[k] = [(2 * k,), ()]
            sides.append([(2 * k + 1,), ()])
            self.prior.split(k, share)
        new = [*[k for k, _ in divided], *range(num, len(sides))]
        values = {name: np.zeros(len(sides), int) for name in _PER_CLUSTER}
        for name, value in values.items():
            value[:num] = getattr(self, name)
            value[new] = 0
        for a, b in joined:
            if sizes[b] > TINY * sizes[a]:
                values["age"][a], values["tries"][a], values["since"][a] = 1, -1, 0
        self._drop([sides, *values.values()], joined)
        for name, value in values.items():
            setattr(self, name, value[: len(sides)])
        self._relabel(sides)

    def _drop(self, values: list[Any], joined: list[tuple[int, int]]) -> None:
        """Take the second cluster of each pair out of the lists, and of the prior."""
        at = list(range(len(values[0])))  # where each cluster is now
        for a, b in joined:
            last = len(values[0]) - 1
            self.prior.merge(at[a], at[b])
            for value in values:
                value[at[b]] = value[last]
            values[0].pop()
            at[at.index(last)], at[b] = at[b], -1

    def _relabel(self, sides: list[list[tuple[int, ...]]]) -> None:
        to = torch.zeros(2 * self.num_clusters, dtype=torch.long)
        zero = {name: torch.zeros_like(v[:1]) for name, v in self.sums.items()}
        rows = []
        for k, pair in enumerate(sides):
            for side, sources in enumerate(pair):
                to[list(sources)] = 2 * k + side
                rows.append(total([zero, *(take(self.sums, [s]) for s in sources)]))
        key = to[2 * self.labels + self.sub]
        self.labels, self.sub = key // 2, key % 2
        self.sums, self.num_clusters = join(rows), len(sides)

    def state(self) -> dict[str, Any]:
        """The chain's state and that of the sub-clusters."""
        return {
            **super().state(),
            "sub": self.sub,
            "sums": self.sums,
            **{name: getattr(self, name).tolist() for name in _PER_CLUSTER},
            "moved": self.moved,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        super().load(state)
        self.sub, self.sums, self.moved = state["sub"], state["sums"], state["moved"]
        for name in _PER_CLUSTER:
            setattr(self, name, np.array(state[name]))


def _marginal_of_unions(
    chain: SubclusterChain, whole: Statistics, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Log marginal likelihood of every pair's union, some pairs at a time."""
    found = []
    for start in range(0, len(first), 512):
        part = slice(start, start + 512)
        one, two = (torch.from_numpy(side[part]) for side in (first, second))
        pair = add(take(whole, one), take(whole, two))
        found.append(chain.family.log_marginal(pair).numpy())
    return np.concatenate(found)
