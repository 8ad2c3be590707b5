r"""Sampling many steps at a time with the law of the sequential sampler, exactly.

A step of an ancestral sampler draws from a Gaussian, $x_{t+1} \sim N(\mu_t(x_t, m_t),
\sigma_t^2)$, with an expensive model output $m_t = m(x_t, t)$. The model drafts for
itself: from the anchor, steps are drawn with the outputs $\hat m$ that keep the last
estimate of the clean image, all true outputs at the drafted states are evaluated at
once, and each draft $\hat x_{t+1} = \hat\mu + \sigma\xi$ is compared with the true law
by a coupling of the two Gaussians: with $\Delta = \hat\mu - \mu$, $e = \Delta /
\|\Delta\|$ and a uniform number u,

$$x_{t+1} = \begin{cases} \hat\mu + \sigma\xi & \ln u \le
    -\dfrac{\|\Delta\|^2}{2 \sigma^2} - \dfrac{\langle \Delta, \xi \rangle}{\sigma} \\
  \mu + \sigma\,(\xi - 2 \langle e, \xi \rangle e) & \text{otherwise.} \end{cases}$$

Both cases together have the law $N(\mu, \sigma^2)$: the first is the density ratio of
rejection sampling, and the reflection maps the rejected part of $\hat\mu + \sigma\xi$
onto the missing part of the true law (a maximal coupling). The first image that is not
drafted right ends the stride; its own step is exact nevertheless. A step's noise $\xi$
decides nothing before its step is drawn, so it is that of the sequential run.

References:
    Hu et al. 2025, arXiv 2505.03983 (speculation by the model itself); Bou-Rabee et
    al. 2020, arXiv 1805.00452, section 2.3 (the coupling by reflection).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dreampropeller.adapters.diffusers.trajectory import SamplingTrajectory
from dreampropeller.adapters.diffusers.transitions import Transitions
from dreampropeller.checks import is_whole
from dreampropeller.component import Memory
from dreampropeller.dispatch.base import Dispatcher
from dreampropeller.solution import Iteration, SolverState, Stats
from dreampropeller.solver import NonFiniteDrift, Solver
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import all_finite


@dataclass(frozen=True)
class Estimate(Memory):
    """What drafts hold fixed.

    Attributes:
        clean: The last estimate of the clean images, shape ``(images, c, h, w)``.
    """

    clean: Tensor


@dataclass(frozen=True)
class Speculative(Solver):
    """Draft a window of steps, and keep those that the true law would have drawn.

    The sample is another one than the sequential run's of the same seed, and has the
    same law. For a `SamplingTrajectory` in the semi-linear form with DDPM, or DDIM with
    η above 0; a batch advances by its slowest image.

    Args:
        window: Number of steps drafted at once.
    """

    window: int

    def __post_init__(self) -> None:
        if not is_whole(self.window) or self.window < 1:
            raise ValueError(f"`window` is {self.window!r}: write at least 1.")

    def iterate(
        self,
        trajectory: Trajectory[Any],
        dispatcher: Dispatcher,
        state: SolverState[Any],
    ) -> tuple[SolverState[Any], Iteration]:
        """Draft, evaluate, verify."""
        if not isinstance(trajectory, SamplingTrajectory):
            raise TypeError(
                f"`Speculative` samples images, and `{type(trajectory).__name__}` is "
                "no `SamplingTrajectory`: write `PicardSolver`."
            )
        transitions = Transitions(trajectory)
        most = min(self.window, trajectory.num_steps - state.step)
        drafts = self._draft(transitions, state, most)
        length = len(drafts)
        steps = range(state.step, state.step + length)
        found = dispatcher.evaluate(steps, [{"x": x} for x in drafts])
        if not all_finite([found[0][0]])[0]:
            raise NonFiniteDrift(f"Step {state.step}: not finite in x.")
        outputs = [drift["x"] for drift, _ in found]
        with dispatcher.timer.phase("verify"):
            x, clean, distances = self._verify(transitions, steps, drafts, outputs)
        # Devices of different models may decide differently, so rank 0 decides.
        (stride,) = dispatcher.agree([len(distances)])
        y, memory = dispatcher.share({"x": x}, {"clean": clean})
        cost = state.stats.num_evaluations + length
        after = replace(
            state,
            step=state.step + stride,
            y=y,
            predictor=Estimate(memory["clean"]),
            stats=Stats(cost, [*state.stats.strides, stride]),
        )
        aux = tuple(aux for _, aux in found[:stride])
        seconds = dispatcher.timer.lap()
        return after, Iteration(
            state.step, length, stride, tuple(distances), None, aux, seconds
        )

    def _verify(
        self,
        transitions: Transitions,
        steps: Sequence[int],
        drafts: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[float]]:
        """The last state of the true law, its clean estimate, and ‖Δ‖ / σ by step."""
        x = clean = drafts[0]
        distances: list[float] = []
        slots = zip(steps, outputs, [*drafts[1:], None], strict=True)
        for step, output, draft in slots:
            if not bool(output.isfinite().all()):
                break  # met again at the anchor, because x is exact
            clean = transitions.clean(step, x, output)
            exact = transitions.advance(step, x, output)
            x, distance = _verified(transitions, step, exact, draft)
            distances.append(distance)
            if x is not draft:
                break
        return x, clean, distances

    def _draft(
        self,
        transitions: Transitions,
        state: SolverState[Any],
        length: int,
    ) -> list[Tensor]:
        """The anchor, and states drawn with the last estimate of the clean image."""
        x = state.y["x"]
        memory = state.predictor
        drafts = [x]
        if not isinstance(memory, Estimate):
            return drafts  # there is no estimate yet: one exact step
        for step in range(state.step, state.step + length - 1):
            output = transitions.output_of(step, x, memory.clean)
            x = transitions.advance(step, x, output)
            drafts.append(x)
        return drafts


def _verified(
    transitions: Transitions, step: int, exact: Tensor, draft: Tensor | None
) -> tuple[Tensor, float]:
    """The next state, which is `draft` itself if all images pass, and ‖Δ‖ / σ.

    Both candidates hold the same noise, so that they differ by their means alone.
    """
    if draft is None:
        return exact, 0.0
    sigma, noise = transitions.noise(step)
    difference = (draft - exact).flatten(1).double()
    size = difference.norm(dim=1)
    along = (difference * noise.flatten(1).double()).sum(1)
    odds = -size.square() / (2 * sigma**2) - along / sigma
    passed = transitions.uniforms(step).log().to(odds.device) <= odds
    distance = float(size.max()) / sigma
    if passed.all():
        return draft, distance
    turned = 2 * sigma * (along / size.square())[:, None] * difference
    reflected = exact - turned.reshape(exact.shape).to(exact.dtype)
    keep = passed.view(-1, *[1] * (exact.ndim - 1))
    return torch.where(keep, draft, reflected), distance
