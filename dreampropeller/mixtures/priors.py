r"""Priors of partitions: the Dirichlet process and the hierarchical one.

*Dirichlet process*, sizes $n_k$ of $K$ clusters over $n$ points:

$$p(z) = \alpha^K \frac{\Gamma(\alpha)}{\Gamma(\alpha + n)} \prod_k \Gamma(n_k),
  \qquad \pi \mid z \sim \mathrm{Dirichlet}(n_1, \dots, n_K, \alpha).$$

*Hierarchical*, $n_{jk}$ points of group $j$ in cluster $k$, top weights $\beta$ over
the occupied clusters and $\beta_u$ for all others:

$$p(z, \beta) = \gamma^K \beta_u^{\gamma - 1} \prod_k \beta_k^{-1} \prod_j
  \frac{\Gamma(\alpha)}{\Gamma(\alpha + n_j)} \prod_k
  \frac{\Gamma(\alpha \beta_k + n_{jk})}{\Gamma(\alpha \beta_k)}.$$

Table counts $m_{jk} = \sum_{i < n_{jk}} \mathrm{Bernoulli}(\alpha\beta_k /
(\alpha\beta_k + i))$ give the top weights $\beta \sim \mathrm{Dirichlet}(m_{\cdot 1},
\dots, m_{\cdot K}, \gamma)$ and those of a group $\pi_j \sim \mathrm{Dirichlet}(\alpha
\beta_1 + n_{j1}, \dots, \alpha\beta_K + n_{jK}, \alpha\beta_u)$.

A concentration is a number, or a pair $(a, b)$: a Gamma prior with shape $a$, rate $b$.

References:
    Escobar and West, JASA 1995 (the concentration of a Dirichlet process).
    Teh, Jordan, Beal and Blei, JASA 2006 (the hierarchical process, appendix A).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.special import betaln, gammaln
from torch import Tensor

from dreampropeller.mixtures.random import log_dirichlet

Concentration: TypeAlias = float | tuple[float, float]
"""A fixed value, or shape and rate of its Gamma prior."""


def start(concentration: Concentration) -> float:
    """The initial value: the fixed one or the prior's mean."""
    if isinstance(concentration, tuple):
        return concentration[0] / concentration[1]
    return float(concentration)


def draw_concentration(
    value: float,
    prior: tuple[float, float],
    clusters: float,
    points: float,
    rng: np.random.Generator,
) -> float:
    r"""A draw of the concentration given $K$ clusters among $n$ points.

    $\eta \sim \mathrm{Beta}(\alpha + 1, n)$; then $\mathrm{Gamma}(a + K, b - \ln
    \eta)$ with odds $(a + K - 1) / (n (b - \ln \eta))$, else $\mathrm{Gamma}(a + K -
    1, b - \ln \eta)$.
    """
    a, b = prior
    rate = b - math.log(rng.beta(value + 1, points))
    odds = (a + clusters - 1) / (points * rate)
    shape = a + clusters - (0 if rng.random() < odds / (1 + odds) else 1)
    return max(float(rng.gamma(shape) / rate), 1e-10)


class PartitionPrior(abc.ABC):
    """Weights of the clusters and the prior's part of a move's probability.

    `counts` has shape ``(groups, clusters)``.
    """

    num_groups: int

    @property
    @abc.abstractmethod
    def mass(self) -> float:
        """The concentration of new clusters, also that of sub-clusters' weights."""

    @abc.abstractmethod
    def begin(self, num_clusters: int) -> None:
        """Weights of the first clusters."""

    @abc.abstractmethod
    def resample(self, counts: np.ndarray, rng: np.random.Generator) -> None:
        """Draw concentrations and top weights given the labels."""

    @abc.abstractmethod
    def log_weights(self, counts: np.ndarray, rng: np.random.Generator) -> Tensor:
        r"""Draw $\ln \pi_{jk}$ of the present clusters, ``(groups, clusters)``."""

    @abc.abstractmethod
    def log_expected_weights(self, counts: np.ndarray) -> np.ndarray:
        """Predictive weights, the new cluster last, ``(groups, clusters + 1)``."""

    @abc.abstractmethod
    def split_ratio(
        self, k: int, left: np.ndarray, right: np.ndarray, rng: np.random.Generator
    ) -> tuple[float, float]:
        r"""Log prior ratio of splitting cluster k, over the density of what is drawn.

        Args:
            k: The cluster.
            left: Points of each group on the side that keeps the index, ``(groups,)``.
            right: Points of each group on the other side.
            rng: Source of the division of k's top weight.

        Returns:
            The log ratio and the left side's share of the top weight.
        """

    @abc.abstractmethod
    def merge_ratio(self, a: int, b: int, left: np.ndarray, right: np.ndarray) -> float:
        """The log ratio of the split that would undo the merge of clusters a and b."""

    @abc.abstractmethod
    def split(self, k: int, share: float) -> None:
        """Append a cluster that takes what `share` leaves of k's weight."""

    @abc.abstractmethod
    def merge(self, a: int, b: int) -> None:
        """Give b's weight to a; the last cluster takes b's index."""

    @abc.abstractmethod
    def remove(self, keep: list[int]) -> None:
        """Keep the clusters that still have points."""

    @abc.abstractmethod
    def log_probability(self, counts: np.ndarray) -> float:
        """The log probability of the labels (and top weights)."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """The state of a resumed chain, as JSON."""

    @abc.abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state; a concentration that is fixed here stays."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Concentration]:
        """The concentrations as they were given."""


class DirichletProcess(PartitionPrior):
    """One group."""

    num_groups = 1

    def __init__(self, alpha: Concentration) -> None:
        self.prior = alpha if isinstance(alpha, tuple) else None
        self.alpha = start(alpha)

    @property
    def mass(self) -> float:
        r"""$\alpha$."""
        return self.alpha

    def begin(self, num_clusters: int) -> None:
        """There are no top weights."""

    def resample(self, counts: np.ndarray, rng: np.random.Generator) -> None:
        r"""Draw $\alpha$ if it has a prior."""
        if self.prior:
            self.alpha = draw_concentration(
                self.alpha, self.prior, counts.shape[1], int(counts.sum()), rng
            )

    def log_weights(self, counts: np.ndarray, rng: np.random.Generator) -> Tensor:
        r"""Draw $\pi$ and drop the weight of new clusters."""
        weights = np.append(counts[0].astype(float), self.alpha)
        return torch.from_numpy(log_dirichlet(weights, rng)[None, :-1])

    def log_expected_weights(self, counts: np.ndarray) -> np.ndarray:
        r"""$n_k / (n + \alpha)$ and $\alpha / (n + \alpha)$."""
        weights = np.append(counts[0].astype(float), self.alpha)
        return np.log(weights / weights.sum())[None]

    def split_ratio(
        self, k: int, left: np.ndarray, right: np.ndarray, rng: np.random.Generator
    ) -> tuple[float, float]:
        r"""$\alpha\, \Gamma(n_b) \Gamma(n_c) / \Gamma(n_b + n_c)$."""
        return self.merge_ratio(k, k, left, right), 0.5

    def merge_ratio(self, a: int, b: int, left: np.ndarray, right: np.ndarray) -> float:
        """The same."""
        return math.log(self.alpha) + float(betaln(left.sum(), right.sum()))

    def split(self, k: int, share: float) -> None:
        """There are no top weights."""

    def merge(self, a: int, b: int) -> None:
        """There are no top weights."""

    def remove(self, keep: list[int]) -> None:
        """There are no top weights."""

    def log_probability(self, counts: np.ndarray) -> float:
        """Equation (1) of `docs/mixtures.md`."""
        n, num = counts.sum(), counts.shape[1]
        normal = gammaln(self.alpha) - gammaln(self.alpha + n)
        return float(num * math.log(self.alpha) + normal + gammaln(counts).sum())

    def state(self) -> dict[str, Any]:
        r"""$\alpha$."""
        return {"alpha": self.alpha}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        if self.prior:
            self.alpha = state["alpha"]

    @property
    def settings(self) -> dict[str, Concentration]:
        r"""$\alpha$ or its prior."""
        return {"alpha": self.prior or self.alpha}


class HierarchicalDirichletProcess(PartitionPrior):
    """Several groups that share clusters."""

    def __init__(
        self, gamma: Concentration, alpha: Concentration, num_groups: int
    ) -> None:
        self.gamma_prior = gamma if isinstance(gamma, tuple) else None
        self.alpha_prior = alpha if isinstance(alpha, tuple) else None
        self.gamma, self.alpha = start(gamma), start(alpha)
        self.num_groups = num_groups
        self.log_beta = np.zeros(0)  # logarithms: a weight may be smaller than 1e-308
        self.log_beta_u = 0.0

    @property
    def mass(self) -> float:
        r"""$\gamma$."""
        return self.gamma

    def begin(self, num_clusters: int) -> None:
        """Equal weights."""
        self.log_beta = np.full(num_clusters, -math.log(num_clusters + 1))
        self.log_beta_u = -math.log(num_clusters + 1)

    def resample(self, counts: np.ndarray, rng: np.random.Generator) -> None:
        r"""Table counts, then $\gamma$ and $\alpha$, then $\beta$."""
        tables = self._tables(counts, rng)
        if self.gamma_prior:
            self.gamma = draw_concentration(
                self.gamma, self.gamma_prior, counts.shape[1], int(tables.sum()), rng
            )
        if self.alpha_prior:
            self.alpha = self._draw_alpha(counts.sum(1), int(tables.sum()), rng)
        weights = np.append(tables.sum(0).astype(float), self.gamma)
        logs = log_dirichlet(weights, rng)
        self.log_beta, self.log_beta_u = logs[:-1], float(logs[-1])

    def _tables(self, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        r"""$m_{jk}$, all Bernoulli draws at once."""
        flat = counts.ravel()
        owner = np.repeat(np.arange(flat.size), flat)
        first = np.cumsum(flat) - flat
        position = np.arange(owner.size) - first[owner]
        weight = np.tile(self.alpha * np.exp(self.log_beta), len(counts))[owner]
        # The first customer of a restaurant always opens a table, whatever the weight.
        opens = (rng.random(owner.size) * (weight + position) < weight) | (
            position == 0
        )
        return np.bincount(owner, opens, flat.size).astype(int).reshape(counts.shape)

    def _draw_alpha(
        self, sizes: np.ndarray, tables: int, rng: np.random.Generator
    ) -> float:
        r"""$w_j \sim \mathrm{Beta}(\alpha + 1, n_j)$, $s_j \sim
        \mathrm{Bernoulli}(n_j / (n_j + \alpha))$, $\alpha \sim \mathrm{Gamma}(a + m -
        \sum s_j, b - \sum \ln w_j)$.
        """  # noqa: D205
        assert self.alpha_prior
        a, b = self.alpha_prior
        sizes = sizes[sizes > 0]
        w = rng.beta(self.alpha + 1, sizes)
        s = rng.random(len(sizes)) < sizes / (sizes + self.alpha)
        draw = rng.gamma(a + tables - s.sum()) / (b - np.log(w).sum())
        return max(float(draw), 1e-10)

    def log_weights(self, counts: np.ndarray, rng: np.random.Generator) -> Tensor:
        r"""Draw $\pi_j$ and drop the weight of new clusters."""
        top = self.alpha * np.exp(np.append(self.log_beta, self.log_beta_u))
        weights = np.tile(top, (len(counts), 1))
        weights[:, :-1] += counts
        return torch.from_numpy(log_dirichlet(weights, rng)[:, :-1])

    def log_expected_weights(self, counts: np.ndarray) -> np.ndarray:
        r"""$(\alpha \beta_k + n_{jk}) / (\alpha + n_j)$, and $\beta_u$'s part."""
        top = self.alpha * np.exp(np.append(self.log_beta, self.log_beta_u))
        weights = np.tile(top, (len(counts), 1))
        weights[:, :-1] += counts
        return np.log(weights / weights.sum(1, keepdims=True))

    def split_ratio(
        self, k: int, left: np.ndarray, right: np.ndarray, rng: np.random.Generator
    ) -> tuple[float, float]:
        r"""Draw $u \sim \mathrm{Beta}(p_b, p_c)$, $p = ½ + \#\{j : n_j > 0\}$."""
        p, q = _shape(left), _shape(right)
        x, y = rng.gamma(p), rng.gamma(q)
        u = x / (x + y)
        return self._ratio(self.log_beta[k], u, left, right), u

    def merge_ratio(self, a: int, b: int, left: np.ndarray, right: np.ndarray) -> float:
        r"""At $u = \beta_b / (\beta_b + \beta_c)$."""
        whole = np.logaddexp(self.log_beta[a], self.log_beta[b])
        return self._ratio(whole, math.exp(self.log_beta[a] - whole), left, right)

    def _ratio(
        self, log_beta: float, u: float, left: np.ndarray, right: np.ndarray
    ) -> float:
        r"""$\gamma / (u (1-u)\, \mathrm{Beta}(u)) \prod_j \dots$: Equation (13)."""
        if not 0 < u < 1:
            return -math.inf
        p, q = _shape(left), _shape(right)
        log_u, log_v = math.log(u), math.log1p(-u)
        density = (p - 1) * log_u + (q - 1) * log_v - betaln(p, q)
        whole = self.alpha * math.exp(log_beta)
        x, y = max(whole * u, 1e-300), max(whole * (1 - u), 1e-300)
        groups = gammaln(x + left) - gammaln(x) + gammaln(y + right) - gammaln(y)
        groups = groups - gammaln(x + y + left + right) + gammaln(x + y)
        return float(math.log(self.gamma) - log_u - log_v - density + groups.sum())

    def log_cells(self, clusters: Sequence[int], counts: Sequence[int]) -> float:
        r"""$\sum_k \ln \Gamma(\alpha \beta_k + n_{jk})$, for the counts in group j."""
        weights = self.alpha * np.exp(self.log_beta[list(clusters)])
        return float(gammaln(np.maximum(weights, 1e-300) + counts).sum())

    def split(self, k: int, share: float) -> None:
        """Divide k's top weight."""
        rest = self.log_beta[k] + math.log1p(-share)
        self.log_beta = np.append(self.log_beta, rest)
        self.log_beta[k] += math.log(share)

    def merge(self, a: int, b: int) -> None:
        """Add the two top weights."""
        self.log_beta[a] = np.logaddexp(self.log_beta[a], self.log_beta[b])
        self.log_beta[b] = self.log_beta[-1]
        self.log_beta = self.log_beta[:-1]

    def remove(self, keep: list[int]) -> None:
        """The weights of empty clusters go to the unused rest."""
        gone = np.delete(self.log_beta, keep)
        self.log_beta_u = float(np.logaddexp.reduce(np.append(gone, self.log_beta_u)))
        self.log_beta = self.log_beta[keep]

    def log_probability(self, counts: np.ndarray) -> float:
        """Equation (9) of `docs/mixtures.md`."""
        top = counts.shape[1] * math.log(self.gamma) - self.log_beta.sum()
        top += (self.gamma - 1) * self.log_beta_u
        beta = self.alpha * np.exp(self.log_beta)
        cells = np.where(counts > 0, gammaln(beta + counts) - gammaln(beta), 0.0)
        sizes = counts.sum(1)
        normal = gammaln(self.alpha) - gammaln(self.alpha + sizes)
        return float(top + cells.sum() + normal.sum())

    def state(self) -> dict[str, Any]:
        """Concentrations and top weights."""
        return {
            "gamma": self.gamma,
            "alpha": self.alpha,
            "log_beta": self.log_beta.tolist(),
            "log_beta_u": self.log_beta_u,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        if self.gamma_prior:
            self.gamma = state["gamma"]
        if self.alpha_prior:
            self.alpha = state["alpha"]
        self.log_beta = np.array(state["log_beta"], dtype=float)
        self.log_beta_u = state["log_beta_u"]

    @property
    def settings(self) -> dict[str, Concentration]:
        r"""$\gamma$ and $\alpha$, or their priors."""
        return {
            "gamma": self.gamma_prior or self.gamma,
            "alpha": self.alpha_prior or self.alpha,
        }


def _shape(counts: np.ndarray) -> float:
    return 0.5 + float((counts > 0).sum())
