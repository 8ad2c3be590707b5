r"""Multinomial components with a Dirichlet prior, for counts dense or sparse.

A point is a vector of counts $c_v$; a set with totals $C_v$, $C = \sum_v C_v$, has

$$\ln f = \ln \frac{\Gamma(A)}{\Gamma(A + C)}
  + \sum_v \ln \frac{\Gamma(a_v + C_v)}{\Gamma(a_v)}, \qquad A = \sum_v a_v,$$

and $\theta \sim \mathrm{Dirichlet}(a + C)$. Multinomial coefficients are left out: they
are the same for all partitions. A density is that of the words in their order.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dreampropeller.mixtures.family import (
    Block,
    Family,
    Params,
    Statistics,
    segments,
)
from dreampropeller.mixtures.random import log_dirichlet


class Multinomial(Family):
    """Counts; `a` has shape ``(dim,)``."""

    name = "multinomial"

    def __init__(self, a: Tensor) -> None:
        self.a = a.double()
        self.dim = len(a)

    @property
    def settings(self) -> dict[str, Any]:
        """The prior's parameters."""
        return {"a": self.a}

    def block(self, x: Any, device: torch.device | str = "cpu") -> Block:
        """Counts as a dense tensor, or as a sparse matrix of scipy."""
        if sparse.issparse(x):
            return {"sparse": x.tocsr().astype(np.float64), "device": device}
        return {"x": torch.from_numpy(np.array(x, dtype=np.float64)).to(device)}

    def rows(self, block: Block, index: Tensor) -> Block:
        """Some rows of a block."""
        if "sparse" in block:
            # Not what `_on_device` keeps, which is the whole block.
            chosen = block["sparse"][index.cpu().numpy()]
            return {"sparse": chosen, "device": block["device"]}
        return {"x": block["x"][index.to(block["x"].device)]}

    def statistics(self, block: Block, key: Tensor, num: int) -> Statistics:
        """Number of points and total counts of each set."""
        order, ends = segments(key, num)
        counts = torch.tensor(ends).diff().double()
        if "sparse" in block:
            indices, bounds = order.numpy(), np.asarray(ends)
            member = sparse.csr_matrix(
                (np.ones(len(indices)), indices, bounds), shape=(num, len(key))
            )
            totals = torch.from_numpy((member @ block["sparse"]).toarray())
            return {"n": counts, "C": totals}
        x = block["x"][order.to(block["x"].device)]
        totals = x.new_zeros(num, self.dim)
        for k in range(num):
            torch.sum(x[ends[k] : ends[k + 1]], 0, out=totals[k])
        return {"n": counts, "C": totals.cpu()}

    def log_marginal(self, statistics: Statistics) -> Tensor:
        """The marginal likelihood of each set, in the module's formula."""
        totals = statistics["C"]
        whole = self.a.sum()
        words = torch.lgamma(self.a + totals) - torch.lgamma(self.a)
        return torch.lgamma(whole) - torch.lgamma(whole + totals.sum(1)) + words.sum(1)

    def draw(self, statistics: Statistics, rng: np.random.Generator) -> Params:
        r"""$\ln \theta \sim \ln \mathrm{Dirichlet}(a + C)$."""
        return _probabilities((self.a + statistics["C"]).numpy(), rng)

    def predictive(self, statistics: Statistics) -> Params:
        """A Dirichlet–multinomial."""
        return {"pseudo": self.a + statistics["C"]}

    def log_likelihood(self, block: Block, params: Params) -> Tensor:
        r"""$\sum_v c_v \ln \theta_v$, or the Dirichlet–multinomial of `pseudo`."""
        if "pseudo" in params:
            return self._dirichlet_multinomial(block, params["pseudo"])
        log_theta = params["log_theta"]
        if "x" in block:
            x = block["x"].float()
            return log_theta.to(x.device, torch.float32) @ x.T
        if torch.device(block["device"]).type == "cpu":
            words = np.ascontiguousarray(log_theta.T.numpy(), dtype=np.float32)
            product = block["sparse"].astype(np.float32) @ words
            return torch.from_numpy(product).T
        x = _on_device(block)
        return torch.sparse.mm(x, log_theta.T.to(x.device, torch.float32)).T

    def _dirichlet_multinomial(self, block: Block, pseudo: Tensor) -> Tensor:
        """In float64 on the CPU: it runs over the counts that are not zero."""
        x = block["sparse"] if "sparse" in block else block["x"].cpu().numpy()
        x = sparse.csr_matrix(x)
        lengths = torch.from_numpy(np.asarray(x.sum(1)).ravel())
        whole = pseudo.sum(1)
        out = torch.lgamma(whole)[:, None] - torch.lgamma(whole[:, None] + lengths)
        values = torch.from_numpy(x.data)
        words = torch.from_numpy(x.indices).long()
        owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), np.diff(x.indptr)))
        for k in range(len(pseudo)):
            own = pseudo[k][words]
            gain = torch.lgamma(own + values) - torch.lgamma(own)
            out[k].index_add_(0, owner, gain)
        return out.float()

    def halves(
        self, statistics: Statistics, rng: np.random.Generator, principal: Tensor
    ) -> tuple[Params, Params]:
        r"""Each word's counts divided at random, by a $\mathrm{Beta}(½, ½)$ draw."""
        del principal  # totals know no direction of largest variance
        part = torch.from_numpy(rng.beta(0.5, 0.5, statistics["C"].shape))
        left = self.a + part * statistics["C"]
        right = self.a + (1 - part) * statistics["C"]
        return _normalised(left), _normalised(right)

    def seeds(self, anchors: Statistics, pooled: Statistics) -> Params:
        """The two points' counts, smoothed with as many of the set around them."""
        own = anchors["C"]
        share = pooled["C"] / pooled["C"].sum().clamp(min=1)
        return _normalised(self.a + own + own.sum(1, keepdim=True) * share)

    def simulate(
        self,
        params: Params,
        labels: Tensor,
        rng: np.random.Generator,
        lengths: np.ndarray | None = None,
    ) -> np.ndarray:
        """Counts of `lengths` words per point, by default 1."""
        theta = params["log_theta"].exp()
        theta = (theta / theta.sum(1, keepdim=True)).numpy()[labels.numpy()]
        lengths = np.ones(len(labels), np.int64) if lengths is None else lengths
        return rng.multinomial(lengths, theta)


def _probabilities(weights: np.ndarray, rng: np.random.Generator) -> Params:
    return {"log_theta": torch.from_numpy(log_dirichlet(weights, rng))}


def _normalised(weights: Tensor) -> Params:
    return {"log_theta": (weights / weights.sum(1, keepdim=True)).log()}


def _on_device(block: Block) -> Tensor:
    if "moved" not in block:
        x = block["sparse"]
        x.sum_duplicates()  # torch wants each index once, in order
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*in beta state", UserWarning)
            block["moved"] = torch.sparse_csr_tensor(
                torch.from_numpy(x.indptr),
                torch.from_numpy(x.indices),
                torch.from_numpy(x.data).float(),
                size=x.shape,
                check_invariants=True,
            ).to(block["device"])
    return block["moved"]
