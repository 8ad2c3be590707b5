"""Settings that all systems share which start from images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from systems.guidance.prompts import PromptConfig
from systems.guidance.zero123 import IMAGE_GUIDANCES
from systems.settings.checks import at_least
from systems.settings.reader import part
from systems.settings.schedules import Schedule, check_schedule


@dataclass(frozen=True)
class ImagePromptConfig(PromptConfig):
    """No prompt, or one that a model takes beside the image (`prompt_processor`).

    Args:
        prompt: Description of the object; may be empty.
    """

    prompt: str = ""
    view_dependent: bool = False

    def __post_init__(self) -> None:
        for name in ("view_dependent", "use_perp_neg"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` has no effect beside an image, whose camera says the "
                    "view: leave it out."
                )


IMAGE_PROMPTS = {"dummy-prompt-processor": ImagePromptConfig}


@dataclass(frozen=True)
class FrequencyConfig:
    """When reference views and guidance act (`system.freq`).

    Args:
        ref_or_zero123: "accumulate": both in each step; "alternate": one of them.
        ref_only_steps: First steps without guidance, if they alternate.
        n_ref: Number of steps from one with reference views to the next, likewise.
    """

    ref_or_zero123: Literal["accumulate", "alternate"] = "accumulate"
    ref_only_steps: int = 0
    n_ref: int = 2

    def __post_init__(self) -> None:
        at_least("ref_only_steps", self.ref_only_steps, 0)
        at_least("n_ref", self.n_ref, 1)
        own = (self.ref_only_steps, self.n_ref)
        if self.ref_or_zero123 == "accumulate" and own != (0, 2):
            raise ValueError(
                "`ref_only_steps` and `n_ref` have no effect on `ref_or_zero123: "
                "accumulate`: write `alternate`, or leave them out."
            )

    def refers(self, step: int) -> bool:
        """Whether a step has reference views."""
        if self.ref_or_zero123 == "accumulate":
            return True
        return step < self.ref_only_steps or step % self.n_ref == 0

    def guides(self, step: int) -> bool:
        """Whether a step has guidance."""
        return self.ref_or_zero123 == "accumulate" or not self.refers(step)


@dataclass(frozen=True)
class ImageLossConfig:
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_sds: Weight of the guidance.
        lambda_rgb: Weight of the colours of the reference views.
        lambda_mask: Weight of their masks.
        lambda_sparsity: Weight of the penalty on opacity.
        lambda_opaque: Weight of the penalty on half-transparent pixels.
    """

    lambda_sds: Schedule = 0.1
    lambda_rgb: Schedule = 500.0
    lambda_mask: Schedule = 50.0
    lambda_sparsity: Schedule = 0.0
    lambda_opaque: Schedule = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_schedule(name, value, 0)


@dataclass(frozen=True, kw_only=True)
class ImageGuidedConfig:
    """The part of `system` that says how images guide.

    Args:
        prompt_processor_type: "dummy-prompt-processor".
        prompt_processor: A prompt beside the image; usually empty.
        guidance_type: Guidance; a key of `systems.guidance.zero123.IMAGE_GUIDANCES`.
        guidance: Settings of the guidance.
        freq: When reference views and guidance act.
    """

    prompt_processor: ImagePromptConfig = field(metadata=part(IMAGE_PROMPTS))
    guidance: Any = field(metadata=part(IMAGE_GUIDANCES))
    prompt_processor_type: str = "dummy-prompt-processor"
    guidance_type: str = "zero123-guidance"
    freq: FrequencyConfig = field(default_factory=FrequencyConfig)
