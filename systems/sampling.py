"""`launch.py --sample`: images of a prompt, many denoising steps at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import dreampropeller as dp
from dreampropeller.adapters.diffusers import measure, sample, worst_image
from systems.files import written
from systems.guidance.prompts import PromptConfig
from systems.images import save_image, save_sheet
from systems.problem import Problem
from systems.settings.checks import at_least, between, one_of
from systems.settings.config import Config
from systems.settings.reader import ConfigError, read
from systems.settings.solver import CleanImageGuesses

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
ROWS, COLUMNS = 24, 26
"""Largest numbers of iterations and steps in a strip."""
ACCEPTED, TRIED, EMPTY = (0.1, 0.7, 0.2), (1.0, 0.6, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class SamplerConfig:
    """`system.sampler`: the diffusion pipeline and its sampler.

    Args:
        pretrained_model_name_or_path: Diffusion model: "toybox", a hub model, or a
            local folder.
        scheduler: Sampler: "ddim", "ddpm", "dpm++", or null for the model's own.
        num_inference_steps: Number of denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 evaluates only the
            conditional model.
        guidance_rescale: Rescaling of the guided prediction, from 0 (off) to 1, for
            pipelines that support it.
        eta: Noise of DDIM, from 0 (none) to 1.
        form: Form of the drift: "semi-linear", or "published" for comparison.
        batched: Evaluate a window in one batched call if a calibration shows that it
            pays on this device, and run sequentially otherwise. The calibration is
            measured at the first run and recorded beside the runs.
        num_images: Number of images, each from its own noise.
    """

    pretrained_model_name_or_path: str = "toybox"
    scheduler: str | None = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    guidance_rescale: float | None = None
    eta: float = 0.0
    form: str = "semi-linear"
    batched: bool = False
    num_images: int = 1

    def __post_init__(self) -> None:
        at_least("num_inference_steps", self.num_inference_steps, 1)
        at_least("num_images", self.num_images, 1)
        at_least("guidance_scale", self.guidance_scale, 0)
        between("eta", self.eta, 0, 1)
        between("guidance_rescale", self.guidance_rescale or 0, 0, 1)
        one_of("form", self.form, ("semi-linear", "published"))
        if self.scheduler is not None:
            one_of("scheduler", self.scheduler, tuple(SCHEDULERS))


@dataclass(frozen=True)
class SamplingConfig:
    """`system` of a config for `--sample`.

    Args:
        prompt_processor: The prompt and the negative prompt.
        sampler: Diffusion pipeline and its sampler.
    """

    prompt_processor: PromptConfig
    sampler: SamplerConfig


NEEDS = {
    "piadm-ode": ("ddim",),
    "piadm-sde": ("ddpm",),
    "speculative": ("ddpm", "ddim"),  # with η above 0
}
"""Schedulers of the solvers that only sample images."""


class Strip:
    """The window at work: the states that each iteration evaluated."""

    def __init__(self) -> None:
        self.rows: list[tuple[dp.Iteration, list[Tensor]]] = []
        self._next: list[Tensor] = []

    def __call__(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        """Keep the first image of every state in the window."""
        if self._next:  # the first iteration holds only noise and is left out
            last = self._next[-1:]
            row = (self._next + last * iteration.window)[: iteration.window]
            self.rows.append((iteration, row))
        states = [state.y, *state.guesses]
        self._next = [y["x"][0, :3].detach().float().cpu() for y in states]

    def image(self, num_steps: int) -> tuple[Tensor, int]:
        """Cells, iteration by iteration, and the number of cells per row.

        Green cells were accepted, orange ones evaluated; the last cell is the sample.
        Rows and steps of a long run are thinned out.
        """
        chosen = self.rows[:: max(1, -(-len(self.rows) // ROWS))]
        stride = -(-num_steps // COLUMNS)
        steps = range((num_steps - 1) % stride, num_steps, stride)
        blank = _framed(torch.ones_like(self._next[0]), EMPTY)
        cells: list[Tensor] = []
        for iteration, row in chosen:
            for step in steps:
                slot = step - iteration.begin
                inside = 0 <= slot < len(row)
                colour = ACCEPTED if slot < iteration.stride else TRIED
                cells.append(_framed(row[slot], colour) if inside else blank)
            cells.append(blank)
        cells[-1:] = [_framed(self._next[0], ACCEPTED)]
        return torch.stack(cells), len(steps) + 1 if chosen else 1


def _framed(x: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """A state as an image in [0, 1] with a border of one pixel."""
    cell = torch.tensor(colour)[:, None, None].repeat(1, x.shape[1] + 2, x.shape[2] + 2)
    cell[:, 1:-1, 1:-1] = (x / 2 + 0.5).clamp(0, 1)
    return cell


class Sampling(Problem):
    """Images of a prompt; the pipeline owns the loop and is called once."""

    option = "--sample"
    sections = frozenset({"system"})
    section_types: ClassVar[Mapping[str, type]] = {"system": SamplingConfig}

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.settings = read(SamplingConfig, config.system, "system")
        if config.dispatch.count > 1 and self.settings.sampler.batched:
            raise ConfigError(
                "`system.sampler.batched` puts a window on one device, and "
                f"there are {config.dispatch.count} workers: choose one."
            )
        if config.dispatch.batch != "never":
            raise ConfigError(
                "`dispatch.batch` has no effect on sampling: write "
                "`system.sampler.batched=true`, which measures first."
            )
        self._check_solver()
        self._strip = Strip()
        self._images = torch.empty(0)

    def _check_solver(self) -> None:
        """Refuse a sampler that the solver does not take.

        Raises:
            ConfigError: Names the setting, and what to write.
        """
        sampler, name = self.settings.sampler, self.config.solver.name
        if sampler.batched and name in ("sequential", "speculative"):
            raise ConfigError(
                f"`system.sampler.batched` has no effect on `solver.name={name}`: "
                "leave it out, or write `solver.name=picard`."
            )
        guesses = self.config.solver.predictor
        if name == "picard" and isinstance(guesses, CleanImageGuesses):
            if sampler.form != "semi-linear":
                raise ConfigError(
                    "`solver.predictor=clean_image` reads the model's output, and the "
                    f"drift of `system.sampler.form={sampler.form}` is an increment: "
                    "leave one of them out."
                )
            if sampler.batched and guesses.sequential_steps:
                raise ConfigError(
                    "`system.sampler.batched` measures a whole window, and "
                    "`solver.predictor.sequential_steps` begins without one: leave one "
                    "of them out."
                )
        if name not in NEEDS:
            return
        if sampler.scheduler not in NEEDS[name]:
            needed = NEEDS[name][0]
            raise ConfigError(
                f"`solver.name={name}` works with {needed.upper()}: write "
                f"`system.sampler.scheduler={needed}`."
            )
        if sampler.form != "semi-linear":
            raise ConfigError(
                f"`system.sampler.form` is `{sampler.form}`, whose drift is an "
                f"increment, and `solver.name={name}` needs the model's output: leave "
                "it out, or write `solver.name=picard`."
            )
        if name == "piadm-ode" and sampler.eta:
            raise ConfigError(
                f"`system.sampler.eta` is {sampler.eta}, and an ODE has no noise: "
                "write `system.sampler.eta=0`, or `solver.name=piadm-sde "
                "system.sampler.scheduler=ddpm`."
            )
        if name == "speculative" and sampler.scheduler == "ddim" and not sampler.eta:
            raise ConfigError(
                "`system.sampler.eta` is 0, and `solver.name=speculative` draws its "
                "steps: write `system.sampler.eta=1`, or "
                "`system.sampler.scheduler=ddpm`."
            )

    @property
    def title(self) -> str:
        """The prompt."""
        return self.settings.prompt_processor.prompt

    @property
    def num_steps(self) -> int:
        """The number of denoising steps."""
        return self.settings.sampler.num_inference_steps

    def solver(self) -> dp.Solver:
        """The configured solver, with the published norm.

        "momentum" holds the model's last output for new steps.
        """
        solver = self.config.solver.build()
        if not isinstance(solver, dp.PicardSolver):
            return solver
        if isinstance(solver.window, dp.BlockWindow):
            return solver  # it uses no errors
        held = solver.predictor == dp.Momentum()
        predictor = dp.Momentum(0.0) if held else solver.predictor
        return replace(solver, predictor=predictor, norm=worst_image)

    def solve(
        self,
        dispatcher: Callable[[dp.Trajectory[Any]], dp.Dispatcher],
        state: dp.SolverState[Any] | None,
        on_iteration: Callable[[dp.SolverState[Any], dp.Iteration], bool | None],
    ) -> dp.Solution[Any]:
        """Call the pipeline; see `dreampropeller.adapters.diffusers.sample`.

        Raises:
            KeyboardInterrupt: `on_iteration` asked to stop; there is no sample.
        """
        del state
        pipeline = _pipeline(self.settings.sampler, self.device)
        pipeline.set_progress_bar_config(disable=True)
        solutions: list[dp.Solution[Any]] = []
        calibration, solver = None, self.solver()
        if self.settings.sampler.batched and isinstance(solver, dp.PicardSolver):
            calibration = self._calibration(pipeline)
            print(dp.choose_solver(solver, calibration, self.device).reason)

        self._tell_depth()

        def watch(state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
            self._strip(state, iteration)
            if on_iteration(state, iteration):
                raise KeyboardInterrupt

        images = sample(
            pipeline,
            self.title,
            **self._arguments(),
            solver=solver,
            dispatcher=dispatcher,
            calibration=calibration,
            on_iteration=watch,
            on_solution=solutions.append,
        ).images
        self._images = torch.from_numpy(images).movedim(-1, 1).float()
        return solutions[0]

    def _tell_depth(self) -> None:
        """Say in the report that PIADM checks no error, unless its depth is exact."""
        depth, size = self.config.solver.depth, min(self._window(), self.num_steps)
        if self.config.solver.name.startswith("piadm") and depth < size:
            self.notes.append(
                f"Every block was iterated `solver.depth={depth}` times, and nothing "
                "measured the error that is left: compare with `solver.name=sequential`"
                f" of the same seed, or write a greater depth ({size} is exact)."
            )

    def write(self, folder: Path, y: dp.State) -> dict[str, Any]:
        """Write the images, and a strip that shows the window at work."""
        del y
        enlarged = max(1, 256 // self._images.shape[-1])
        columns = min(4, len(self._images))
        with written(folder / "sample.png") as part:
            save_sheet(self._images, part, columns, scale=enlarged)
        cells, columns = self._strip.image(self.num_steps)
        save_image(cells, folder / "strip.png", columns)
        return {"sampler": asdict(self.settings.sampler)}

    def _arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline call."""
        sampler = self.settings.sampler
        arguments: dict[str, Any] = {
            "negative_prompt": self.settings.prompt_processor.negative_prompt or None,
            "num_inference_steps": sampler.num_inference_steps,
            "guidance_scale": sampler.guidance_scale,
            "num_images_per_prompt": sampler.num_images,
            "eta": sampler.eta,
            "generator": torch.Generator().manual_seed(self.config.seed),
            "output_type": "np",
            "form": sampler.form,
            "window": self._window(),
        }
        if sampler.guidance_rescale is not None:
            arguments["guidance_rescale"] = sampler.guidance_rescale
        return arguments

    def _window(self) -> int:
        """Initial number of steps in the window."""
        window = self.config.solver.window
        assert isinstance(window, dp.Window), "`load` resolves `auto`"
        return window.length(window.init(), 0, self.num_steps)

    def _calibration(self, pipeline: Any) -> dp.Calibration:
        """The recorded calibration; measured and recorded if there is none."""
        path = Path(self.config.exp_root_dir) / self.config.name / "calibration.json"
        return dp.Calibration.recorded(
            path, lambda: measure(pipeline, self.title, **self._arguments())
        )


def _pipeline(wanted: SamplerConfig, device: torch.device) -> Any:
    # Here, so that threestudio's own, older diffusers is enough for its backend.
    import diffusers

    from systems.guidance.priors import open_pipeline, resolve

    source = resolve(wanted.pretrained_model_name_or_path)
    pipeline = open_pipeline(source).to(device)
    if wanted.scheduler is not None:
        kind = getattr(diffusers, SCHEDULERS[wanted.scheduler])
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    return pipeline
