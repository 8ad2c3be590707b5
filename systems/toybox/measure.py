"""Measurements of the second prior: combinations, cameras and images.

Three parts. *Combinations*: object, colour and finish the classifier sees in samples of
trained and of held-out pairs, with the camera given. *Cameras*: the azimuth the
classifier sees on objects with a front, and the intersection over union of the sample's
mask with the ground truth's at the requested camera. *Images*: held-out pairs from a
camera other than the reference image's, against the ground truth, compared with the
reference itself.

A sample's mask is where it differs from its plain background, the median of its border;
pixels at the edge that differ less than half as much as their neighbours count as bare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreampropeller import StepRandom
from systems.scene.cameras import Cameras
from systems.toybox.captions import HELD_OUT, Caption, view_of
from systems.toybox.classifier import Classifier, angle_between
from systems.toybox.examples import random_looks
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS, WITH_FRONT
from systems.toybox.pipeline import ToyboxPipeline, draw
from systems.toybox.truth import Truth
from systems.toybox.views import random_cameras

BACKGROUND = 0.75
CONTRAST = 0.06
"""Difference to the background from which a pixel counts as covered."""
CHUNK = 32
_NAMES, _COLOURS, _FINISHES = list(OBJECTS), list(COLOURS), list(FINISHES)


@dataclass(frozen=True)
class Question:
    """The request for a sample.

    Attributes:
        asked: Caption, with the view's word.
        camera: A single camera.
        trained: Whether the pair of colour and object was in the training set.
    """

    asked: Caption
    camera: Cameras
    trained: bool

    @property
    def truth(self) -> Truth:
        """The ground truth."""
        assert self.asked.name is not None
        assert self.asked.colour is not None
        return Truth(
            self.asked.colour,
            self.asked.name,
            self.asked.finish,
            self.asked.second or "",
        )


def ground_truth(asked: Question, size: int) -> Tensor:
    """The ground-truth image over grey, shape ``(1, 3, size, size)``."""
    background = torch.full((3,), BACKGROUND)
    return asked.truth.render(asked.camera, size).over(background)


def questions(
    count: int, held_out: bool, seed: int = 0, names: Sequence[str] = tuple(OBJECTS)
) -> list[Question]:
    """A fixed list: objects in turn, with random colours, finishes and cameras.

    Args:
        count: Number of questions.
        held_out: Use only held-out pairs, or only trained ones.
        seed: Seed of the choice.
        names: Keys of `OBJECTS`; with `held_out` those that have held-out pairs.
    """
    generator = StepRandom(seed).generator(0, f"questions {held_out}")
    pairs = [p for p in HELD_OUT if p[1] in names]
    chosen = [_NAMES.index(names[i % len(names)]) for i in range(count)]
    if held_out:
        chosen = [_NAMES.index(pairs[i % len(pairs)][1]) for i in range(count)]
    looks = random_looks(torch.tensor(chosen), generator)
    cameras = random_cameras(count, generator)
    result: list[Question] = []
    for i, number in enumerate(chosen):
        camera = Cameras(*(v[i : i + 1] for v in _numbers(cameras)))
        colour, second = (_COLOURS[int(x[i])] for x in (looks.colour, looks.second))
        finish = _FINISHES[int(looks.finish[i])]
        if held_out:
            colour = pairs[i % len(pairs)][0]
            if colour == second:
                second = _COLOURS[(_COLOURS.index(colour) + 1) % len(_COLOURS)]
        view = view_of(float(camera.azimuth), float(camera.elevation))
        asked = Caption(
            _NAMES[number], colour, finish, None if finish == "plain" else second, view
        )
        result.append(Question(asked, camera, not held_out))
    return result


def answers(
    prior: ToyboxPipeline,
    asked: Sequence[Question],
    seed: int,
    guidance_scale: float = 3.0,
    camera: bool = True,
) -> Tensor:
    """Samples of text and camera in 25 steps, from 0 to 1.

    Args:
        prior: The second prior.
        asked: Questions to sample.
        seed: Seed of the noise.
        guidance_scale: Guidance scale of the text.
        camera: Condition on the cameras; otherwise only the view's word names the side.
    """
    made: list[Tensor] = []
    for start in range(0, len(asked), CHUNK):
        part = asked[start : start + CHUNK]
        texts = [q.asked.text for q in part]
        given = {"camera": join([q.camera for q in part])} if camera else {}
        settings = {"guidance_scale": guidance_scale, **given}
        made.append(draw(prior, texts, seed + start, **settings))
    return torch.cat(made)


_AZIMUTH = "azimuth, median error in degrees"
_WITHIN = "azimuth within 30 degrees"
_OVERLAP = "mask IoU, mean"


def combinations(
    asked: Sequence[Question], images: Tensor, classifier: Classifier
) -> dict[str, float]:
    """Accuracy of objects, colours and finishes."""
    seen = classifier.classify(images)
    assert seen.finishes is not None
    right = {
        "object": [_NAMES[i] for i in seen.objects],
        "colour": [_COLOURS[i] for i in seen.colours],
        "finish": [_FINISHES[i] for i in seen.finishes],
    }
    wanted = {
        "object": [q.asked.name for q in asked],
        "colour": [q.asked.colour for q in asked],
        "finish": [q.asked.finish for q in asked],
    }
    return {
        "samples": len(asked),
        **{
            kind: round(
                sum(a == b for a, b in zip(right[kind], wanted[kind], strict=True))
                / len(asked),
                4,
            )
            for kind in right
        },
    }


def cameras(
    asked: Sequence[Question], images: Tensor, classifier: Classifier
) -> dict[str, float | None]:
    """Azimuth of objects with a front, and overlap with the ground-truth mask.

    None where no object has a front.
    """
    kept = [i for i, q in enumerate(asked) if q.asked.name in WITH_FRONT]
    if not kept:
        return {"samples": 0, _AZIMUTH: None, _WITHIN: None, _OVERLAP: None}
    chosen = [asked[i] for i in kept]
    seen = classifier.classify(images[kept])
    assert seen.azimuths is not None
    error = angle_between(seen.azimuths, torch.cat([q.camera.azimuth for q in chosen]))
    overlap = torch.tensor(
        [
            mask_iou(mask(image), q.truth.render(q.camera, image.shape[-1]).mask[0, 0])
            for q, image in zip(chosen, images[kept], strict=True)
        ]
    )
    return {
        "samples": len(kept),
        _AZIMUTH: round(float(error.median()), 2),
        _WITHIN: round(float((error < 30).double().mean()), 4),
        _OVERLAP: round(float(overlap.mean()), 4),
    }


@dataclass(frozen=True)
class NewViews:
    """Samples from reference images.

    Attributes:
        references: Reference images from 0 to 1, shape ``(n, 3, size, size)``.
        samples: Samples at the requested cameras, likewise.
        truths: Ground-truth images, likewise.
        masks: Masks of `truths`, shape ``(n, size, size)``.
        reference_masks: Masks of `references`, shape ``(n, size, size)``.
    """

    references: Tensor
    samples: Tensor
    truths: Tensor
    masks: Tensor
    reference_masks: Tensor

    def figures(self) -> dict[str, float]:
        """PSNR over the union of masks and their IoU, of samples and of the copy."""
        sample_masks = torch.stack([mask(image) for image in self.samples])
        result: dict[str, float] = {"pairs": len(self.samples)}
        for name, images, masks in (
            ("samples", self.samples, sample_masks),
            ("copy of the input", self.references, self.reference_masks),
        ):
            psnr = [
                masked_psnr(a, b, m | n)
                for a, b, m, n in zip(
                    images, self.truths, masks, self.masks, strict=True
                )
            ]
            overlap = [mask_iou(m, n) for m, n in zip(masks, self.masks, strict=True)]
            result[f"{name}, PSNR"] = round(sum(psnr) / len(psnr), 2)
            result[f"{name}, mask IoU"] = round(sum(overlap) / len(overlap), 4)
        return result


def new_views(
    prior: ToyboxPipeline, count: int = 64, seed: int = 0, guidance_scale: float = 2.0
) -> NewViews:
    """Samples of held-out pairs with a front, given an image from another camera."""
    names = [n for n in WITH_FRONT if any(n == p[1] for p in HELD_OUT)]
    asked = questions(count, True, seed + 1, names)
    generator = StepRandom(seed).generator(0, "reference cameras")
    before = random_cameras(count, generator)
    grey = torch.full((3,), BACKGROUND)
    size = 2 * prior.unet.config["sample_size"]
    wanted = [q.truth.render(q.camera, size) for q in asked]
    given = [
        q.truth.render(Cameras(*(v[i : i + 1] for v in _numbers(before))), size)
        for i, q in enumerate(asked)
    ]
    references = torch.cat([r.over(grey) for r in given])
    made: list[Tensor] = []
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        settings = {
            "camera": join([q.camera for q in asked[part]]),
            "image": references[part],
            "image_camera": Cameras(*(v[part] for v in _numbers(before))),
            "guidance_scale": guidance_scale,
        }
        texts = [""] * len(references[part])
        made.append(draw(prior, texts, seed + start, **settings))
    return NewViews(
        references,
        torch.cat(made),
        torch.cat([r.over(grey) for r in wanted]),
        torch.cat([r.mask[:, 0] > 0.5 for r in wanted]),
        torch.cat([r.mask[:, 0] > 0.5 for r in given]),
    )


def join(cameras: Sequence[Cameras]) -> Cameras:
    """Concatenate cameras."""
    parts = zip(*(_numbers(c) for c in cameras), strict=True)
    return Cameras(*(torch.cat(part) for part in parts))


def _numbers(cameras: Cameras) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cameras.azimuth, cameras.elevation, cameras.distance, cameras.fov


def mask(image: Tensor) -> Tensor:
    """The mask of the object in an image ``(3, h, w)``."""
    rows = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    background = rows.median(1).values
    contrast = (image - background[:, None, None]).abs().amax(0)
    covered = contrast > CONTRAST

    def around(values: Tensor) -> Tensor:
        return torch.nn.functional.max_pool2d(values[None], 3, 1, 1)[0]

    edge = (around((~covered).float()) > 0) & (contrast < around(contrast) / 2)
    return covered & ~edge


def mask_iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks; a mask is where a value is above 0.5."""
    a, b = a > 0.5, b > 0.5
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def masked_psnr(a: Tensor, b: Tensor, where: Tensor) -> float:
    """PSNR in dB of two images ``(3, h, w)`` where a mask ``(h, w)`` is true."""
    error = (a - b)[:, where].square().mean().clamp(min=1e-10)
    return float(-10 * error.log10())
