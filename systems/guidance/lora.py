r"""A LoRA of a U-Net that learns the score of the rendered images.

A layer $W x$ becomes $W x + \tfrac{\alpha}{r} B A x$ with trained A and B of rank r (E.
Hu et al., 2021, arXiv 2106.09685), and B is zero at first. The frozen weights are
those of the prior: they are shared, not copied.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from jaxtyping import Float
from torch import Tensor, nn

from dreampropeller import StepRandom
from systems.guidance.priors import Prior
from systems.scene.cameras import Cameras
from systems.toybox.conditions import Conditions

MATRIX = 16
"""Entries of a camera's matrix."""
CHEAP = 64
"""A rank that costs little, whatever the width of the layers."""
NEAR, FAR = 0.01, 100.0
"""Distances of the clipping planes of `to_clip_space`, as in threestudio."""


class Lora(nn.Module):
    """Noise prediction by a U-Net with a trained LoRA, given the camera of the view.

    The camera enters the class embedding: as a matrix through a small trained network,
    or in the model's own format if it takes cameras. Its trainable parameters are those
    of the LoRA and of that network.

    Args:
        prior: The model to adapt; it is not changed.
        rank: Rank r.
        alpha: Scale α of the LoRA; α = r leaves it unscaled.
        targets: Endings of the names of the adapted layers, such as "to_q".
        camera: Condition on the camera: "extrinsics", "mvp" or "none".

    Raises:
        ValueError: A target matches no layer that can be adapted, the rank is above
            the width of all of them, or the camera cannot enter the model.
    """

    def __init__(
        self,
        prior: Prior,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        camera: str = "extrinsics",
    ) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        _check_targets(prior.unet, targets, rank)
        tensors = itertools.chain(prior.unet.parameters(), prior.unet.buffers())
        unet = copy.deepcopy(prior.unet, {id(tensor): tensor for tensor in tensors})
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
            target_modules=list(targets),
            init_lora_weights="gaussian",
        )
        self.unet: Any = inject_adapter_in_model(config, unet)
        self._projects = camera != "none" and not prior.takes_conditions
        self._camera = camera
        if self._projects:
            self.unet.class_embedding = _Projection(_embedding_width(unet))
        self.to(prior.device)
        for parameter in self.parameters():
            if parameter.requires_grad:  # trained in single precision, as usual
                parameter.data = parameter.data.float()
        # Not a module: it has no parameters of its own.
        self.prior = copy.copy(prior)
        self.prior.unet = self.unet

    def reset(self, random: StepRandom) -> None:
        """Initialise the trained parameters from the seed of the run."""
        from peft.tuners.lora import LoraLayer

        with random.scope(0, "lora"):
            for layer in self.unet.modules():
                if isinstance(layer, LoraLayer):
                    layer.reset_lora_parameters("default", "gaussian")
            if self._projects:
                self.unet.class_embedding.reset()

    def conditions(self, cameras: Cameras, known: bool = True) -> Conditions | None:
        """The cameras in the U-Net's format.

        Args:
            cameras: Cameras of the views.
            known: False for the unconditional branch, which does not see the camera.
        """
        if self.prior.takes_conditions:
            seen = cameras if known and self._camera != "none" else None
            return Conditions.of(len(cameras), self.unet.config["sample_size"], seen)
        if not self._projects:
            return None
        matrix = (to_clip_space if self._camera == "mvp" else camera_to_world)(cameras)
        matrix = matrix.flatten(1)
        return Conditions(matrix if known else 0 * matrix, None)

    def output(
        self, noisy: Tensor, t: Tensor, words: Tensor, conditions: Conditions | None
    ) -> Float[Tensor, "views channels rows columns"]:
        """The output of the adapted U-Net, as `Prior.output`."""
        return self.prior.output(noisy, t, words, conditions)

    def forward(
        self, noisy: Tensor, t: Tensor, words: Tensor, conditions: Conditions | None
    ) -> Float[Tensor, "views channels rows columns"]:
        """The noise that the adapted U-Net predicts."""
        output = self.output(noisy, t, words, conditions)
        return self.prior.to_noise(output, noisy, t)

    def target(
        self, x: Tensor, noise: Tensor, t: Tensor
    ) -> Float[Tensor, "views channels rows columns"]:
        r"""What the output should be: ε, $v = \alpha_t\epsilon - \sigma_t x$, or x."""
        kind = self.prior.prediction_type
        if kind == "epsilon":
            return noise
        if kind != "v_prediction":
            return x
        alpha, sigma = self.prior.scales(t)
        return alpha * noise - sigma * x


class _Projection(nn.Module):
    """Two layers from a camera's matrix to the embedding of the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = TimestepEmbedding(MATRIX, width)

    def reset(self) -> None:
        for layer in (self.network.linear_1, self.network.linear_2):
            layer.reset_parameters()

    def forward(self, labels: Tensor) -> Tensor:
        return self.network(labels.to(self.network.linear_1.weight.dtype))


def camera_to_world(cameras: Cameras) -> Float[Tensor, "views 4 4"]:
    """Camera-to-world matrices: columns right, up, back and position."""
    position, right, up, forward = cameras.axes()
    matrix = torch.zeros(len(cameras), 4, 4)
    matrix[:, :3] = torch.stack([right, up, -forward, position], -1)
    matrix[:, 3, 3] = 1
    return matrix


def to_clip_space(cameras: Cameras) -> Float[Tensor, "views 4 4"]:
    r"""From world to clip space, P (camera-to-world)⁻¹, where y points down.

    With field of view φ, width over height a, near plane n and far plane f

    $$P = \begin{pmatrix} \cot(\varphi/2)/a & & & \\ & -\cot(\varphi/2) & & \\
      & & -\frac{f + n}{f - n} & -\frac{2fn}{f - n} \\ & & -1 & \end{pmatrix}$$

    (threestudio's `mvp_mtx`).
    """
    scale = 1 / torch.tan(cameras.fov.deg2rad() / 2)
    aspect = torch.ones_like(scale) if cameras.aspect is None else cameras.aspect
    projection = torch.zeros(len(cameras), 4, 4)
    projection[:, 0, 0] = scale / aspect
    projection[:, 1, 1] = -scale
    projection[:, 2, 2] = -(FAR + NEAR) / (FAR - NEAR)
    projection[:, 2, 3] = -2 * FAR * NEAR / (FAR - NEAR)
    projection[:, 3, 2] = -1
    return projection @ torch.linalg.inv(camera_to_world(cameras))


def _embedding_width(unet: Any) -> int:
    """Width of the timestep embedding, to which the camera is added."""
    if getattr(unet, "class_embedding", "missing") is not None or not hasattr(
        unet, "time_embedding"
    ):
        raise ValueError(
            f"The camera cannot enter this `{type(unet).__name__}`: it has no class "
            "embedding that is free for it. Write "
            "`system.guidance.camera_condition_type=none`, or name another model in "
            "`pretrained_model_name_or_path_lora`."
        )
    return unet.time_embedding.linear_2.out_features


def _check_targets(unet: nn.Module, targets: Sequence[str], rank: int) -> None:
    """Refuse targets that peft cannot adapt, and a rank that only costs time.

    Raises:
        ValueError: Says what to write instead.
    """
    modules = {name: module for name, module in unet.named_modules() if name}
    layers = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)}
    known = ", ".join(sorted(set(map(_ending, layers))))

    def ends(names: Iterable[str], *endings: str) -> list[str]:
        ways = tuple(f".{ending}" for ending in endings)
        return [name for name in names if f".{name}".endswith(ways)]

    idle = [target for target in targets if not ends(layers, target)]
    if idle or not targets:
        named = ", ".join(f"`{target}`" for target in idle) or "nothing"
        raise ValueError(
            f"`lora_targets` names {named}, which matches no layer of the U-Net: write "
            f"some of {known}."
        )
    for target in targets:
        others = [name for name in ends(modules, target) if name not in layers]
        if others:
            raise ValueError(
                f"`lora_targets` names `{target}`, which also matches `{others[0]}`, "
                f"which is no single layer: write more of the name, some of {known}."
            )
    widest = max(_width(layers[name]) for name in ends(layers, *targets))
    if rank > max(widest, CHEAP):
        raise ValueError(
            f"`lora_rank` is {rank}, and the widest layer of `lora_targets` has width "
            f"{widest}, beyond which a rank adds nothing: write at most "
            f"{max(widest, CHEAP)}; threestudio takes 4."
        )


def _width(layer: nn.Module) -> int:
    """The largest rank that the weight of a layer can have."""
    weight = layer.get_parameter("weight")
    return min(len(weight), weight[0].numel())


def _ending(name: str) -> str:
    """The last part of a layer's name; with the one before where it is a number."""
    head, _, last = name.rpartition(".")
    return f"{head.rpartition('.')[2]}.{last}" if last.isdigit() else last
