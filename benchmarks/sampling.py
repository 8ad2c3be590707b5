"""Parallel sampling against sequential sampling and against diffusers' own ParaDiGMS.

`python -m benchmarks.sampling` samples the trained toybox U-Net, wrapped in a Stable
Diffusion pipeline (one-block autoencoder, latents compared), with

- diffusers' `StableDiffusionParadigmsPipeline` and ours in both forms, same seeds,
  window and tolerance, all as batched calls;
- DPM-Solver++, against its sequential run;
- windows × tolerances × forms × {plain, Anderson acceleration};
- rounds at equal error: wider windows, Anderson and guesses
  from the clean image; and `Speculative`, whose samples have the sequential law;
- 64 prompts, classified by the toybox classifier.

Every run is a line of the log, `runs.jsonl` in the folder `--to`; an interrupted
benchmark resumes from it. Tables are printed, and the plot is written beside the log.
Iterations and evaluations are exact; seconds are CPU seconds of one process with one
thread, wall-clock on a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.deprecated.stable_diffusion_variants import (
    pipeline_stable_diffusion_paradigms as published,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
)
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelScheduler
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import (
    DPMSolverMultistepScheduler,
)
from torch import Tensor

import dreampropeller as dp
from benchmarks import runs
from dreampropeller.adapters.diffusers import CleanImage, Speculative, sample
from systems.toybox import classifier
from systems.toybox import pipeline as toybox
from systems.toybox.evaluate import prompts
from systems.toybox.objects import COLOURS, OBJECTS

PROMPT = "a blue mug, side view"
GUIDANCE_SCALE = 3.0
ANDERSON = " + Anderson"
CLEAN = " + clean image"
SPECULATIVE = "speculative"
METHODS = tuple(
    form + how for how in ("", ANDERSON) for form in ("published", "semi-linear")
)
SAMPLERS: dict[str, tuple[Any, int]] = {
    "ddpm-1000": (DDPMParallelScheduler, 1000),
    "ddpm-100": (DDPMParallelScheduler, 100),
    "ddim-50": (DDIMParallelScheduler, 50),
    "ddim-100": (DDIMParallelScheduler, 100),
    "dpm++-50": (DPMSolverMultistepScheduler, 50),
}
Job = dict[str, Any]


class Bench:
    """The trained U-Net in a Stable Diffusion pipeline, and its samplers."""

    def __init__(self) -> None:
        self.prior = toybox.load()
        self.calls: list[int] = []
        self.prior.unet.register_forward_hook(self._count)
        self.classifier = classifier.load()
        self.kept: dict[str, Tensor] = {}

    def _count(self, module: Any, inputs: Any, output: Any) -> None:
        del module, output
        self.calls.append(len(inputs[0]))

    def pipeline(self, kind: Any, sampler: str) -> Any:
        """A pipeline class around the U-Net."""
        # Stable Diffusion's pipeline requires these; diffusers' ParaDiGMS would clip.
        scheduler = SAMPLERS[sampler][0].from_config(
            self.prior.scheduler.config, clip_sample=False, steps_offset=1
        )
        shape: Any = {"block_out_channels": (8,), "norm_num_groups": 4}
        whole = kind(
            vae=AutoencoderKL(latent_channels=3, **shape),
            text_encoder=self.prior.text_encoder,
            tokenizer=self.prior.tokenizer,
            unet=self.prior.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        whole.set_progress_bar_config(disable=True)
        return whole

    def arguments(self, job: Job) -> dict[str, Any]:
        """Arguments of every pipeline call."""
        classified = job["part"] == "prompts"  # diffusers' ParaDiGMS cannot rescale
        return {
            **({"guidance_rescale": toybox.GUIDANCE_RESCALE} if classified else {}),
            "prompt_embeds": self.prior.encode([job["prompt"]]),
            "negative_prompt_embeds": self.prior.encode([""]),
            "num_inference_steps": SAMPLERS[job["sampler"]][1],
            "guidance_scale": GUIDANCE_SCALE,
            "generator": torch.Generator().manual_seed(job["seed"]),
            "output_type": "latent",
        }

    def own(self, job: Job) -> Tensor:
        """The sequential pipeline's latents."""
        whole = self.pipeline(StableDiffusionPipeline, job["sampler"])
        return whole(**self.arguments(job)).images

    def diffusers(self, job: Job) -> Tensor:
        """The published code's latents."""
        whole = self.pipeline(
            published.StableDiffusionParadigmsPipeline, job["sampler"]
        )
        options = {"parallel": job["window"], "tolerance": job["tolerance"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, as is known
            return whole(**options, **self.arguments(job)).images

    def ours(self, job: Job) -> Tensor:
        """Our latents."""
        whole = self.pipeline(StableDiffusionPipeline, job["sampler"])
        self.calls.clear()

        def forget(state: Any, iteration: dp.Iteration) -> None:
            if iteration.begin == 0:  # before it, the pipeline's own call is recorded
                del state, self.calls[:-1]

        method = job["method"]
        if method == SPECULATIVE:
            how: dict[str, Any] = {"solver": Speculative(job["window"])}
        else:
            how = {
                "window": job["window"],
                "tolerance": job["tolerance"],
                "form": method.split(" + ")[0],
                "acceleration": dp.Anderson() if ANDERSON in method else None,
                "predictor": CleanImage() if CLEAN in method else None,
            }
        return sample(
            whole,
            **how,
            dispatcher=dp.BatchedDispatcher,
            on_iteration=forget,
            **self.arguments(job),
        ).images

    def run(self, job: Job) -> Job:
        """Run a job: cost, error against sequential, and classification."""
        method: Callable[[Job], Tensor] = {
            "sequential": self.own,
            "diffusers": self.diffusers,
        }.get(job["method"], self.ours)
        self.calls.clear()
        start = time.process_time()
        latents = method(job)
        seconds = time.process_time() - start
        calls = list(self.calls)
        reference = self.reference(job, latents)
        seen = self.classifier.classify((latents / 2 + 0.5).clamp(0, 1))
        return {
            **job,
            "iterations": len(calls),
            "evaluations": sum(calls) // 2,  # guidance evaluates twice
            "seconds": round(seconds, 2),
            "error": float((latents - reference).square().mean().sqrt()),
            "object": int(seen.objects[0]),
            "colour": int(seen.colours[0]),
        }

    def reference(self, job: Job, latents: Tensor) -> Tensor:
        """The sequential latents of the same seed and prompt."""
        key = f"{job['sampler']}/{job['prompt']}/{job['seed']}"
        if job["method"] == "sequential":
            self.kept[key] = latents
        if key not in self.kept:  # missing after an interruption
            self.kept[key] = self.own(job)
        return self.kept[key]


def jobs() -> Iterator[Job]:
    """All runs, the most informative first."""
    yield from against_published(0, ("ddim-100", "ddpm-100"))
    yield from multistep()
    yield from classified(0, 32)
    yield from grid()
    yield from against_published(0, ("ddpm-1000",))
    yield from equal_error("ddim-50", DDIM_50)
    yield from equal_error("ddpm-1000", DDPM_1000)
    yield from classified(32, 64)
    for samplers in (("ddim-100", "ddpm-100"), ("ddpm-1000",)):
        for seed in (1, 2):
            yield from against_published(seed, samplers)


def against_published(seed: int, samplers: Sequence[str]) -> Iterator[Job]:
    """Both forms and diffusers' own code, from the same seed."""
    for sampler in samplers:
        one: Job = {"part": "published", "sampler": sampler, "seed": seed}
        one |= {"prompt": PROMPT}
        window = 64 if sampler == "ddpm-1000" else 16
        yield {**one, "method": "sequential", "window": 1, "tolerance": 0.0}
        for method in ("diffusers", "semi-linear", "published", METHODS[-1]):
            yield {**one, "method": method, "window": window, "tolerance": 0.1}


DDPM_1000: tuple[tuple[str, int, float], ...] = (
    ("semi-linear" + CLEAN, 64, 0.1),
    ("semi-linear" + CLEAN + ANDERSON, 128, 0.1),
    ("published", 64, 1.0),
    (SPECULATIVE, 32, 0.0),
    ("semi-linear" + CLEAN + ANDERSON, 256, 0.1),
    (SPECULATIVE, 64, 0.0),
    (SPECULATIVE, 16, 0.0),
)
DDIM_50: tuple[tuple[str, int, float], ...] = tuple(
    (method, window, tolerance)
    for method, window in (
        ("published", 8),
        ("semi-linear", 8),
        ("published", 16),
        ("semi-linear" + ANDERSON, 16),
        ("semi-linear" + ANDERSON, 50),
    )
    for tolerance in (0.03, 0.1)
)
"""Method, window, tolerance; 50 is all steps at once."""


def equal_error(sampler: str, runs: Iterable[tuple[str, int, float]]) -> Iterator[Job]:
    """Fewest rounds for an error: a red mushroom, for DDIM three seeds."""
    for seed in range(3 if sampler == "ddim-50" else 1):
        one: Job = {"part": "rounds", "sampler": sampler, "seed": seed}
        one |= {"prompt": "a red mushroom"}
        yield {**one, "method": "sequential", "window": 1, "tolerance": 0.0}
        for method, window, tolerance in runs:
            yield {**one, "method": method, "window": window, "tolerance": tolerance}


def multistep() -> Iterator[Job]:
    """DPM-Solver++: history in the carry."""
    one: Job = {"part": "multistep", "sampler": "dpm++-50", "seed": 0}
    one |= {"prompt": PROMPT}
    yield {**one, "method": "sequential", "window": 1, "tolerance": 0.0}
    for window in (8, 16):
        for tolerance in (0.0, 0.03, 0.1, 0.3):
            for method in METHODS[1::2]:
                more = {"method": method, "window": window, "tolerance": tolerance}
                yield {**one, **more}


def grid() -> Iterator[Job]:
    """Window × tolerance × form × {plain, Anderson}; 100 is all steps at once."""
    for sampler in ("ddim-100", "ddpm-100"):
        for window in (16, 8, 32, 100):
            if window == 100 and sampler == "ddpm-100":
                continue  # takes a minute per run
            small = () if window == 8 else (0.003, 0.01)  # compares at equal error
            for tolerance in (*small, 0.03, 0.1, 0.3):
                for method in METHODS if window < 100 else METHODS[1::2]:
                    one: Job = {"part": "grid", "sampler": sampler, "seed": 0}
                    one |= {"prompt": PROMPT, "method": method}
                    yield {**one, "window": window, "tolerance": tolerance}


def classified(begin: int, end: int) -> Iterator[Job]:
    """Prompts whose samples are classified."""
    for number, prompt in list(enumerate(prompts(end)))[begin:]:
        one: Job = {"part": "prompts", "sampler": "ddim-50", "seed": number}
        one |= {"prompt": prompt.text}
        yield {**one, "method": "sequential", "window": 1, "tolerance": 0.0}
        yield {**one, "method": "semi-linear", "window": 8, "tolerance": 0.1}


def identity(job: Job) -> tuple[Any, ...]:
    """The key by which two jobs are equal."""
    names = ("part", "sampler", "method", "prompt", "seed", "window", "tolerance")
    return tuple(job[name] for name in names)


def work(log: Path, todo: Iterable[Job], hours: float) -> None:
    """Run the jobs missing from the log, until the time is over."""
    log.parent.mkdir(parents=True, exist_ok=True)
    known = {identity(entry) for entry in read(log)}
    rest = [job for job in todo if identity(job) not in known]
    end = time.monotonic() + hours * 3600
    bench = Bench() if rest else None
    for number, job in enumerate(rest):
        if time.monotonic() > end:
            print(f"Time is over, {len(rest) - number} jobs are left.")
            return
        assert bench is not None
        found = {**bench.run(job), "machine": runs.machine()}
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


def read(log: Path) -> list[Job]:
    """The log's entries."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def table(entries: list[Job], part: str) -> str:
    """A part of the log as Markdown, averaged over seeds."""
    names = ("sampler", "method", "window", "tolerance")
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for entry in entries:
        if entry["part"] == part:
            groups.setdefault(tuple(entry[n] for n in names), []).append(entry)
    lines = [
        "| sampler | method | window | tolerance | iterations | evaluations | s | "
        "error | seeds |",
        "|---" * 9 + "|",
    ]
    for key, group in sorted(groups.items(), key=lambda item: item[0][0]):
        cells = [str(value) for value in key]
        cells += [f"{mean(e[n] for e in group):.1f}" for n in ("iterations",)]
        cells += [f"{mean(e['evaluations'] for e in group):.0f}"]
        cells += [f"{mean(e['seconds'] for e in group):.1f}"]
        cells += [f"{mean(e['error'] for e in group):.4f}", str(len(group))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def crossed(entries: list[Job]) -> str:
    """The grid as Markdown, a column per method: iterations / error."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for entry in entries:
        if entry["part"] == "grid":
            row = cells.setdefault(
                tuple(entry[n] for n in ("sampler", "window", "tolerance")), {}
            )
            row[entry["method"]] = f"{entry['iterations']} / {entry['error']:.4f}"
    lines = [f"| sampler | window | tolerance | {' | '.join(METHODS)} |"]
    lines.append("|---" * (3 + len(METHODS)) + "|")
    for key, row in sorted(cells.items()):
        found = [row.get(method, "–") for method in METHODS]
        lines.append(f"| {' | '.join([*map(str, key), *found])} |")
    return "\n".join(lines)


def agreement(entries: list[Job]) -> str:
    """Accuracy of sequential and parallel samples, and of the two with each other."""
    truth = {prompt.text: prompt for prompt in prompts(64)}
    objects, colours = list(OBJECTS), list(COLOURS)
    rows: dict[str, list[Job]] = {"sequential": [], "semi-linear": []}
    for entry in entries:
        if entry["part"] == "prompts":
            rows[entry["method"]].append(entry)
    lines = ["| samples | prompts | object | colour | iterations |", "|---" * 5 + "|"]
    for method, row in rows.items():
        if row:
            right = mean(objects[e["object"]] == truth[e["prompt"]].name for e in row)
            hue = mean(colours[e["colour"]] == truth[e["prompt"]].colour for e in row)
            depth = mean(e["iterations"] for e in row)
            lines.append(
                f"| {method} | {len(row)} | {right:.1%} | {hue:.1%} | {depth:.1f} |"
            )
    pairs = zip(rows["sequential"], rows["semi-linear"], strict=False)
    same = [a["object"] == b["object"] and a["colour"] == b["colour"] for a, b in pairs]
    if same:
        lines.append(f"\nSame object and colour seen in {mean(same):.1%} of the pairs.")
    return "\n".join(lines)


def plot(entries: list[Job], path: Path) -> None:
    """Iterations over error, a point per tolerance, for each sampler and window."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    samplers, windows = ("ddim-100", "ddpm-100"), (8, 16, 32, 100)
    figure, axes = plt.subplots(
        *(len(samplers), len(windows)),
        figsize=(12, 5.5),
        sharex="row",
        layout="constrained",
    )
    for line, sampler in enumerate(samplers):
        for column, window in enumerate(windows):
            panel = axes[line, column]
            for method in METHODS:
                keys = {"sampler": sampler, "window": window, "method": method}
                row = [
                    e
                    for e in entries
                    if e["part"] == "grid" and all(e[k] == v for k, v in keys.items())
                ]
                row.sort(key=lambda e: e["tolerance"])
                panel.plot(
                    [e["error"] for e in row],
                    [e["iterations"] for e in row],
                    "--" if method.startswith("published") else "-",
                    color="tab:orange" if method.endswith(ANDERSON) else "tab:blue",
                    marker=".",
                    label=method,
                )
            if not any(found.get_xydata().size for found in panel.lines):
                panel.axis("off")
                continue
            panel.set(title=f"{sampler}, window {window}", xscale="log")
            panel.set(xlabel="error", ylabel="iterations")
    lines, names = axes[0, 0].get_legend_handles_labels()
    axes[-1, -1].legend(lines, names, loc="center")  # an empty panel
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    runs.add_places(parser, "sampling")
    parser.add_argument(
        "--parts", nargs="*", help="published multistep grid rounds prompts"
    )
    parser.add_argument("--hours", type=float, default=2.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [j for j in jobs() if not arguments.parts or j["part"] in arguments.parts]
    log = arguments.to / "runs.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    work(log, wanted, arguments.hours)
    entries = read(log)
    for part in ("published", "multistep", "rounds"):
        print(f"{part}\n\n{table(entries, part)}\n")
    print(f"grid: iterations / error\n\n{crossed(entries)}\n")
    print(agreement(entries))
    print(f"Runs were made on {runs.machines(entries)}.")
    folder = runs.tables_of(arguments)
    plot(entries, folder / "sampling.png")


if __name__ == "__main__":
    main()
