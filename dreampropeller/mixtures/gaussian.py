r"""Gaussian components with a normal–inverse-Wishart prior, full and diagonal.

$\Sigma \sim \mathrm{IW}(\nu_0, \Psi_0)$ and $\mu \mid \Sigma \sim
N(m_0, \Sigma/\kappa_0)$.
Points are kept relative to $m_0$. A set with $n$ points, sum $s$ and second moment $S$
has the posterior

$$\kappa_n = \kappa_0 + n, \quad \nu_n = \nu_0 + n, \quad m_n = s/\kappa_n, \quad
  \Psi_n = \Psi_0 + S - s s^\top / \kappa_n$$

and the marginal likelihood

$$\ln f = -\tfrac{nD}{2} \ln \pi + \ln \tfrac{\Gamma_D(\nu_n/2)}{\Gamma_D(\nu_0/2)}
  + \tfrac{\nu_0}{2} \ln |\Psi_0| - \tfrac{\nu_n}{2} \ln |\Psi_n|
  + \tfrac D2 \ln \tfrac{\kappa_0}{\kappa_n}.$$

Densities use residuals $r = M (x - \mu)$ with $M^\top M = \Sigma^{-1}$. The diagonal
family is $D$ independent copies of the case $D = 1$. A prior made from the data alone
has $\Psi_0 = \tau \Psi$ with a scale $\tau$ that is sampled.

References:
    Murphy, "Conjugate Bayesian analysis of the Gaussian distribution", 2007.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreampropeller.mixtures.family import Block, Family, Params, Statistics, segments

_CHUNK = 1024
"""Rows whose residuals are computed together: they should fit a core's cache."""
SCALES = tuple(float(v) for v in np.logspace(-4, 0, 25))
"""Where a sampled scale of the prior lies: from equal to the data's to a ten-thousandth
of it."""
_HALF = math.sqrt(2 / math.pi)
"""Mean of |z|, z standard normal: how far a half of a Gaussian is from its centre."""


class _Gaussian(Family):
    """The common base of full and diagonal covariances."""

    def __init__(
        self,
        mean: Tensor,
        kappa: float,
        nu: float,
        psi: Tensor,
        scale: float | None = None,
    ) -> None:
        self.mean, self.kappa, self.nu = mean.double(), float(kappa), float(nu)
        self.base = psi.double()
        self.dim = len(mean)
        self.sampled = scale is not None
        self.scale = 1.0 if scale is None else float(scale)

    @property
    def psi(self) -> Tensor:
        r"""$\Psi_0$."""
        return self.scale * self.base

    @property
    def settings(self) -> dict[str, Any]:
        """The prior's parameters."""
        return {
            "mean": self.mean,
            "kappa": self.kappa,
            "nu": self.nu,
            "psi": self.base,
            "sampled": self.sampled,
        }

    def restore(self, settings: dict[str, Any]) -> None:
        r"""Take over $m_0$ and $\Psi$, which may stem from the data."""
        self.mean, self.base = settings["mean"], settings["psi"]

    def resample(self, statistics: Statistics, rng: np.random.Generator) -> None:
        r"""Draw the scale $\tau$ of $\Psi_0 = \tau \Psi$, uniform over a grid.

        $p(\tau \mid z, x) \propto \prod_k f(X_k; \tau)$: how much narrower than the
        whole data clusters are is learned from those found so far.
        """
        if not self.sampled:
            return
        tau = torch.tensor(SCALES, dtype=torch.float64)
        nu = self.nu + statistics["n"]
        log_det = (self._spectrum(statistics)[..., None] + tau).log().sum(1)
        own = self.nu / 2 * self.dim * len(nu) * tau.log()
        logs = own - (nu[:, None] / 2 * log_det).sum(0)
        p = torch.softmax(logs, 0).numpy()
        self.scale = float(rng.choice(SCALES, p=p / p.sum()))

    def state(self) -> dict[str, Any]:
        r"""$\tau$."""
        return {"scale": self.scale}

    def load(self, state: dict[str, Any]) -> None:
        r"""Take over $\tau$ if it is sampled here."""
        if self.sampled:
            self.scale = state["scale"]

    def block(self, x: Any, device: torch.device | str = "cpu") -> Block:
        """Rows relative to the prior mean, in float64 and, transposed, float32."""
        rows = np.asarray(x, dtype=np.float64) - self.mean.numpy()
        rows = torch.from_numpy(rows).to(device)
        return {"x": rows, "xt": rows.float().T.contiguous()}

    def rows(self, block: Block, index: Tensor) -> Block:
        """Some rows of a block."""
        index = index.to(block["x"].device)
        return {"x": block["x"][index], "xt": block["xt"][:, index]}

    def statistics(self, block: Block, key: Tensor, num: int) -> Statistics:
        """Number, sum and second moment of each set."""
        order, ends = segments(key, num)
        x = block["x"][order.to(block["x"].device)]
        counts = torch.tensor(ends).diff().double()
        sums = x.new_zeros(num, self.dim)
        moments = x.new_zeros(num, *self.psi.shape)
        for k in range(num):
            if ends[k] < ends[k + 1]:
                own = x[ends[k] : ends[k + 1]]
                torch.sum(own, 0, out=sums[k])
                self._moment(own, moments[k])
        return {"n": counts, "s": sums.cpu(), "S": moments.cpu()}

    def log_likelihood(self, block: Block, params: Params) -> Tensor:
        """Log density of a normal, or of a Student t where `params` holds `df`."""
        xt = block["xt"]
        params = {
            name: value.to(xt.device, torch.float32) for name, value in params.items()
        }
        out = xt.new_empty(len(params["constant"]), xt.shape[1])
        for start in range(0, xt.shape[1], _CHUNK):
            end = start + _CHUNK
            squares = self._residuals(xt[:, start:end], params).square_()
            if "df" in params:
                out[:, start:end] = self._student(squares, params["df"])
            else:
                torch.sum(squares, 1, out=out[:, start:end]).mul_(-0.5)
        return out.add_(params["constant"][:, None])

    def _components(self, mean: Tensor, root: Tensor) -> Params:
        """Normals with means ``(sets, dim)`` and roots M of their precisions."""
        log_det = self._log_det_root(root)
        constant = log_det - self.dim / 2 * math.log(2 * math.pi)
        return {"root": root, "mean": mean, "constant": constant}

    def posterior(self, statistics: Statistics) -> tuple[Tensor, ...]:
        r"""$\kappa_n, \nu_n, m_n, \Psi_n$ of each set."""
        kappa = self.kappa + statistics["n"]
        mean = statistics["s"] / kappa[:, None]
        psi = self.psi + statistics["S"] - self._outer(statistics["s"], mean)
        return kappa, self.nu + statistics["n"], mean, psi

    def halves(
        self, statistics: Statistics, rng: np.random.Generator, principal: Tensor
    ) -> tuple[Params, Params]:
        r"""The two halves of each set's Gaussian, cut through the mean.

        With $a$ a direction as long as the standard deviation along it, a half has
        mean $m \pm \sqrt{2/\pi}\, a$ and covariance $\Sigma - \tfrac2\pi a a^\top$.
        """
        _, nu, mean, psi = self.posterior(statistics)
        covariance = psi / nu.view(-1, *[1] * (psi.ndim - 1))
        u = torch.from_numpy(rng.standard_normal(mean.shape))
        u = u / u.norm(dim=1, keepdim=True)
        away = _HALF * torch.where(
            principal[:, None], self._principal(covariance), self._along(covariance, u)
        )
        root = self._root(covariance - self._outer(away, away))
        return self._components(mean - away, root), self._components(mean + away, root)

    def seeds(self, anchors: Statistics, pooled: Statistics) -> Params:
        """Normals centred on the two points, with the pooled covariance."""
        _, nu, _, psi = self.posterior(pooled)
        root = self._root(psi / nu.view(-1, *[1] * (psi.ndim - 1)))
        return self._components(anchors["s"], root.expand(2, *root.shape[1:]))

    @abc.abstractmethod
    def _spectrum(self, statistics: Statistics) -> Tensor:
        r"""Eigenvalues of $\Psi_n - \Psi_0$ relative to $\Psi$, ``(sets, dim)``."""

    @abc.abstractmethod
    def _moment(self, rows: Tensor, out: Tensor) -> None: ...

    @abc.abstractmethod
    def _residuals(self, xt: Tensor, params: Params) -> Tensor: ...

    @abc.abstractmethod
    def _student(self, squares: Tensor, df: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _outer(self, a: Tensor, b: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _root(self, covariance: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _log_det_root(self, root: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _principal(self, covariance: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _along(self, covariance: Tensor, u: Tensor) -> Tensor: ...


class FullGaussian(_Gaussian):
    """Full covariances; `psi` has shape ``(dim, dim)``."""

    name = "full"

    def log_marginal(self, statistics: Statistics) -> Tensor:
        """The marginal likelihood of each set, in the module's formula."""
        n, dim = statistics["n"], self.dim
        kappa, nu, _, psi = self.posterior(statistics)
        prior = torch.tensor(self.nu / 2, dtype=torch.float64)
        return (
            -n * dim / 2 * math.log(math.pi)
            + torch.mvlgamma(nu / 2, dim)
            - torch.mvlgamma(prior, dim)
            + self.nu / 2 * _log_det(self.psi)
            - nu / 2 * _log_det(psi)
            + dim / 2 * (math.log(self.kappa) - kappa.log())
        )

    def draw(self, statistics: Statistics, rng: np.random.Generator) -> Params:
        r"""Means and precisions by Bartlett's decomposition.

        With $L = \mathrm{chol}(\Psi_n)$ and $A$ lower triangular, $A_{ii} =
        \sqrt{\chi^2_{\nu_n - i + 1}}$, $A_{ij} \sim N(0, 1)$: $M = A^\top L^{-1}$.
        """
        kappa, nu, mean, psi = self.posterior(statistics)
        dim = self.dim
        lower = np.tril(rng.standard_normal((len(nu), dim, dim)), -1)
        diagonal = np.sqrt(rng.chisquare(nu.numpy()[:, None] - np.arange(dim)))
        lower[:, np.arange(dim), np.arange(dim)] = diagonal
        a = torch.from_numpy(lower)
        z = torch.from_numpy(rng.standard_normal((len(nu), dim, 1)))
        factor = torch.linalg.cholesky(psi)
        away = factor @ torch.linalg.solve_triangular(a.mT, z, upper=True)
        mean = mean + away[..., 0] / kappa.sqrt()[:, None]
        eye = torch.eye(dim, dtype=torch.float64).expand_as(psi)
        root = a.mT @ torch.linalg.solve_triangular(factor, eye, upper=False)
        log_det = a.diagonal(dim1=1, dim2=2).log().sum(1)
        log_det = log_det - factor.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = log_det - dim / 2 * math.log(2 * math.pi)
        return {"root": root, "mean": mean, "constant": constant}

    def predictive(self, statistics: Statistics) -> Params:
        r"""Student t with $\nu_n - D + 1$ degrees of freedom."""
        kappa, nu, mean, psi = self.posterior(statistics)
        df = nu - self.dim + 1
        root = self._root(psi * ((kappa + 1) / (kappa * df))[:, None, None])
        constant = (
            torch.lgamma((df + self.dim) / 2)
            - torch.lgamma(df / 2)
            - self.dim / 2 * (df * math.pi).log()
            + self._log_det_root(root)
        )
        return {"root": root, "mean": mean, "constant": constant, "df": df}

    def simulate(
        self, params: Params, labels: Tensor, rng: np.random.Generator
    ) -> np.ndarray:
        r"""$x = m_0 + \mu + M^{-1} \varepsilon$."""
        noise = torch.from_numpy(rng.standard_normal((len(labels), self.dim)))
        x = params["mean"][labels].clone()
        for k in labels.unique().tolist():
            own = labels == k
            x[own] += torch.linalg.solve(params["root"][k], noise[own].T).T
        return (x + self.mean).numpy()

    def _spectrum(self, statistics: Statistics) -> Tensor:
        factor = torch.linalg.cholesky(self.base)
        scatter = self.posterior(statistics)[3] - self.psi
        half = torch.linalg.solve_triangular(factor, scatter, upper=False)
        whole = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        return torch.linalg.eigvalsh((whole + whole.mT) / 2).clamp(min=0)

    def _moment(self, rows: Tensor, out: Tensor) -> None:
        torch.mm(rows.T, rows, out=out)

    def _residuals(self, xt: Tensor, params: Params) -> Tensor:
        root = params["root"]
        shift = (root @ params["mean"][..., None]).reshape(-1, 1)
        return torch.addmm(shift, root.reshape(-1, self.dim), xt, beta=-1).view(
            len(root), self.dim, -1
        )

    def _student(self, squares: Tensor, df: Tensor) -> Tensor:
        ratio = squares.sum(1) / df[:, None]
        return torch.log1p(ratio).mul_(-(df[:, None] + self.dim) / 2)

    def _outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a[:, :, None] * b[:, None, :]

    def _root(self, covariance: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(covariance)
        eye = torch.eye(self.dim, dtype=torch.float64).expand_as(covariance)
        return torch.linalg.solve_triangular(factor, eye, upper=False)

    def _log_det_root(self, root: Tensor) -> Tensor:
        return root.diagonal(dim1=1, dim2=2).log().sum(1)

    def _principal(self, covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        return vectors[..., -1] * values[:, -1:].sqrt()

    def _along(self, covariance: Tensor, u: Tensor) -> Tensor:
        return (torch.linalg.cholesky(covariance) @ u[..., None])[..., 0]


def _log_det(matrices: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(matrices)
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class DiagonalGaussian(_Gaussian):
    """Diagonal covariances; `psi` has shape ``(dim,)``."""

    name = "diagonal"

    def log_marginal(self, statistics: Statistics) -> Tensor:
        """The sum over dimensions of the marginal likelihood at one dimension."""
        n, dim = statistics["n"], self.dim
        kappa, nu, _, psi = self.posterior(statistics)
        return (
            -n * dim / 2 * math.log(math.pi)
            + dim * (torch.lgamma(nu / 2) - math.lgamma(self.nu / 2))
            + self.nu / 2 * self.psi.log().sum()
            - nu / 2 * psi.log().sum(1)
            + dim / 2 * (math.log(self.kappa) - kappa.log())
        )

    def draw(self, statistics: Statistics, rng: np.random.Generator) -> Params:
        r"""$1/\sigma^2 = \chi^2_{\nu_n} / \psi_n$, dimension by dimension."""
        kappa, nu, mean, psi = self.posterior(statistics)
        chi = torch.from_numpy(rng.chisquare(nu.numpy()[:, None], psi.shape))
        z = torch.from_numpy(rng.standard_normal(mean.shape))
        root = (chi / psi).sqrt()
        return self._components(mean + z / root / kappa.sqrt()[:, None], root)

    def predictive(self, statistics: Statistics) -> Params:
        r"""A product of Student t with $\nu_n$ degrees of freedom."""
        kappa, nu, mean, psi = self.posterior(statistics)
        root = (kappa * nu / (kappa + 1))[:, None].div(psi).sqrt()
        one = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2)
        one = one - 0.5 * (nu * math.pi).log()
        constant = self.dim * one + self._log_det_root(root)
        return {"root": root, "mean": mean, "constant": constant, "df": nu}

    def simulate(
        self, params: Params, labels: Tensor, rng: np.random.Generator
    ) -> np.ndarray:
        r"""$x = m_0 + \mu + \varepsilon / M$."""
        noise = torch.from_numpy(rng.standard_normal((len(labels), self.dim)))
        x = params["mean"][labels] + noise / params["root"][labels]
        return (x + self.mean).numpy()

    def _spectrum(self, statistics: Statistics) -> Tensor:
        scatter = self.posterior(statistics)[3] - self.psi
        return (scatter / self.base).clamp(min=0)

    def _moment(self, rows: Tensor, out: Tensor) -> None:
        torch.sum(rows * rows, 0, out=out)

    def _residuals(self, xt: Tensor, params: Params) -> Tensor:
        return (xt - params["mean"][..., None]).mul_(params["root"][..., None])

    def _student(self, squares: Tensor, df: Tensor) -> Tensor:
        ratio = squares / df[:, None, None]
        return torch.log1p(ratio).sum(1).mul_(-(df[:, None] + 1) / 2)

    def _outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def _root(self, covariance: Tensor) -> Tensor:
        return covariance.rsqrt()

    def _log_det_root(self, root: Tensor) -> Tensor:
        return root.log().sum(1)

    def _principal(self, covariance: Tensor) -> Tensor:
        widest = covariance.argmax(1, keepdim=True)
        axis = torch.zeros_like(covariance).scatter_(1, widest, 1.0)
        return axis * covariance.sqrt()

    def _along(self, covariance: Tensor, u: Tensor) -> Tensor:
        return covariance.sqrt() * u
