"""Loops of diffusers pipelines: their own result at tolerance 0, or a refusal."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreampropeller.adapters.diffusers import sample

diffusers: Any = importlib.import_module("diffusers")

# Of diffusers' own multistep scheduler under numpy 2, not of ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
STEPS = 6
PROMPT = {
    "prompt_embeds": torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(5)),
    "negative_prompt_embeds": torch.zeros(1, 12, 16),
}
IMAGE = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
MASK = Image.fromarray((np.arange(256).reshape(16, 16) % 16 < 8).astype(np.uint8) * 255)


def unet(**settings: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        **{"in_channels": 4, **settings},
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def text(kind: Any = CLIPTextModel, **settings: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **settings,
    )
    return kind(config)


def vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        latent_channels=4,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def ddim(kind: Any = diffusers.DDIMScheduler) -> Any:
    return kind(prediction_type="v_prediction", steps_offset=1, clip_sample=False)


def pipeline(kind: Any, scheduler: Any = None, **parts: Any) -> Any:
    parts = {"unet": unet(), "safety_checker": None, "feature_extractor": None, **parts}
    whole = kind(
        vae=vae(),
        text_encoder=text(),
        tokenizer=None,
        scheduler=scheduler or ddim(),
        requires_safety_checker=False,
        **parts,
    )
    whole.set_progress_bar_config(disable=True)
    return whole


def sdxl() -> Any:
    whole = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=text(CLIPTextModelWithProjection, projection_dim=16),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            transformer_layers_per_block=1,
        ),
        scheduler=ddim(),
    )
    whole.set_progress_bar_config(disable=True)
    return whole


def check(whole: Any, **arguments: Any) -> None:
    """The pipeline's own image, and `sample`'s at tolerance 0."""
    wanted = {"num_inference_steps": STEPS, "output_type": "np", **PROMPT, **arguments}
    own = whole(generator=torch.Generator().manual_seed(0), **wanted).images
    solutions: list[Any] = []
    made = sample(
        whole,
        window=4,
        tolerance=0,
        generator=torch.Generator().manual_seed(0),
        on_solution=solutions.append,
        **wanted,
    ).images
    assert (made == own).all()
    assert solutions


@pytest.mark.parametrize("strength", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++"])
def test_image_to_image_takes_the_steps_that_are_left(
    strength: float, scheduler: str
) -> None:
    kinds: Any = {
        "ddim": diffusers.DDIMScheduler,
        "ddpm": diffusers.DDPMScheduler,
        "dpm++": diffusers.DPMSolverMultistepScheduler,
    }
    whole = pipeline(
        diffusers.StableDiffusionImg2ImgPipeline,
        kinds[scheduler].from_config(ddim().config),
    )
    check(whole, image=IMAGE, strength=strength)


@pytest.mark.parametrize("end", [None, 0.3, 0.6])
def test_sdxl_ends_where_a_refiner_begins(end: float | None) -> None:
    pooled = torch.randn(1, 16, generator=torch.Generator().manual_seed(4))
    more = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
    check(sdxl(), denoising_end=end, height=16, width=16, **more)


def test_compiled_unets() -> None:
    torch._dynamo.reset()
    whole = pipeline(diffusers.StableDiffusionPipeline)
    whole.unet = torch.compile(whole.unet, backend="eager")
    check(whole)
    whole = pipeline(diffusers.StableDiffusionPipeline)
    whole.unet.compile(backend="eager")
    check(whole)
    assert whole.unet._compiled_call_impl is not None


def test_a_setting_of_the_scheduler_that_is_left_alone_passes() -> None:
    class Explicit(diffusers.StableDiffusionPipeline):
        def prepare_extra_step_kwargs(self, *given: Any) -> dict[str, Any]:
            more = super().prepare_extra_step_kwargs(*given)
            return {**more, "use_clipped_model_output": None}

    check(pipeline(Explicit))


def test_a_condition_that_stays_the_same_passes() -> None:
    whole = pipeline(diffusers.StableDiffusionPipeline)
    check(whole, guidance_rescale=0.5)
    check(whole, guidance_scale=1.0)


def controlled() -> tuple[Any, dict[str, Any]]:
    control = diffusers.ControlNetModel.from_unet(
        unet(), conditioning_embedding_out_channels=(8, 8)
    )
    torch.nn.init.ones_(control.controlnet_mid_block.weight)
    kind = diffusers.StableDiffusionControlNetPipeline
    return pipeline(kind, controlnet=control), {"image": IMAGE}


def pasted() -> tuple[Any, dict[str, Any]]:
    kind = diffusers.StableDiffusionInpaintPipeline
    return pipeline(kind), {"image": IMAGE, "mask_image": MASK, "strength": 1.0}


def masked() -> tuple[Any, dict[str, Any]]:
    kind = diffusers.StableDiffusionInpaintPipeline
    whole = pipeline(kind, unet=unet(in_channels=9))
    return whole, {"image": IMAGE, "mask_image": MASK, "strength": 1.0}


def self_attention() -> tuple[Any, dict[str, Any]]:
    whole = pipeline(diffusers.StableDiffusionSAGPipeline, image_encoder=None)
    return whole, {"sag_scale": 0.5}


def perturbed() -> tuple[Any, dict[str, Any]]:
    whole = pipeline(
        diffusers.StableDiffusionPAGPipeline,
        image_encoder=None,
        pag_applied_layers="mid",
    )
    return whole, {"pag_scale": 2.0}


def paradigms() -> tuple[Any, dict[str, Any]]:
    kind = diffusers.StableDiffusionParadigmsPipeline
    return pipeline(kind, ddim(diffusers.DDIMParallelScheduler)), {}


def never() -> tuple[Any, dict[str, Any]]:
    class Never(diffusers.StableDiffusionPipeline):
        def __call__(self, **arguments: Any) -> Any:
            self.scheduler.set_timesteps(arguments["num_inference_steps"])
            return torch.zeros(1)

    return pipeline(Never), {}


def fading() -> tuple[Any, dict[str, Any]]:
    class Fading(diffusers.StableDiffusionPipeline):
        @property
        def guidance_scale(self) -> float:
            self.asked = getattr(self, "asked", 0) + 1
            return 7.5 / self.asked

    return pipeline(Fading), {}


def drawing() -> tuple[Any, dict[str, Any]]:
    class Drawing(diffusers.StableDiffusionPipeline):
        def progress_bar(self, *given: Any, **more: Any) -> Any:
            step = self.scheduler.step

            def noisy(*values: Any, generator: Any = None, **others: Any) -> Any:
                torch.randn(1, generator=generator)
                return step(*values, generator=generator, **others)

            self.scheduler.step = noisy
            return super().progress_bar(*given, **more)

    return pipeline(Drawing, diffusers.DDPMScheduler.from_config(ddim().config)), {}


def caching() -> tuple[Any, dict[str, Any]]:
    """Keeps features over three steps, as DeepCache does."""
    whole, kept = pipeline(diffusers.StableDiffusionPipeline), {"calls": 0}

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        kept["calls"] += 1
        if kept["calls"] % 3 == 1:
            kept["features"] = output
        return kept["features"]

    whole.unet.mid_block.register_forward_hook(hook)
    return whole, {}


@pytest.mark.filterwarnings("ignore")  # of diffusers' own, older pipelines
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (controlled, "changes `.*block.*residuals?` from step to step"),
        (pasted, "changes the latents between two steps"),
        (masked, "more than the latents"),
        (self_attention, "reads more of its U-Net than its output"),
        (perturbed, "more than the latents|something else than"),
        (paradigms, "more than once per step"),
        (never, "made 0 calls of `unet`"),
        (fading, "something else than classifier-free guidance"),
        (drawing, "the state of its generator"),
        (caching, r"changed `kept\.calls`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_loops_that_do_more_are_refused(make: Any, message: str) -> None:
    whole, arguments = make()
    wanted = {"num_inference_steps": STEPS, "output_type": "np", **PROMPT, **arguments}
    with pytest.raises(ValueError, match=message):
        sample(whole, generator=torch.Generator().manual_seed(0), **wanted)
    assert "forward" not in vars(whole.unet)
    assert "step" not in vars(whole.scheduler) or make is drawing
