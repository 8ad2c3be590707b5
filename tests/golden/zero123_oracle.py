"""threestudio's own Zero-1-to-3 guidance on a tiny model in the authors' layout.

    PYTHONPATH=<threestudio>:. python tests/golden/zero123_oracle.py <threestudio>

writes `zero123.safetensors` beside this file. Needs threestudio (28d9d80, December
2024), einops, kornia, openai-clip and opencv; what else it imports is not used and
replaced by mocks. The architecture is that of its own configuration file but for the
sizes. Weights, images and noise are functions of their names, so that the file holds
results only: a digest of the names and shapes of the weights, the conditions, and
probes of what is large (`vsd_oracle.probe`).
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.golden.vsd_oracle import probe, values

FILE = Path(__file__).parent / "zero123.safetensors"
KINDS = ("zero123", "stable-zero123")
SCALE, SIZE = 3.0, 20
ELEVATION, AZIMUTH, DISTANCE = (30.0, -10.0), (170.0, -45.0), (3.0, 4.5)
REFERENCE = {
    "cond_elevation_deg": 5.0,
    "cond_azimuth_deg": -170.0,
    "cond_camera_distance": 3.8,
}
TIMESTEPS = (123, 789)
WIDTH, CHANNELS = 16, 32
CLIP: Mapping[str, int] = {
    "embed_dim": WIDTH,
    "image_resolution": 224,
    "vision_layers": 2,
    "vision_width": 64,
    "vision_patch_size": 56,
    "context_length": 2,
    "vocab_size": 2,
    "transformer_width": 16,
    "transformer_heads": 1,
    "transformer_layers": 1,
}
PLACEHOLDERS = (
    "matplotlib",
    "matplotlib.pyplot",
    "pkg_resources",
    "taming",
    "taming.modules",
    "taming.modules.vqvae",
    "taming.modules.vqvae.quantize",
    "tinycudann",
    "torchvision",
    "torchvision.transforms",
    "torchvision.utils",
    "typeguard",
)


def weight(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The weight of a name in the authors' layout; vectors are biases or scales."""
    if len(shape) > 1:
        fan = torch.Size(shape[1:]).numel()
        return values(name, shape, fan**-0.5)
    return values(name, shape, 0.1) + (not name.endswith("bias"))


def digest(weights: Mapping[str, Tensor]) -> Tensor:
    """32 bytes that tell names and shapes apart."""
    text = "\n".join(f"{name} {tuple(weights[name].shape)}" for name in sorted(weights))
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


def picture() -> Tensor:
    """The reference image with alpha, 512×512 bytes, rows first.

    Blocks of 2×2 pixels are of one colour, so that resizing does not round bytes.
    """
    smooth = values("picture", (4, 8, 8), 0.5)[None] + 0.5
    middle = torch.nn.functional.interpolate(smooth, (256, 256), mode="bilinear")
    large = torch.nn.functional.interpolate(middle, (512, 512), mode="nearest")
    return (large[0].permute(1, 2, 0) * 255).round().byte()


def images() -> Tensor:
    """Rendered images from 0 to 1, shape ``(2, 3, SIZE, SIZE)``."""
    return values("images", (2, 3, SIZE, SIZE), 0.5) + 0.5


def noise() -> Tensor:
    """The noise that the latents are given."""
    return values("noise", (2, 4, 32, 32), 1.7)


def posterior() -> torch.Generator:
    """The generator of the autoencoder's noise."""
    return torch.Generator().manual_seed(7)


def weights_of(model: Any) -> dict[str, Tensor]:
    """Weights of the parts that we read, and moving averages of the U-Net.

    The latter have the names' values; without them, results would differ.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.diffusion_model."):
            flat = "model_ema." + name.removeprefix("model.").replace(".", "")
            found[name] = torch.zeros_like(tensor)
            found[flat] = weight(name, tensor.shape)
        elif name.startswith(
            ("first_stage_model.", "cond_stage_model.model.visual.", "cc_projection.")
        ):
            found[name] = weight(name, tensor.shape)
    return found


def configuration(root: Path) -> Any:
    """The published configuration, with small sizes."""
    omegaconf: Any = importlib.import_module("omegaconf")
    file = root / "load" / "zero123" / "sd-objaverse-finetune-c_concat-256.yaml"
    config = omegaconf.OmegaConf.load(file)
    unet = config.model.params.unet_config.params
    unet.model_channels, unet.channel_mult, unet.num_res_blocks = CHANNELS, [1, 2], 1
    unet.attention_resolutions, unet.context_dim = [1], WIDTH
    unet.use_checkpoint = False
    vae = config.model.params.first_stage_config.params.ddconfig
    vae.ch, vae.ch_mult, vae.num_res_blocks = CHANNELS, [1, 1, 1, 2], 1
    return config


def main(root: Path) -> None:
    """Write the file."""
    for name in (
        "pytorch_lightning",
        "kornia",
        "diffusers",
        "transformers",
        "jaxtyping",
    ):
        importlib.import_module(name)  # before they find the placeholders
    for name in PLACEHOLDERS:
        sys.modules[name] = mock.MagicMock()
    resources: Any = sys.modules["pkg_resources"]
    importlib.import_module("packaging.version")
    resources.packaging = importlib.import_module("packaging")
    for name in ("threestudio", "threestudio.models", "threestudio.models.guidance"):
        package: Any = types.ModuleType(name)  # its own imports everything
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        package.register = lambda name: lambda kind: kind
        package.info = print
        sys.modules[name] = package
    clip: Any = importlib.import_module("clip.model")
    clip_load: Any = importlib.import_module("clip")
    clip_load.load = lambda **_: (clip.CLIP(**CLIP).float(), None)
    ddpm: Any = importlib.import_module("extern.ldm_zero123.models.diffusion.ddpm")
    projection = torch.nn.Linear(WIDTH + 4, WIDTH)
    init = ddpm.LatentDiffusion.__init__

    def small(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.cc_projection = projection  # 768 wide in the code

    found: dict[str, Tensor] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(ddpm.LatentDiffusion, "__init__", small),
    ):
        for kind in KINDS:
            guidance = load(root, Path(folder), kind)
            for name, tensor in results(guidance).items():
                found[f"{kind}/{name}"] = tensor.detach().clone().contiguous()
        path = Path(folder) / "model.ckpt"
        stored = torch.load(path, weights_only=True)["state_dict"]
    found["weights"] = digest({k: v for k, v in stored.items() if "ema" not in k})
    save_file: Any = importlib.import_module("safetensors.torch").save_file
    save_file(found, FILE)


def load(root: Path, folder: Path, kind: str) -> Any:
    """The guidance of threestudio, from files in its own formats."""
    cv2: Any = importlib.import_module("cv2")
    omegaconf: Any = importlib.import_module("omegaconf")
    name = kind.replace("-", "_")
    module: Any = importlib.import_module(
        f"threestudio.models.guidance.{name}_guidance"
    )
    config, ckpt, image = (folder / f"model.{end}" for end in ("yaml", "ckpt", "png"))
    omegaconf.OmegaConf.save(configuration(root), config)
    cv2.imwrite(str(image), cv2.cvtColor(picture().numpy(), cv2.COLOR_RGBA2BGRA))
    if not ckpt.exists():
        model = module.instantiate_from_config(configuration(root).model)
        torch.save({"state_dict": weights_of(model)}, ckpt)
    made = {"zero123": "Zero123Guidance", "stable-zero123": "StableZero123Guidance"}
    with mock.patch(
        "threestudio.utils.base.get_device", return_value=torch.device("cpu")
    ):
        return getattr(module, made[kind])(
            {
                "pretrained_model_name_or_path": str(ckpt),
                "pretrained_config": str(config),
                "vram_O": False,
                "cond_image_path": str(image),
                "guidance_scale": SCALE,
                **REFERENCE,
            }
        )


def results(guidance: Any) -> dict[str, Tensor]:
    """Conditions, the guided noise, and the gradient of rendered images."""
    where = [torch.tensor(part) for part in (ELEVATION, AZIMUTH, DISTANCE)]
    cond = guidance.get_cond(*where)
    rendered = images().requires_grad_(True)
    seen = {}
    apply = guidance.model.apply_model

    def watched(x: Tensor, t: Tensor, given: Any) -> Tensor:
        seen["output"] = apply(x, t, given)
        return seen["output"]

    drawn = torch.randn((2, 4, 32, 32), generator=posterior())
    with (
        mock.patch.object(guidance.model, "apply_model", watched),
        mock.patch("torch.randint", return_value=torch.tensor(TIMESTEPS)),
        mock.patch("torch.randn_like", return_value=noise()),
        mock.patch("torch.randn", return_value=drawn),
    ):
        out = guidance(rendered.permute(0, 2, 3, 1), *where)
    out["loss_sds"].backward()
    assert rendered.grad is not None
    plain, given = seen["output"].chunk(2)
    guided = plain + SCALE * (given - plain)
    return {
        "image": probe("image", guidance.rgb_256),
        "embeds": cond["c_crossattn"][0][2:, 0],
        "latent": probe("latent", guidance.c_concat),
        "noise": probe("noise", guided),
        "gradient": probe("gradient", rendered.grad),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
