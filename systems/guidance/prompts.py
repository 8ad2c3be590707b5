"""Prompts that say from where the object is seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from systems.scene.cameras import Cameras
from systems.settings.checks import between

VIEWS = ("front", "side", "back", "overhead")


@dataclass(frozen=True)
class PromptConfig:
    """What is wanted (`system.prompt_processor` in a config).

    Args:
        prompt: The object, such as "a red mushroom".
        negative_prompt: What is not wanted; takes the place of the empty prompt.
        pretrained_model_name_or_path: The guidance's model, if it is named at all.
        view_dependent: Add the view to the prompt.
        overhead_threshold: Elevation from which a view is overhead, degrees.
        front_threshold: Azimuth up to which a view is a front view, degrees.
        back_threshold: The same around the back, degrees.
    """

    prompt: str
    negative_prompt: str = ""
    pretrained_model_name_or_path: str | None = None
    view_dependent: bool = True
    overhead_threshold: float = 60.0
    front_threshold: float = 45.0
    back_threshold: float = 45.0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(
                "`prompt` is empty: say what to make, for example `a red mushroom`."
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
        """Which of `texts` each camera asks for."""
        if not self.view_dependent:
            return [0] * len(cameras)
        angles = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
        return [VIEWS.index(self.view(*angle)) for angle in angles]

    def view(self, azimuth: float, elevation: float) -> str:
        """The word for a camera, in degrees."""
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
