r"""Reverse diffusion as a trajectory: exponential integrators and a corrector.

The forward process $dx_s = -\tfrac12 x_s\,ds + dw_s$ turns data into noise; its law at
time $s$ has the score $S(s, x)$. Backward in time, with $s = T - t$,

$$dy = [\tfrac12 y + S]\,dt + dw \quad\text{(SDE)}, \qquad
  dy = [\tfrac12 y + \tfrac12 S]\,dt \quad\text{(ODE)}.$$

With the score frozen over a step of length $e$ and the linear part integrated exactly,

$$y \leftarrow e^{e/2} y + c\,(e^{e/2} - 1)\,S(s, y) + \sqrt{e^e - 1}\,\xi,$$

$c = 2$ for the SDE, and $c = 1$ without noise for the ODE. The ODE may be corrected at
fixed time by underdamped Langevin dynamics with friction $g$, $du = v\,dt$, $dv = (S -
g v)\,dt + \sqrt{2g}\,db$; its step is, with $q = e^{-ge}$,

$$v' = q v + \tfrac{1 - q}{g} S + B_v, \qquad
  u' = u + \tfrac{1 - q}{g} v + \tfrac1g \bigl(e - \tfrac{1 - q}{g}\bigr) S + B_u.$$

The score is the drift; the rest is the update. `Sequential` is the sequential form,
`SlidingWindow` the sliding one, and `BlockWindow` makes it PIADM: blocks of time of
length O(1), each iterated a fixed number of times (`dreampropeller.piadm`).

References:
    Chen, Ren, Ying and Rotskoff, NeurIPS 2024, arXiv 2405.15986.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dreampropeller.checks import is_number, is_whole
from dreampropeller.identity import Fingerprint, plain, shape_of
from dreampropeller.rng import StepRandom
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import Aux, State

Score: TypeAlias = Callable[[float, Tensor], Tensor]
"""The score $S(s, x)$ of the law at forward time s; the shape of x."""


@dataclass(frozen=True)
class Corrector:
    r"""Underdamped Langevin dynamics at fixed time, after every block of the ODE.

    Args:
        time: Total time, of order $1/\sqrt L$ for scores of Lipschitz constant L.
        blocks: Number of blocks; each begins with a fresh velocity.
        steps: Number of small steps per block.
        friction: Friction $g$.
    """

    time: float = 0.5
    blocks: int = 1
    steps: int = 16
    friction: float = 2.0

    def __post_init__(self) -> None:
        for name in ("time", "friction"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"`{name}` is {value!r}: write a number above 0.")
        for name in ("blocks", "steps"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ValueError(f"`{name}` is {value!r}: write at least 1.")


@dataclass(frozen=True)
class SmallStep:
    """One step of the recurrence.

    Attributes:
        time: Forward time $s$ whose score is the drift.
        length: Length $e$ of the step.
        kind: "predictor" or "corrector".
        first: Whether a corrector block begins here, with a fresh velocity.
    """

    time: float
    length: float
    kind: Literal["predictor", "corrector"] = "predictor"
    first: bool = False


@dataclass(frozen=True)
class Grid:
    r"""Blocks of small steps from $s = T$ to $s = \eta$.

    Args:
        horizon: Final forward time $T$, whose law is approximated by a standard normal.
        step: Length of the longest small step. In the last block a step is at most
            `step` times the remaining time, the scale on which the score changes.
        block: Length $h$ of the longest block.
        stop: Time $\eta$ of early stopping.
    """

    horizon: float
    step: float
    block: float = 1.0
    stop: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("horizon", "step", "block", "stop"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"`{name}` is {value!r}: write a number above 0.")
        if self.stop >= self.horizon:
            raise ValueError(
                f"`stop` is {self.stop}: write a time before `horizon`, which is "
                f"{self.horizon}."
            )
        if self.step > self.block:
            raise ValueError(
                f"`step` is {self.step}, longer than a block of {self.block}: write a "
                "smaller one."
            )

    def blocks(self) -> list[list[SmallStep]]:
        """The small steps of every block."""
        span = self.horizon - self.stop
        count = max(1, math.ceil(span / self.block - 1e-9))
        ends = [self.horizon - span * n / count for n in range(count + 1)]
        return [
            self._block(ends[n], ends[n + 1], last=n + 1 == count) for n in range(count)
        ]

    def _block(self, begin: float, end: float, *, last: bool) -> list[SmallStep]:
        if not last:
            count = max(1, math.ceil((begin - end) / self.step - 1e-9))
            e = (begin - end) / count
            return [SmallStep(begin - e * m, e) for m in range(count)]
        steps, s = [], begin
        while s > end * (1 + 1e-9):
            e = min(self.step * min(1.0, s), s - end)
            steps.append(SmallStep(s, e))
            s -= e
        return steps


class DiffusionTrajectory(Trajectory[State]):
    """A reverse diffusion from standard normal noise (PIADM's recurrence).

    Args:
        score: The score; a pure function, called as ``score(s, x)``.
        start: The noise, shape ``(samples, ...)``.
        grid: Blocks and small steps.
        kind: Kind of the dynamics: "sde" or "ode".
        corrector: Corrector of the ODE after every block; None: no corrector.
        seed: Seed of all noise after the start. The noise of a step is keyed by the
            step, so it is the same in all Picard iterations.
    """

    advice = (
        "Look at the score there, or write a smaller `step`, a later `stop` or a "
        "greater `depth`."
    )

    def __init__(
        self,
        score: Score,
        start: Tensor,
        grid: Grid,
        kind: Literal["sde", "ode"] = "sde",
        corrector: Corrector | None = None,
        seed: int = 0,
    ) -> None:
        if kind not in ("sde", "ode"):
            raise ValueError(f"`kind` is {kind!r}: write 'sde' or 'ode'.")
        if corrector is not None and kind == "sde":
            raise ValueError(
                "A corrector belongs to the ODE: write `kind='ode'`, or leave it out."
            )
        check_arguments(score, start, grid, corrector)
        self.score, self.start, self.kind = score, start, kind
        self.corrector = corrector
        self.random = StepRandom(seed)
        self.steps: list[SmallStep] = []
        self.boundaries: list[int] = []  # ends of the blocks, in steps
        for block in grid.blocks():
            self._append(block)
            if corrector is not None:
                e = corrector.time / corrector.blocks / corrector.steps
                time = block[-1].time - block[-1].length
                small = [
                    SmallStep(time, e, "corrector", first=m == 0)
                    for m in range(corrector.steps)
                ]
                for _ in range(corrector.blocks):
                    self._append(small)
        check = getattr(score, "check_time", None)
        if check is not None:  # now, not at the end of the run
            for small in (self.steps[0], self.steps[-1]):
                check(small.time)
        self.num_steps = len(self.steps)
        self._seed = seed

    def fingerprint(self) -> Fingerprint:
        """The grid, the kind, the corrector and the seed; not the score."""
        times = [(step.kind, step.time, step.length) for step in self.steps]
        own = {"kind": self.kind, "steps": plain(times), "seed": self._seed}
        corrector = None if self.corrector is None else vars(self.corrector)
        more = {"corrector": plain(corrector), "start": shape_of(self.start)}
        return {**super().fingerprint(), **own, **more}

    def _append(self, block: Sequence[SmallStep]) -> None:
        self.steps += block
        self.boundaries.append(len(self.steps))

    def init(self) -> tuple[State, State]:
        """The noise, and a velocity of the corrector."""
        x = self.start.clone()
        return {"x": x}, {} if self.corrector is None else {"v": torch.zeros_like(x)}

    def make_drift(self, device: torch.device) -> Drift:
        """The score at a step's time."""
        del device

        def drift(step: int, y: State) -> tuple[State, Aux]:
            x = y["x"]
            with torch.no_grad():
                found = self.score(self.steps[step].time, x)
            if not isinstance(found, Tensor):
                raise TypeError(
                    f"The score returned a `{type(found).__name__}`: return a tensor "
                    "of the shape of the points."
                )
            if found.shape != x.shape:  # it would be broadcast
                raise ValueError(
                    f"The score has shape {tuple(found.shape)}, and its points have "
                    f"{tuple(x.shape)}: return one number per coordinate."
                )
            return {"score": found}, {}

        return drift

    def update(
        self, step: int, y: State, carry: State, drift: State
    ) -> tuple[State, State]:
        """One exponential-integrator step."""
        small, x, s = self.steps[step], y["x"], drift["score"]
        if small.kind == "corrector":
            return self._correct(step, small, x, carry["v"], s)
        grow = math.expm1(small.length / 2)
        x = x + grow * x + (2 * grow if self.kind == "sde" else grow) * s
        if self.kind == "sde":
            x = x + math.sqrt(math.expm1(small.length)) * self._noise(step, "xi")
        return {"x": x}, carry

    def _correct(
        self, step: int, small: SmallStep, u: Tensor, v: Tensor, s: Tensor
    ) -> tuple[State, State]:
        assert self.corrector is not None
        g, e = self.corrector.friction, small.length
        if small.first:
            v = self._noise(step, "velocity")
        r = -math.expm1(-g * e) / g
        var_u, var_v, both = langevin_covariance(g, e)
        first, second = self._noise(step, "first"), self._noise(step, "second")
        slope = both / math.sqrt(var_v)
        noise_v = math.sqrt(var_v) * first
        noise_u = slope * first + math.sqrt(max(var_u - slope**2, 0.0)) * second
        after_u = u + r * v + (e - r) / g * s + noise_u
        after_v = math.exp(-g * e) * v + r * s + noise_v
        return {"x": after_u}, {"v": after_v}

    def _noise(self, step: int, stream: str) -> Tensor:
        x = self.start
        source = self.random.generator(step, stream)
        return torch.randn(x.shape, generator=source, dtype=x.dtype).to(x.device)


def check_arguments(
    score: object, start: object, grid: object, corrector: object
) -> None:
    """Refuse arguments of `DiffusionTrajectory` of another kind.

    Raises:
        TypeError: Names the argument, and what to write.
        ValueError: The start is not finite.
    """
    noise = "write noise, `torch.randn(samples, dim)`."
    for name, value, right, example in (
        ("score", score, callable(score), "a function of time and points."),
        ("start", start, isinstance(start, Tensor), "`torch.randn(samples, dim)`."),
        ("grid", grid, isinstance(grid, Grid), "`Grid(horizon=6.0, step=0.05)`."),
        (
            "corrector",
            corrector,
            corrector is None or isinstance(corrector, Corrector),
            "`Corrector()`, or leave it out.",
        ),
    ):
        if not right:
            kind = "None" if value is None else f"a `{type(value).__name__}`"
            raise TypeError(f"`{name}` is {kind}: write {example}")
    assert isinstance(start, Tensor)
    if not start.is_floating_point():
        raise TypeError(f"`start` holds `{start.dtype}`, no floating numbers: {noise}")
    if not start.isfinite().all():
        raise ValueError(f"`start` holds NaN or infinity: {noise}")


def langevin_covariance(g: float, e: float) -> tuple[float, float, float]:
    r"""Variances of $B_u$ and $B_v$ and their covariance, over a step of length $e$.

    $\mathrm{Var} B_u = \tfrac2g [e - \tfrac{2(1-q)}{g} + \tfrac{1-q^2}{2g}]$,
    $\mathrm{Var} B_v = 1 - q^2$, $\mathrm{Cov} = (1-q)^2 / g$; for small $z = ge$ the
    first by its series, $\sum_{k \ge 3} (-z)^k (4 - 2^k) / (k!\, g^2)$, because the
    terms of the formula cancel.
    """
    z = g * e
    one = -math.expm1(-z)
    if z < 0.5:
        terms = ((-z) ** k * (4 - 2**k) / math.factorial(k) for k in range(3, 25))
        series = sum(terms)
    else:
        series = 2 * z - 4 * one - math.expm1(-2 * z)
    return series / g**2, -math.expm1(-2 * z), one**2 / g
