"""Embedded prompts, and their cache on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""Parts of a pipeline that only embedding needs."""


@dataclass(frozen=True)
class Words:
    """Embedded prompts.

    Attributes:
        prompt_embeds: Shape ``(prompts, tokens, channels)``.
        negative_prompt_embeds: Shape ``(1, tokens, channels)``.
    """

    prompt_embeds: Float[Tensor, "prompts tokens channels"]
    negative_prompt_embeds: Float[Tensor, "one tokens channels"]


@torch.no_grad()
def embed(pipeline: Any, prompts: Sequence[str], negative: str) -> Words:
    """Embed the prompts with the pipeline's own `encode_prompt`."""
    given, without = [], None
    for prompt in prompts:
        one, without = pipeline.encode_prompt(
            prompt=prompt,
            device=pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative,
        )[:2]
        given.append(one)
    if without is None:
        raise ValueError("At least one prompt is needed.")
    return Words(torch.cat(given).float().cpu(), without.float().cpu())


def cache_file(source: str, texts: Sequence[str]) -> Path:
    """The cache file of the embeddings of these texts, for one model."""
    folder = Path(source)
    files = [path for part in TEXT_PARTS for path in sorted((folder / part).glob("*"))]
    stamp = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files
    ]
    # 3: fields named as in diffusers; 2: the embedded priors embed captions.
    key = json.dumps([3, source, stamp, list(texts)])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return home / "dreampropeller" / "embeddings" / f"{name}.safetensors"


def read_words(path: Path) -> Words | None:
    """Cached embeddings; None where there is no readable file."""
    try:
        # Copied, since a file's tensors lie in memory as in the file, and CPU kernels
        # may round by alignment: a run would differ from its first.
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        return Words(**tensors)
    except (OSError, SafetensorError, TypeError):
        return None


def write_words(path: Path, words: Words) -> None:
    """Cache embeddings; failing to write the cache is not an error."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(vars(words), part)
        os.replace(part, path)
    except (OSError, SafetensorError):
        part.unlink(missing_ok=True)
