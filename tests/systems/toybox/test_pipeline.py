import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils import logging
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from dreampropeller.adapters.diffusers import sample
from systems.scene.cameras import Cameras
from systems.toybox import WEIGHTS, classifier, pipeline
from systems.toybox.captions import vocabulary
from systems.toybox.conditions import (
    CAMERA,
    Conditions,
    labels,
    ray_maps,
    to_blocks,
    to_images,
)
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


@pytest.fixture(scope="module")
def second() -> pipeline.ToyboxPipeline:
    """The second prior, small and untrained."""
    torch.manual_seed(0)
    made = pipeline.ToyboxPipeline(
        make_unet((8, 16, 16)), make_text_encoder(), make_tokenizer(), make_scheduler()
    )
    made.unet.eval()
    made.text_encoder.eval()
    return made


def _cameras(*azimuths: float) -> Cameras:
    one = torch.ones(len(azimuths))
    return Cameras(torch.tensor(azimuths), 20 * one, 2.4 * one, 50 * one)


def test_a_saved_pipeline_loads_as_a_whole_and_in_parts(
    second: pipeline.ToyboxPipeline, tmp_path: Path
) -> None:
    second.save_pretrained(tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    loaded = pipeline.load(tmp_path)
    for part in ("unet", "text_encoder"):
        before, after = getattr(second, part), getattr(loaded, part)
        for name, value in before.state_dict().items():
            assert torch.equal(value, after.state_dict()[name])
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert unet.config["in_channels"] == 30
    CLIPTextModel.from_pretrained(tmp_path, subfolder="text_encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, subfolder="tokenizer")
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config["prediction_type"] == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, second.scheduler.alphas_cumprod)
    text = "a red ice cream cone with white spots, side view"
    assert tokenizer(text).input_ids == second.tokenizer(text).input_ids


def test_blocks_hold_the_pixels_of_an_image() -> None:
    images = torch.rand(2, 3, 64, 64)
    blocks = to_blocks(images)
    assert torch.equal(to_images(blocks), images)
    assert torch.equal(
        blocks[:, 4:8, 5, 9].flatten(1), images[:, 1, 10:12, 18:20].flatten(1)
    )


def test_camera_and_image_change_the_second_priors_images(
    second: pipeline.ToyboxPipeline,
) -> None:
    def ask(**conditions: Any) -> torch.Tensor:
        return pipeline.draw(
            second, ["a red mug", "a red mug"], 0, num_inference_steps=2, **conditions
        )

    plain = ask()
    assert plain.shape == (2, 3, 64, 64)
    # A fresh model's class embedding is random: it does tell cameras apart.
    front = ask(camera=_cameras(0.0))
    assert torch.equal(front, ask(camera=_cameras(0.0, 0.0)))
    each = ask(camera=_cameras(0.0, 90.0))
    assert torch.equal(each[0], front[0])
    assert not torch.equal(each[1], front[1])
    assert not torch.equal(front, plain)
    image = torch.rand(1, 3, 50, 50, generator=torch.Generator().manual_seed(1))
    shown = ask(image=image, camera=_cameras(30.0), image_camera=_cameras(0.0))
    assert not torch.equal(shown, ask(image=image, camera=_cameras(30.0)))
    as_pil = ask(
        image=transforms(image), camera=_cameras(30.0), image_camera=_cameras(0.0)
    )
    torch.testing.assert_close(as_pil, shown, atol=0.02, rtol=0)


def transforms(image: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image[0] * 255).byte().permute(1, 2, 0).numpy())


def test_both_branches_of_text_guidance_keep_the_camera(
    second: pipeline.ToyboxPipeline,
) -> None:
    words, blank = second.encode(["a red cube"]), second.encode([""])
    x = torch.randn(1, 12, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(600)
    conditions = second.conditions(1, _cameras(70.0), torch.rand(1, 3, 64, 64))
    assert conditions is not None
    seen: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        del module
        seen.append(kwargs["class_labels"])

    hooks = [
        second.unet.register_forward_pre_hook(record, with_kwargs=True),
        second.unet.conv_in.register_forward_pre_hook(
            lambda module, args: shown.append(args[0])
        ),
    ]
    second.velocity(x, t, words, blank, 3.0, conditions=conditions)
    without, given = seen[0]
    assert torch.equal(without[: 1 + CAMERA], given[: 1 + CAMERA])
    assert without[0] == given[0] == 1
    assert (without[-1], given[-1]) == (0, 1)
    rays = ray_maps(_cameras(70.0), 32).expand(2, -1, -1, -1)
    torch.testing.assert_close(shown[0][:, 24:], rays)
    assert (shown[0][0, 12:24] == 0).all()
    assert conditions.reference is not None
    assert torch.equal(shown[0][1:, 12:24], conditions.reference)
    image = torch.rand(1, 3, 64, 64)
    second.velocity(
        *(x, t, words, blank, 3.0),
        conditions=second.conditions(1, _cameras(70.0), image, _cameras(10.0)),
    )
    for hook in hooks:
        hook.remove()
    rays = ray_maps(_cameras(70.0), 32, _cameras(10.0))
    assert torch.equal(shown[1][1:, 24:], rays)
    assert (shown[1][0, 12:] == 0).all()  # neither image nor a camera relative to it
    # A relative camera means nothing without its image.
    relative = Conditions.of(
        1, 32, _cameras(70.0), torch.rand(1, 3, 64, 64), _cameras(0.0)
    )
    assert (relative.without_image().labels == 0).all()
    assert relative.labels[0, 1 + CAMERA] == 1
    # One camera to look from, several reference images.
    several = torch.rand(2, 3, 64, 64)
    moved = Conditions.of(2, 32, _cameras(70.0), several, _cameras(0.0, 70.0)).labels
    assert torch.equal(moved[:1], relative.labels)
    assert not torch.equal(moved[1], moved[0])


def test_a_window_of_samples_of_a_camera_is_the_pipelines_own(
    second: pipeline.ToyboxPipeline,
) -> None:
    """Parallel sampling sees the noisy image alone in the U-Net's input."""

    def ask(call: Any, **options: Any) -> torch.Tensor:
        more = {"num_inference_steps": 5, "output_type": "pt", **options}
        dice = torch.Generator().manual_seed(0)
        return call("a red mug", generator=dice, camera=_cameras(70.0), **more).images

    window = functools.partial(sample, second, window=3, tolerance=0.0)
    assert torch.equal(ask(window), ask(second))


def test_conditions_that_make_no_sense_are_refused(
    prior: pipeline.ToyboxPipeline, second: pipeline.ToyboxPipeline
) -> None:
    with pytest.raises(ValueError, match="takes no `camera`"):
        prior("a red cube", camera=_cameras(0.0))
    with pytest.raises(ValueError, match="`camera` holds 3 views for 2 images"):
        second(["a red cube"] * 2, camera=_cameras(0.0, 1.0, 2.0))
    with pytest.raises(ValueError, match="give `image` and `camera` too"):
        second("a red cube", image_camera=_cameras(0.0))


def test_cameras_outside_the_training_range_are_warned_about() -> None:
    far = Cameras(*(torch.tensor([v]) for v in (0.0, 20.0, 1.5, 50.0)))
    with pytest.warns(UserWarning, match=r"distance 2.1 to 2.7, .* asked for 1.5"):
        Conditions.of(1, 32, far)
    assert torch.equal(
        Conditions.of(1, 32, _cameras(500.0)).labels, labels(1, _cameras(500.0))
    )


def test_attention_to_the_text_is_at_8_by_8_only() -> None:
    unet = make_unet()
    assert unet.config["down_block_types"][2] == "CrossAttnDownBlock2D"
    assert sum("CrossAttn" in name for name in unet.config["down_block_types"]) == 1
    assert 3e6 < sum(p.numel() for p in unet.parameters()) < 5e6


def test_the_second_prior_fits_24_megabytes_in_half_precision() -> None:
    parts = (make_unet(), make_text_encoder())
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 24e6


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


def test_prompts_are_read_as_captions(prior: pipeline.ToyboxPipeline) -> None:
    written = ["Red Mugs!", "a DSLR photo of a red mug, 8k"]
    assert torch.equal(prior.encode(written), prior.encode(["a red mug"] * 2))


def test_the_first_prior_keeps_to_its_own_words(
    prior: pipeline.ToyboxPipeline,
) -> None:
    assert len(prior.known.objects) == 16
    with pytest.raises(ValueError, match=r"`teapot` \(the second one, `toybox2`, does"):
        prior.encode(["a red teapot"])


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pipeline.*systems\.toybox train"):
        pipeline.load(tmp_path)


def test_the_seed_decides_the_images(prior: pipeline.ToyboxPipeline) -> None:
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
    (image,) = ask("pil", return_dict=False)[0]
    assert np.abs(np.asarray(image) / 255 - ask("np").images[0]).max() <= 0.5 / 255
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
    images = pipeline.draw(prior, [f"a {c} {n}, side view" for c, n in pairs], 0)
    seen = classifier.load().classify(images)
    objects = [list(OBJECTS)[i] for i in seen.objects.tolist()]
    colours = [list(COLOURS)[i] for i in seen.colours.tolist()]
    assert sum(o == n for o, (_, n) in zip(objects, pairs, strict=True)) >= 5
    assert sum(k == c for k, (c, _) in zip(colours, pairs, strict=True)) >= 5


def test_shipped_weights_are_small() -> None:
    size = sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file())
    assert size < 16e6
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt")]
