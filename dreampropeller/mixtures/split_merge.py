r"""Splits and merges that leave the posterior invariant.

Two points i, j are drawn; S is the rest of their clusters. A *launch* state, two
components, is prepared from i, j and the set alone. If i and j share a cluster, the
labels of S are drawn from $q(s) = \prod_k w_{s_k} f(x_k \mid \theta_{s_k}) / \sum_s w_s
f(x_k \mid \theta_s)$ and a split is proposed, accepted with probability $\min(1, A)$,

$$A = \frac{p(z')}{p(z)} \frac{f(X_b) f(X_c)}{f(X_b \cup X_c)\, q(s)};$$

else a merge, with $q$ at the present labels, with $\min(1, 1/A)$. The launch state does
not depend on how the set is divided now, so both directions see the same $q$.

References:
    Jain and Neal, "A split-merge Markov chain Monte Carlo procedure for the Dirichlet
    process mixture model", JCGS 2004; the launch here redraws all points at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dreampropeller.mixtures.chain import Chain
from dreampropeller.mixtures.family import (
    Params,
    Statistics,
    add,
    join,
    take,
    total,
)
from dreampropeller.mixtures.passes import side_pass
from dreampropeller.mixtures.priors import HierarchicalDirichletProcess
from dreampropeller.mixtures.random import log_dirichlet

_FAIR = torch.full((1, 2), math.log(0.5), dtype=torch.float64)


@dataclass
class Sides:
    """A division of a set into two.

    Args:
        index: The points, shape ``(members,)``.
        side: 0 or 1, shape ``(members,)``.
        log_q: Log probability of drawing these sides.
        statistics: Two rows.
    """

    index: Tensor
    side: Tensor
    log_q: float
    statistics: Statistics


@dataclass
class Launch:
    """Two weighted components that divide a set."""

    member: Tensor
    params: Params
    log_weights: Tensor

    def sides(self, chain: Chain, stream: str, given: Tensor | None = None) -> Sides:
        """Draw the sides, or evaluate given ones, shape ``(points,)``."""
        points = {"member": self.member}
        if given is not None:
            points["side"] = given
        found = chain.map(
            side_pass,
            points,
            params=self.params,
            log_weights=self.log_weights,
            stream=stream,
        )
        offsets = range(0, len(self.member), chain.blocks.size)
        return Sides(
            torch.cat([r["index"] + o for r, o in zip(found, offsets, strict=True)]),
            torch.cat([r["side"] for r in found]),
            math.fsum(r["log_q"] for r in found),
            total([r["statistics"] for r in found]),
        )


def prepare(
    chain: Chain, member: Tensor, pooled: Statistics, name: str, rounds: int
) -> Launch:
    """The launch state of two anchors and the set around them.

    Args:
        chain: The chain; its labels are not used.
        member: 0 and 1 for the anchors, 2 for the set, -1 for all other points.
        pooled: The statistics of anchors and set together, one row.
        name: The name of the proposal's random streams.
        rounds: Number of divisions of the set before the components are kept.
    """
    rng = chain.rng(f"{name}/launch")
    pair = [int(torch.nonzero(member == side)[0, 0]) for side in (0, 1)]
    rows = chain.family.block(chain.blocks.x[pair])
    anchors = chain.family.statistics(rows, torch.tensor([0, 1]), 2)
    launch = Launch(member, chain.family.seeds(anchors, pooled), _FAIR)
    for t in range(rounds + 1):
        now = launch.sides(chain, f"{name}/round {t}").statistics
        weights = chain.prior.mass / 2 + now["n"].numpy()[None]
        log_weights = torch.from_numpy(log_dirichlet(weights, rng))
        launch = Launch(member, chain.family.draw(now, rng), log_weights)
    return launch


def propose(chain: Chain, number: int, rounds: int) -> bool:
    """Propose one split or merge; whether it was accepted."""
    if len(chain.labels) < 2:
        return False
    name = f"proposal {number}"
    rng = chain.rng(name)
    i, j = (int(v) for v in rng.choice(len(chain.labels), 2, replace=False))
    a, b = int(chain.labels[i]), int(chain.labels[j])
    inside = (chain.labels == a) | (chain.labels == b)
    member = torch.where(inside, 2, -1)
    member[i], member[j] = 0, 1
    pooled = take(chain.sums, [a])
    if a != b:
        pooled = add(pooled, take(chain.sums, [b]))
    launch = prepare(chain, member, pooled, name, rounds)
    given = None if a == b else (chain.labels == b).long()
    sides = launch.sides(chain, f"{name}/sides", given)
    log_ratio, share = _log_ratio(chain, (a, b), sides, pooled, rng)
    log_u = math.log(1 - rng.random())
    if a == b and log_u < log_ratio:
        _split(chain, a, sides, share)
        return True
    if a != b and log_u < -log_ratio:
        _merge(chain, a, b, pooled)
        return True
    return False


def _log_ratio(
    chain: Chain,
    clusters: tuple[int, int],
    sides: Sides,
    pooled: Statistics,
    rng: np.random.Generator,
) -> tuple[float, float]:
    r"""$\ln A$ of the split into `sides`, and the left side's share of the weight."""
    a, b = clusters
    groups = chain.group[sides.index]
    left, right = (
        np.bincount(groups[sides.side == side], minlength=chain.groups)
        for side in (0, 1)
    )
    f = chain.family.log_marginal(join([sides.statistics, pooled])).tolist()
    share = 0.5
    if a == b:
        ratio, share = chain.prior.split_ratio(a, left, right, rng)
    else:
        ratio = chain.prior.merge_ratio(a, b, left, right)
    return ratio + f[0] + f[1] - f[2] - sides.log_q, share


def _put(sums: Statistics, row: int, values: Statistics, source: int) -> None:
    for name, value in sums.items():
        value[row] = values[name][source]


def _split(chain: Chain, a: int, sides: Sides, share: float) -> None:
    chain.labels = chain.labels.clone()
    chain.labels[sides.index[sides.side == 1]] = chain.num_clusters
    chain.sums = join([chain.sums, take(sides.statistics, [1])])
    _put(chain.sums, a, sides.statistics, 0)
    chain.num_clusters += 1
    chain.prior.split(a, share)


def _merge(chain: Chain, a: int, b: int, pooled: Statistics) -> None:
    last = chain.num_clusters - 1
    to = torch.arange(chain.num_clusters)
    target = b if a == last else a  # where cluster a's points are after the renaming
    to[last] = b
    to[a] = to[b] = target
    keep = torch.arange(chain.num_clusters)
    keep[b] = last
    chain.labels = to[chain.labels]
    chain.sums = take(chain.sums, keep[:last])
    _put(chain.sums, target, pooled, 0)
    chain.num_clusters -= 1
    chain.prior.merge(a, b)


def propose_in_group(chain: Chain, number: int) -> bool:
    """Redraw one group's points of two clusters together; whether it was accepted.

    The components are drawn from the two clusters' *other* points, which the move does
    not change. It is rejected if a cluster would keep no point anywhere.
    """
    if chain.num_clusters < 2:
        return False
    name = f"group move {number}"
    rng = chain.rng(name)
    group = int(rng.integers(chain.groups))
    b, c = (int(v) for v in rng.choice(chain.num_clusters, 2, replace=False))
    pair = (chain.labels == b) | (chain.labels == c)
    inside = pair & (chain.group == group)
    if not bool(inside.any()):
        return False
    others = chain.gather(
        torch.where(pair & ~inside, (chain.labels == c).long(), -1), 2
    )
    launch = Launch(torch.where(inside, 2, -1), chain.family.draw(others, rng), _FAIR)
    old = launch.sides(chain, name, (chain.labels == c).long())
    new = launch.sides(chain, f"{name}/sides")
    before, after = (add(others, sides.statistics) for sides in (old, new))
    if bool((after["n"] == 0).any()):
        return False
    f = chain.family.log_marginal(join([before, after])).tolist()
    log_ratio = f[2] + f[3] - f[0] - f[1] + old.log_q - new.log_q
    log_ratio += _log_group(chain, (b, c), new) - _log_group(chain, (b, c), old)
    if math.log(1 - rng.random()) >= log_ratio:
        return False
    chain.labels = chain.labels.clone()
    chain.labels[new.index] = torch.where(new.side == 0, b, c)
    for row, source in ((b, 0), (c, 1)):
        _put(chain.sums, row, after, source)
    return True


def _log_group(chain: Chain, clusters: Sequence[int], sides: Sides) -> float:
    r"""$\sum \ln \Gamma(\alpha \beta_k + n_{jk})$ of the two clusters."""
    assert isinstance(chain.prior, HierarchicalDirichletProcess), "several groups"
    counts = torch.bincount(sides.side, minlength=2).tolist()
    return chain.prior.log_cells(clusters, counts)
