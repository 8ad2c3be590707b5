"""User input, checked: priors of components, concentrations and data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from dreampropeller.checks import is_number, is_whole
from dreampropeller.mixtures.family import Family
from dreampropeller.mixtures.gaussian import DiagonalGaussian, FullGaussian
from dreampropeller.mixtures.multinomial import Multinomial
from dreampropeller.mixtures.priors import Concentration

LARGEST = 1e30
"""Of real-valued data: single precision ends at 3e38."""
FARTHEST = 1e15
"""From the prior's mean, in its scales: the square still fits into single precision."""
MOST = 1e15
"""Of a count: up to here every whole number has its own float64."""


@dataclass(frozen=True)
class NIW:
    r"""Gaussian components: $\Sigma \sim \mathrm{IW}(\nu, \Psi)$, $\mu \mid \Sigma \sim
    N(m, \Sigma / \kappa)$.

    Args:
        mean: $m$, shape ``(dim,)``; by default the data's mean.
        kappa: $\kappa$; the smaller, the farther apart clusters may lie.
        nu: $\nu$, above ``dim - 1``, without `psi` above ``dim + 1``; by default
            ``2 dim + 2``. For diagonal components the degrees of freedom per dimension,
            above 0, without `psi` above 2; by default 4.
        psi: $\Psi$, shape ``(dim, dim)``, or ``(dim,)`` for diagonal components. By
            default it is $\tau$ times the scale at which the expected covariance is
            the data's, and $\tau$ in $[10^{-4}, 1]$ is sampled with the labels.
        covariance: "full" or "diagonal".
    """  # noqa: D205

    mean: Any = None
    kappa: Any = 0.05
    nu: Any = None
    psi: Any = None
    covariance: str = "full"

    def resolve(self, x: np.ndarray) -> Family:
        """The family, with defaults from the data."""
        dim = x.shape[1]
        if self.covariance not in ("full", "diagonal"):
            raise ValueError(
                f"`covariance` is {self.covariance!r}: write 'full' or 'diagonal'."
            )
        full = self.covariance == "full"
        check_magnitude(x)
        nu, kappa = self._nu(dim, full), above(self.kappa, 0, "kappa")
        mean = x.mean(0) if self.mean is None else as_floats(self.mean, "mean")
        if mean.shape != (dim,):
            raise ValueError(f"`mean` has shape {mean.shape}: the data needs ({dim},).")
        if self.psi is None:
            psi = self._spread(x) * (nu - dim - 1 if full else nu - 2)
        else:
            psi = _matrix(self.psi, dim, full)
        _check_distances(np.abs(x - mean).max(0), psi.diagonal() if full else psi, nu)
        kind = FullGaussian if full else DiagonalGaussian
        scale = 1.0 if self.psi is None else None
        return kind(
            torch.from_numpy(mean.copy()),
            kappa,
            nu,
            torch.from_numpy(psi.copy()),
            scale,
        )

    def _nu(self, dim: int, full: bool) -> float:
        """Degrees of freedom; the default `psi` needs a mean of the covariance."""
        if self.nu is None:
            return 2.0 * dim + 2 if full else 4.0
        least = dim - 1 if full else 0
        if self.psi is not None:
            return above(self.nu, least, "nu")
        own = f", or one above {least} and your own `psi`"
        return above(self.nu, dim + 1 if full else 2, "nu", own)

    def _spread(self, x: np.ndarray) -> np.ndarray:
        constant = np.flatnonzero(np.ptp(x, axis=0) <= 1e-12 * np.abs(x).max(0))
        if len(constant):
            raise ValueError(
                f"Column {constant[0]} is constant, so no scale can be taken from it: "
                "remove the column, or write `prior=NIW(psi=...)`."
            )
        if self.covariance == "diagonal":
            return x.var(0)
        covariance = np.atleast_2d(np.cov(x.T, bias=True))
        values = np.linalg.eigvalsh(covariance / _outer_deviation(covariance))
        if values[0] < 1e-10:
            raise ValueError(
                "Some columns are linear combinations of others (or there are fewer "
                "points than columns): remove them, or write "
                "`prior=NIW(covariance='diagonal')` or `NIW(psi=...)`."
            )
        return covariance


def _check_distances(farthest: np.ndarray, psi: np.ndarray, nu: float) -> None:
    """Refuse points whose squared distance, in units of the prior's, overflows."""
    ratio = farthest / np.sqrt(psi / nu)
    column = int(ratio.argmax())
    if not ratio[column] <= FARTHEST:
        raise ValueError(
            f"Column {column} reaches {ratio[column]:.3g} times the scale of `psi` "
            f"from `mean`, and single precision allows {FARTHEST:g}: write a `psi` of "
            "the data's scale, or leave the farthest points out."
        )


def _outer_deviation(covariance: np.ndarray) -> np.ndarray:
    deviation = np.sqrt(np.diag(covariance))
    return np.outer(deviation, deviation)


def _matrix(psi: Any, dim: int, full: bool) -> np.ndarray:
    psi = as_floats(psi, "psi")
    shape = (dim, dim) if full else (dim,)
    if psi.ndim == 0:
        psi = psi * (np.eye(dim) if full else np.ones(dim))
    if psi.shape != shape:
        raise ValueError(f"`psi` has shape {psi.shape}: the data needs {shape}.")
    if full and np.abs(psi - psi.T).max() > 1e-10 * np.abs(psi).max():
        raise ValueError(
            "`psi` is not symmetric: write `(psi + psi.T) / 2` if that is meant."
        )
    values = np.linalg.eigvalsh(psi) if full else psi
    if values.min() <= 1e-14 * values.max() * full:  # else Cholesky factors fail
        raise ValueError(
            f"`psi` has a smallest eigenvalue of {values.min():.3g}: write a symmetric "
            "matrix whose eigenvalues are all above 0."
        )
    return psi


@dataclass(frozen=True)
class Dirichlet:
    r"""Components over counts: $\theta \sim \mathrm{Dirichlet}(a)$.

    Args:
        a: One number for all columns or shape ``(dim,)``; the smaller, the fewer
            columns a cluster uses.
    """

    a: Any = 1.0

    def resolve(self, x: Any) -> Family:
        """The family for data with as many columns."""
        a = as_floats(self.a, "a")
        a = np.full(x.shape[1], float(a)) if a.ndim == 0 else a
        if a.shape != (x.shape[1],):
            raise ValueError(f"`a` has shape {a.shape}: needed is ({x.shape[1]},).")
        if not (a > 0).all():
            raise ValueError(f"`a` has the entry {a.min():.3g}: write numbers above 0.")
        return Multinomial(torch.from_numpy(a.copy()))


PRIORS = {
    "full": NIW(),
    "diagonal": NIW(covariance="diagonal"),
    "multinomial": Dirichlet(),
}
"""Names for the priors with default settings."""


def as_prior(prior: Any) -> NIW | Dirichlet:
    """The prior that a name or None stands for."""
    if prior is None:
        return PRIORS["full"]
    if isinstance(prior, str) and prior in PRIORS:
        return PRIORS[prior]
    if isinstance(prior, (NIW, Dirichlet)):
        return prior
    raise ValueError(
        f"`prior` is {prior!r}: write `NIW(...)` for real-valued data, "
        f"`Dirichlet(...)` for counts, or one of {', '.join(map(repr, PRIORS))}."
    )


def as_concentration(value: Any, name: str) -> Concentration:
    """A number above 0, or shape and rate of a Gamma prior."""
    pair = value if isinstance(value, (tuple, list)) else (value,)
    good = len(pair) in (1, 2) and all(
        is_number(v) and math.isfinite(v) and v > 0 for v in pair
    )
    if not good:
        raise ValueError(
            f"`{name}` is {value!r}: write a number above 0, or (shape, rate) of a "
            "Gamma prior to have it sampled, for example (1.0, 1.0)."
        )
    if len(pair) == 2:
        return (float(pair[0]), float(pair[1]))
    return float(pair[0])


def above(value: Any, least: float, name: str, otherwise: str = "") -> float:
    """A finite number above `least`."""
    if not (is_number(value) and math.isfinite(value) and value > least):
        raise ValueError(
            f"`{name}` is {value!r}: write a number above {least}{otherwise}."
        )
    return float(value)


def as_floats(value: Any, name: str) -> np.ndarray:
    """Finite numbers, of any shape."""
    try:
        found = np.asarray(value, float)
    except (TypeError, ValueError):
        found = np.array(np.nan)
    if not np.isfinite(found).all():
        raise ValueError(f"`{name}` is {value!r}: write finite numbers.")
    return found


def as_jobs(value: Any) -> int | str | None:
    """A number of processes, a negative one as joblib reads it, or "ranks"."""
    if value is None or (isinstance(value, str) and value == "ranks"):
        return value
    number: int = int(value) if is_whole(value) else 0
    if number != 0:
        return number
    raise ValueError(
        f"`n_jobs` is {value!r}: write a number of processes, -1 for one per core, "
        "-2 for one less, or 'ranks' inside a `torch.distributed` group."
    )


def as_device(value: Any) -> str:
    """A device that is there, "cpu" or one of CUDA."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` is {value!r}: write 'cpu', 'cuda' or 'cuda:1'.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"`device` is {value!r} and there are {count} CUDA devices here: write "
            "'cpu', or the index of one of them."
        )
    return str(device)


def at_least(value: Any, least: int, name: str) -> int:
    """An integer setting, not below `least`."""
    if not is_whole(value) or value < least:
        raise ValueError(
            f"`{name}` is {value!r}: write an integer of at least {least}."
        )
    return int(value)


def as_weights(weights: Any, shape: tuple[int, int]) -> np.ndarray:
    """Weights of groups, ``(groups, clusters)``, whose rows sum to 1."""
    weights = np.asarray(weights, float)
    if weights.shape != shape:
        raise ValueError(
            f"`weights` has shape {weights.shape}: {shape} is needed, a row per group "
            "and a column per cluster as `transform` returns."
        )
    if not ((weights >= 0).all() and np.allclose(weights.sum(1), 1, atol=1e-6)):
        raise ValueError(
            "The rows of `weights` are not probabilities: write numbers of at least 0 "
            "whose rows sum to 1, as `transform` returns."
        )
    return weights


def check_magnitude(x: np.ndarray) -> None:
    """Refuse columns whose densities do not fit into single precision."""
    for column, (low, high) in enumerate(zip(x.min(0), x.max(0), strict=True)):
        largest, spread = max(-low, high), high - low
        if largest > LARGEST:
            raise ValueError(
                f"Column {column} holds {largest:.3g}, and densities are computed in "
                f"single precision, up to {LARGEST:g}: divide the data by a constant."
            )
        if 0 < spread < 1 / LARGEST:
            raise ValueError(
                f"Column {column} has a spread of {spread:.3g}, and densities are "
                f"computed in single precision, from {1 / LARGEST:g}: multiply the "
                "data by a constant."
            )


def check_counts(x: Any) -> None:
    """Refuse negative counts, dense or sparse."""
    least, most = x.min(), x.max()
    if most > MOST:
        raise ValueError(
            f"The largest count is {most:.3g}, and no more than {MOST:g} are told "
            "apart: divide the counts by a constant."
        )
    if least < 0:
        raise ValueError(
            f"Negative values in data: the smallest is {least:.3g}, and counts are "
            "at least 0. For real-valued data write `prior=NIW()`."
        )


def stack(groups: list[Any]) -> Any:
    """The groups' rows, one below the other."""
    if any(sparse.issparse(group) for group in groups):
        return sparse.vstack([sparse.csr_matrix(g) for g in groups], format="csr")
    return np.concatenate(groups)
