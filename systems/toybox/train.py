r"""Train the embedded prior: `python -m systems.toybox.train --minutes 120`.

The U-Net and the text encoder learn together to predict the velocity

$$v = \alpha_t\,\epsilon - \sigma_t\,x, \qquad x_t = \alpha_t\,x + \sigma_t\,\epsilon$$

(T. Salimans and J. Ho, 2022, arXiv 2202.00512, section 4) by its mean square error, on
a cosine schedule. What is shipped is the exponential moving average of the weights.

Resumable: `outputs/toybox/state.pt` keeps the newest state, and is continued when it
exists. When only exported weights survive, `--from FOLDER` starts from them with an
optimizer warm-up. The learning rate follows the share of the budget that is spent, so a
run ends annealed however fast the machine was; `--until HH:MM` bounds it by the clock.

Give it the machine to itself: its threads wait for each other, so that on shared cores
a step takes ten times as long. Stop it (``kill -STOP``) while something else is timed;
a step is charged ten seconds at most.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from dreampropeller import StepRandom
from systems.toybox import dataset as data
from systems.toybox.model import (
    MAX_WORDS,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)

PEAK_RATE = 8e-4
WARM_UP = 150
EMA_DECAY = 0.9992
CHECKPOINT_EVERY = 180.0
LONGEST_STEP = 10.0
"""Seconds; what a step takes beyond them, the process was stopped."""


@dataclass(frozen=True)
class Budget:
    """How long to train.

    Attributes:
        minutes: Of computing time, earlier parts of the same run included.
        until: Clock time ``HH:MM`` at which the run ends, whatever was spent by then.
        steps: Steps in all at most, earlier parts included.
    """

    minutes: float
    until: str | None = None
    steps: int | None = None


class Denoiser(nn.Module):
    """The trained parts together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = make_unet()
        self.text_encoder = make_text_encoder()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """The velocity, shape ``(batch, 3, size, size)``."""
        words = self.text_encoder(ids).last_hidden_state
        return self.unet(x, t, words).sample


class Run:
    """A training run: all that is saved, and a step.

    Args:
        source: Exported weights to start from.
        seed: Of initial weights and batches.
    """

    def __init__(self, source: Path | None, seed: int) -> None:
        self.random = StepRandom(seed)
        with self.random.scope(0, "initial weights"):
            model = Denoiser()
        if source is not None:
            _load_weights(model, source)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.scheduler = make_scheduler()
        self.tokenizer = make_tokenizer()
        self.step = 0
        self.spent = 0.0

    def advance(self, renders: data.Dataset, batch: int, rate: float) -> float:
        """Take an optimizer step at a learning rate; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = self.random.generator(self.step, "batch")
        loss = _loss(
            self.model, self.scheduler, self.tokenizer, renders, batch, generator
        )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        # Early averages would remember the initial weights for too long.
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        with torch.no_grad():
            for mean, value in pairs:
                mean.lerp_(value, 1 - decay)
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write everything needed to go on; the old file stays until it is whole."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.spent,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent = state["step"], state["spent"]


def learning_rate(step: int, progress: float) -> float:
    """Warm-up by steps, constant, then a cosine from 40 % of the budget to its end.

    Args:
        step: Steps taken before.
        progress: Share of the budget spent, from 0 to 1.
    """
    falling = min(1.0, max(0.0, progress - 0.4) / 0.6)
    anneal = 0.5 * (1 + math.cos(math.pi * falling))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * max(anneal, 0.01)


def prepare(folder: Path, samples: int, normals: int) -> data.Dataset:
    """The training set, rendered once and kept."""
    path = folder / f"renders-{samples}-{normals}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        data.build(samples, normals).save(part)
        os.replace(part, path)
    return data.Dataset.load(path)


def train(
    folder: Path,
    budget: Budget,
    renders: data.Dataset,
    batch: int = 32,
    source: Path | None = None,
    seed: int = 0,
) -> Path:
    """Train until the budget is spent.

    Args:
        folder: Where state, log and process number go.
        budget: How long.
        renders: The training set.
        batch: Pictures in a step.
        source: Exported weights to start from, when there is no state to resume.
        seed: Of initial weights and batches.

    Returns:
        The file of the last state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "state.pt"
    run = Run(source, seed)
    if state_file.exists():
        run.restore(state_file)
    (folder / "train.pid").write_text(str(os.getpid()))
    deadline = time.monotonic() + seconds_until(budget.until)
    last_step = math.inf if budget.steps is None else budget.steps
    saved = time.monotonic()
    smooth = float("nan")
    with (
        open(folder / "loss.jsonl", "a", encoding="utf-8") as log,
        tqdm(total=round(budget.minutes, 1), initial=run.spent / 60, unit="min") as bar,
    ):
        while run.step < last_step:
            start = time.monotonic()
            # A run that was stopped for a while still ends annealed, at the deadline.
            seconds = min(budget.minutes * 60, run.spent + deadline - start)
            if run.spent >= seconds:
                break
            rate = learning_rate(run.step, run.spent / seconds)
            loss = run.advance(renders, batch, rate)
            elapsed = min(time.monotonic() - start, LONGEST_STEP)
            run.spent += elapsed
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            bar.update(elapsed / 60)
            bar.set_postfix(step=run.step, loss=f"{smooth:.4f}", s=f"{elapsed:.2f}")
            if run.step % 20 == 0:
                minutes = round(run.spent / 60, 3)
                entry = {"step": run.step, "minutes": minutes, "loss": round(smooth, 5)}
                log.write(json.dumps(entry) + "\n")
                log.flush()
            if time.monotonic() - saved > CHECKPOINT_EVERY:
                run.save(state_file)
                saved = time.monotonic()
    run.save(state_file)
    return state_file


def seconds_until(clock: str | None, now: datetime | None = None) -> float:
    """Seconds to the next time the clock shows ``HH:MM``; infinite for None.

    Raises:
        ValueError: The text is no clock time.
    """
    if clock is None:
        return math.inf
    try:
        end = datetime.strptime(clock, "%H:%M").time()
    except ValueError as error:
        raise ValueError(f"`{clock}` is no clock time: write `HH:MM`.") from error
    now = now or datetime.now()
    wait = datetime.combine(now.date(), end) - now
    return (wait % timedelta(days=1)).total_seconds()


def _loss(
    model: nn.Module,
    scheduler: DDIMScheduler,
    tokenizer: PreTrainedTokenizerFast,
    renders: data.Dataset,
    batch: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean square error of the velocity over a random batch."""
    x, captions = data.batch(renders, batch, generator)
    ids = tokenizer(
        captions, padding="max_length", max_length=MAX_WORDS, return_tensors="pt"
    ).input_ids
    t = torch.randint(
        scheduler.config["num_train_timesteps"], (batch,), generator=generator
    )
    noise = torch.randn(x.shape, generator=generator)
    t = cast(torch.IntTensor, t)  # what diffusers says of any integer tensor
    noisy = scheduler.add_noise(x, noise, t)
    target = scheduler.get_velocity(x, noise, t)
    # bfloat16 and channels last: a third faster on a CPU that has both.
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(noisy, t, ids)
    return (velocity.float() - target).square().mean()


def _load_weights(model: Denoiser, source: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    words = CLIPTextModel.from_pretrained(source, subfolder="text_encoder")
    model.unet.load_state_dict(unet.state_dict())
    model.text_encoder.load_state_dict(words.state_dict())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded prior.")
    parser.add_argument("--folder", type=Path, default=Path("outputs/toybox"))
    parser.add_argument("--minutes", type=float, default=120.0, help="of computing")
    parser.add_argument("--until", help="HH:MM by which the run ends annealed")
    parser.add_argument("--samples", type=int, default=240, help="renders of a pair")
    parser.add_argument("--normals", type=int, default=400, help="maps of an object")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from", dest="source", type=Path, help="exported weights to start from"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(
        arguments.folder,
        Budget(arguments.minutes, arguments.until),
        prepare(arguments.folder, arguments.samples, arguments.normals),
        source=arguments.source,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
