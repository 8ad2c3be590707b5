"""Chains: any number of workers, resumed states, recovery of known clusters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score as nmi

from dreampropeller.mixtures import NIW, Dirichlet, DPMixture, HDPMixture, fitting
from dreampropeller.mixtures.blocks import Blocks, JobBlocks, RankBlocks
from dreampropeller.mixtures.chain import Chain
from dreampropeller.mixtures.exact import ExactChain
from dreampropeller.mixtures.priors import (
    DirichletProcess,
    HierarchicalDirichletProcess,
    PartitionPrior,
)
from dreampropeller.mixtures.subclusters import SETTLE, SubclusterChain
from tests.rank_pool import RankPool

METHODS = ["subcluster", "exact"]


def gaussians(
    n: int, dim: int, num: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit Gaussians whose centres are at least ten standard deviations apart."""
    rng = np.random.default_rng(seed)
    centres: list[np.ndarray] = []
    while len(centres) < num:
        new = rng.normal(size=dim) * 20
        if all(np.linalg.norm(new - old) >= 10 for old in centres):
            centres.append(new)
    labels = rng.integers(0, num, n)
    return np.stack(centres)[labels] + rng.normal(size=(n, dim)), labels


def chain_on(blocks: Blocks, method: str, groups: int) -> Chain:
    n = blocks.num_points
    prior: PartitionPrior = DirichletProcess((1.0, 1.0))
    if groups > 1:
        prior = HierarchicalDirichletProcess((1.0, 1.0), 1.0, groups)
    group = torch.arange(n) * groups // n
    labels = torch.arange(n) % 3
    if method == "exact":
        return ExactChain(blocks, prior, group, 0, labels, proposals=2)
    return SubclusterChain(blocks, prior, group, 0, labels)


def run(blocks: Blocks, method: str, groups: int, sweeps: int) -> Chain:
    chain = chain_on(blocks, method, groups)
    for _ in range(sweeps):
        chain.sweep()
    return chain


def made(kind: Callable[..., Blocks], *args: Any, size: int = 128) -> Blocks:
    x, _ = gaussians(900, 2, 4)
    return kind(NIW().resolve(x), x, *args, size=size)


def ranks() -> list[tuple[torch.Tensor, list[float]]]:
    """What every rank finds, for both methods."""
    found = []
    for method in METHODS:
        chain = run(made(RankBlocks), method, 1, 6)
        found.append((chain.labels, chain.history.log_joint))
    return found


def test_labels_do_not_depend_on_the_number_of_workers(two_ranks: RankPool) -> None:
    one = [run(made(Blocks), method, 1, 6) for method in METHODS]
    for method, alone in zip(METHODS, one, strict=True):
        blocks = made(JobBlocks, 3)
        chain = run(blocks, method, 1, 6)
        blocks.close()
        assert torch.equal(chain.labels, alone.labels)
        assert chain.history.log_joint == alone.history.log_joint  # bit for bit
    for found in two_ranks(ranks):
        for (labels, log_joint), alone in zip(found, one, strict=True):
            assert torch.equal(labels, alone.labels)
            assert log_joint == alone.history.log_joint


def fits_of_a_rank(folder: Path) -> tuple[list[list[float]], list[str]]:
    """Labels of fits that work on two ranks, messages of those that do not."""
    rank, (x, _) = torch.distributed.get_rank(), gaussians(60, 2, 2)
    options: dict[str, Any] = {"n_jobs": "ranks", "n_sweeps": 9, "alpha": (1.0, 1.0)}
    cov, labels = np.cov, list[list[float]]()
    refused: list[str] = []
    for changed in (
        {"random_state": None},
        {"checkpoint": folder / "chain"},
        {"checkpoint": folder / "chain", "n_sweeps": 12},
    ):
        # As on another type of CPU, where the covariance of the data has other bits.
        with mock.patch("numpy.cov", lambda *a, **k: cov(*a, **k) * (1 + rank * 1e-9)):
            model = DPMixture(**{**options, **changed}).fit(x)
        labels.append([len(model.history_["log_joint"]), *model.labels_.tolist()])
        labels[-1] += model.history_["log_joint"].tolist()
    for changed, points in (
        ({}, x[rank::2]),
        ({"alpha": 1.0 + rank}, x),
        ({"n_sweeps": 10 + rank}, x),
        ({"checkpoint": folder / "none" / "chain"}, x),
    ):
        with pytest.raises(ValueError, match=r"write|every rank") as error:
            DPMixture(**{**options, **changed}).fit(points)
        refused.append(str(error.value))
    return labels, refused


def test_ranks_agree_on_seed_data_and_file(two_ranks: RankPool, tmp_path: Path) -> None:
    (first, refused), second = two_ranks(fits_of_a_rank, tmp_path)
    assert (first, refused) == second
    assert [found[0] for found in first] == [9, 9, 12]
    for message, names in zip(refused, ["data", "alpha", "n_sweeps"], strict=False):
        assert f"have different {names}: with" in message
    assert "does not exist" in refused[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["chain"]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_chain_goes_on_bit_for_bit(
    method: str, groups: int, tmp_path: Path
) -> None:
    whole = run(made(Blocks, size=512), method, groups, 14)
    part = run(made(Blocks, size=512), method, groups, 6)
    fitting.write({**part.state(), "mark": {}}, tmp_path / "state")
    again = chain_on(made(Blocks, size=512), method, groups)
    state = fitting.read(tmp_path / "state", {})
    assert state is not None
    again.load(state)
    for _ in range(8):
        again.sweep()
    assert torch.equal(again.labels, whole.labels)
    assert again.history == whole.history
    assert again.prior.state() == whole.prior.state()


@pytest.mark.parametrize("method", METHODS)
def test_fit_continues_from_its_checkpoint(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _ = gaussians(300, 2, 3)
    monkeypatch.setattr(fitting, "EVERY", 7)
    settings: dict[str, Any] = {"method": method, "n_sweeps": 30, "burn_in": 5}
    whole = DPMixture(**settings).fit(x)
    sweep, made = Chain.record, []

    def interrupted(chain: Chain) -> None:
        made.append(None)
        if len(made) == 17:
            raise KeyboardInterrupt
        sweep(chain)

    monkeypatch.setattr(Chain, "record", interrupted)
    path = tmp_path / "chain"
    with pytest.raises(KeyboardInterrupt):
        DPMixture(**settings, checkpoint=path).fit(x)
    monkeypatch.setattr(Chain, "record", sweep)
    resumed = DPMixture(**settings, checkpoint=path).fit(x)
    np.testing.assert_array_equal(resumed.labels_, whole.labels_)
    np.testing.assert_array_equal(
        resumed.history_["log_joint"], whole.history_["log_joint"]
    )
    with pytest.raises(ValueError, match="chain with other data: write"):
        DPMixture(**settings, checkpoint=path).fit(x + 1)


@pytest.mark.parametrize("start", [1, 30])
@pytest.mark.parametrize("dim", [2, 32])
def test_known_clusters_are_found_from_one_and_from_thirty(
    dim: int, start: int
) -> None:
    x, truth = gaussians(10_000, dim, 10)
    found = DPMixture(n_sweeps=100, init_components=start).fit(x)
    assert nmi(truth, found.labels_) > 0.98
    assert found.n_components_ == 10


def test_halves_of_a_gaussian_merge_and_two_gaussians_do_not() -> None:
    x = np.random.default_rng(0).normal(size=(1000, 2))
    coin = np.arange(1000) % 2
    halves, both = x[:, 0] > 0, x + 6 * coin[:, None]
    for points, labels, expected in ((x, halves, 1), (both, coin == 1, 2)):
        blocks = Blocks(NIW().resolve(points), points)
        group, start = torch.zeros(1000).long(), torch.from_numpy(labels)
        chain = SubclusterChain(blocks, DirichletProcess(1.0), group, 0, start)
        for _ in range(SETTLE + 4):
            chain.sweep()
        assert chain.num_clusters == expected


def test_exact_finds_few_clusters_too() -> None:
    x, truth = gaussians(1000, 2, 4)
    found = DPMixture(method="exact", n_sweeps=15, burn_in=5).fit(x)
    assert nmi(truth, found.labels_) > 0.98


def test_permuted_points_have_the_same_clusters_where_these_lie_apart() -> None:
    x, truth = gaussians(200, 2, 3)
    order = np.random.default_rng(0).permutation(200)
    for rows in (np.arange(200), order):
        found = DPMixture(n_sweeps=40).fit(x[rows])
        assert nmi(truth[rows], found.labels_) > 0.999


@pytest.mark.parametrize("method", METHODS)
def test_groups_share_their_clusters(method: str) -> None:
    x, truth = gaussians(600, 2, 3)
    first, second = truth != 0, truth != 1
    model = HDPMixture(method=method, n_sweeps=50).fit([x[first], x[second]])
    assert model.n_components_ == 3
    both = np.concatenate([truth[first], truth[second]])
    assert nmi(both, np.concatenate(model.labels_)) > 0.98
    assert (model.group_weights_.min(1) < 0.01).all()  # each group lacks one
    again = model.transform([x[first], x[second]])
    np.testing.assert_allclose(again, model.group_weights_, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_documents_of_two_kinds(method: str) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 300)
    words = rng.dirichlet(np.full(30, 0.1), 2)
    x = rng.multinomial(25, words[truth])
    model = DPMixture(prior=Dirichlet(0.5), method=method, n_sweeps=60).fit(x)
    assert nmi(truth, model.labels_) > 0.95
    assert (model.predict(x) == model.labels_).mean() > 0.98
