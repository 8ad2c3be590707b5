"""A small judge: which object, in which colour, does a 32×32 picture show.

Trained on fresh renders of every pair (other seeds than the prior's), it measures what
the prior draws. `python -m systems.toybox.classifier` trains it, in a quarter of an
hour on one core, and reports its accuracy on renders it has not seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from dreampropeller import StepRandom
from systems.toybox import WEIGHTS
from systems.toybox import dataset as data
from systems.toybox.objects import COLOURS, OBJECTS

FILE = WEIGHTS / "classifier" / "model.safetensors"
BATCH = 128


@dataclass(frozen=True)
class Judgement:
    """What the classifier sees.

    Attributes:
        objects: Number of the object, shape ``(pictures,)``.
        colours: Number of the colour, shape ``(pictures,)``.
    """

    objects: Tensor
    colours: Tensor


class Classifier(nn.Module):
    """Four convolutions and two linear heads."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 96)
        layers: list[nn.Module] = []
        for i, (old, new) in enumerate(itertools.pairwise(widths)):
            layers += [
                nn.Conv2d(old, new, 3, stride=1 if i == 0 else 2, padding=1),
                nn.GroupNorm(8, new),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * 4 * 4
        self.objects = nn.Linear(features, len(OBJECTS))
        self.colours = nn.Linear(features, len(COLOURS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of object and colour, of pictures from −1 to 1, ``(n, 3, 32, 32)``."""
        features = self.body(pictures)
        return self.objects(features), self.colours(features)

    @torch.no_grad()
    def judge(self, pictures: Tensor) -> Judgement:
        """The likeliest object and colour.

        Args:
            pictures: From 0 to 1, shape ``(pictures, 3, 32, 32)``.
        """
        objects, colours = self(pictures * 2 - 1)
        return Judgement(objects.argmax(-1), colours.argmax(-1))


def load(file: Path = FILE) -> Classifier:
    """The classifier that comes with the repository."""
    model = Classifier()
    model.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return model.eval()


def accuracy(model: Classifier, renders: data.Dataset, seed: int) -> dict[str, float]:
    """Shares of right objects and colours among renders over random backgrounds."""
    generator = StepRandom(seed).generator(0, "background")
    seen = model.judge(data.compose(renders.rgba, generator) / 2 + 0.5)
    labels = renders.labels.long()
    return {
        "object": float((seen.objects == labels[:, 0]).double().mean()),
        "colour": float((seen.colours == labels[:, 1]).double().mean()),
    }


def train(renders: data.Dataset, steps: int, seed: int = 1) -> Classifier:
    """Fit the classifier.

    Args:
        renders: Of every pair.
        steps: Optimizer steps, each on `BATCH` renders over new backgrounds.
        seed: Of initial weights, batches and noise.
    """
    random = StepRandom(seed)
    with random.scope(0, "initial weights"):
        model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-2)
    labels = renders.labels.long()
    for step in (bar := tqdm(range(steps), desc="classifier")):
        generator = random.generator(step, "batch")
        index = torch.randint(len(labels), (BATCH,), generator=generator)
        pictures = data.compose(renders.rgba[index], generator)
        # Samples of the prior are not as clean as renders.
        noise = torch.randn(pictures.shape, generator=generator)
        pictures = pictures + 0.05 * torch.rand(1, generator=generator) * noise
        objects, colours = model(pictures)
        loss = nn.functional.cross_entropy(objects, labels[index, 0])
        loss = loss + nn.functional.cross_entropy(colours, labels[index, 1])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return model.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=360, help="renders of each pair")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = train(data.build(arguments.samples, 0, seed=1, skip=()), arguments.steps)
    model = model.half().float()  # judged as it will be loaded
    score = accuracy(model, data.build(16, 0, seed=2, skip=()), seed=2)
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() for k, v in model.state_dict().items()}, arguments.to)
    report = {"steps": arguments.steps, "renders": 16 * 128, "accuracy": score}
    arguments.to.with_name("report.json").write_text(
        json.dumps(report, indent=2) + "\n"
    )
    print(report)


if __name__ == "__main__":
    main()
