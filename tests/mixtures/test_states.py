"""States on disk and `warm_start`: what a chain may continue from, and what with."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from dreampropeller.mixtures import NIW, Dirichlet, DPMixture, HDPMixture, blocks
from dreampropeller.mixtures.states import digest

X = np.random.default_rng(0).normal(size=(60, 2)) + 9 * (np.arange(60) % 2)[:, None]
COUNTS = np.random.default_rng(0).poisson(2.0, (60, 2))
SHORT: dict[str, Any] = {"n_sweeps": 12, "burn_in": 2, "method": "exact"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save` and `checkpoint` write alike."""
    path = tmp_path_factory.mktemp("saved") / "chain"
    model = DPMixture(**SHORT, checkpoint=path).fit(X)
    written = torch.load(path, weights_only=True)
    model.save(path)
    assert torch.load(path, weights_only=True).keys() == written.keys()
    return path


@pytest.mark.parametrize(
    ("changed", "x", "names"),
    [
        ({"alpha": 500.0}, X, "alpha"),
        ({"prior": NIW(psi=5.0)}, X, "prior"),
        ({"prior": "diagonal"}, X, "prior"),
        ({"method": "subcluster"}, X, "burn_in, method, n_proposals"),
        ({"n_proposals": 3}, X, "burn_in, n_proposals"),
        ({"init_components": 30}, X, "init_components"),
        ({"random_state": 1}, X, "random_state"),
        ({}, X[::-1], "data"),
    ],
)
def test_a_file_of_another_chain_is_refused(
    changed: dict[str, Any], x: np.ndarray, names: str, saved: Path
) -> None:
    other = DPMixture(**{**SHORT, "checkpoint": saved, **changed})
    with pytest.raises(ValueError, match=f"with other {names}.*write another"):
        other.fit(x)


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_another_rounding_of_the_prior_continues_the_same_chain(
    n_jobs: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another type of CPU, where the covariance of the data has other bits."""
    monkeypatch.setattr(blocks, "SIZE", 32)
    settings: dict[str, Any] = {**SHORT, "n_proposals": 2, "n_jobs": n_jobs}
    whole = DPMixture(**{**settings, "n_sweeps": 24}).fit(X)
    path = tmp_path / "chain"
    part = DPMixture(**settings, warm_start=True, checkpoint=path).fit(X)
    cov = np.cov
    monkeypatch.setattr(np, "cov", lambda *a, **k: cov(*a, **k) * (1 + 1e-9))
    more = DPMixture(**{**settings, "n_sweeps": 24}, checkpoint=path).fit(X)
    for model in (more, part.set_params(checkpoint=None).fit(X)):
        assert torch.equal(model.family_.settings["psi"], whole.family_.settings["psi"])
        np.testing.assert_array_equal(
            model.history_["log_joint"], whole.history_["log_joint"]
        )


def test_other_groups_of_the_same_points_are_refused(tmp_path: Path) -> None:
    model = HDPMixture(n_sweeps=3, burn_in=1, checkpoint=tmp_path / "chain")
    model.fit([X[:30], X[30:]])
    with pytest.raises(ValueError, match="other groups: write"):
        model.fit([X[:20], X[20:]])
    model.set_params(gamma=3.0)
    with pytest.raises(ValueError, match="other gamma: write"):
        model.fit([X[:30], X[30:]])


def test_a_saved_chain_makes_the_sweeps_that_are_missing(
    saved: Path, tmp_path: Path
) -> None:
    path = shutil.copy(saved, tmp_path / "chain")
    whole = DPMixture(**{**SHORT, "n_sweeps": 20}).fit(X)
    more = DPMixture(**{**SHORT, "n_sweeps": 20}, checkpoint=path).fit(X)
    assert more.n_iter_ == 20
    np.testing.assert_array_equal(more.labels_, whole.labels_)


def test_a_chain_that_patience_ended_says_how_to_go_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"burn_in": 1, "checkpoint": tmp_path / "chain"}
    done = DPMixture(n_sweeps=60, patience=8, **settings).fit(X).n_iter_
    assert done < 60
    assert DPMixture(n_sweeps=60, patience=8, **settings).fit(X).n_iter_ == done
    with pytest.warns(ConvergenceWarning, match="write `patience=None`"):
        DPMixture(n_sweeps=80, patience=8, **settings).fit(X)
    assert DPMixture(n_sweeps=80, patience=None, **settings).fit(X).n_iter_ == 80


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"weights": torch.ones(2)}, "is not a state of a mixture"),
        ([1, 2], "is not a state of a mixture"),
        ({"labels": torch.zeros(60)}, "does not say which data"),
    ],
)
def test_another_kind_of_file_is_refused(
    content: Any, sentence: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "file")
    with pytest.raises(ValueError, match=sentence):
        DPMixture(**SHORT, checkpoint=tmp_path / "file").fit(X)


def test_a_folder_that_does_not_exist_is_named_before_the_first_sweep(
    tmp_path: Path,
) -> None:
    path = tmp_path / "none" / "chain"
    with pytest.raises(ValueError, match=r"The folder of .* does not exist: make it"):
        DPMixture(n_sweeps=10**9, checkpoint=path).fit(X)
    with pytest.raises(ValueError, match="is a folder: write the name of a file"):
        DPMixture(**SHORT).fit(X).save(tmp_path)


def test_warm_start_takes_the_settings_of_now() -> None:
    model = DPMixture(1.0, **SHORT, warm_start=True).fit(X)
    model.set_params(alpha=2.0, prior=NIW(psi=5.0), n_proposals=4).fit(X)
    assert model.history_["concentration"].tolist() == [1.0] * 12 + [2.0] * 12
    assert torch.equal(
        model.family_.settings["psi"], 5 * torch.eye(2, dtype=torch.float64)
    )
    sampled = model.set_params(alpha=(1.0, 1.0)).fit(X)
    assert len(set(sampled.history_["concentration"])) == 2 + 12


@pytest.mark.parametrize("method", ["exact", "subcluster"])
def test_warm_start_with_other_points_has_their_statistics(method: str) -> None:
    settings = {**SHORT, "method": method}
    model = DPMixture(**settings, warm_start=True).fit(X)
    model.fit(X + 100)
    total = model.statistics_["s"].sum(0) / 60 + model.family_.settings["mean"]
    np.testing.assert_allclose(total, (X + 100).mean(0))


def test_warm_start_with_a_checkpoint_goes_on_from_the_last_fit(tmp_path: Path) -> None:
    settings = {**SHORT, "n_proposals": 2}
    whole = DPMixture(**{**settings, "n_sweeps": 24}).fit(X)
    part = DPMixture(**settings, warm_start=True, checkpoint=tmp_path / "chain").fit(X)
    np.testing.assert_array_equal(part.fit(X).labels_, whole.labels_)
    assert part.n_iter_ == 24


def test_warm_start_replaces_the_file_of_the_settings_before(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    model = DPMixture(**SHORT, warm_start=True, checkpoint=path).fit(X)
    model.set_params(alpha=2.0).fit(X)
    assert model.history_["concentration"].tolist() == [1.0] * 12 + [2.0] * 12
    assert len(torch.load(path, weights_only=True)["history"]["log_joint"]) == 24
    DPMixture(3.0, **SHORT, checkpoint=tmp_path / "other").fit(X)
    with pytest.raises(ValueError, match="other alpha: write another"):
        model.set_params(checkpoint=tmp_path / "other").fit(X)


def test_warm_start_needs_no_sweeps_to_settle() -> None:
    model = DPMixture(n_sweeps=9, warm_start=True).fit(X)
    assert model.set_params(n_sweeps=6).fit(X).n_iter_ == 15
    with pytest.raises(ValueError, match="`n_sweeps` is 5: write at least 6, because"):
        model.set_params(n_sweeps=5).fit(X)


def test_a_digest_copies_no_array() -> None:
    array = np.ones(10**6)
    tracemalloc.start()
    found = digest(array, array[:0], np.array(2.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < array.nbytes / 2
    assert found != digest(array, array[:0], np.array(3.0))


@pytest.mark.parametrize(
    ("changed", "x", "sentence"),
    [
        ({"method": "subcluster"}, X, "`method` is 'exact'.*now 'subcluster'"),
        ({"prior": Dirichlet()}, COUNTS, "`prior` is 'full'.*now 'multinomial'"),
        ({"prior": "diagonal"}, X, "`prior` is 'full'.*now 'diagonal'"),
        ({}, X[:50], "60 points and the data 50"),
    ],
)
def test_warm_start_refuses_a_chain_of_another_kind(
    changed: dict[str, Any], x: np.ndarray, sentence: str
) -> None:
    model = DPMixture(**SHORT, warm_start=True).fit(X)
    with pytest.raises(ValueError, match=f"{sentence}.*warm_start=False"):
        model.set_params(**changed).fit(x)
