"""Component families: marginals, draws and densities agree with each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from dreampropeller.mixtures.family import Family, add, join, take
from dreampropeller.mixtures.gaussian import SCALES, FullGaussian
from dreampropeller.mixtures.inputs import NIW
from dreampropeller.mixtures.multinomial import Multinomial, _on_device
from tests.mixtures.exact import COUNTS, diagonal, gaussian, multinomial, points

FAMILIES = {
    "full": (gaussian(3), points(6, 3)),
    "diagonal": (diagonal(3), points(6, 3)),
    "multinomial": (multinomial(), np.concatenate([COUNTS, COUNTS[:1]])),
}
each = pytest.mark.parametrize(("family", "x"), FAMILIES.values(), ids=FAMILIES)


def sets(family: Family, x: np.ndarray, key: list[int], num: int) -> dict:
    return family.statistics(family.block(x), torch.tensor(key), num)


@each
def test_marginal_is_the_product_of_predictives(family: Family, x: np.ndarray) -> None:
    block, chain = family.block(x), 0.0
    for i in range(len(x)):
        before = sets(family, x, [0] * i + [-1] * (len(x) - i), 1)
        chain += float(family.log_likelihood(block, family.predictive(before))[0, i])
    whole = family.log_marginal(sets(family, x, [0] * len(x), 1))
    assert float(whole[0]) == pytest.approx(chain, abs=1e-4)  # densities are float32


@each
def test_a_union_has_the_sum_of_the_statistics(family: Family, x: np.ndarray) -> None:
    parts = sets(family, x, [0, 1, 1, 0, 1, -1], 2)
    union = add(take(parts, [0]), take(parts, [1]))
    for name, value in sets(family, x, [0] * 5 + [-1], 1).items():
        torch.testing.assert_close(union[name], value)


@each
def test_an_empty_set_has_marginal_one(family: Family, x: np.ndarray) -> None:
    empty = family.log_marginal(sets(family, x, [-1] * len(x), 1))
    assert float(empty[0]) == pytest.approx(0, abs=1e-12)


@each
def test_marginal_is_the_mean_likelihood_under_the_prior(
    family: Family, x: np.ndarray
) -> None:
    rng = np.random.default_rng(0)
    none = take(sets(family, x, [-1] * len(x), 1), [0] * 40_000)
    likelihood = family.log_likelihood(family.block(x[:2]), family.draw(none, rng))
    found = likelihood.double().sum(1).exp()
    error = float(found.std() / math.sqrt(len(found)))
    exact = float(family.log_marginal(sets(family, x[:2], [0, 0], 1)).exp()[0])
    assert abs(float(found.mean()) - exact) < 4 * error


def test_mean_of_drawn_covariances() -> None:
    family, x = FAMILIES["full"]
    assert isinstance(family, FullGaussian)
    whole = sets(family, x, [0] * 6, 1)
    _, nu, _, psi = family.posterior(whole)
    params = family.draw(take(whole, [0] * 20_000), np.random.default_rng(0))
    covariances = torch.linalg.inv(params["root"].mT @ params["root"])
    error = covariances.std(0) / math.sqrt(20_000)
    wanted = psi[0] / (nu[0] - family.dim - 1)
    assert bool(((covariances.mean(0) - wanted).abs() < 4 * error).all())


@pytest.mark.parametrize("name", ["full", "diagonal"])
def test_density_is_that_of_a_normal(name: str) -> None:
    family, x = FAMILIES[name]
    params = family.draw(
        sets(family, x, [0, 0, 0, 1, 1, 1], 2), np.random.default_rng(0)
    )
    found = family.log_likelihood(family.block(x), params)
    for k in range(2):
        root = params["root"][k]
        precision = root.T @ root if root.ndim == 2 else torch.diag(root**2)
        mean = params["mean"][k] + 0.7  # kept relative to the prior's mean
        normal = stats.multivariate_normal(mean, torch.linalg.inv(precision))
        np.testing.assert_allclose(found[k], normal.logpdf(x), atol=1e-4)


def test_halves_of_a_gaussian_have_the_moments_of_its_halves() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200_000, 2)) * [3, 1]
    family = FullGaussian(torch.zeros(2), 1e-6, 2, 1e-6 * torch.eye(2))
    whole = sets(family, x, [0] * len(x), 1)
    left, right = family.halves(whole, rng, torch.tensor([True]))
    side = x[x[:, 0] > 0]
    high = max(left, right, key=lambda half: float(half["mean"][0, 0]))
    np.testing.assert_allclose(high["mean"][0], side.mean(0), atol=0.02)
    covariance = torch.linalg.inv(high["root"][0].T @ high["root"][0])
    np.testing.assert_allclose(covariance, np.cov(side.T), atol=0.03)


def test_sampled_scale_follows_its_posterior() -> None:
    x = points(40)
    family = NIW().resolve(x)
    assert isinstance(family, FullGaussian)
    two = sets(family, x, [i % 2 for i in range(40)], 2)
    logs = []
    for scale in SCALES:
        family.scale = scale
        logs.append(float(family.log_marginal(two).sum()))
    exact = np.exp(np.array(logs) - max(logs))
    exact /= exact.sum()
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        family.resample(two, rng)
        drawn.append(SCALES.index(family.scale))
    found = np.bincount(drawn, minlength=len(SCALES)) / 2000
    assert 0.5 * np.abs(found - exact).sum() < 0.05


def test_sparse_counts_equal_dense_counts() -> None:
    rng = np.random.default_rng(0)
    x = rng.poisson(0.4, (50, 9)).astype(float)
    family = Multinomial(torch.full((9,), 0.3))
    dense, thin = family.block(x), family.block(sparse.csr_matrix(x))
    key = torch.from_numpy(rng.integers(-1, 3, 50))
    one, two = (family.statistics(block, key, 3) for block in (dense, thin))
    assert torch.equal(one["C"], two["C"])
    index = torch.tensor([3, 3, 7])
    for params in (family.draw(one, rng), family.predictive(one)):
        first = family.log_likelihood(family.rows(dense, index), params)
        second = family.log_likelihood(family.rows(thin, index), params)
        torch.testing.assert_close(first, second)


def test_rows_of_sparse_counts_leave_the_matrix_on_the_device() -> None:
    family = Multinomial(torch.full((3,), 0.3))
    block = family.block(sparse.csr_matrix(COUNTS))
    assert _on_device(block).shape == (5, 3)
    assert _on_device(family.rows(block, torch.tensor([0, 2]))).shape == (2, 3)


@each
def test_simulated_points_have_the_entropy_of_their_component(
    family: Family, x: np.ndarray
) -> None:
    rng = np.random.default_rng(1)
    params = family.draw(sets(family, x, [0, 0, 0, 1, 1, 1], 2), rng)
    drawn = family.simulate(params, torch.ones(20_000, dtype=torch.long), rng)
    own = family.log_likelihood(family.block(drawn), params)[1].double()
    if isinstance(family, Multinomial):
        log_theta = params["log_theta"][1]
        wanted = float((log_theta.exp() * log_theta).sum())
    else:
        wanted = float(params["constant"][1]) - family.dim / 2
    assert abs(float(own.mean()) - wanted) < 4 * float(own.std()) / math.sqrt(20_000)


def test_join_keeps_the_order() -> None:
    family, x = FAMILIES["full"]
    parts = sets(family, x, [0, 0, 1, 1, 2, 2], 3)
    assert torch.equal(
        join([take(parts, [2]), take(parts, [0])])["s"][0], parts["s"][2]
    )
