"""A drift split at the image: renders in the rollout, to need fewer network calls.

    python -m benchmarks.split_drift [--problems hash-grid gaussians] [--logged]

The gradient of guidance on the images is evaluated at the guesses as usual. The rollout
then renders again at the states it reaches, corrects that gradient by c (image − image
at the guess) and pulls it back there. Both solve the same problems with the default
threshold, so that iterations compare at equal quality; see `docs/split_drift.md`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import dreampropeller as dp
from benchmarks import runs
from benchmarks.measured import SEQUENTIAL, entries_of, make_parser
from benchmarks.texture import white_mesh
from dreampropeller.rollout import Evaluation
from dreampropeller.tree import copy_nest
from systems import build, quality
from systems.distillation import Distillation, Look
from systems.guidance.base import Guidance, Shown
from systems.settings.config import load

BINS = 8
"""Ranges of timesteps with a slope each."""
DECAY = 0.7
"""Weight of the sums of previous iterations, as in `Secant`."""


@dataclass
class Seen:
    """Guidance at the images of a guess, shapes ``(views, 3, height, width)``.

    Attributes:
        images: The images x.
        gradient: The gradient g of the loss on them.
        timesteps: The timestep of each view.
        model: The slope if the denoiser did not react to its input, ``(views,)``.
        own: The slope of each view where its step was evaluated twice.
    """

    images: Tensor
    gradient: Tensor
    timesteps: Tensor
    model: Tensor
    own: Tensor | None = None


@dataclass
class SplitLoss:
    """A system's loss, from guidance or from a gradient on images that is given.

    It replaces `Distillation.losses` of a system.

    Args:
        system: The system.
        slope: "none": c = 0; "model": c of a denoiser that does not react; "fitted":
            secants of views, and where there are none of their range of timesteps.
    """

    system: Distillation
    slope: str
    seen: dict[int, Seen] = field(default_factory=dict)
    given: Seen | None = None
    drift: Any = None
    products: Tensor = field(default_factory=lambda: torch.zeros(BINS))
    squares: Tensor = field(default_factory=lambda: torch.zeros(BINS))
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __call__(
        self, looks: Sequence[Look], guidance: Guidance
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """The losses of steps; the gradient on images is a constant in them."""
        found = []
        for look in looks:
            gradient = self.gradient(look, guidance)
            total = (gradient * look.images).sum()
            weight = self.system.weights(look.step)
            for name, term in self.system.regularisers.items():
                if weight[name]:
                    total = total + weight[name] * term(look.seen)
            found.append((total, {}))
        return found

    def gradient(self, look: Look, guidance: Any) -> Tensor:
        """The gradient on a step's images: of guidance, or the corrected given one."""
        images = look.images.detach()
        if self.given is not None:
            move = images - self.given.images
            return self.given.gradient + self.of(self.given) * move
        start = time.process_time()
        shown = look.images.detach().requires_grad_(True)
        with torch.enable_grad():
            random = self.system.random
            one = Shown(shown, look.views.cameras, look.step)
            ((loss, _),) = guidance.several([one], random)
            (gradient,) = torch.autograd.grad(loss, shown)
        self.note("network", start)
        weight = self.system.weights(look.step)["sds"]
        t = guidance.timestep(images, look.step, random)
        alpha, sigma = guidance.prior.scales(t)
        # Images from 0 to 1 are shown as −1 to 1: a factor of 2 each way.
        model = 4 * weight * guidance.weight(t) * alpha / sigma / len(images)
        self.seen[look.step] = Seen(images, weight * gradient, t, model.flatten())
        return weight * gradient

    def of(self, one: Seen) -> Tensor:
        """The slope c of each view, of shape ``(views, 1, 1, 1)``."""
        if self.slope == "none":
            c = torch.zeros_like(one.model)
        elif self.slope == "model":
            c = one.model
        elif one.own is not None:
            c = one.own
        else:
            ratio = (self.products / self.squares.clamp(min=1e-30)).clamp(min=0)
            ratio = torch.where(self.squares > 0, ratio, self.pooled)
            c = ratio[self.bins(one)] * one.model
        return c[:, None, None, None]

    @property
    def pooled(self) -> Tensor:
        """The slope of all timesteps over the model's; 1 before any was measured."""
        if not self.squares.any():
            return torch.ones(())
        return (self.products.sum() / self.squares.sum()).clamp(min=0)

    def bins(self, one: Seen) -> Tensor:
        """The range of timesteps of each view."""
        return one.timesteps * BINS // 1000

    def fit(self, before: Mapping[int, Seen]) -> None:
        """Secants of the steps that were evaluated before, view by view."""
        products, squares = torch.zeros(BINS), torch.zeros(BINS)
        for step in before.keys() & self.seen.keys():
            old, new = before[step], self.seen[step]
            move = (new.images - old.images).flatten(1)
            change = (new.gradient - old.gradient).flatten(1)
            product, square = (change * move).sum(1), move.square().sum(1)
            new.own = (product / square.clamp(min=1e-30)).clamp(min=0)
            if new.images.shape == old.images.shape:
                products.index_add_(0, self.bins(new), product * new.model)
                squares.index_add_(0, self.bins(new), square * new.model.square())
        if squares.any():
            self.products = DECAY * self.products + products
            self.squares = DECAY * self.squares + squares

    def note(self, name: str, start: float) -> None:
        """Note the seconds of the processor since `start`."""
        self.seconds.setdefault(name, []).append(time.process_time() - start)


@dataclass(frozen=True)
class SplitSolver(dp.PicardSolver):
    """`PicardSolver` whose rollout resolves the drifts at the states it reaches.

    Args:
        split: The loss.
        sweeps: 0: every rank renders every state in turn; otherwise the number of times
            that each rank renders the states of its own slots, as last rolled out.
    """

    split: Any = None
    sweeps: int = 0

    def _evaluate(self, trajectory: Any, dispatcher: Any, state: Any) -> Evaluation:
        before, self.split.seen = self.split.seen, {}
        found = super()._evaluate(trajectory, dispatcher, state)
        self.split.fit(before)
        return found

    def _roll_out(
        self, trajectory: Any, timer: Any, state: Any, seen: Evaluation, bound: float
    ) -> Any:
        plain = replace(self, acceleration=None)
        if self.sweeps:
            rolled, carries = super()._roll_out(trajectory, timer, state, seen, bound)
            for _ in range(self.sweeps):
                drifts = [
                    self.resolved(seen, slot, rolled.states[slot])
                    for slot in range(len(seen.steps))
                ]
                resolved = replace(seen, drifts=drifts)
                rolled, carries = dp.PicardSolver._roll_out(
                    plain, trajectory, timer, state, resolved, bound
                )
        else:
            resolved = self.in_turn(trajectory, state, seen)
            rolled, carries = dp.PicardSolver._roll_out(
                plain, trajectory, timer, state, resolved, bound
            )
        return replace(rolled, drifts=seen.drifts), carries

    def in_turn(self, trajectory: Any, state: Any, seen: Evaluation) -> Evaluation:
        """Render each state as it is reached."""
        y, carry, drifts = state.y, copy_nest(state.carry), []
        for slot, step in enumerate(seen.steps):
            drifts.append(self.resolved(seen, slot, y))
            start = time.process_time()
            with torch.no_grad():
                y, carry = trajectory.update(step, y, carry, drifts[-1])
            self.split.note("update", start)
        return replace(seen, drifts=drifts)

    def resolved(self, seen: Evaluation, slot: int, y: dp.State) -> dp.State:
        """The drift of a slot at a state: rendered, corrected and pulled back."""
        if slot == 0:
            return seen.drifts[0]
        start = time.process_time()
        self.split.given = self.split.seen[seen.steps[slot]]
        try:
            found, _ = self.split.drift(seen.steps[slot], y)
        finally:
            self.split.given = None
        self.split.note("render", start)
        return found


PROBLEMS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "hash-grid": (
        "configs/dreamfusion-toybox-hashgrid.yaml",
        ("mushroom", "rocket"),
        ("trainer.max_steps=64", "system.renderer.num_samples_per_ray=32"),
    ),
    "gaussians": (
        "configs/dreamgaussian-toybox.yaml",
        ("mushroom", "tree"),
        ("trainer.max_steps=40", "system.densify.interval=20"),
    ),
    "texture": (
        "configs/texture-toybox.yaml",
        ("rocket", "mug"),
        (
            "trainer.max_steps=160",
            "system.geometry.texture_resolution=128",
            "system.renderer.supersample=2",
        ),
    ),
}
"""Config, objects and settings: smaller than the published runs."""
WINDOWS = {"hash-grid": 16, "gaussians": 16, "texture": 32}
COLOURED = {"rocket": "an orange rocket", "mug": "a blue mug"}


def rows(size: int) -> dict[str, tuple[list[str], str | None, int, bool]]:
    """Settings, slope (None: not split), sweeps, and whether `Secant` is on."""
    window = [f"solver.window.size={size}"]
    strict = [*window, "solver.threshold.value=0.1"]
    return {
        SEQUENTIAL: (["solver.name=sequential"], None, 0, False),
        f"default, window {size}": (window, None, 0, True),
        f"in turn, c fitted, window {size}": (window, "fitted", 0, False),
        f"in turn, δ = 0.1, window {size}": (strict, "fitted", 0, False),
        f"in turn, c = 0, window {size}": (window, "none", 0, False),
        f"in turn, c = model, window {size}": (window, "model", 0, False),
        f"1 sweep, c fitted, window {size}": (window, "fitted", 1, True),
        f"2 sweeps, c fitted, window {size}": (window, "fitted", 2, True),
        f"2 sweeps, δ = 0.1, window {size}": (strict, "fitted", 2, True),
    }


def jobs(arguments: Any) -> list[dict[str, Any]]:
    """The runs that the options choose."""
    found = []
    for kind in arguments.problems:
        config, objects, settings = PROBLEMS[kind]
        for name in objects[: arguments.objects]:
            prompt, own = runs.prompt_of(name), list(settings)
            if kind == "texture":
                prompt = COLOURED[name]
                own.append(f"system.geometry.mesh={white_mesh(name)}")
            for row, (chosen, slope, sweeps, secant) in rows(WINDOWS[kind]).items():
                if row != SEQUENTIAL and not any(
                    row.startswith(one) for one in arguments.rows
                ):
                    continue
                found.append(
                    runs.job(
                        config,
                        prompt,
                        *own,
                        *chosen,
                        "seed=0",
                        *([] if secant else ["solver.acceleration.name=none"]),
                        row=row,
                        kind=kind,
                        seed=0,
                        slope=slope,
                        sweeps=sweeps,
                    )
                )
    for one in found:  # the log tells runs apart by their settings
        one["settings"] = [*one["settings"], f"tag={one['row'].replace(' ', '-')}"]
    return found


def solve(to: Path, wanted: runs.Job) -> dict[str, Any]:
    """Solve a job; count iterations, network calls and renders; time their parts."""
    torch.manual_seed(0)
    system: Any = build(load(wanted["config"], wanted["settings"]))
    solver: Any = system.solver()
    split = SplitLoss(system, wanted["slope"] or "none")
    system.losses = split
    trajectory = system.trajectory()
    if wanted["slope"] is not None:
        split.drift = trajectory.make_drift(torch.device("cpu"))
        solver = SplitSolver(**vars(solver), split=split, sweeps=wanted["sweeps"])
    start, cpu = time.perf_counter(), time.process_time()
    solution = dp.solve(trajectory, solver, check=False)
    cost = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "iterations": solution.stats.num_iterations,
        "evaluations": solution.stats.num_evaluations,
        "renders": len(split.seconds.get("render", [])),
        "strides": solution.stats.strides,
    }
    for name, seconds in split.seconds.items():
        cost[f"{name}_seconds"] = round(median(seconds), 4)
    truth = quality.truth_of(system)
    assert truth is not None, "benchmarks need prompts of the toybox"
    found = quality.against_truth(system, solution.value, truth)
    file = to / "images" / f"{wanted['kind']} {wanted['prompt']}.pt".replace(" ", "-")
    file.parent.mkdir(parents=True, exist_ok=True)
    if wanted["row"] == SEQUENTIAL:
        torch.save(found.images, file)
    error = (found.images - torch.load(file)).square().mean()
    beside = -10 * math.log10(max(float(error), 1e-12))
    return {**wanted, **cost, **found.figures(), "beside": round(beside, 2)}


def main() -> None:
    """Run the missing jobs, and print the figures."""
    parser = make_parser(__doc__, "split_drift")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--objects", type=int, default=1, help="objects per problem")
    parser.add_argument("--rows", nargs="+", default=["default", "in turn, c fitted"])
    arguments = parser.parse_args()
    for one in entries_of(arguments, jobs(arguments), solve):
        keys = ("kind", "prompt", "row", "iterations", "evaluations", "renders")
        print(*(one[key] for key in keys), one["psnr"], one["beside"])


if __name__ == "__main__":
    main()
