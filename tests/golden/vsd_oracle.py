"""Gradients of threestudio's own ProlificDreamer on tiny Stable Diffusions.

    PYTHONPATH=<stand-ins>:<threestudio>:. python tests/golden/vsd_oracle.py <folder>

writes `vsd.safetensors` beside this file, and tiny pipelines into the folder. Needs an
environment in which threestudio (28d9d80, December 2024) imports on a CPU, with
diffusers 0.19.3, whose `LoRAAttnProcessor` it uses. The weights are functions of their
names, and the random numbers those that `StepRandom` draws, so that the file holds
cameras and gradients only. Networks work in double precision: in single precision the
autoencoder's rounding alone is 2e-5 of the images' gradient.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

FILE = Path(__file__).parent / "vsd.safetensors"
VIEWS, SIZE, TOKENS, WIDTH, SEED, STEP = 2, 12, 5, 16, 3, 4
CASES: dict[str, dict[str, Any]] = {
    # Epsilon for the pretrained model, velocity for the LoRA's, as published.
    "two models": {},
    "one model": {"guidance_scale_lora": 1.5, "lora_n_timestamp_samples": 2},
}
WIDE = {"width": 96, "height": 64}
ANGLES = {"azimuth": (-30.0, 120.0, 10.0), "elevation": (0.0, 20.0, 80.0)}
"""Between front and side, between side and back, and overhead, in degrees."""
TIMESTEPS, SCALE = (100, 500, 900), 7.5
"""Of the perpendicular negative prompts."""
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "time_embedding_dim": 1280,  # threestudio's camera embedding has this width
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "norm_num_groups": 4,
    "block_out_channels": (4, 4, 4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def values(name: str, shape: tuple[int, ...] | torch.Size, scale: float) -> Tensor:
    """Numbers from −scale to scale that a name and a shape determine."""
    phase = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    numbers = torch.sin(12.9898 * (index + 1) + phase % 9973) * 43.758
    return (scale * (2 * (numbers - numbers.floor()) - 1)).float().reshape(shape)


@torch.no_grad()
def fill(module: torch.nn.Module, salt: str) -> None:
    """Set all parameters of a module from their names."""
    for name, parameter in module.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            bias = name.endswith("bias")
            parameter.copy_(values(salt + name, parameter.shape, 0.1) + (not bias))
        else:
            fan = math.prod(parameter.shape[1:]) or 1
            parameter.copy_(values(salt + name, parameter.shape, fan**-0.5))


def words(kind: str) -> Tensor:
    """An embedded prompt, shape ``(1, TOKENS, WIDTH)``."""
    return values(f"prompt {kind}", (1, TOKENS, WIDTH), 1.0)


def images() -> Tensor:
    """Rendered images from 0 to 1, shape ``(VIEWS, 3, SIZE, SIZE)``."""
    return 0.5 + values("images", (VIEWS, 3, SIZE, SIZE), 0.5)


def latents() -> Tensor:
    """Noisy latents of the views in `ANGLES`."""
    return values("latents", (len(TIMESTEPS), 4, 8, 8), 2.0).double()


def probe(name: str, gradient: Tensor) -> Tensor:
    """A few numbers of a large gradient: its norm, and sums with known weights."""
    weights = [values(f"{name} {i}", gradient.shape, 1.0) for i in range(3)]
    sums = [(gradient * weight).double().sum() for weight in weights]
    return torch.stack([gradient.double().norm(), *sums])


def probes(gradients: dict[str, Tensor]) -> Tensor:
    """Probes of named gradients, in the order of their names."""
    return torch.stack([probe(name, gradients[name]) for name in sorted(gradients)])


def keyed(stream: str) -> torch.Generator:
    """The generator of `StepRandom(SEED)` for a stream at STEP."""
    digest = hashlib.blake2b(f"{SEED}/{STEP}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def scheduler(kind: str) -> dict[str, Any]:
    """Arguments of both models' scheduler."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": kind,
    }


def lora_names(unet: Any) -> Iterator[tuple[str, Tensor]]:
    """The LoRA of threestudio's U-Net, by the names of the adapted layers."""
    for name, processor in unet.attn_processors.items():
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            pair = getattr(processor, f"{layer}_lora")
            end = ".0" if layer == "to_out" else ""
            for part in ("down", "up"):
                weight = getattr(pair, part).weight
                yield f"{name.removesuffix('.processor')}.{layer}{end}.{part}", weight


def write_pipelines(folder: Path) -> None:
    """Save the two tiny Stable Diffusions, in the installed diffusers."""
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            **{"vocab_size": 5, "hidden_size": WIDTH, "intermediate_size": WIDTH},
            **{"num_hidden_layers": 1, "num_attention_heads": 2},
        )
    )
    vae = diffusers.AutoencoderKL(**VAE)
    fill(vae, "vae ")
    for name, kind in (("base", "epsilon"), ("other", "v_prediction")):
        unet = diffusers.UNet2DConditionModel(**UNET)
        fill(unet, f"{name} ")
        diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=text,
            tokenizer=None,
            unet=unet,
            scheduler=diffusers.DDPMScheduler(**scheduler(kind)),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / name)


class _Prompts:
    """Stands for threestudio's prompt processor; conditional first, as its own."""

    def get_text_embeddings(
        self, elevation: Tensor, *_: Any, view_dependent_prompting: bool
    ) -> Tensor:
        count = len(elevation)
        kind = "view" if view_dependent_prompting else "plain"
        both = [words(kind), words("negative")]
        return torch.cat([part.expand(count, -1, -1) for part in both])


def main(folder: Path) -> None:
    """Write the pipelines and the file."""
    threestudio: Any = importlib.import_module("threestudio")
    data: Any = importlib.import_module("threestudio.data.uncond")
    save_file: Any = importlib.import_module("safetensors.torch").save_file
    write_pipelines(folder)
    batch, wide = views(data), views(data, **WIDE)
    names = ("elevation", "azimuth", "camera_distances", "c2w")
    found = {name: batch[name].float().clone() for name in names}
    found |= {name: wide[name].float().clone() for name in ("fovy", "mvp_mtx")}
    found["perp neg/noise"] = perpendicular(threestudio, folder / "base")
    kind = threestudio.find("stable-diffusion-vsd-guidance")
    for case, settings in CASES.items():
        other = "other" if case == "two models" else "base"
        guidance = kind(
            {
                "pretrained_model_name_or_path": str(folder / "base"),
                "pretrained_model_name_or_path_lora": str(folder / other),
                "half_precision_weights": False,
                **settings,
            }
        )
        guidance.weights_dtype = guidance.camera_embedding.dtype = torch.float64
        for part in (guidance.unet, guidance.unet_lora, guidance.vae):
            part.double()
        for name, tensor in gradients(guidance, batch).items():
            found[f"{case}/{name}"] = tensor.detach().clone().contiguous()
    save_file(found, FILE)


def views(data: Any, **size: int) -> dict[str, Tensor]:
    """The cameras of a step, the same for any size, and what goes with them."""
    torch.manual_seed(0)
    config = data.RandomCameraDataModuleConfig(
        batch_size=VIEWS, camera_perturb=0.0, center_perturb=0.0, up_perturb=0.0, **size
    )
    # Elevations of points on the sphere: threestudio tosses an unseeded coin.
    with mock.patch("random.random", return_value=1.0):
        batch = data.RandomCameraIterableDataset(config).collate(None)
    return batch | {"c2w": batch["c2w"].double()}


def perpendicular(threestudio: Any, model: Path) -> Tensor:
    """The pretrained model's noise in variational score distillation, `use_perp_neg`.

    By the unified guidance: the one of VSD alone does not read that setting. One view
    at a time: of several, it gives the negative prompts of one the images of another.
    """
    processor = threestudio.find("stable-diffusion-prompt-processor")
    with (
        mock.patch.object(processor, "prepare_text_embeddings"),
        mock.patch.object(processor, "load_from_cache", lambda _, text: words(text)[0]),
    ):
        prompts = processor({"prompt": "a", "use_perp_neg": True})()
    guidance = threestudio.find("stable-diffusion-unified-guidance")(
        {
            "guidance_type": "vsd",
            "pretrained_model_name_or_path": str(model),
            "guidance_scale": SCALE,
            "half_precision_weights": False,
        }
    )
    guidance.pipe.unet.double()
    found = []
    for i, (x, t) in enumerate(zip(latents(), TIMESTEPS, strict=True)):
        camera = {
            name: torch.tensor(angles[i : i + 1]) for name, angles in ANGLES.items()
        }
        one = {**camera, "camera_distances": torch.ones(1)}
        found.append(
            guidance.get_eps_pretrain(x[None], torch.tensor([t]), prompts, **one)
        )
    return torch.cat(found)


def gradients(guidance: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses and gradients of threestudio's guidance."""
    lora = dict(lora_names(guidance.unet_lora))
    camera = dict(guidance.camera_embedding.module.named_parameters())
    with torch.no_grad():
        for name, tensor in lora.items():
            tensor.copy_(values(f"lora {name}", tensor.shape, 0.3))
    fill(guidance.camera_embedding.module, "camera ")
    rgb = images().double().requires_grad_(True)
    streams = iter(("latent", "noise", "lora-noise"))
    times = iter(("timestep", "lora-timestep"))

    def normal(like: Any, **_: Any) -> Tensor:
        shape = like.shape if isinstance(like, Tensor) else tuple(like)
        return torch.randn(shape, generator=keyed(next(streams))).double()

    def integer(low: int, high: int, size: Any, **_: Any) -> Tensor:
        return randint(low, high, tuple(size), generator=keyed(next(times)))

    randint = torch.randint
    posterior: Any = importlib.import_module("diffusers.models.vae")
    with (
        mock.patch("torch.randint", integer),
        mock.patch("torch.randn_like", normal),
        mock.patch.object(posterior, "randn_tensor", normal),
        mock.patch("random.random", return_value=1.0),  # the camera is not hidden
    ):
        out = guidance(rgb.permute(0, 2, 3, 1), _Prompts(), **batch)
    (image,) = torch.autograd.grad(out["loss_vsd"], rgb)
    learned = torch.autograd.grad(out["loss_lora"], [*lora.values(), *camera.values()])
    names = [*lora, *(f"camera.{name}" for name in camera)]
    found = dict(zip(names, learned, strict=True))
    return {
        "loss_vsd": out["loss_vsd"],
        "loss_lora": out["loss_lora"],
        "image": image.float(),
        "learned": probes(found),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
