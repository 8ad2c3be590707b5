r"""Training examples: painted views over plain backgrounds, captions, conditions.

85 % of a batch is text with the camera, 10 % a reference image with the camera relative
to its own, 5 % text, image and camera (half, 35 % and 15 % up to image 845,440, until
when the reference image had taught no shape). Conditions are dropped for guidance:
the text (10 %), the image (10 % where it is the only condition), the camera (15 %), the
colour (6 %) and the view's word (12 %; 50 % beside a camera, so that the camera must be
read). Held-out pairs are never shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from systems.scene.cameras import Cameras
from systems.toybox.captions import HELD_OUT, Caption, view_of
from systems.toybox.conditions import CAMERA, LABELS, PATCH, labels, ray_maps
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.views import ViewSet, paint

TEXT, IMAGE = 0.85, 0.10
NORMAL_MAPS = 0.12
"""Share of normal maps among the examples of text and camera."""
FINISH_SHARES = (0.4, 0.3, 0.3)
"""Of plain, striped and spotted."""
_NAMES, _COLOURS, _FINISHES = list(OBJECTS), list(COLOURS), list(FINISHES)
_ALLOWED = torch.tensor(
    [[(colour, name) not in HELD_OUT for colour in COLOURS] for name in OBJECTS]
).float()


@dataclass(frozen=True)
class Looks:
    """Colours and finishes of examples.

    Attributes:
        colour: Index of the body's colour, shape ``(n,)``.
        second: Index of the second colour, shape ``(n,)``.
        finish: Index of the finish, shape ``(n,)``.
    """

    colour: Tensor
    second: Tensor
    finish: Tensor

    def paint(self, layers: Tensor) -> Tensor:
        """Colour times coverage of layers; see `systems.toybox.views.paint`."""
        palette = torch.tensor(list(COLOURS.values()), device=layers.device)
        finish = self.finish.to(layers.device)
        return paint(layers, palette[self.colour], palette[self.second], finish)

    def __getitem__(self, index: Tensor) -> Looks:
        return Looks(self.colour[index], self.second[index], self.finish[index])


@dataclass(frozen=True)
class Examples:
    """A training batch.

    Attributes:
        images: Images from −1 to 1, shape ``(n, 3, size, size)``.
        references: Reference images, zeros for none, as `images`.
        captions: Captions; empty for none.
        labels: See `systems.toybox.conditions.labels`.
        rays: See `systems.toybox.conditions.ray_maps`; zeros without a camera.
    """

    images: Float[Tensor, "n 3 size size"]
    references: Float[Tensor, "n 3 size size"]
    captions: list[str]
    labels: Float[Tensor, "n labels"]
    rays: Float[Tensor, "n rays side side"]


def random_looks(
    objects: Tensor, generator: torch.Generator, held_out: bool = False
) -> Looks:
    """Colours and finishes for objects.

    Args:
        objects: Index of each object, shape ``(n,)``.
        generator: Source of randomness, on the CPU.
        held_out: Allow held-out pairs too, as a classifier must have seen all.
    """
    allowed = torch.ones_like(_ALLOWED) if held_out else _ALLOWED
    colour = torch.multinomial(allowed[objects], 1, generator=generator)[:, 0]
    apart = torch.randint(1, len(COLOURS), colour.shape, generator=generator)
    shares = torch.tensor(FINISH_SHARES).expand(len(objects), -1)
    finish = torch.multinomial(shares, 1, generator=generator)[:, 0]
    return Looks(colour, (colour + apart) % len(COLOURS), finish)


def random_backgrounds(count: int, generator: torch.Generator) -> Float[Tensor, "n 3"]:
    """Solid backgrounds, more often grey than coloured."""
    grey = torch.rand(count, 1, generator=generator).expand(count, 3)
    colour = torch.rand(count, 3, generator=generator)
    plain = torch.rand(count, 1, generator=generator) < 0.6
    return torch.where(plain, grey, colour)


def over(rgb: Tensor, layers: Tensor, background: Tensor) -> Tensor:
    """Painted layers over backgrounds ``(n, 3)``, from −1 to 1."""
    bare = 1 - layers[:, 6:7]
    return (rgb + bare * background[:, :, None, None].to(rgb)) * 2 - 1


def draw(views: ViewSet, count: int, generator: torch.Generator) -> Examples:
    """Draw a batch; on the device of the views, from a generator on the CPU."""
    index = torch.randint(len(views), (count,), generator=generator)
    objects = views.objects(index)
    looks = random_looks(objects, generator)
    background = random_backgrounds(count, generator)
    dice = torch.rand(count, 8, generator=generator)
    text_only = dice[:, 0] < TEXT
    image_only = ~text_only & (dice[:, 0] < TEXT + IMAGE)
    normal = text_only & (dice[:, 1] < NORMAL_MAPS)
    layers = views.layers(index)
    rgb = looks.paint(layers)
    rgb = torch.where(normal[:, None, None, None].to(rgb.device), layers[:, 7:10], rgb)
    images = over(rgb, layers, background)

    has_image = ~text_only & ~(image_only & (dice[:, 2] < 0.1))
    other = views.other_views(index, generator)
    shown = has_image.nonzero()[:, 0]
    references = torch.zeros_like(images)
    if len(shown):
        seen = views.layers(other[shown])
        reference = over(looks[shown].paint(seen), seen, background[shown])
        references[shown.to(images.device)] = reference

    camera, reference_camera = (
        Cameras(*views.cameras[i].unbind(-1)) for i in (index, other)
    )
    has_camera = dice[:, 3] >= 0.15
    # With text and image, half of the cameras are absolute and half relative.
    relative = image_only | (~text_only & (dice[:, 4] < 0.5))
    numbers = torch.where(
        relative[:, None],
        labels(count, camera, reference_camera),
        labels(count, camera),
    )
    kept = has_camera & (has_image | ~relative)
    numbers = numbers * kept[:, None]
    side = images.shape[-1] // PATCH
    rays = torch.where(
        relative[:, None, None, None],
        ray_maps(camera, side, reference_camera),
        ray_maps(camera, side),
    )
    rays = rays * kept[:, None, None, None]
    numbers[:, -1] = has_image.float()
    captions = [
        ""
        if drop
        else _spell(
            objects[i], looks, i, camera, bool(normal[i]), dice[i], bool(kept[i])
        )
        for i, drop in enumerate((image_only | (dice[:, 5] < 0.1)).tolist())
    ]
    assert numbers.shape[-1] == LABELS == 2 * (1 + CAMERA) + 1
    return Examples(images, references, captions, numbers.to(images), rays.to(images))


def _spell(
    number: Tensor,
    looks: Looks,
    i: int,
    camera: Cameras,
    normal: bool,
    dice: Tensor,
    seen_from: bool,
) -> str:
    """The caption of an example; `dice`, uniform in 0…1, decide what is dropped."""
    # A normal map has no colour; half of the captions name one all the same, so that a
    # prompt with a colour can be asked for its normals.
    named = float(dice[6]) > (0.5 if normal else 0.06)
    finish = _FINISHES[int(looks.finish[i])]
    if normal and not named:
        finish = "plain"
    view = view_of(float(camera.azimuth[i]), float(camera.elevation[i]))
    return Caption(
        _NAMES[int(number)],
        _COLOURS[int(looks.colour[i])] if named else None,
        finish,
        _COLOURS[int(looks.second[i])] if named and finish != "plain" else None,
        view if float(dice[7]) > (0.5 if seen_from else 0.12) else None,
        normal,
    ).text
