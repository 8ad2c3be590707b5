r"""Quality of an object: against the toybox's ground truth, or by CLIP.

With ground truth: peak signal-to-noise ratio, structural similarity and the
intersection over union of silhouettes, over 16 fixed views independent of the training,

$$\mathrm{PSNR} = -10 \log_{10} \operatorname{mean} (x - x^*)^2, \qquad
  \mathrm{IoU} = |A \cap B| / |A \cup B|,$$

over all pixels, and over those of either silhouette alone (a grey image has a PSNR of
17.5 dB over all pixels, because most of them are background).

Without ground truth: CLIP score and R-precision (`systems.quality.clip`), if a CLIP
model is available.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

import dreampropeller as dp
from systems.quality.clip import ClipError, clip_score, read_prompts
from systems.scene.cameras import Cameras, Views
from systems.toybox.captions import FIRST_COLOURS, FIRST_OBJECTS
from systems.toybox.classifier import FILE, SECOND_FILE, Classification
from systems.toybox.classifier import load as load_classifier
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.truth import Truth, truth

if TYPE_CHECKING:
    from systems.base import System

NUM_VIEWS = 16
GREY = 0.5
"""Midway between black and white, distinct from every body colour."""
SIZE = 32
"""Side of the images compared, by default; rendered at twice this size and averaged."""


@dataclass(frozen=True)
class Quality:
    """Figures of an object, and the images they were computed from.

    Attributes:
        psnr: PSNR over all pixels of all views, dB.
        union_psnr: The same over the pixels of either silhouette.
        ssim: Mean structural similarity, from −1 to 1.
        iou: IoU of the silhouettes of all views together, from 0 to 1.
        right_colour: Fraction of views in which the classifier sees the right colour.
        right_object: Fraction of views in which it sees the right object.
        images: Images over grey, shape ``(views, 3, size, size)``.
        wanted: Ground-truth images, likewise.
    """

    psnr: float
    union_psnr: float
    ssim: float
    iou: float
    right_colour: float
    right_object: float
    images: Float[Tensor, "views 3 size size"]
    wanted: Float[Tensor, "views 3 size size"]

    def figures(self) -> dict[str, float]:
        """The figures, rounded."""
        names = ("psnr", "union_psnr", "ssim", "iou", "right_colour", "right_object")
        return {name: round(getattr(self, name), 4) for name in names}


def fixed_views(size: int = 2 * SIZE) -> Views:
    """Sixteen views all around at 20°, every other one shifted up or down."""
    number = torch.arange(NUM_VIEWS)
    elevation = torch.tensor([20.0, 45.0, 20.0, 0.0])[number % 4]
    one = torch.ones(NUM_VIEWS)
    cameras = Cameras(number / NUM_VIEWS * 360, elevation, 2.4 * one, 50.0 * one)
    return Views(cameras, cameras.axes()[0], size, size)


def truth_of(system: System) -> Truth | None:
    """The ground truth of a system's prompt, if it names a toybox object."""
    prompt = system.truth_prompt
    if prompt is None:
        return None
    if system.config.quality.truth is not None:
        return truth(prompt)  # a mistake in what was named is said
    try:
        return truth(prompt)
    except ValueError:
        return None


def psnr_so_far(system: System, y: dp.State) -> float | None:
    """PSNR over four of the fixed views, for a run in progress; None: no truth."""
    wanted = truth_of(system)
    if wanted is None:
        return None
    views, error = fixed_views(SIZE), 0.0
    for number in range(0, NUM_VIEWS, NUM_VIEWS // 4):
        one = views.one(number)
        goal = wanted.render(one.cameras, SIZE).over(torch.full((3,), GREY))
        seen, _ = system.render(y, one, grey=GREY)
        error += float((seen - goal).square().mean()) / 4
    return -10 * math.log10(max(error, 1e-12))


def against_truth(system: System, y: dp.State, wanted: Truth) -> Quality:
    """Measure a state.

    Args:
        system: System that renders the state.
        y: The state.
        wanted: The ground truth.
    """
    size = system.config.quality.size
    views = fixed_views(2 * size)
    seen = [system.render(y, views.one(i), grey=GREY) for i in range(NUM_VIEWS)]
    images, opacity = (
        torch.nn.functional.avg_pool2d(torch.cat(part), 2)
        for part in zip(*seen, strict=True)
    )
    exact = wanted.render(views.cameras, size)
    goal = exact.over(torch.full((3,), GREY))
    return measure(images, opacity, goal, exact.mask, wanted)


def measure(
    images: Float[Tensor, "views 3 size size"],
    opacity: Float[Tensor, "views 1 size size"],
    goal: Float[Tensor, "views 3 size size"],
    mask: Float[Tensor, "views 1 size size"],
    wanted: Truth,
) -> Quality:
    """Compare images with the ground truth, both over the same grey."""
    from skimage.metrics import structural_similarity

    error = (images - goal).square()
    similar: list[Any] = [
        structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=1.0)
        for a, b in zip(images, goal, strict=True)
    ]
    inside, should = opacity > 0.5, mask > 0.5
    union = inside | should
    classified = _classified(images, wanted)

    def share(found: Tensor, right: int) -> float:
        return float((found == right).float().mean())

    return Quality(
        psnr=_decibels(error),
        union_psnr=_decibels(error[union.expand_as(error)]),
        ssim=float(sum(similar) / len(similar)),
        iou=int((inside & should).sum()) / max(int(union.sum()), 1),
        right_colour=share(classified.colours, list(COLOURS).index(wanted.colour)),
        right_object=share(classified.objects, list(OBJECTS).index(wanted.name)),
        images=images,
        wanted=goal,
    )


def _classified(images: Tensor, wanted: Truth) -> Classification:
    """What the first classifier sees in small images, or the second in others."""
    first = wanted.name in FIRST_OBJECTS and wanted.colour in FIRST_COLOURS
    if images.shape[-1] == SIZE and first and wanted.finish == "plain":
        return load_classifier(FILE).classify(images)
    sides = (2 * SIZE, 2 * SIZE)
    large = torch.nn.functional.interpolate(images, sides, mode="bilinear")
    return load_classifier(SECOND_FILE).classify(large)


def _decibels(squares: Tensor) -> float:
    """PSNR of squared errors; 0 dB where there are none."""
    mean = float(squares.mean()) if squares.numel() else 1.0
    return -10 * math.log10(max(mean, 1e-12))


def by_clip(system: System, y: dp.State) -> dict[str, float] | str:
    """CLIP figures of a state as in evaluation, or the reason for their absence."""
    wanted = system.config.quality
    if system.truth_prompt is None:
        return (
            "not measured: an image names no ground truth, and `quality.truth` no "
            'toybox object (such as `quality.truth="a red mug"`)'
        )
    if wanted.clip is None:
        return (
            "not measured: the toybox has no ground truth for this prompt, and "
            "`quality.clip` names no CLIP model (such as "
            "`openai/clip-vit-base-patch32`)"
        )
    try:
        others = read_prompts(wanted.prompts)
        images = torch.stack(list(system.turntable(y, NUM_VIEWS)))
        figures = clip_score(wanted.clip, images, system.title, others, system.device)
    except ClipError as error:
        return f"not measured: {error}"
    return asdict(figures)
