r"""Systems that start from images: a reference loss beside the guidance.

$$\ell(t, \theta) = \ell_{guided}(t, \theta) + \lambda_{rgb} \operatorname{mean}
  (x - x^*)^2 + \lambda_{mask} \operatorname{mean} (o - \alpha^*)^2 +
  \lambda_{depth}\,\ell_{depth} + \lambda_{rel}\,(1 - \rho) + \sum_r \lambda_r R_r$$

over the reference views, with rendered colours x and opacity o, the image's colours
$x^*$ over the scene's background and its mask $\alpha^*$, the error $\ell_{depth}$ of
the depth after a linear fit, and its correlation ρ with the given one (weights and form
as in threestudio's `zero123-system`, but for the mask, which is soft here). Random
views are guided by a model that is shown the images
(`systems.guidance.zero123`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from systems.distillation import Distillation, Look
from systems.guidance.base import Guidance
from systems.guidance.priors import check, is_embedded
from systems.guidance.zero123 import (
    IMAGE_GUIDANCES,
    Zero123Config,
    check_takes_images,
)
from systems.images import save_image
from systems.references import read_reference
from systems.references.depth import read_depth
from systems.references.goal import Goal
from systems.references.views import SingleImageConfig
from systems.scene.cameras import RandomCameras, Views
from systems.scene.regularisers import Regulariser
from systems.scene.renderers import Rendering
from systems.scene.renderers.volume import VolumeRenderer
from systems.settings.config import Config
from systems.settings.notes import note
from systems.settings.reader import ConfigError, read
from systems.settings.schedules import values_of

_ONLY_GUIDED = ("sparsity",)


@dataclass(frozen=True)
class ReferenceLoss:
    """The loss of the reference views of a step.

    Attributes:
        value: The loss.
        log: Scalars to log.
        seen: The rendering.
    """

    value: Float[Tensor, ""]
    log: dict[str, Any]
    seen: Rendering


@dataclass(frozen=True)
class ImageLook:
    """What a step needs by itself; at least one of the two.

    Attributes:
        step: The step on the trajectory.
        guided: The random views, as rendered; None: the step has no guidance.
        reference: The loss of the reference views; None: the step has none.
    """

    step: int
    guided: Look | None
    reference: ReferenceLoss | None

    @property
    def seen(self) -> Rendering:
        """The rendering that growth counts: the random views', if there are any."""
        chosen = self.guided or self.reference
        assert chosen is not None
        return chosen.seen


def _sum(
    look: ImageLook, guided: Iterator[tuple[Tensor, dict[str, Any]]]
) -> tuple[Tensor, dict[str, Any]]:
    parts: list[Tensor] = []
    log: dict[str, Any] = {}
    if look.reference is not None:
        parts.append(look.reference.value)
        log |= look.reference.log
    if look.guided is not None:
        value, own = next(guided)
        parts.append(value)
        log |= own
    total = torch.stack(parts).sum()
    return total, {**log, "loss": total}


class ImageTo3D(Distillation, abc.ABC):
    """A system that starts from images, whatever represents the object."""

    data_type: ClassVar[str | None] = "single-image-datamodule"

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        settings: Zero123Config = self.settings.guidance
        _check_same(settings, self.data)
        if config.quality.clip is not None:
            raise ConfigError(
                "`quality.clip` compares with a prompt, and this system starts from an "
                "image: leave it out."
            )
        self.goal = Goal(self.references, self._read_depth(), self.device)

    def read_cameras(self) -> RandomCameras:
        """See `System.read_cameras`; reads the images too."""
        self.data = read(SingleImageConfig, self.config.data, "data")
        side = max(512, self.data.largest)
        self.references = [
            read_reference(
                path, side, self.data.cut, self.data.recentre, self.data.fill
            )
            for path in self.data.paths
        ]
        for path, image in zip(self.data.paths, self.references, strict=True):
            for line in image.notes:
                note(f"`{path}`: {line}")
        note(
            f"`{self.data.paths[0]}` is taken as seen from "
            f"{self.data.default_elevation_deg:g}° above "
            "(`data.default_elevation_deg`)."
        )
        return self.data.random_camera

    @property
    def title(self) -> str:
        """The name of the image's file."""
        return Path(self.data.paths[0]).stem

    @property
    def truth_prompt(self) -> str | None:
        """See `System.truth_prompt`; an image alone names no object."""
        return self.config.quality.truth

    def about(self) -> dict[str, Any]:
        """See `System.about`; the images by their pixels, wherever their files are."""
        known = super().about()
        paths = ("image", "image_path", "more", "depth")
        data = {k: v for k, v in known["data"].items() if k not in paths}
        guidance = dict(known["system"].get("guidance", {}))
        guidance.pop("cond_image_path", None)
        angles = [vars(one) | {"image": ""} for one in self.data.more]
        return {
            **known,
            "data": {**data, "pixels": self.goal.digest, "more": angles},
            "system": {**known["system"], "guidance": guidance},
        }

    def check_model(self) -> None:
        """Refuse early a model that takes no image, or a prompt it does not know."""
        name = self.settings.guidance.pretrained_model_name_or_path
        if is_embedded(name):
            check(name, [text for text in self.prompts.texts() if text])
            check_takes_images(name)
        elif self.prompts.prompt or self.prompts.negative_prompt:
            raise ConfigError(
                f"`{name}` reads no words beside the image: leave "
                "`system.prompt_processor` out."
            )

    def load_guidance(self) -> Guidance:
        """See `Distillation.load_guidance`."""
        guidance = IMAGE_GUIDANCES[self.settings.guidance_type]
        return guidance.of_images(
            self.settings.guidance,
            self.prompts,
            self.references,
            self.data.cameras(),
            self.device,
        )

    @abc.abstractmethod
    def reference_rendering(
        self, module: nn.Module, views: Views, step: int, with_normals: bool
    ) -> Rendering:
        """The unlit images of the reference views; arguments as for `rendering`."""

    @abc.abstractmethod
    def prepare(self, module: nn.Module, step: int) -> None:
        """Bring buffers to a step that renders no random views."""

    def look(self, step: int, module: nn.Module) -> Any:
        """See `Distillation.look`: an `ImageLook`, with the reference views."""
        freq = self.settings.freq
        guided = super().look(step, module) if freq.guides(step) else None
        if guided is None:
            self.prepare(module, step)
        refers = freq.refers(step) and self.shard.index == 0
        reference = self.reference_loss(step, module) if refers else None
        return ImageLook(step, guided, reference)

    def contribution(self, look: Any, guidance: Guidance) -> dp.Contribution | None:
        """See `Distillation.contribution`; the first shard has the reference views."""
        guided, reference = super().contribution(look.guided, guidance), look.reference
        if reference is None:
            return guided
        views = len(reference.seen.opacity)
        if guided is None:
            log = {**reference.log, "loss": reference.value}
            return dp.Contribution(reference.value, log, {}, (reference.seen, views))
        total = torch.stack([reference.value, guided.loss]).sum()
        log = {**reference.log, **guided.aux, "loss": total}
        return replace(guided, loss=total, aux=log)

    def losses(
        self, looks: Sequence[Any], guidance: Guidance
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """See `Distillation.losses`; those of the reference views are added."""
        guided = [look.guided for look in looks if look.guided is not None]
        found = iter(super().losses(guided, guidance) if guided else ())
        return [_sum(look, found) for look in looks]

    def reference_loss(self, step: int, module: nn.Module) -> ReferenceLoss:
        """The loss of the reference views of a step, and scalars to log."""
        weight = self.weights(step)
        height, width = self.data.shape(step)
        views = self.data.views(height, width)
        terms = self.reference_regularisers()
        with_normals = any(
            term.needs_normals and weight[name] > 0 for name, term in terms.items()
        )
        seen = self.reference_rendering(module, views, step, with_normals)
        found = self.goal.terms(seen, self.background(module, views, step))
        psnr = -10 * found["rgb"].detach().clamp(min=1e-12).log10()
        found |= {name: term(seen) for name, term in terms.items() if weight[name]}
        weighted = [weight[n] * v for n, v in found.items() if weight[n]]
        total = torch.stack([0 * seen.opacity.sum(), *weighted])
        log = {f"loss_ref_{name}": value for name, value in found.items()}
        log |= {"psnr_ref": psnr, "opacity": seen.opacity.mean()}
        return ReferenceLoss(total.sum(), log, seen)

    def reference_regularisers(self) -> Mapping[str, Regulariser]:
        """The regularisers of the reference views."""
        return {n: r for n, r in self.regularisers.items() if n not in _ONLY_GUIDED}

    def background(self, module: Any, views: Views, step: int | None) -> Tensor:
        """Colours behind the pixels of views, ``(views, height, width, 3)``."""
        directions = views.cameras.rays(views.height, views.width)[1]
        return module.background(directions.to(self.device), step, self.whole_random)

    def _read_depth(self) -> Float[Tensor, "height width"] | None:
        """The depth map that the loss compares with; None: it compares with none."""
        loss, data = vars(self.settings.loss), self.data
        names = ("lambda_depth", "lambda_depth_rel")
        if not any(any(values_of(loss.get(name, 0))) for name in names):
            if data.depth is not None:
                raise ConfigError(
                    "`data.depth` has no effect without `system.loss.lambda_depth` or "
                    "`lambda_depth_rel`: set one, or leave it out."
                )
            return None
        if not isinstance(self.scene.get_submodule("renderer"), VolumeRenderer):
            raise ConfigError(
                "`lambda_depth` and `lambda_depth_rel` need depth along rays: write "
                "`system.renderer_type: nerf-volume-renderer`, or 0."
            )
        first, side = self.references[0], self.references[0].rgb.shape[-1]
        kept = read_reference(data.paths[0], side, data.cut, False)
        if not torch.equal(first.alpha, kept.alpha):
            raise ConfigError(
                f"`{data.paths[0]}` is moved and scaled, and its depth map would not "
                "follow: write `data.recentre=false`."
            )
        return read_depth(data.depth_path)

    def exports(self, folder: Path, y: dp.State) -> dict[str, Callable[[], Any]]:
        """The images as they were understood, beside the object seen from there."""
        return {
            **super().exports(folder, y),
            "reference": lambda: self._reference(folder, y),
        }

    def summary(self, report: dict[str, Any]) -> list[str]:
        """See `System.summary`; how near the object is to the images."""
        found = report.get("reference")
        lines = super().summary(report)
        if isinstance(found, dict):
            lines.insert(
                0,
                f"At the camera of the image: PSNR {found['psnr']:.1f} dB, mask IoU "
                f"{found['iou']:.2f}.",
            )
        return lines

    def against_references(
        self, y: dp.State
    ) -> tuple[dict[str, float], Float[Tensor, "images 3 side side"]]:
        """PSNR and mask IoU at the cameras of the images, and both images by turns."""
        side = min(512, max(128, self.data.largest))
        views, pairs, both, either = self.data.views(side, side), [], 0, 0
        for number, image in enumerate(self.references):
            sized = image.resized(side, side)
            seen, opacity = self.render(y, views.one(number), grey=GREY)
            pairs += [sized.over(GREY), seen[0]]
            inside, should = opacity[0] > 0.5, sized.alpha > 0.5
            both += int((inside & should).sum())
            either += int((inside | should).sum())
        images = torch.stack(pairs)
        error = (images[::2] - images[1::2]).square().mean().clamp(min=1e-12)
        psnr = float(-10 * error.log10())
        return {"psnr": round(psnr, 4), "iou": round(both / max(either, 1), 4)}, images

    def _reference(self, folder: Path, y: dp.State) -> dict[str, float | str]:
        figures, images = self.against_references(y)
        save_image(images, folder / "reference.png", 2)
        return {**figures, "image": "reference.png"}


GREY = 0.5
"""Level of the background of `reference.png`, as in the other figures."""


def _check_same(guidance: Zero123Config, data: SingleImageConfig) -> None:
    """Refuse a guidance that is shown another image or camera than `data`."""
    pairs = {
        "cond_image_path": (guidance.cond_image_path, data.paths[0]),
        "cond_elevation_deg": (guidance.cond_elevation_deg, data.default_elevation_deg),
        "cond_azimuth_deg": (guidance.cond_azimuth_deg, data.default_azimuth_deg),
        "cond_camera_distance": (
            guidance.cond_camera_distance,
            data.default_camera_distance,
        ),
    }
    for name, (given, known) in pairs.items():
        if given is not None and given != known:
            raise ConfigError(
                f"`system.guidance.{name}` is `{given}`, and `data` says `{known}`: "
                "leave it out, or write the same."
            )
