"""Classifiers of the object, its colours and the azimuth in an image.

The first one, for the first prior, distinguishes 16 objects and 8 colours at 32×32. The
second one distinguishes all objects, colours and finishes at 64×64, and estimates the
azimuth of an object with a front. It is trained on the prior's views, in every pair of
colour and object. `python -m systems.toybox classifier` trains it and reports its
accuracy on renders that it has not seen.
"""

from __future__ import annotations

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
from systems.toybox import SECOND_WEIGHTS, WEIGHTS
from systems.toybox.captions import FIRST_COLOURS, FIRST_OBJECTS
from systems.toybox.conditions import CHANNELS, to_blocks
from systems.toybox.examples import Looks, over, random_backgrounds, random_looks
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS, WITH_FRONT
from systems.toybox.views import ViewSet

FILE = WEIGHTS / "classifier" / "model.safetensors"
SECOND_FILE = SECOND_WEIGHTS / "classifier" / "model.safetensors"
BATCH = 64
RATE = 1.5e-3
_FRONT = torch.tensor([name in WITH_FRONT for name in OBJECTS])


@dataclass(frozen=True)
class Classification:
    """Predictions of the classifier.

    Attributes:
        objects: Index of the object, shape ``(images,)``.
        colours: Index of the body's colour, shape ``(images,)``.
        finishes: Index of the finish, shape ``(images,)``; None from the first one.
        azimuths: Azimuth in degrees, −180 to 180, shape ``(images,)``; None from the
            first one.
    """

    objects: Tensor
    colours: Tensor
    finishes: Tensor | None = None
    azimuths: Tensor | None = None


class Classifier(nn.Module):
    """Convolutions of stride 2 down to 4×4, and linear heads.

    The second one reads images in blocks of 2×2 pixels, at a quarter of the cost.

    Args:
        second: Use size and heads of the second classifier.
    """

    def __init__(self, second: bool = True) -> None:
        super().__init__()
        widths = (CHANNELS, 32, 64, 128, 160) if second else (3, 24, 48, 96, 96)
        layers: list[nn.Module] = []
        for i, (old, new) in enumerate(itertools.pairwise(widths)):
            layers += [
                nn.Conv2d(old, new, 3, stride=1 if i == 0 else 2, padding=1),
                nn.GroupNorm(8, new),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * 4 * 4
        self.objects = nn.Linear(features, len(OBJECTS if second else FIRST_OBJECTS))
        self.colours = nn.Linear(features, len(COLOURS if second else FIRST_COLOURS))
        self.finishes = nn.Linear(features, len(FINISHES)) if second else None
        hidden = [nn.Linear(features, 128), nn.SiLU(), nn.Linear(128, 2)]
        self.azimuth = nn.Sequential(*hidden) if second else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of object and colour, of images from −1 to 1, ``(n, 3, size, size)``.

        The second one also returns logits of the finish, and a vector whose direction
        is the azimuth.
        """
        seen = images if self.finishes is None else to_blocks(images)
        features = self.body(seen.contiguous(memory_format=torch.channels_last))
        heads = (self.objects, self.colours, self.finishes, self.azimuth)
        return tuple(head(features) for head in heads if head is not None)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Classification:
        """The most likely object, colour and finish, and the azimuth.

        Args:
            images: Images from 0 to 1, shape ``(images, 3, size, size)``.
        """
        parts = [self(part * 2 - 1) for part in images.split(256)]
        objects, colours, *rest = (torch.cat(p) for p in zip(*parts, strict=True))
        if not rest:
            return Classification(objects.argmax(-1), colours.argmax(-1))
        finishes, (x, y) = rest[0].argmax(-1), rest[1].unbind(-1)
        azimuths = torch.atan2(y, x).rad2deg()
        return Classification(
            objects.argmax(-1), colours.argmax(-1), finishes, azimuths
        )


def load(file: Path = FILE) -> Classifier:
    """Load a classifier, of either kind.

    Args:
        file: `FILE`, `SECOND_FILE`, or the file of another trained classifier.
    """
    weights = {name: value.float() for name, value in load_file(file).items()}
    model = Classifier(second="finishes.weight" in weights)
    model.load_state_dict(weights)
    return model.eval()


@dataclass(frozen=True)
class Labelled:
    """Rendered images with their labels.

    Attributes:
        images: Images from −1 to 1, shape ``(n, 3, size, size)``.
        objects: Index of the object, shape ``(n,)``.
        looks: Colours and finishes.
        azimuths: Azimuth in degrees, shape ``(n,)``.
    """

    images: Tensor
    objects: Tensor
    looks: Looks
    azimuths: Tensor


def labelled(views: ViewSet, index: Tensor, generator: torch.Generator) -> Labelled:
    """Views in random colours, held-out pairs included, over random backgrounds."""
    objects = views.objects(index)
    looks = random_looks(objects, generator, held_out=True)
    layers = views.layers(index)
    background = random_backgrounds(len(index), generator)
    images = over(looks.paint(layers), layers, background)
    return Labelled(images, objects, looks, views.cameras[index, 0])


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Distance of two angles, in degrees, 0 to 180."""
    return ((a - b + 180) % 360 - 180).abs()


def accuracy(model: Classifier, views: ViewSet, seed: int) -> dict[str, float]:
    """Accuracy on all views, and the median error of the azimuth.

    The azimuth counts only for objects with a front.
    """
    generator = StepRandom(seed).generator(0, "looks")
    made = labelled(views, torch.arange(len(views)), generator)
    seen = model.classify(made.images / 2 + 0.5)
    assert seen.finishes is not None
    assert seen.azimuths is not None
    error = angle_between(seen.azimuths, made.azimuths)[_FRONT[made.objects]]

    def share(right: Tensor) -> float:
        return round(float(right.double().mean()), 4)

    return {
        "object": share(seen.objects == made.objects),
        "colour": share(seen.colours == made.looks.colour),
        "finish": share(seen.finishes == made.looks.finish),
        "azimuth, median error in degrees": round(float(error.median()), 2),
        "azimuth within 30 degrees": share(error < 30),
    }


def loss_of(model: Classifier, made: Labelled) -> Tensor:
    """Cross-entropies of the heads, and one minus the cosine of the azimuth's error."""
    objects, colours, finishes, direction = model(made.images)
    entropy = nn.functional.cross_entropy
    loss = entropy(objects, made.objects) + entropy(colours, made.looks.colour)
    loss = loss + entropy(finishes, made.looks.finish)
    angle = made.azimuths.deg2rad()
    wanted = torch.stack([angle.cos(), angle.sin()], -1)
    miss = 1 - nn.functional.cosine_similarity(direction.float(), wanted)
    return loss + 2 * (miss * _FRONT[made.objects]).mean()


def train(
    views: ViewSet, steps: int, seed: int = 1, model: Classifier | None = None
) -> Classifier:
    """Fit the second classifier.

    Args:
        views: Views of every object.
        steps: Number of optimizer steps, each on `BATCH` views in new colours.
        seed: Seed of initial weights, batches and noise; use another one to continue.
        model: Classifier to continue with; default: a new one.
    """
    random = StepRandom(seed)
    if model is None:
        with random.scope(0, "initial weights"):
            model = Classifier()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-2)
    for step in (bar := tqdm(range(steps), desc="classifier", mininterval=5)):
        generator = random.generator(step, "batch")
        index = torch.randint(len(views), (BATCH,), generator=generator)
        made = labelled(views, index, generator)
        # Samples of the prior are not as clean as renders.
        noise = torch.randn(made.images.shape, generator=generator)
        made.images.add_(0.05 * torch.rand(1, generator=generator) * noise)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, made)
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
    return model.eval()


def save(model: Classifier, file: Path, report: dict[str, object]) -> None:
    """Write weights in half precision, and a report beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() for k, v in model.state_dict().items()}, file)
    text = json.dumps(report, indent=2) + "\n"
    file.with_name("report.json").write_text(text)
