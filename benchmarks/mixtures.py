"""Dirichlet process mixtures compared with scikit-learn's variational mixtures.

    python -m benchmarks.mixtures gaussians --to benchmarks/results/mixtures.jsonl
    python -m benchmarks.mixtures million --n-jobs 1
    python -m benchmarks.mixtures text

Both use one thread. Seconds are processor time, which does not depend on the load of
the machine; `million` also gives the wall-clock time. Comparisons that the file `--to`
holds are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import normalized_mutual_info_score
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits

from dreampropeller.mixtures import Dirichlet, DPMixture, HDPMixture


def gaussians(
    n: int, dim: int, num: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussians of random covariance, centres spread by 10 standard deviations.

    The spread is per axis; in two dimensions 50 of them overlap somewhat.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num, dim)) * 10
    labels = rng.choice(num, n, p=rng.dirichlet(np.full(num, 5.0)))
    roots = np.eye(dim) + rng.normal(size=(num, dim, dim)) * 0.3 / np.sqrt(dim)
    x = np.empty((n, dim))
    for k in range(num):
        own = labels == k
        x[own] = centres[k] + rng.normal(size=(int(own.sum()), dim)) @ roots[k].T
    return x, labels


def timed(model: Any, x: Any) -> tuple[Any, float]:
    """The fitted model, and processor seconds on one thread."""
    torch.set_num_threads(1)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings that 100 iterations were not enough
        start = time.process_time()
        model.fit(x)
        return model, time.process_time() - start


def methods(components: tuple[int, ...]) -> dict[str, Any]:
    """The methods compared, ours first, by name."""
    rivals = {
        f"BayesianGaussianMixture({k})": BayesianGaussianMixture(
            n_components=k, random_state=0
        )
        for k in components
    }
    return {"DPMixture": DPMixture(random_state=0), **rivals}


def compare(
    n: int, dim: int, num: int, components: tuple[int, ...], known: list[dict]
) -> Iterator[dict]:
    """Seconds, NMI and clusters of ours and of scikit-learn's."""
    x, truth = gaussians(n, dim, num)
    for name, method in methods(components).items():
        case = {"n": n, "dim": dim, "clusters": num, "method": name}
        if any(case.items() <= row.items() for row in known):
            continue
        model, seconds = timed(method, x)
        labels = model.labels_ if name == "DPMixture" else model.predict(x)
        row = {
            **case,
            "seconds": round(seconds, 1),
            "nmi": round(normalized_mutual_info_score(truth, labels), 4),
            "found": len(np.unique(labels)),
            "sweeps": int(model.n_iter_),
        }
        print(row, flush=True)
        yield row


def million(n_jobs: int) -> dict:
    """A million points in eight dimensions; seconds are those of this process."""
    x, truth = gaussians(1_000_000, 8, 20)
    start, began = time.perf_counter(), time.process_time()
    model = DPMixture(random_state=0, n_jobs=n_jobs).fit(x)
    return {
        "n": len(x),
        "dim": 8,
        "clusters": 20,
        "n_jobs": n_jobs,
        "seconds": round(time.process_time() - began, 1),
        "clock": round(time.perf_counter() - start, 1),
        "nmi": round(normalized_mutual_info_score(truth, model.labels_), 4),
        "found": int(model.n_components_),
        "sweeps": int(model.n_iter_),
    }


def documents() -> tuple[sparse.csr_matrix, list[str]]:
    """Word counts of the topics of Python's help, which ships with Python."""
    from pydoc_data.topics import topics

    text = [re.sub(r"[^a-z ]", " ", topics[name].lower()) for name in sorted(topics)]
    counter = CountVectorizer(min_df=4, max_df=0.5, stop_words="english")
    counts: Any = counter.fit_transform(text)
    keep = np.flatnonzero(np.asarray(counts.sum(1)).ravel() >= 40)
    return sparse.csr_matrix(counts)[keep], list(counter.get_feature_names_out())


def halves(counts: sparse.csr_matrix, seed: int) -> tuple[Any, Any]:
    """Every document's words, split at random into training and held-out words."""
    rng = np.random.default_rng(seed)
    seen = counts.copy()
    seen.data = rng.binomial(counts.data.astype(int), 0.5)
    held = counts.copy()
    held.data = counts.data - seen.data
    return seen, held


def tokens(row: Any) -> sparse.csr_matrix:
    """One row per word of a document."""
    words = np.repeat(row.indices, row.data.astype(int))
    ones = np.ones(len(words))
    return sparse.csr_matrix(
        (ones, (np.arange(len(words)), words)), (len(words), row.shape[1])
    )


def perplexity(words: np.ndarray, held: Any) -> float:
    """Perplexity of held-out words under distributions ``(documents, vocabulary)``."""
    log = held.multiply(np.log(words)).sum()
    return float(np.exp(-log / held.sum()))


def text(sweeps: int) -> list[dict]:
    """Held-out perplexity of topics, compared with latent Dirichlet allocation."""
    found, names = documents()
    counts: Any = found
    train = np.arange(counts.shape[0]) % 5 != 0
    seen, held = halves(counts[~train], 0)
    rows = []
    groups = [tokens(counts[i]) for i in np.flatnonzero(train)]
    model: Any = HDPMixture(
        (1.0, 1.0), (1.0, 1.0), prior=Dirichlet(0.1), method="exact",
        n_sweeps=sweeps, n_proposals=1, init_components=20,
    )  # fmt: skip
    start = time.process_time()
    model.fit(groups)
    seconds = time.process_time() - start
    weights = model.transform([tokens(row) for row in seen])
    theta = model.family_.a + model.statistics_["C"]
    theta = (theta / theta.sum(1, keepdim=True)).numpy()
    rows.append(
        {
            "method": "HDPMixture",
            "topics": int(model.n_components_),
            "perplexity": round(perplexity(weights @ theta, held), 1),
            "seconds": round(seconds, 1),
            "documents": counts.shape,
        }
    )
    print(rows[-1], flush=True)
    order = np.argsort(-model.weights_)[:6]
    print([[names[v] for v in np.argsort(-theta[k])[:7]] for k in order])
    for k in (10, 20, 40):
        start = time.process_time()
        rival = LatentDirichletAllocation(k, random_state=0, max_iter=50)
        rival.fit(counts[train])
        seconds = time.process_time() - start
        words = rival.components_ / rival.components_.sum(1, keepdims=True)
        found = perplexity(rival.transform(seen) @ words, held)
        row = {"method": f"LatentDirichletAllocation({k})", "topics": k}
        rows.append(
            {**row, "perplexity": round(found, 1), "seconds": round(seconds, 1)}
        )
        print(rows[-1], flush=True)
    unigram = np.asarray(counts[train].sum(0)).ravel() + 0.1
    flat = np.tile(unigram / unigram.sum(), (seen.shape[0], 1))
    rows.append({"method": "one topic", "perplexity": round(perplexity(flat, held), 1)})
    print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run a benchmark, and append its rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["gaussians", "million", "text"])
    parser.add_argument("--points", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 32])
    parser.add_argument("--clusters", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--components", type=int, nargs="+", default=[30, 100])
    parser.add_argument("--sweeps", type=int, default=150)
    parser.add_argument("--n-jobs", type=int, default=1)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()

    def keep(rows: list[dict]) -> None:
        if args.to is not None:
            args.to.parent.mkdir(parents=True, exist_ok=True)
            with args.to.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    if args.what == "million":
        row = million(args.n_jobs)
        print(row)
        keep([row])
    elif args.what == "text":
        keep(text(args.sweeps))
    else:
        grid = itertools.product(args.points, args.dims, args.clusters)
        known = []
        if args.to is not None and args.to.exists():
            known = [json.loads(line) for line in args.to.open()]
        for n, dim, num in grid:
            for row in compare(n, dim, num, tuple(args.components), known):
                keep([row])


if __name__ == "__main__":
    main()
