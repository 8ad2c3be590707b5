r"""Train the second prior: `python -m systems.toybox train`.

The U-Net and the text encoder learn together to predict the velocity

$$v = \alpha_t\,\epsilon - \sigma_t\,x, \qquad x_t = \alpha_t\,x + \sigma_t\,\epsilon$$

(T. Salimans and J. Ho, 2022, arXiv 2202.00512, section 4). The square error of a
timestep weighs $\min(r, 5) / (r + 1)$ with the signal-to-noise ratio $r = \alpha_t^2 /
\sigma_t^2$ (T. Hang et al., 2023, arXiv 2303.09556, for v), but at least
$\min(0.3, 10 r)$ and 0.1: camera and reference image decide what is visible where $r$
is small, and without a floor their weights hardly learned (docs/toybox.md). Below $r =
0.03$ the unknown background makes most of the error. The exported weights are the
exponential moving average.

The learning rate is constant, so that a run can continue for any time. Before an export
it falls to zero over the last tenth of a part's time. That tenth is not kept:
`state.pt` holds the state before it, from which the next part resumes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dreampropeller import StepRandom
from systems.toybox import examples
from systems.toybox.conditions import to_blocks
from systems.toybox.local_sgd import LocalSGD
from systems.toybox.model import (
    MAX_WORDS,
    WIDTHS,
    Denoiser,
    make_scheduler,
    make_tokenizer,
    start_from,
)
from systems.toybox.pipeline import ToyboxPipeline
from systems.toybox.views import ViewSet, build_shard, open_shards

RATE = 1.2e-3
WARM_UP = 150
DECAY_SHARE = 0.1
EMA_DECAY = 0.9995
GAMMA = 5.0
LEAST_WEIGHT = 0.1
SMALL_SNR = 0.03
"""Below it the background of an image cannot be told from its noise."""
SMALL_SNR_WEIGHT = 0.3
CHECKPOINT_EVERY = 180.0


@dataclass(frozen=True)
class Budget:
    """The length of a part of a run.

    Attributes:
        minutes: Largest duration in minutes.
        until: Clock time ``HH:MM`` at which the part ends at the latest.
        steps: Largest number of steps in this part.
    """

    minutes: float = math.inf
    until: str | None = None
    steps: int | None = None

    def share(self, seconds: float, deadline: float, steps: int) -> float:
        """Elapsed fraction of the part, from 0 to 1.

        Args:
            seconds: Seconds since its start.
            deadline: Seconds from its start to `until`.
            steps: Number of steps taken in this part.
        """
        shares = [seconds / max(1e-9, min(self.minutes * 60, deadline))]
        if self.steps is not None:
            shares.append(steps / self.steps)
        return max(shares)


class Run:
    """A training run: its saved state, and its step.

    Args:
        source: Pipeline folder of the initial weights; None: random weights.
        seed: Seed of initial weights and batches.
        device: Device of the training.
        widths: Numbers of channels of the U-Net's levels.
    """

    def __init__(
        self,
        source: Path | None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        widths: tuple[int, int, int] = WIDTHS,
    ) -> None:
        self.random = StepRandom(seed)
        self.device = torch.device(device)
        self.widths = widths
        with self.random.scope(0, "initial weights"):
            model = Denoiser(widths)
        if source is not None:
            start_from(model, source, self.random.generator(0, "phases"))
        if self.device.type == "cpu":
            # On CPUs the backward pass of the fused attention takes ten times as long.
            model.unet.set_default_attn_processor()
            model.text_encoder.set_attn_implementation("eager")
        model = model.to(self.device)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.scheduler = make_scheduler()
        self.tokenizer = make_tokenizer()
        self.step = 0
        self.images = 0

    def advance(
        self, views: ViewSet, batch: int, rate: float, stream: str = "batch"
    ) -> Tensor:
        """Take an optimizer step at a learning rate; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.model, views, batch, self.step, stream)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        # Early averages would keep the initial weights for too long.
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        with torch.no_grad():
            for mean, value in pairs:
                mean.lerp_(value, 1 - decay)
        self.step += 1
        self.images += batch
        return loss.detach()

    def loss(
        self, model: nn.Module, views: ViewSet, batch: int, step: int, stream: str
    ) -> Tensor:
        """Weighted square error of the velocity over a random batch."""
        generator = self.random.generator(step, stream)
        made = examples.draw(views, batch, generator)
        ids = self.tokenizer(
            made.captions,
            padding="max_length",
            max_length=MAX_WORDS,
            return_tensors="pt",
        ).input_ids.to(self.device)
        x = to_blocks(made.images)
        count: int = self.scheduler.config["num_train_timesteps"]
        times = torch.randint(count, (batch,), generator=generator)
        noise = torch.randn(x.shape, generator=generator).to(x)
        t = cast(torch.IntTensor, times.to(x.device))  # what diffusers says of integers
        noisy = self.scheduler.add_noise(x, noise, t)
        target = self.scheduler.get_velocity(x, noise, t)
        shown = torch.cat([noisy, to_blocks(made.references), made.rays], 1)
        # bfloat16 and channels last: faster on CPUs and GPUs that have both.
        shown = shown.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity = model(shown, t, ids, made.labels)
        error = (velocity.float() - target).square().mean((1, 2, 3))
        kept = self.scheduler.alphas_cumprod.to(x)[t]
        snr = kept / (1 - kept)
        least = SMALL_SNR_WEIGHT * (snr / SMALL_SNR).clamp(max=1)
        weight = torch.maximum(snr.clamp(max=GAMMA) / (snr + 1), least).clamp(
            min=LEAST_WEIGHT
        )
        return (weight * error).mean()

    def save(self, path: Path) -> None:
        """Write the state to resume from; the old file stays until it is complete."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "images": self.images,
            "widths": list(self.widths),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, path: Path) -> None:
        """Resume from a file that `save` wrote.

        Raises:
            ValueError: The file belongs to a U-Net of other widths.
        """
        state = torch.load(path, weights_only=True, map_location=self.device)
        found = tuple(state.get("widths", WIDTHS))
        if found != self.widths:
            raise ValueError(
                f"`{path}` holds a U-Net of widths {found}, and {self.widths} are "
                f"wanted: write `--widths {' '.join(map(str, found))}` to go on with "
                "it, or another `--folder`."
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.images = state["step"], state["images"]

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a pipeline folder, in half precision."""
        model = copy.deepcopy(self.average).cpu().half()
        ToyboxPipeline(
            unet=model.unet,
            text_encoder=model.text_encoder,
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
        ).save_pretrained(folder, safe_serialization=True)
        report = {"steps": self.step, "images": self.images}
        (folder / "training.json").write_text(json.dumps(report) + "\n")


def learning_rate(step: int, share: float) -> float:
    """Warm-up by steps, then constant, then a linear decay at the end of a part.

    Args:
        step: Number of steps taken before.
        share: Elapsed fraction of the part, from 0 to 1.
    """
    falling = min(1.0, max(0.0, (1 - share) / DECAY_SHARE))
    return RATE * min(1.0, (step + 1) / WARM_UP) * falling


def train(
    run: Run,
    folder: Path,
    budget: Budget,
    views: ViewSet | None = None,
    batch: int = 32,
) -> Path:
    """Train a part of a run, and export the result.

    Args:
        run: New run; it resumes from `folder`'s state if there is one.
        folder: Folder of state, log, process number and exported weights.
        budget: Length of the part.
        views: Training views; default: those in the folder, of which more may appear
            during the training.
        batch: Number of examples per step.

    Returns:
        The folder of the exported pipeline.

    Raises:
        KeyboardInterrupt: The process was asked to stop (SIGINT, SIGTERM); the state
            after the last whole step is saved then. In the last tenth of a part, the
            state from before the learning rate fell stays, and the weights are
            exported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.pt"
    if state.exists():
        run.restore(state)
    workers = LocalSGD()
    if workers.leads:
        (folder / "train.pid").write_text(str(os.getpid()))
    seen = open_shards(folder / "views") if views is None else views
    stream = f"batch {workers.rank}" if workers.rank else "batch"
    kept = False
    losses = folder / "loss.jsonl" if workers.leads else Path(os.devnull)
    with open(losses, "a", encoding="utf-8") as log, _asked_to_stop() as stopped:
        saved, smooth = time.monotonic(), None
        workers.begin(run)
        for share in _shares(run, budget):
            if stopped:
                break
            if share >= 1 or workers.due():
                if workers.average(run, share >= 1, batch):
                    break
                ends = share >= 1 - DECAY_SHARE
                if not kept and (ends or time.monotonic() - saved > CHECKPOINT_EVERY):
                    if workers.leads:
                        run.save(state)
                    saved, kept = time.monotonic(), ends
                    seen = open_shards(folder / "views") if views is None else views
            loss = run.advance(seen, batch, learning_rate(run.step, share), stream)
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            if run.step % 20 == 0:
                entry = {"step": run.step, "images": run.images, "share": share}
                entry |= {"loss": round(float(smooth), 5), "time": time.time()}
                log.write(json.dumps(entry) + "\n")
                log.flush()
    if workers.leads:
        if not kept:
            run.save(state)
        if kept or not stopped:
            run.export(folder / "pipeline")
    if stopped:
        raise KeyboardInterrupt
    return folder / "pipeline"


def train_on(
    run: Run, folder: Path, budget: Budget, batch: int, shards: int | None
) -> Path:
    """Train on the folder's views, or on views rendered first on the run's device.

    Args:
        run: New run.
        folder: See `train`.
        budget: Length of the part, rendering included.
        batch: Number of examples per step.
        shards: Number of shards to render; None reads those in the folder.
    """
    if shards is None:
        return train(run, folder, budget, batch=batch)
    start = time.monotonic()
    made = [build_shard(i, device=run.device) for i in range(shards)]
    views = ViewSet(tuple(m[0] for m in made), torch.cat([m[1] for m in made]))
    left = budget.minutes - (time.monotonic() - start) / 60
    if left <= 0:
        raise ValueError(
            f"Rendering took all of the {budget.minutes:g} minutes: write more "
            "`--minutes`, or fewer `--shards`."
        )
    return train(run, folder, replace(budget, minutes=left), views, batch)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """The signals to stop that arrive meanwhile, instead of what they would do."""
    arrived: list[int] = []
    names = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    before = [signal.signal(n, lambda n, frame: arrived.append(n)) for n in names]
    try:
        yield arrived
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


def _shares(run: Run, budget: Budget) -> Iterator[float]:
    """Elapsed fraction of a part before each step, without end, and a progress bar."""
    start, first = time.monotonic(), run.step
    deadline = seconds_until(budget.until)
    with tqdm(total=1000, unit="‰", desc="training", mininterval=5) as bar:
        while True:
            seconds = time.monotonic() - start
            share = min(1.0, budget.share(seconds, deadline, run.step - first))
            bar.update(int(1000 * share) - bar.n)
            bar.set_postfix(images=run.images, refresh=False)
            yield share


def seconds_until(clock: str | None, now: datetime | None = None) -> float:
    """Seconds to the next clock time ``HH:MM``; infinite for None.

    Raises:
        ValueError: The text is not a clock time.
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
