"""A Stable Diffusion of a few thousand random weights, written to a folder."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch


def write(folder: Path, blocks: int = 6) -> None:
    """Write what `StableDiffusionPipeline.from_pretrained` reads.

    Args:
        folder: Folder to write to.
        blocks: Number of the autoencoder's resolutions. Six make 16 of 512 pixels, for
            speed; Stable Diffusion's four make 64.
    """
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")

    torch.manual_seed(0)
    vocabulary = folder / "vocabulary"
    vocabulary.mkdir(parents=True)
    letters = [*map(chr, range(33, 127))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    table = {word: index for index, word in enumerate(words)}
    (vocabulary / "vocab.json").write_text(json.dumps(table))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt")
    )
    tokenizer.model_max_length = 77
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(4,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            norm_num_groups=4,
            latent_channels=4,
        ),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(16, 16),
            norm_num_groups=4,
            time_embedding_dim=1280,  # what VSD hard-codes for its camera embedding
            layers_per_block=1,
            # Attention at the lower resolution, for speed.
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            sample_size=8,
        ),
        scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
