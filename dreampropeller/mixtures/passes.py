r"""Computations per point: labels, sub-labels, sides of a proposed split.

Labels given weights and parameters are independent, $p(z_i = k) \propto \pi_k f(x_i
\mid \theta_k)$; each is found from one uniform number by inverting the cumulative sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreampropeller.mixtures.family import Block, Family, Params, Statistics
from dreampropeller.mixtures.random import uniforms

Result = dict[str, Any]


def weighted(
    family: Family, block: Block, params: Params, log_weights: Tensor, groups: Tensor
) -> Tensor:
    """Log joint density of point and label, shape ``(components, rows)``.

    Args:
        family: The family of the components.
        block: The rows.
        params: The components.
        log_weights: Shape ``(groups, components)``, float64.
        groups: The group of each row.
    """
    logits = family.log_likelihood(block, params)
    own = log_weights.float().to(logits.device)
    if len(own) == 1:
        return logits.add_(own[0][:, None])
    return logits.add_(own[groups.to(logits.device)].T)


def choose(logits: Tensor, u: Tensor) -> Tensor:
    """A component per row with probabilities ∝ exp(logits), from one uniform each."""
    top = logits.amax(0)
    # All densities underflow only for a point infinitely far away; then take the first.
    total = logits.sub_(top).exp_().nan_to_num_(0.0).cumsum(0)
    below = total <= u.to(total.device) * total[-1]
    return below.sum(0).clamp_(max=len(logits) - 1).cpu()


def label_pass(
    family: Family,
    block: Block,
    number: int,
    points: dict[str, Tensor],
    shared: dict[str, Any],
) -> Result:
    """Propose a label for every point, before the guard."""
    logits = weighted(
        family, block, shared["params"], shared["log_weights"], points["group"]
    )
    size = logits.shape[1]
    key = (shared["seed"], shared["sweep"])
    labels = choose(logits, uniforms(*key, "labels", number, size))
    batch = uniforms(*key, "batch", number, size) * shared["batches"]
    return {"label": labels, "batch": batch.long()}


def statistics_pass(
    family: Family,
    block: Block,
    number: int,
    points: dict[str, Tensor],
    shared: dict[str, Any],
) -> Statistics:
    """The statistics of the sets that `key` names."""
    del number
    return family.statistics(block, points["key"], shared["num"])


def predict_pass(
    family: Family,
    block: Block,
    number: int,
    points: dict[str, Tensor],
    shared: dict[str, Any],
) -> Tensor:
    """Log joint densities, shape ``(components, rows)``."""
    del number
    return weighted(
        family, block, shared["params"], shared["log_weights"], points["group"]
    ).cpu()


def subcluster_pass(
    family: Family,
    block: Block,
    number: int,
    points: dict[str, Tensor],
    shared: dict[str, Any],
) -> Result:
    r"""Labels, sub-labels with their $\ln q$ per cluster, and sub-clusters' statistics.

    `shared["halves"]` holds the two sub-components of every cluster, one `Params` for
    the left ones and one for the right; `best` takes the likeliest label instead.
    For every pair of clusters in `shared["pairs"]`, `pair_q` is the log probability
    that their two components alone divide the points of both as the labels do.
    """
    logits = weighted(
        family, block, shared["params"], shared["log_weights"], points["group"]
    )
    key, size = (shared["seed"], shared["sweep"]), logits.shape[1]
    kept = logits.clone() if shared["pairs"] else logits  # `choose` overwrites it
    if shared["best"]:
        labels = logits.argmax(0).cpu()
    else:
        labels = choose(logits, uniforms(*key, "labels", number, size))
    u = uniforms(*key, "sublabels", number, size)
    sub = torch.zeros_like(labels)
    log_q = torch.zeros(len(logits), dtype=torch.float64)
    order = torch.argsort(labels, stable=True)
    ends = torch.bincount(labels, minlength=len(logits)).cumsum(0).tolist()
    for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == end:
            continue
        index = order[start:end]
        pair = {name: value[k] for name, value in shared["halves"].items()}
        own = family.log_likelihood(family.rows(block, index), pair)
        own.add_(shared["log_halves"][k].float().to(own.device)[:, None])
        log_p = torch.log_softmax(own.double(), 0).cpu()
        sub[index] = choose(own, u[index])
        log_q[k] = log_p.gather(0, sub[index][None]).sum()
    num = 2 * len(logits)
    return {
        "label": labels,
        "sub": sub,
        "log_q": log_q,
        "pair_q": _divisions(kept, order, [0, *ends], shared["pairs"]),
        "statistics": family.statistics(block, 2 * labels + sub, num),
    }


def _divisions(
    logits: Tensor, order: Tensor, ends: list[int], pairs: list[tuple[int, int]]
) -> Tensor:
    """Log probability of the present division of each pair's points, ``(pairs,)``."""
    found = torch.zeros(len(pairs), dtype=torch.float64)
    for at, pair in enumerate(pairs):
        for side, k in enumerate(pair):
            own = order[ends[k] : ends[k + 1]].to(logits.device)
            apart = logits[pair[1 - side], own] - logits[k, own]
            found[at] -= torch.nn.functional.softplus(apart.double()).sum().cpu()
    return found


def side_pass(
    family: Family,
    block: Block,
    number: int,
    points: dict[str, Tensor],
    shared: dict[str, Any],
) -> Result:
    r"""Sides of the points of a set, given two components, or their probability.

    `points["member"]` is -1 outside the set, 2 for points to be drawn, and 0 or 1 for
    the two anchors, whose side is given. With `points["side"]` the sides are given too
    and only $\ln q$ is computed.
    """
    member = points["member"]
    index = torch.nonzero(member >= 0)[:, 0]
    anchored = member[index]
    if len(index):
        rows = family.rows(block, index)
        logits = weighted(
            family, rows, shared["params"], shared["log_weights"], points["group"]
        ).cpu()
        log_p = torch.log_softmax(logits.double(), 0)
    else:
        rows = family.rows(block, index)
        log_p = torch.zeros(2, 0, dtype=torch.float64)
    if "side" in points:
        side = points["side"][index]
    else:
        u = uniforms(
            shared["seed"], shared["sweep"], shared["stream"], number, len(member)
        )
        drawn = (u[index] < log_p[1].exp()).long()
        side = torch.where(anchored == 2, drawn, anchored)
    chosen = log_p.gather(0, side[None])[0]
    return {
        "index": index,
        "side": side,
        "log_q": float(chosen[anchored == 2].sum()),
        "statistics": family.statistics(rows, side, 2),
    }
