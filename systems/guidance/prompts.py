"""View-dependent prompts: the prompt names the side that is seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from systems.scene.cameras import Cameras
from systems.settings.checks import between

VIEWS = ("front", "side", "back", "overhead")
Decay: TypeAlias = tuple[float, float, float]
"""a, b and c of a weight $a e^{-b r} + c$."""


@dataclass(frozen=True)
class PromptConfig:
    """The prompts (`system.prompt_processor` in a config).

    Args:
        prompt: Description of the object, such as "a red mushroom".
        negative_prompt: Description of what to avoid; replaces the empty prompt.
        pretrained_model_name_or_path: The model of the guidance; may be left out.
        view_dependent: Append the direction of view to the prompt.
        overhead_threshold: Elevation from which a view counts as overhead, in
            degrees.
        front_threshold: Azimuth up to which a view counts as a front view, in degrees.
        back_threshold: Angle from the back up to which a view counts as a back view,
            in degrees.
        use_perp_neg: Perpendicular negative prompts for the other views, in every
            guidance by text (`systems.guidance.perpendicular`); the pretrained model's
            prediction in variational score distillation. The prompts are interpolated
            by the azimuth, whatever the two thresholds, and `guidance_rescale` has no
            effect.
        perp_neg_f_fs: a, b, c of the front prompt's weight $a e^{-b r} + c$ against a
            view between front (r = 1) and side.
        perp_neg_f_sf: The same of the side prompt, with 1 − r.
        perp_neg_f_sb: The same of the side prompt against a view between side (r = 1)
            and back.
        perp_neg_f_fsb: The same of the front prompt against it.
    """

    prompt: str
    negative_prompt: str = ""
    pretrained_model_name_or_path: str | None = None
    view_dependent: bool = True
    overhead_threshold: float = 60.0
    front_threshold: float = 45.0
    back_threshold: float = 45.0
    use_perp_neg: bool = False
    perp_neg_f_fs: Decay = (4.0, 0.5, -2.426)
    perp_neg_f_sf: Decay = (4.0, 0.5, -2.426)
    perp_neg_f_sb: Decay = (1.0, 0.5, -0.606)
    perp_neg_f_fsb: Decay = (1.0, 0.5, 0.967)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(
                "`prompt` is empty: say what to make, for example `a red mushroom`."
            )
        if self.use_perp_neg and not self.view_dependent:
            raise ValueError(
                "Perpendicular negative prompts (`use_perp_neg`, or "
                "`perp-neg-guidance`) set views against each other, and the prompt "
                "names none: write `view_dependent=true`, or leave them out."
            )
        between("overhead_threshold", self.overhead_threshold, 0, 90)
        between("front_threshold", self.front_threshold, 0, 180)
        between("back_threshold", self.back_threshold, 0, 180)

    def texts(self) -> list[str]:
        """The prompts to embed: one for each of `VIEWS`, or one for all."""
        if not self.view_dependent:
            return [self.prompt]
        return [f"{self.prompt}, {view} view" for view in VIEWS]

    def numbers(self, cameras: Cameras) -> list[int]:
        """The index into `texts` for each camera."""
        if not self.view_dependent:
            return [0] * len(cameras)
        angles = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
        return [VIEWS.index(self.view(*angle)) for angle in angles]

    def view(self, azimuth: float, elevation: float) -> str:
        """The word for a camera's view; angles in degrees."""
        if elevation > self.overhead_threshold:
            return "overhead"
        around = abs((azimuth + 180) % 360 - 180)
        if around < self.front_threshold:
            return "front"
        return "back" if around > 180 - self.back_threshold else "side"


PROMPT_PROCESSORS: Mapping[str, type[PromptConfig]] = {
    "diffusers-prompt-processor": PromptConfig,
    "stable-diffusion-prompt-processor": PromptConfig,
    "deep-floyd-prompt-processor": PromptConfig,
}
"""The last two names are threestudio's."""
