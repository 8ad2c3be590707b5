"""The CLIP score, with a real CLIP model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from systems import quality
from systems.quality import clip
from systems.runs import results
from tests.systems.scenes import small

CPU = torch.device("cpu")
OTHERS = ["b b", "b a"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(
        '{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3, "b</w>": 4}'
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    ).save_pretrained(folder)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config={
                **shape,
                "vocab_size": 5,
                "max_position_embeddings": 12,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
            },
            vision_config={**shape, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    ).save_pretrained(folder)
    return str(folder)


def test_figures_follow_the_cosines(model: str) -> None:
    images = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    found = {
        prompt: clip.clip_score(
            model, images, prompt, [p for p in ("a a", *OTHERS) if p != prompt], CPU
        )
        for prompt in ("a a", *OTHERS)
    }
    assert all(0 <= f.clip_score <= 100 and f.num_prompts == 3 for f in found.values())
    # Each view picks one of the three prompts.
    assert sum(f.r_precision for f in found.values()) == pytest.approx(1, abs=1e-3)
    best = max(found, key=lambda prompt: found[prompt].clip_score)
    assert found[best].r_precision == max(f.r_precision for f in found.values())


def test_a_prompt_does_not_compete_with_itself(model: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    assert clip.clip_score(model, images, "b b", OTHERS, CPU).num_prompts == 2


def test_a_missing_model_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(clip.ClipError, match=r"quality\.clip="):
        clip.clip_score(str(tmp_path), torch.rand(1, 3, 8, 8), "a", [], CPU)


@pytest.mark.parametrize("content", [None, " \n"])
def test_prompts_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(clip.ClipError, match="prompt a line"):
        clip.read_prompts(file)


def test_a_run_is_judged_by_clip_or_says_why_not(model: str) -> None:
    system = small(f"quality.clip={model}")
    y, _ = system.trajectory().init()
    figures = quality.by_clip(system, y)
    assert isinstance(figures, dict)
    assert figures["num_prompts"] > 30
    report = {"steps": 1, "quality": figures}
    assert "CLIP score" in results.summary(Path("x"), system, report)
    for system in (small(), small("quality.clip=/nowhere")):
        reason = quality.by_clip(system, y)
        assert isinstance(reason, str)
        assert "not measured" in reason
        assert "quality.clip" in reason
