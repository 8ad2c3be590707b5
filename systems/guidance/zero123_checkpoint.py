"""Zero-1-to-3 checkpoints in one file, as their authors publish them.

``105000.ckpt``, ``zero123-xl.ckpt`` and ``stable_zero123.ckpt`` hold the U-Net, the
autoencoder, OpenAI's CLIP and the camera projection under the names of the latent
diffusion code. Sizes follow from the tensors; that code's constants (8 attention heads,
32 groups of normalisation, CLIP heads of 64 channels, the noise schedule) do not. Where
moving averages of the U-Net are stored they are used, as in its samplers.

A ``.ckpt`` is a pickle, which can run code when it is read; torch's `weights_only`
refuses that, and so refuses some harmless files with objects of a trainer too.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from systems.guidance.priors import ModelError
from systems.guidance.zero123_pipeline import CLIPCameraProjection, Zero123Pipeline

Weights: TypeAlias = Mapping[str, Tensor]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.model.visual."
PROJECTION = "cc_projection."
EXPECTED: Mapping[str, str] = {
    UNET: "U-Net",
    VAE: "autoencoder",
    CLIP: "CLIP image encoder",
    PROJECTION: "camera projection",
}
"""Beginnings of the names, and the parts that they belong to."""
SUFFIXES = (".ckpt", ".safetensors")
LATENT_SIDE = 32
"""Width and height of the latent: the models are trained on 256×256 pixels."""
SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_CLIP_NAMES: Mapping[str, str] = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""OpenAI's names of a module or a tensor, and those of transformers."""


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Zero123Pipeline:
    """The pipeline of a checkpoint file.

    Args:
        path: A ``.safetensors`` or ``.ckpt`` file.
        dtype: Type of the weights.

    Raises:
        ModelError: The file is unreadable, could run code, or lacks a part.
    """
    weights = read_checkpoint(path)
    for prefix, part in EXPECTED.items():
        if not any(name.startswith(prefix) for name in weights):
            raise ModelError(
                f"`{path}` has no weights `{prefix}…` (the {part}): a Zero-1-to-3 "
                f"checkpoint has {', '.join(f'`{p}…`' for p in EXPECTED)}. Write the "
                "path of one, such as `zero123-xl.ckpt`."
            )
    try:
        return Zero123Pipeline(
            vae=_vae(weights, dtype).eval(),
            image_encoder=_image_encoder(weights).to(dtype).eval(),
            unet=_unet(_averaged(weights), dtype).eval(),
            scheduler=DDIMScheduler(**SCHEDULER),
            clip_camera_projection=_projection(weights, dtype).eval(),
        )
    except KeyError as error:
        raise ModelError(
            f"`{path}` lacks the weights `{error.args[0]}`: download it again."
        ) from error
    except RuntimeError as error:  # of `load_state_dict`: its second line names a key
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"`{path}` is no complete Zero-1-to-3 checkpoint ({reason}): download it "
            "again."
        ) from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, without running code that it may hold.

    Raises:
        ModelError: The file is unreadable, or could run code.
    """
    try:
        if path.suffix == ".safetensors":
            # Copied to torch's alignment, by which CPU kernels may round.
            found: Any = {name: t.clone() for name, t in load_file(path).items()}
        else:
            mapped = zipfile.is_zipfile(path)  # older files cannot be mapped
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=mapped or None
            )
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise ModelError(_unreadable(path, error)) from error
        raise ModelError(
            f"`{path}` holds more than tensors and could run code when it is read, so "
            "it is refused. Where you trust its source, write its tensors to a "
            f"safetensors file once, and name that: {_conversion(path)}"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(_unreadable(path, error)) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        found = {}
    return {str(k): v for k, v in found.items() if isinstance(v, Tensor)}


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return f"`{path}` cannot be read as a checkpoint ({reason}): download it again."


def _conversion(path: Path) -> str:
    """The command that writes a pickle's tensors to a safetensors file."""
    return (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"w = torch.load('{path}', map_location='cpu', weights_only=False); "
        "save_file({k: v.clone() for k, v in w['state_dict'].items()}, "
        f"'{path.with_suffix('.safetensors')}')\""
    )


def _within(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights of a part, by their names inside it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _averaged(weights: Weights) -> dict[str, Tensor]:
    """The U-Net's weights, replaced by their moving averages where they are stored."""
    found = {}
    for name, tensor in weights.items():
        if name.startswith(UNET):
            average = "model_ema." + name.removeprefix("model.").replace(".", "")
            found[name] = weights.get(average, tensor)
    return found


def _unet(weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    inside = _within(weights, UNET)
    ends = [name for name in inside if name.endswith("0.op.weight")]
    levels = len(ends) + 1
    blocks = {name.split(".")[1] for name in inside if name.startswith("output_blocks")}
    layers = len(blocks) // levels - 1
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    attends = [f"input_blocks.{i}.1.norm.weight" in inside for i in firsts]
    middle = "middle_block.1.transformer_blocks."
    depth = {
        name.removeprefix(middle).split(".")[0]
        for name in inside
        if name.startswith(middle)
    }
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
    config: dict[str, Any] = {
        "sample_size": LATENT_SIDE,
        "in_channels": inside["input_blocks.0.0.weight"].shape[1],
        "out_channels": inside["out.2.weight"].shape[0],
        "block_out_channels": tuple(
            inside[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts
        ),
        "layers_per_block": layers,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "transformer_layers_per_block": len(depth),
        "cross_attention_dim": inside[f"{middle}0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": inside["middle_block.1.proj_in.weight"].ndim == 2,
        "attention_head_dim": 8,  # the number of heads, in spite of its name
    }
    converted = convert_ldm_unet_checkpoint(weights, config)
    return _filled(UNet2DConditionModel, config, converted, dtype)


def _vae(weights: Weights, dtype: torch.dtype) -> Any:
    inside = _within(weights, VAE)

    def count(prefix: str) -> int:
        starts = [name for name in inside if name.startswith(prefix)]
        return len({name.removeprefix(prefix).split(".")[0] for name in starts})

    levels = count("encoder.down.")
    config: dict[str, Any] = {
        "in_channels": inside["encoder.conv_in.weight"].shape[1],
        "out_channels": inside["decoder.conv_out.weight"].shape[0],
        "latent_channels": inside["post_quant_conv.weight"].shape[0],
        "block_out_channels": tuple(
            inside[f"encoder.down.{i}.block.0.conv1.weight"].shape[0]
            for i in range(levels)
        ),
        "layers_per_block": count("encoder.down.0.block."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "sample_size": LATENT_SIDE * 2 ** (levels - 1),
        "scaling_factor": 0.18215,
    }
    own = {name: weights[name] for name in weights if name.startswith(VAE)}
    converted = convert_ldm_vae_checkpoint(own, config)
    return _filled(AutoencoderKL, config, converted, dtype)


def _filled(
    kind: Any, config: dict[str, Any], weights: Weights, dtype: torch.dtype
) -> Any:
    """A model with these weights; they are copied only to change their type."""
    with torch.device("meta"):
        model = kind(**config)
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model.load_state_dict(cast, assign=True)
    return model


def _image_encoder(weights: Weights) -> Any:
    inside = _within(weights, CLIP)
    width, patch = inside["class_embedding"].shape[0], inside["conv1.weight"].shape[-1]
    grid = math.isqrt(inside["positional_embedding"].shape[0] - 1)
    block = "transformer.resblocks."
    layers = {
        name.removeprefix(block).split(".")[0]
        for name in inside
        if name.startswith(block)
    }
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inside[f"{block}0.mlp.c_fc.weight"].shape[0],
        projection_dim=inside["proj"].shape[1],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // 64),
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict(clip_weights(inside))
    return model


def clip_weights(inside: Weights) -> dict[str, Tensor]:
    """Weights of OpenAI's CLIP image encoder under the names of transformers."""
    found = {"visual_projection.weight": inside["proj"].T.contiguous()}
    for name, tensor in inside.items():
        if name == "proj":
            continue
        start, rest = "vision_model.", name
        if name.startswith("transformer.resblocks."):
            number, rest = name.removeprefix("transformer.resblocks.").split(".", 1)
            start = f"vision_model.encoder.layers.{number}."
        module, dot, kind = rest.rpartition(".")
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{start}self_attn.{letter}_proj.{kind}"] = part
        elif dot:
            found[f"{start}{_CLIP_NAMES.get(module, module)}.{kind}"] = tensor
        else:
            found[f"{start}{_CLIP_NAMES.get(rest, rest)}"] = tensor
    return found


def _projection(weights: Weights, dtype: torch.dtype) -> Any:
    inside = _within(weights, PROJECTION)
    width, total = inside["weight"].shape
    config = {"embedding_dim": width, "additional_embeddings": total - width}
    named = {f"proj.{name}": tensor for name, tensor in inside.items()}
    return _filled(CLIPCameraProjection, config, named, dtype)
