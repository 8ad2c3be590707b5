r"""CLIP score and R-precision, for prompts without a ground-truth object.

With the unit embeddings $u_i$ of view $i$ and $v_p$ of prompt $p$, $p^*$ the prompt
of the object,

$$\mathrm{score} = \operatorname{mean}_i 100 \max(u_i \cdot v_{p^*}, 0), \qquad
  R = \operatorname{mean}_i \bigl[\operatorname{argmax}_p u_i \cdot v_p = p^*\bigr]$$

(J. Hessel et al., 2021, arXiv 2104.08718; D. H. Park et al., 2021; used for text-to-3D
by B. Poole et al., 2022, arXiv 2209.14988). Figures of different CLIP models or prompt
lists cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class ClipError(ValueError):
    """CLIP is unavailable; the message says why and what to write instead."""


@dataclass(frozen=True)
class ClipFigures:
    """CLIP figures of an object.

    Attributes:
        clip_score: CLIP score, from 0 to 100.
        r_precision: Fraction of views whose best prompt is the right one, from 0 to 1.
        num_prompts: Number of candidate prompts, the right one included.
    """

    clip_score: float
    r_precision: float
    num_prompts: int


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one per line.

    Raises:
        ClipError: The file cannot be read, or is empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ClipError(
            f"`quality.prompts={path}` cannot be read ({error}). Name a text file with "
            "a prompt a line."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ClipError(f"`quality.prompts={path}` is empty. Write a prompt a line.")
    return prompts


@torch.no_grad()
def clip_score(
    name: str,
    images: Float[Tensor, "views 3 height width"],
    prompt: str,
    others: Sequence[str],
    device: torch.device,
) -> ClipFigures:
    """CLIP score and R-precision of images.

    Args:
        name: Name of a CLIP model on the hub, or a local folder.
        images: Images of the object, from 0 to 1.
        prompt: Prompt of the object.
        others: Other candidate prompts of R-precision.
        device: Device of the model.

    Raises:
        ClipError: The model is unavailable.
    """
    from transformers import AutoTokenizer, CLIPModel
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    try:
        model: Any = CLIPModel.from_pretrained(name)
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClipError(
            f"the CLIP model `{name}` cannot be loaded: {reason[:200]} Write the path "
            "of a local folder or a name on the hub, such as "
            "`quality.clip=openai/clip-vit-base-patch32`."
        ) from error
    prompts = [prompt, *(other for other in others if other != prompt)]
    config = model.config
    words = tokenizer(
        prompts,
        padding=True,
        truncation=True,
        max_length=config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    side = config.vision_config.image_size
    resized = torch.nn.functional.interpolate(
        images, (side, side), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    output = model.to(device).eval()(
        input_ids=words["input_ids"].to(device),
        attention_mask=words["attention_mask"].to(device),
        pixel_values=((resized - mean) / std).to(device),
    )
    cosines = (output.image_embeds @ output.text_embeds.T).float().cpu()
    return ClipFigures(
        clip_score=round(float(100 * cosines[:, 0].clamp_min(0).mean()), 3),
        r_precision=round(float((cosines.argmax(-1) == 0).float().mean()), 4),
        num_prompts=len(prompts),
    )
