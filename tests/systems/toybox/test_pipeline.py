from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils import logging
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from systems.toybox import WEIGHTS, classifier, pipeline
from systems.toybox.captions import vocabulary
from systems.toybox.model import (
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)
from systems.toybox.objects import COLOURS, OBJECTS

logging.disable_progress_bar()


@pytest.fixture(scope="module")
def prior() -> pipeline.ToyboxPipeline:
    return pipeline.load()


def test_a_saved_pipeline_loads_as_a_whole_and_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = pipeline.ToyboxPipeline(
        make_unet(), make_text_encoder(), make_tokenizer(), make_scheduler()
    )
    saved.save_pretrained(tmp_path)
    loaded = pipeline.load(tmp_path)
    for part in ("unet", "text_encoder"):
        before, after = getattr(saved, part), getattr(loaded, part)
        for name, value in before.state_dict().items():
            assert torch.equal(value, after.state_dict()[name])
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert unet.config["cross_attention_dim"] == 96
    CLIPTextModel.from_pretrained(tmp_path, subfolder="text_encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, subfolder="tokenizer")
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config["prediction_type"] == "v_prediction"
    text = "a red ice cream cone, side view"
    assert tokenizer(text).input_ids == saved.tokenizer(text).input_ids


def test_attention_to_the_text_is_at_8_by_8_only() -> None:
    unet = make_unet()
    assert unet.config["down_block_types"][2] == "CrossAttnDownBlock2D"
    assert sum("CrossAttn" in name for name in unet.config["down_block_types"]) == 1
    assert 3e6 < sum(p.numel() for p in unet.parameters()) < 5e6


def test_tokens_are_words() -> None:
    tokenizer = make_tokenizer()
    words = [*vocabulary()]
    ids = tokenizer(" ".join(words)).input_ids[1:-1]
    assert len(set(ids)) == len(words)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("a Red mug,side view").input_ids == (
        tokenizer("a red mug , side view").input_ids
    )


def test_unknown_words_are_refused_before_sampling(
    prior: pipeline.ToyboxPipeline,
) -> None:
    with pytest.raises(ValueError, match=r"`dragon`.*hub model"):
        prior("a red dragon")


def test_a_prompt_that_is_too_long_is_refused(prior: pipeline.ToyboxPipeline) -> None:
    with pytest.raises(ValueError, match=r"has 20 words and commas.*at most 14"):
        prior("a red " * 10)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pipeline.*systems\.toybox\.train"):
        pipeline.load(tmp_path)


def test_the_seed_decides_the_pictures(prior: pipeline.ToyboxPipeline) -> None:
    once, again, other = (
        pipeline.draw(prior, ["a red cube"], seed, num_inference_steps=2)
        for seed in (1, 1, 2)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_guidance_extrapolates_from_the_empty_prompt(
    prior: pipeline.ToyboxPipeline,
) -> None:
    words, blank = prior.encode(["a red cube"]), prior.encode([""])
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(600)
    given = prior.unet(x, t, words).sample
    without = prior.unet(x, t, blank).sample
    torch.testing.assert_close(prior.velocity(x, t, words, blank, 1.0), given)
    torch.testing.assert_close(
        prior.velocity(x, t, words, blank, 3.0, rescale=0.0),
        without + 3 * (given - without),
        atol=1e-4,
        rtol=1e-4,
    )


def test_it_answers_as_diffusers_pipelines_do(prior: pipeline.ToyboxPipeline) -> None:
    def ask(kind: str, **more: Any) -> Any:
        noise = torch.Generator().manual_seed(0)
        more = {"num_inference_steps": 2, "generator": noise, **more}
        return prior("a red cube", output_type=kind, **more)

    tensor = ask("pt").images
    assert torch.equal(torch.from_numpy(ask("np").images).movedim(-1, 1), tensor)
    assert torch.equal((ask("latent").images / 2 + 0.5).clamp(0, 1), tensor)
    (picture,) = ask("pil", return_dict=False)[0]
    assert np.abs(np.asarray(picture) / 255 - ask("np").images[0]).max() <= 0.5 / 255
    start = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ask("pt", latents=start).images, tensor)
    assert not torch.equal(ask("pt", eta=1.0).images, tensor)
    assert len(ask("pt", num_images_per_prompt=2).images) == 2


def test_shipped_weights_draw_what_they_are_asked_for(
    prior: pipeline.ToyboxPipeline,
) -> None:
    """Five of six prompts; by chance it would be one object in 16, one colour in 8."""
    pairs = [
        *(("green", "tree"), ("red", "mushroom"), ("blue", "torus")),
        *(("red", "cube"), ("purple", "snowman"), ("blue", "car")),
    ]
    pictures = pipeline.draw(prior, [f"a {c} {n}, side view" for c, n in pairs], 0)
    seen = classifier.load().judge(pictures)
    objects = [list(OBJECTS)[i] for i in seen.objects.tolist()]
    colours = [list(COLOURS)[i] for i in seen.colours.tolist()]
    assert sum(o == n for o, (_, n) in zip(objects, pairs, strict=True)) >= 5
    assert sum(k == c for k, (c, _) in zip(colours, pairs, strict=True)) >= 5


def test_shipped_weights_are_small() -> None:
    size = sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file())
    assert size < 16e6
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt")]
