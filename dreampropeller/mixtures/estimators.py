"""`DPMixture` and `HDPMixture`, estimators in the manner of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp, softmax
from sklearn.utils.validation import check_is_fitted

from dreampropeller.checks import is_whole
from dreampropeller.mixtures.base import Mixture
from dreampropeller.mixtures.inputs import (
    as_concentration,
    as_weights,
    stack,
)
from dreampropeller.mixtures.priors import (
    DirichletProcess,
    HierarchicalDirichletProcess,
)


class DPMixture(Mixture):
    r"""Dirichlet process mixture: the number of clusters is found with the labels.

    $$p(z \mid x) \propto \alpha^K \prod_k \Gamma(n_k) f(X_k)$$

    Args:
        alpha: The concentration $\alpha$: a number, or (shape, rate) of a Gamma prior
            to have it sampled.
        prior: `NIW(...)` for real-valued data, `Dirichlet(...)` for counts (dense or
            scipy sparse), or "full", "diagonal", "multinomial"; None is "full".
        method: "subcluster", the published sampler, fast and approximate, or "exact",
            whose split and merge leave the posterior invariant.
        n_sweeps: Largest number of sweeps; "subcluster" needs 9, and 6 to go on
            by `warm_start`.
        burn_in: Number of sweeps before which "subcluster" does not stop early, and
            after which the number of proposals of "exact" is frozen.
        patience: Number of sweeps without a split or merge after which "subcluster"
            stops; None: never. "exact" always makes `n_sweeps`.
        n_proposals: Number of splits or merges that "exact" proposes per sweep; None:
            the number of clusters at the end of the burn-in.
        init_components: Number of random initial labels.
        random_state: The seed. The same seed gives the same labels for any `n_jobs`.
        n_jobs: Number of processes, -1 for one per core, -2 for one less and so on, or
            "ranks" for those of the default group of `torch.distributed`, whose ranks
            all call `fit` with all points and the same parameters.
        device: Device of the densities: "cpu", "cuda", "cuda:1".
        checkpoint: A file that `fit` writes its state to every 25 sweeps, and resumes
            from, bit for bit, if it exists; one of other points or settings is refused.
        warm_start: Continue the chain of the last `fit` by `n_sweeps` more, with the
            present settings, of which `method` and the kind of `prior` must stay.

    Attributes:
        labels_: Labels of the last sweep, shape ``(points,)``.
        n_components_: The number of clusters $K$.
        weights_: Shares of the points, shape ``(K,)``.
        history_: Per sweep `num_clusters`, `log_joint` $= \ln p(z, x)$ and
            `concentration`. Agreement of runs that start from 1 and from 30 components
            is the check of convergence.
        n_iter_: Sweeps made.

    References:
        Chang and Fisher, NIPS 2013; Jain and Neal, JCGS 2004.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(300, 2))
        >>> x[:100] += 20
        >>> DPMixture(random_state=0).fit(x).n_components_
        2
    """

    def __init__(
        self,
        alpha: Any = 1.0,
        *,
        prior: Any = None,
        method: Any = "subcluster",
        n_sweeps: Any = 200,
        burn_in: Any = 20,
        patience: Any = 25,
        n_proposals: Any = None,
        init_components: Any = 1,
        random_state: Any = 0,
        n_jobs: Any = None,
        device: Any = "cpu",
        checkpoint: Any = None,
        warm_start: Any = False,
    ) -> None:
        self.alpha = alpha
        self.prior = prior
        self.method = method
        self.n_sweeps = n_sweeps
        self.burn_in = burn_in
        self.patience = patience
        self.n_proposals = n_proposals
        self.init_components = init_components
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.device = device
        self.checkpoint = checkpoint
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any = None) -> DPMixture:
        """Run the chain on points ``(points, dim)``."""
        del y
        x = self._array(
            X, reset=not (self.warm_start and hasattr(self, "state_")), least=2
        )
        prior = DirichletProcess(as_concentration(self.alpha, "alpha"))
        self._run(x, torch.zeros(x.shape[0], dtype=torch.long), prior)
        return self

    def _joint(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        x = self._array(X, reset=False)
        weights = self.partition_.log_expected_weights(self.counts_)
        return self._log_joint(x, np.zeros(x.shape[0], int), weights)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest present cluster of each point, by the posterior predictive."""
        return self._joint(X)[:, :-1].argmax(1)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the present clusters, shape ``(points, K)``."""
        return softmax(self._joint(X)[:, :-1], axis=1)

    def score_samples(self, X: Any) -> np.ndarray:
        """Log predictive density of each point, a new cluster included."""
        return np.asarray(logsumexp(self._joint(X), axis=1))

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log predictive density."""
        del y
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Points and their labels from the present clusters."""
        check_is_fitted(self)
        return self._drawn(n_samples, self.weights_)


class HDPMixture(Mixture):
    r"""Hierarchical Dirichlet process mixture: groups that share clusters.

    Every group $j$ has weights $\pi_j \sim \mathrm{Dirichlet}(\alpha\beta)$ over
    clusters common to all; `docs/mixtures.md` has the joint law.

    Args:
        gamma: The top concentration $\gamma$, as `alpha` of `DPMixture`.
        alpha: The groups' concentration $\alpha$, likewise.
        prior: As in `DPMixture`.
        method: As in `DPMixture`; by default "exact".
        n_sweeps: As in `DPMixture`.
        burn_in: As in `DPMixture`.
        patience: As in `DPMixture`.
        n_proposals: As in `DPMixture`.
        init_components: As in `DPMixture`.
        random_state: As in `DPMixture`.
        n_jobs: As in `DPMixture`.
        device: As in `DPMixture`.
        checkpoint: As in `DPMixture`.
        warm_start: As in `DPMixture`.

    Attributes:
        labels_: A list with the labels of each group.
        n_components_: The number of clusters.
        weights_: Shares of all points, shape ``(K,)``.
        group_weights_: Predictive weights of the groups, ``(groups, K)``.
        history_: As in `DPMixture`, with $\ln p(z, \beta, x)$.
        n_iter_: Sweeps made.

    References:
        Teh et al., JASA 2006; Chang and Fisher, NIPS 2014.
    """

    def __init__(
        self,
        gamma: Any = 1.0,
        alpha: Any = 1.0,
        *,
        prior: Any = None,
        method: Any = "exact",
        n_sweeps: Any = 200,
        burn_in: Any = 20,
        patience: Any = 25,
        n_proposals: Any = None,
        init_components: Any = 1,
        random_state: Any = 0,
        n_jobs: Any = None,
        device: Any = "cpu",
        checkpoint: Any = None,
        warm_start: Any = False,
    ) -> None:
        self.gamma = gamma
        self.alpha = alpha
        self.prior = prior
        self.method = method
        self.n_sweeps = n_sweeps
        self.burn_in = burn_in
        self.patience = patience
        self.n_proposals = n_proposals
        self.init_components = init_components
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.device = device
        self.checkpoint = checkpoint
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any = None) -> HDPMixture:
        """Run the chain on groups, a list of arrays ``(points of the group, dim)``."""
        del y
        groups = self._groups(
            X, reset=not (self.warm_start and hasattr(self, "state_"))
        )
        x = stack(groups)
        if x.shape[0] < 2:
            raise ValueError("All groups together have 1 point: at least 2 are needed.")
        sizes = [group.shape[0] for group in groups]
        group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        gamma = as_concentration(self.gamma, "gamma")
        alpha = as_concentration(self.alpha, "alpha")
        prior = HierarchicalDirichletProcess(gamma, alpha, len(sizes))
        self._run(x, group, prior)
        self.labels_ = np.split(self.labels_, np.cumsum(sizes)[:-1])
        log_weights = prior.log_expected_weights(self.counts_)[:, :-1]
        self.group_weights_ = softmax(log_weights, axis=1)
        return self

    def _groups(self, x: Any, *, reset: bool = False) -> list[Any]:
        if not isinstance(x, (list, tuple)) or not len(x):
            raise ValueError(
                "`HDPMixture` needs a list of arrays, one per group: write `[x]` for a "
                "single group, or use `DPMixture`."
            )
        return [self._group(j, own, reset and j == 0) for j, own in enumerate(x)]

    def _group(self, number: int, x: Any, reset: bool) -> Any:
        try:
            return self._array(x, reset=reset)
        except ValueError as error:
            raise ValueError(f"Group {number}: {error}") from error

    def _joint(self, x: Any, log_weights: np.ndarray) -> np.ndarray:
        return self._log_joint(x, np.zeros(x.shape[0], int), log_weights[None])

    def _top(self) -> np.ndarray:
        """Weights of a group without points, the new cluster last."""
        none = np.zeros((1, self.n_components_), int)
        return self.partition_.log_expected_weights(none)[0]

    def transform(self, X: Any, n_iter: int = 50) -> np.ndarray:
        r"""Weights of groups, known or new, from their points, ``(groups, K)``.

        The fixed point of $n_{jk} = \sum_i p(z_{ji} = k)$ with weights
        $\alpha \beta_k + n_{jk}$.
        """
        check_is_fitted(self)
        return self._shares(self._groups(X), n_iter)

    def _shares(self, groups: list[Any], n_iter: int = 50) -> np.ndarray:
        rows = []
        for x in groups:
            zero = np.zeros(self.n_components_ + 1)
            logs = self._joint(x, zero)[:, :-1]
            top = self.partition_.alpha * np.exp(self._top()[:-1])
            weights = top / top.sum()
            for _ in range(n_iter):
                weights = top + softmax(logs + np.log(weights), axis=1).sum(0)
            rows.append(weights / weights.sum())
        return np.stack(rows)

    def predict(self, X: Any) -> list[np.ndarray]:
        """The likeliest present cluster of each point, with the groups' `transform`."""
        return [p.argmax(1) for p in self.predict_proba(X)]

    def predict_proba(self, X: Any) -> list[np.ndarray]:
        """Probabilities of the present clusters, ``(points, K)`` for each group."""
        check_is_fitted(self)
        groups = self._groups(X)
        weights = np.log(self._shares(groups))
        found = []
        for x, own in zip(groups, weights, strict=True):
            found.append(
                softmax(self._joint(x, np.append(own, -np.inf))[:, :-1], axis=1)
            )
        return found

    def score_samples(
        self,
        X: Any,
        weights: Any = None,
    ) -> list[np.ndarray]:
        """Log predictive densities of the points of each group.

        Args:
            X: The groups.
            weights: Their weights, ``(groups, K)`` with rows that sum to 1, for example
                `transform` of points observed before; by default those of a new group.
        """
        check_is_fitted(self)
        groups = self._groups(X)
        logs = np.tile(self._top(), (len(groups), 1))
        if weights is not None:
            rows = as_weights(weights, (len(groups), self.n_components_))
            with np.errstate(divide="ignore"):  # a group may lack a cluster
                logs = np.log(np.pad(rows, ((0, 0), (0, 1))))
        return [
            np.asarray(logsumexp(self._joint(x, own), axis=1))
            for x, own in zip(groups, logs, strict=True)
        ]

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log predictive density of the points, with a new group's weights."""
        del y
        return float(np.concatenate(self.score_samples(X)).mean())

    def sample(
        self, n_samples: int = 1, group: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points and labels of a group, by default of all groups together."""
        check_is_fitted(self)
        weights, last = self.weights_, len(self.group_weights_) - 1
        if group is not None:
            if not is_whole(group) or not 0 <= group <= last:
                raise ValueError(
                    f"`group` is {group!r}: write an index from 0 to {last}, or None "
                    "for all groups together."
                )
            weights = self.group_weights_[group]
        return self._drawn(n_samples, weights)
