"""`launch.py --sample`: pictures of a prompt, many denoising steps at a time."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dreampropeller as dp
from dreampropeller.adapters.diffusers import measure, sample, worst_picture
from dreampropeller.dispatch.process_group import local_device
from systems.guidance.prompts import PromptConfig
from systems.images import save_picture, save_sheet
from systems.runs import folders, workers
from systems.settings.checks import at_least, one_of
from systems.settings.config import Config, is_rank
from systems.settings.reader import ConfigError, read

SYSTEM_TYPE = "diffusion-sampling"
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
ROWS, COLUMNS = 24, 26
"""Most iterations and steps that a strip shows."""
ACCEPTED, TRIED, EMPTY = (0.1, 0.7, 0.2), (1.0, 0.6, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class SamplerConfig:
    """`system.sampler`.

    Args:
        pretrained_model_name_or_path: "toybox", a hub model, or a local folder.
        scheduler: "ddim", "ddpm", "dpm++", or null for the model's own.
        num_inference_steps: Steps.
        guidance_scale: 1 asks the conditional model alone.
        guidance_rescale: From 0 (off) to 1, for pipelines that have it.
        eta: Noise of DDIM, from 0 (none) to 1.
        form: "semi-linear", or "published" for comparison.
        batched: Evaluate a window in one call if a calibration, made at the first run
            and kept beside the runs, shows that it pays here; else the plain loop.
        num_images: Pictures, each with noise of its own.
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
        at_least("eta", self.eta, 0)
        one_of("form", self.form, ("semi-linear", "published"))
        if self.scheduler is not None:
            one_of("scheduler", self.scheduler, tuple(SCHEDULERS))


@dataclass(frozen=True)
class SamplingConfig:
    """`system` of a config for `--sample`.

    Args:
        prompt_processor: What is wanted.
        sampler: How it is drawn.
    """

    prompt_processor: PromptConfig
    sampler: SamplerConfig


class Strip:
    """The window at work: what the model was asked about in each iteration."""

    def __init__(self) -> None:
        self.rows: list[tuple[dp.Iteration, list[Tensor]]] = []
        self._next: list[Tensor] = []

    def __call__(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        """Keep the first picture of every state of the window."""
        if self._next:  # of the first iteration, nothing but noise is left out
            last = self._next[-1:]
            row = (self._next + last * iteration.window)[: iteration.window]
            self.rows.append((iteration, row))
        states = [state.y, *state.guesses]
        self._next = [y["x"][0, :3].detach().float().cpu() for y in states]

    def picture(self, num_steps: int) -> tuple[Tensor, int]:
        """Cells, iteration by iteration, and how many there are in a row.

        Green: accepted; orange: tried; the last cell is the sample. Of a long run, rows
        and steps are left out.
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
    """A state as a picture from 0 to 1 with a border of one pixel."""
    cell = torch.tensor(colour)[:, None, None].repeat(1, x.shape[1] + 2, x.shape[2] + 2)
    cell[:, 1:-1, 1:-1] = (x / 2 + 0.5).clamp(0, 1)
    return cell


def run(config: Config) -> int:
    """Draw, here or on several ranks; gives the exit code.

    Raises:
        ConfigError: A setting cannot be used.
    """
    if is_rank():  # started by torchrun
        return work(config, leads=os.environ["RANK"] == "0")
    if config.dispatch.num_workers == 1:
        return work(config)
    settings(config)  # refuse before anything is made or started
    return workers.run(work, config, folders.open_folder(config))


def settings(config: Config) -> SamplingConfig:
    """The settings of a config for `--sample`.

    Raises:
        ConfigError: It is a config for another task, or a setting cannot be used.
    """
    if config.system_type != SYSTEM_TYPE:
        raise ConfigError(
            f"`system_type` is `{config.system_type}`, and `--sample` draws pictures: "
            "write `--config configs/sample-toybox.yaml`, or `--train` for this one."
        )
    if config.resume is not None:
        raise ConfigError("A sample is not resumed: leave out `resume`.")
    if config.dispatch.count > 1 and config.system.get("sampler", {}).get("batched"):
        raise ConfigError(
            "`system.sampler.batched` puts a window on one device, and "
            f"there are {config.dispatch.count} workers: choose one."
        )
    return read(SamplingConfig, config.system, "system")


def work(config: Config, folder: Path | None = None, leads: bool = True) -> int:
    """What each rank does; the one that leads writes it down, in a folder."""
    wanted = settings(config)
    dispatcher, threads = workers.dispatcher(config.dispatch)
    torch.set_num_threads(threads)
    pipeline = _pipeline(wanted.sampler)
    folder = folder or (folders.open_folder(config) if leads else None)
    solutions: list[dp.Solution[Any]] = []
    strip = Strip()
    arguments: dict[str, Any] = {
        **_arguments(wanted, config.seed),
        "form": wanted.sampler.form,
        "window": config.solver.window.size,
    }
    calibration = None
    if wanted.sampler.batched:
        calibration = _calibration(config, pipeline, arguments)
        print(dp.choose_solver(_picard(config), calibration, local_device()).reason)
    start = time.perf_counter()
    made = sample(
        pipeline,
        wanted.prompt_processor.prompt,
        **arguments,
        solver=_solver(config),
        dispatcher=dispatcher,
        calibration=calibration,
        on_iteration=strip,
        on_solution=solutions.append,
    ).images
    seconds = time.perf_counter() - start
    if folder is None:
        return 0
    stats = solutions[0].stats
    pictures = torch.from_numpy(made).movedim(-1, 1).float()
    enlarged = max(1, 256 // pictures.shape[-1])
    save_sheet(
        pictures, folder / "sample.png", columns=min(4, len(pictures)), scale=enlarged
    )
    cells, columns = strip.picture(sum(stats.strides))
    save_picture(cells, folder / "strip.png", columns)
    folders.write_json(
        folder / "report.json",
        {
            "prompt": wanted.prompt_processor.prompt,
            "result": solutions[0].result.value,
            "steps": sum(stats.strides),
            "iterations": stats.num_iterations,
            "evaluations": stats.num_evaluations,
            "strides": stats.strides,
            "seconds": round(seconds, 2),
            "workers": config.dispatch.count,
            "sampler": asdict(wanted.sampler),
            "solver": asdict(config.solver),
            "environment": folders.environment(),
        },
    )
    print(
        f"{sum(stats.strides)} steps in {stats.num_iterations} iterations, "
        f"{stats.num_evaluations} evaluations, {seconds:.1f} s on "
        f"{config.dispatch.count} worker(s).\nLook into {folder}"
    )
    return 0


def _pipeline(wanted: SamplerConfig) -> Any:
    # Here, so that threestudio's own, older diffusers is enough for its backend.
    import diffusers

    from systems.guidance.priors import open_pipeline, resolve

    source = resolve(wanted.pretrained_model_name_or_path)
    pipeline = open_pipeline(source).to(local_device())
    if wanted.scheduler is not None:
        kind = getattr(diffusers, SCHEDULERS[wanted.scheduler])
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    return pipeline


def _arguments(wanted: SamplingConfig, seed: int) -> dict[str, Any]:
    """What the pipeline is called with."""
    sampler = wanted.sampler
    arguments: dict[str, Any] = {
        "negative_prompt": wanted.prompt_processor.negative_prompt or None,
        "num_inference_steps": sampler.num_inference_steps,
        "guidance_scale": sampler.guidance_scale,
        "num_images_per_prompt": sampler.num_images,
        "eta": sampler.eta,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    if sampler.guidance_rescale is not None:
        arguments["guidance_rescale"] = sampler.guidance_rescale
    return arguments


def _solver(config: Config) -> dp.Solver:
    return dp.Sequential() if config.solver.name == "sequential" else _picard(config)


def _picard(config: Config) -> dp.PicardSolver:
    """As configured, with the published norm; "momentum" holds the last answer."""
    held = config.solver.predictor == "momentum"
    return dp.PicardSolver(
        config.solver.window.build(),
        config.solver.threshold.build(),
        predictor=dp.Momentum(0.0) if held else config.solver.predictor,
        norm=worst_picture,
        acceleration=config.solver.acceleration.build(),
    )


def _calibration(
    config: Config, pipeline: Any, arguments: dict[str, Any]
) -> dp.Calibration:
    """The record beside the runs; measured and written if there is none."""
    path = Path(config.exp_root_dir) / config.name / "calibration.json"
    if not path.exists():
        print(f"Measuring whether a batched window pays (kept in {path}).")
        prompt = read(SamplingConfig, config.system, "system").prompt_processor.prompt
        own = {**arguments, "generator": torch.Generator().manual_seed(config.seed)}
        path.parent.mkdir(parents=True, exist_ok=True)
        measure(pipeline, prompt, **own).save(path)
    return dp.Calibration.load(path)
