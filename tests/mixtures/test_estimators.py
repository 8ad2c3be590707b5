"""`DPMixture` and `HDPMixture` as estimators: scikit-learn's checks, bad input."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from dreampropeller.mixtures import NIW, Dirichlet, DPMixture, HDPMixture, blocks
from dreampropeller.mixtures.inputs import as_jobs

CLASSIFIERS = "asks every estimator with `predict_proba` for its classifier tags"
NORMAL = "its data is real-valued, and counts are not"
REASONS = {
    "check_estimator_sparse_array": CLASSIFIERS,
    "check_estimator_sparse_matrix": CLASSIFIERS,
    "check_clustering": NORMAL,
}
X = np.random.default_rng(0).normal(size=(60, 2)) + 9 * (np.arange(60) % 2)[:, None]
COUNTS = np.random.default_rng(0).poisson(2.0, (20, 4))


@functools.cache
def topics() -> HDPMixture:
    model = HDPMixture(prior="multinomial", n_sweeps=4, burn_in=1)
    return model.fit([COUNTS[:10], COUNTS[10:]])


@functools.cache
def planes() -> HDPMixture:
    return HDPMixture(n_sweeps=4, burn_in=1).fit([X[:30], X[30:]])


@functools.cache
def documents() -> DPMixture:
    return DPMixture(prior="multinomial", n_sweeps=9).fit(COUNTS)


def expected(estimator: DPMixture) -> dict[str, str]:
    return REASONS if estimator.prior == "multinomial" else {}


@parametrize_with_checks(
    [
        DPMixture(n_sweeps=25, burn_in=4),
        DPMixture(n_sweeps=9, burn_in=4, prior="multinomial"),
    ],
    expected_failed_checks=expected,
)
def test_scikit_learn(estimator: DPMixture, check: Callable[[DPMixture], None]) -> None:
    check(estimator)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "nan": (lambda: DPMixture().fit([[0.0, np.nan]] * 5), "contains NaN"),
    "empty": (lambda: DPMixture().fit(np.empty((0, 2))), "0 sample"),
    "one point": (lambda: DPMixture().fit([[1.0, 2.0]]), "1 sample"),
    "constant": (
        lambda: DPMixture().fit(np.c_[X, np.ones(60)]),
        "Column 2 is constant.*remove the column, or write `prior=NIW",
    ),
    "collinear": (
        lambda: DPMixture().fit(np.c_[X, X.sum(1)]),
        "linear combinations.*covariance='diagonal'",
    ),
    "negative": (
        lambda: DPMixture(prior="multinomial").fit(COUNTS - 3),
        "Negative values in data.*write `prior=NIW",
    ),
    "negative sparse": (
        lambda: DPMixture(prior="multinomial").fit(sparse.csr_matrix(COUNTS - 3)),
        "Negative values",
    ),
    "alpha": (
        lambda: DPMixture(-1.0).fit(X),
        "`alpha` is -1.0: write a number",
    ),
    "alpha pair": (lambda: DPMixture((1.0, 0.0)).fit(X), "Gamma prior"),
    "method": (lambda: DPMixture(method="gibbs").fit(X), "'subcluster'.*'exact'"),
    "prior": (lambda: DPMixture(prior="niw").fit(X), "write `NIW"),
    "psi": (
        lambda: DPMixture(prior=NIW(psi=-np.eye(2))).fit(X),
        "smallest eigenvalue of -1",
    ),
    "psi shape": (lambda: DPMixture(prior=NIW(psi=np.eye(3))).fit(X), r"\(2, 2\)"),
    "psi not symmetric": (
        lambda: DPMixture(prior=NIW(psi=[[1.0, 0.5], [0.0, 1.0]])).fit(X),
        r"not symmetric: write `\(psi \+ psi.T\) / 2`",
    ),
    "psi singular": (
        lambda: DPMixture(prior=NIW(psi=np.ones((2, 2)))).fit(X),
        "smallest eigenvalue",
    ),
    "psi of nan": (
        lambda: DPMixture(prior=NIW(psi=[[np.nan, 0], [0, 1]])).fit(X),
        "`psi` is .*finite",
    ),
    "mean": (
        lambda: DPMixture(prior=NIW(mean=[0.0, np.nan])).fit(X),
        "`mean` is .*finite",
    ),
    "nu": (lambda: DPMixture(prior=NIW(nu=1.0, psi=1.0)).fit(X), "above 1"),
    "nu without psi": (
        lambda: DPMixture(prior=NIW(nu=2)).fit(X),
        "`nu` is 2: write a number above 3, or one above 1 and your own `psi`",
    ),
    "nu of diagonals": (
        lambda: DPMixture(prior=NIW(covariance="diagonal", nu=1)).fit(X),
        "`nu` is 1: write a number above 2, or one above 0",
    ),
    "kappa": (
        lambda: DPMixture(prior=NIW(kappa="x")).fit(X),
        "`kappa` is 'x': write a number above 0",
    ),
    "a": (lambda: DPMixture(prior=Dirichlet(0.0)).fit(COUNTS), "numbers above 0"),
    "sweeps": (lambda: DPMixture(n_sweeps=0).fit(X), "`n_sweeps` is 0"),
    "no sweeps for a split": (
        lambda: DPMixture(n_sweeps=8).fit(X),
        "`n_sweeps` is 8: write at least 9, because 'subcluster' splits after 4",
    ),
    "no patience for a split": (
        lambda: DPMixture(burn_in=0, patience=6).fit(X),
        "`burn_in` and `patience` add up to 6: write at least 9",
    ),
    "no proposals": (
        lambda: DPMixture(method="exact", n_proposals=0).fit(X),
        "`n_proposals` is 0: write an integer of at least 1",
    ),
    "patience": (lambda: DPMixture(patience=2).fit(X), "`patience` is 2"),
    "jobs": (lambda: DPMixture(n_jobs="all").fit(X), "'ranks'"),
    "no jobs": (lambda: DPMixture(n_jobs=0).fit(X), "`n_jobs` is 0: write"),
    "jobs as a bool": (lambda: DPMixture(n_jobs=True).fit(X), "`n_jobs` is True"),
    "no ranks": (lambda: DPMixture(n_jobs="ranks").fit(X), "`init_process_group`"),
    "device": (
        lambda: DPMixture(device="gpu").fit(X),
        "`device` is 'gpu': write 'cpu', 'cuda'",
    ),
    "no such device": (
        lambda: DPMixture(device="cuda:99").fit(X),
        "`device` is 'cuda:99' and there are .* CUDA devices here: write 'cpu'",
    ),
    "checkpoint": (
        lambda: DPMixture(checkpoint=True).fit(X),
        "`checkpoint` is True: write the path of a file",
    ),
    "large": (
        lambda: DPMixture().fit(X * 1e40),
        r"Column 0 holds .*e\+4\d.*divide.*constant",
    ),
    "small": (lambda: DPMixture().fit(X * 1e-40), "spread of .*e-.*multiply"),
    "far from psi": (
        lambda: DPMixture(prior=NIW(psi=1.0)).fit(np.r_[X, [[1e25, 0]]]),
        "Column 0 reaches .* times the scale of `psi`",
    ),
    "far away": (
        lambda: DPMixture(n_sweeps=9).fit(X).predict_proba(np.r_[X, [[1e25, 0]]]),
        "Row 60 .*single precision: leave it out",
    ),
    "large counts": (
        lambda: DPMixture(prior="multinomial").fit(COUNTS * 1e20),
        r"largest count is .*e\+2\d",
    ),
    "no list": (lambda: HDPMixture().fit(X), "a list of arrays"),
    "one point in all": (lambda: HDPMixture().fit([[[1.0, 2.0]]]), "at least 2"),
    "columns": (
        lambda: HDPMixture().fit([X, X[:, :1]]),
        "Group 1: X has 1 features.*expecting 2",
    ),
    "columns of counts": (
        lambda: topics().predict([COUNTS, COUNTS[:, :2]]),
        "Group 1: X has 2 features.*expecting 4",
    ),
    "columns of a new group": (
        lambda: planes().score_samples([X[:, :1]]),
        "Group 0: X has 1 features.*expecting 2",
    ),
    "nan in a group": (
        lambda: HDPMixture().fit([X, [[0.0, np.nan]]]),
        "Group 1: .*NaN",
    ),
    "empty group": (lambda: planes().transform([X, X[:0]]), "Group 1: .*0 sample"),
    "negative in a query": (lambda: topics().predict([-COUNTS]), "Group 0: Negative"),
    "negative density": (
        lambda: documents().score_samples(-COUNTS),
        "Negative values in data.*write `prior=NIW",
    ),
    "group of a sample": (lambda: planes().sample(group=7), "`group` is 7.*0 to 1"),
    "size of a sample": (lambda: planes().sample(-1), "`n_samples` is -1"),
    "shape of weights": (
        lambda: planes().score_samples([X], weights=np.ones((2, 1))),
        r"shape \(2, 1\).*`transform`",
    ),
    "negative weights": (
        lambda: planes().score_samples([X], -planes().transform([X])),
        "not probabilities.*sum to 1",
    ),
    "group": (lambda: HDPMixture(0.0).fit([X]), "`gamma` is 0.0"),
}


@pytest.mark.parametrize(("call", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_gets_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_proposals_that_are_never_fixed_give_a_warning() -> None:
    with pytest.warns(ConvergenceWarning, match="`burn_in` is 3.*`n_proposals`"):
        DPMixture(method="exact", n_sweeps=3, burn_in=3).fit(X)


def test_jobs_may_be_a_whole_number_of_numpy() -> None:
    model: Any = DPMixture(n_sweeps=9, n_jobs=np.int64(2)).fit(X)
    np.testing.assert_array_equal(model.labels_, DPMixture(n_sweeps=9).fit(X).labels_)


@pytest.mark.parametrize(("n_jobs", "count"), [(-1, 4), (-2, 3), (-9, 1), (3, 3)])
def test_negative_jobs_leave_cores_free(
    n_jobs: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    class Counted(blocks.Blocks):
        def __init__(self, family: Any, x: Any, jobs: Any, device: str = "cpu") -> None:
            super().__init__(family, x, device)
            made.append(jobs)

    monkeypatch.setattr(blocks, "SIZE", 32)
    monkeypatch.setattr(blocks, "JobBlocks", Counted)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with blocks.opened(NIW().resolve(X), X, as_jobs(n_jobs)):
        assert (made or [1]) == [count]


def test_a_prior_of_ones_own_takes_constant_columns() -> None:
    x = np.c_[X, np.ones(60)]
    model = DPMixture(prior=NIW(psi=0.1), n_sweeps=40).fit(x)
    assert model.n_components_ == 2


def test_density_integrates_to_one() -> None:
    model = DPMixture(n_sweeps=40).fit(X[:, :1])
    grid = np.linspace(-400, 400, 400_001)
    mass = np.exp(model.score_samples(grid[:, None])).sum() * (grid[1] - grid[0])
    assert mass == pytest.approx(1, abs=1e-3)


def test_sampled_points_have_the_density_of_the_fit() -> None:
    model = DPMixture(n_sweeps=30).fit(X)
    drawn, labels = model.sample(2000)
    common = [k for k in range(model.n_components_) if (model.labels_ == k).sum() > 5]
    assert len(common) == 2
    assert np.isin(labels, common).mean() > 0.9
    for k in common:
        own, seen = drawn[labels == k], X[model.labels_ == k]
        assert np.abs(own.mean(0) - seen.mean(0)).max() < 1
        result: Any = stats.ks_2samp(own[:, 0], seen[:, 0])
        assert result.pvalue > 1e-4


def test_warm_start_continues_the_chain() -> None:
    whole = DPMixture(method="exact", n_sweeps=30, n_proposals=2).fit(X)
    part = DPMixture(method="exact", n_sweeps=18, n_proposals=2, warm_start=True).fit(X)
    part.set_params(n_sweeps=12).fit(X)
    np.testing.assert_array_equal(part.labels_, whole.labels_)
    assert part.n_iter_ == 30


def test_concentration_is_sampled_where_it_has_a_prior() -> None:
    fixed = DPMixture(2.0, n_sweeps=30).fit(X).history_["concentration"]
    drawn = DPMixture((2.0, 1.0), n_sweeps=30).fit(X).history_["concentration"]
    assert set(fixed) == {2.0}
    assert len(set(drawn)) == len(drawn)


def test_the_package_does_not_load_scikit_learn() -> None:
    code = (
        "import sys, dreampropeller; "
        "print([n for n in ('sklearn', 'scipy', 'joblib') if n in sys.modules])"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True).strip() == "[]"
