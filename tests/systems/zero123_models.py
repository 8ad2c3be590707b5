"""A tiny random Zero-1-to-3 of the real classes, also in its authors' layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from systems.guidance.zero123_pipeline import CLIPCameraProjection, Zero123Pipeline

WIDTH = 16
"""Width of CLIP's embedding."""
LATENT = 16
SIDE = 2 * LATENT
"""Pixels: the autoencoder has two levels."""
LAYERS = 1
UNET: Mapping[str, Any] = {
    "sample_size": LATENT,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": LAYERS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
}
VAE: Mapping[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": LAYERS,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": SIDE,
    "scaling_factor": 0.18215,
}
CLIP: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "projection_dim": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}


def tiny(
    unet: Mapping[str, Any] = UNET,
    vae: Mapping[str, Any] = VAE,
    clip: Mapping[str, Any] = CLIP,
) -> Zero123Pipeline:
    """A pipeline of half a million parameters."""
    torch.manual_seed(0)
    pipeline = Zero123Pipeline(
        vae=AutoencoderKL(**vae).eval(),
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**clip)).eval(),
        unet=UNet2DConditionModel(**unet).eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        clip_camera_projection=CLIPCameraProjection(WIDTH),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def original(pipeline: Zero123Pipeline) -> dict[str, Tensor]:
    """The weights under their names in the authors' files."""
    parts = {
        "model.diffusion_model.": _unet(pipeline.unet.state_dict()),
        "first_stage_model.": _vae(pipeline.vae.state_dict()),
        "cond_stage_model.model.visual.": _clip(pipeline.image_encoder.state_dict()),
        "cc_projection.": pipeline.clip_camera_projection.proj.state_dict(),
    }
    return {
        prefix + name: tensor.clone().contiguous()
        for prefix, part in parts.items()
        for name, tensor in part.items()
    }


def _renamed(name: str, pairs: Mapping[str, str]) -> str:
    for new, old in pairs.items():
        name = re.sub(rf"(^|\.){re.escape(new)}\.", rf"\g<1>{old}.", name)
    return name


_UNET_NAMES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _unet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        kind, attention = "resnets" in name, "attentions" in name
        new = _renamed(name, _RESNET_NAMES) if kind else name
        if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", new):
            way, block, _, layer, rest = match.groups()
            number = int(block) * (LAYERS + 1) + int(layer)
            if way == "down":
                start = f"input_blocks.{number + 1}"
            else:
                start = f"output_blocks.{number}"
            if kind or attention:
                new = f"{start}.{int(attention)}.{rest}"
            elif way == "down":
                end = (int(block) + 1) * (LAYERS + 1)
                new = f"input_blocks.{end}.0.op.{rest.removeprefix('conv.')}"
            else:  # the only upsampler follows a block without attention
                new = f"output_blocks.{number + LAYERS}.1.{rest}"
        found[_renamed(new, _UNET_NAMES)] = tensor
    return found


_VAE_NAMES = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    last = max(
        int(found) for found in re.findall(r"up_blocks\.(\d)", " ".join(weights))
    )
    for name, tensor in weights.items():
        new = _renamed(name, _VAE_NAMES).replace("resnets.", "block.")
        new = new.replace("down_blocks.", "down.")
        if match := re.search(r"up_blocks\.(\d)", new):
            new = new.replace(match.group(), f"up.{last - int(match.group(1))}")
        convolution = ".attn_1." in new and tensor.ndim == 2
        found[new] = tensor[:, :, None, None] if convolution else tensor
    return found


_CLIP_NAMES = {
    "embeddings.patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"proj": weights["visual_projection.weight"].T}
    inside = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in weights.items()
        if name.startswith("vision_model.")
    }
    for name, tensor in inside.items():
        if "position_ids" in name:
            continue
        if name == "embeddings.class_embedding":
            found["class_embedding"] = tensor
        elif name == "embeddings.position_embedding.weight":
            found["positional_embedding"] = tensor
        elif match := re.match(r"(.+self_attn\.)([qkv])_proj\.(\w+)", name):
            start, letter, kind = match.groups()
            if letter == "q":
                three = [inside[f"{start}{one}_proj.{kind}"] for one in "qkv"]
                new = _renamed(start + "x", _CLIP_NAMES)[:-1]
                found[f"{new}in_proj_{kind}"] = torch.cat(three)
        else:
            found[_renamed(name, _CLIP_NAMES)] = tensor
    return found
