r"""The second prior's parts: a small U-Net, text encoder, tokenizer and schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from systems.toybox.captions import vocabulary
from systems.toybox.conditions import CHANNELS, INPUTS, LABELS, PATCH

SIDE = 32
"""Width and height the U-Net works at."""
MAX_WORDS = 16
WIDTHS = (32, 64, 128)
NUM_TIMESTEPS = 1000
_SPECIAL = ("<pad>", "<begin>", "<end>", "<unknown>")


def make_unet(widths: tuple[int, int, int] = WIDTHS) -> UNet2DConditionModel:
    """A U-Net of about 4 M parameters.

    It attends to the text at 8×8 only, and adds the pooled text to the embedding of the
    timestep, so that every block receives the colour (as in DeepFloyd IF). The camera
    is added there too. Its input is the noisy image and the reference image, both in
    blocks, and the rays of the blocks.
    """
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=INPUTS,
        out_channels=CHANNELS,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=96,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=LABELS,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def make_text_encoder() -> CLIPTextModel:
    """A CLIP text model of two small layers."""
    begin, end, pad = (_SPECIAL.index(t) for t in ("<begin>", "<end>", "<pad>"))
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_SPECIAL) + len(vocabulary()),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_WORDS,
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; commas count as words."""
    ids = {word: i for i, word in enumerate((*_SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(","), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>",
        special_tokens=[("<begin>", ids["<begin>"]), ("<end>", ids["<end>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<begin>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_max_length=MAX_WORDS,
    )


def make_scheduler() -> DDIMScheduler:
    r"""Cosine schedule with its log-SNR shifted by −2 ln 2, v-prediction.

    Images of twice the side keep their content under twice the noise:
    $\bar\alpha' / (1 - \bar\alpha') = \bar\alpha / (4\,(1 - \bar\alpha))$ (E.
    Hoogeboom, J. Heek and T. Salimans, 2023, arXiv 2301.11093, section 3.1). The last
    timestep's $\bar\alpha$ is nearly zero as it is; it is not rescaled to zero.
    """
    cosine = DDIMScheduler(NUM_TIMESTEPS, beta_schedule="squaredcos_cap_v2")
    kept = torch.cumprod(1 - cosine.betas.double(), 0)
    odds = kept / (1 - kept) / PATCH**2
    shifted = odds / (1 + odds)
    before = torch.cat([torch.ones(1, dtype=torch.float64), shifted[:-1]])
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        trained_betas=(1 - shifted / before).tolist(),
        prediction_type="v_prediction",
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


class Denoiser(nn.Module):
    """The trained parts together."""

    def __init__(self, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        self.unet = make_unet(widths)
        self.text_encoder = make_text_encoder()
        # Initially the camera has no effect.
        projection: Any = self.unet.class_embedding
        nn.init.zeros_(projection.linear_2.weight)
        nn.init.zeros_(projection.linear_2.bias)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """The velocity in blocks.

        Args:
            x: Noisy image, reference image and rays in blocks, shape ``(batch, 30, 32,
                32)``.
            t: Timesteps, shape ``(batch,)``.
            ids: Tokens, shape ``(batch, MAX_WORDS)``.
            labels: See `systems.toybox.conditions.labels`.
        """
        words = self.text_encoder(ids).last_hidden_state
        return self.unet(x, t, words, class_labels=labels).sample


@torch.no_grad()
def start_from(model: Denoiser, folder: Path, generator: torch.Generator) -> None:
    """Initialise from the weights of a saved pipeline, of this or the first prior.

    From the first prior's, which sees single pixels, the first convolution is averaged
    over the four pixels of a block and random for reference and rays: from zero, these
    weights hardly moved in 5,000 steps. The last one is
    repeated, plus random weights with zero mean over the block: without them the four
    pixels stay alike for long. Words are matched by their spelling.

    Args:
        model: Receives the weights.
        folder: A pipeline folder.
        generator: Source of the random weights.

    Raises:
        ValueError: The pipeline's U-Net has other widths.
    """
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    found, wanted = (tuple(u.config["block_out_channels"]) for u in (unet, model.unet))
    if found != wanted:
        raise ValueError(
            f"`{folder}` holds a U-Net of widths {found}, and {wanted} are wanted: "
            "start from scratch with `--from none`, or write "
            f"`--widths {' '.join(map(str, found))}`."
        )
    old, new = unet.state_dict(), model.unet.state_dict()
    if old["conv_in.weight"].shape != new["conv_in.weight"].shape:
        weight = old["conv_in.weight"].repeat_interleave(PATCH**2, 1) / PATCH**2
        shape = new["conv_in.weight"][:, weight.shape[1] :].shape
        fresh = torch.randn(shape, generator=generator) * weight.std()
        old["conv_in.weight"] = torch.cat([weight, fresh], 1)
        weight = old["conv_out.weight"].repeat_interleave(PATCH**2, 0)
        noise = torch.randn(weight.shape, generator=generator) * weight.std()
        phases = noise.unflatten(0, (-1, PATCH**2))
        phases = phases - phases.mean(1, keepdim=True)
        old["conv_out.weight"] = weight + phases.flatten(0, 1)
        old["conv_out.bias"] = old["conv_out.bias"].repeat_interleave(PATCH**2)
    model.unet.load_state_dict({**new, **old})
    before = PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer")
    known: dict[str, int] = before.get_vocab()
    table = "embeddings.token_embedding.weight"
    old, new = text.state_dict(), model.text_encoder.state_dict()
    (key,) = (name for name in new if name.endswith(table))
    rows = new[key].clone()
    for word, i in make_tokenizer().get_vocab().items():
        if word in known:
            rows[i] = old[key][known[word]]
    model.text_encoder.load_state_dict({**new, **old, key: rows})
