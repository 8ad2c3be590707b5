"""The embedded prior's parts: a small U-Net, text encoder, tokenizer and schedule."""

from __future__ import annotations

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from systems.toybox.captions import vocabulary

SIZE = 32
MAX_WORDS = 16
_SPECIAL = ("<pad>", "<begin>", "<end>", "<unknown>")


def make_unet() -> UNet2DConditionModel:
    """A U-Net of about 4 M parameters.

    It attends to the text at 8×8 only, and adds the pooled text to the embedding of the
    timestep, so that every block is told the colour (as in DeepFloyd IF).
    """
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=96,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
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
    """One token a word; commas count as words."""
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
    """Cosine schedule, v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
