"""Beyond 3D: a character-level transformer, a window of eight steps at a time.

    python -m examples.characters

The text is Python's own documentation (`pydoc_data.topics`), its last tenth held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.rivals import Task, main

CONTEXT = 48
_text = "\n".join(topics[name] for name in sorted(topics))
_alphabet = sorted(set(_text))
_index = {letter: index for index, letter in enumerate(_alphabet)}
_codes = torch.tensor([_index[letter] for letter in _text])
_cut = len(_codes) * 9 // 10
TRAIN, TEST = _codes[:_cut], _codes[_cut:]


class Transformer(nn.Module):
    """A causal transformer that predicts the next character.

    Args:
        width: Width of the residual stream.
        depth: Number of blocks.
    """

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(_alphabet), width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(_alphabet)))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Logits of the next character, of shape ``(batch, context, alphabet)``."""
        x = self.letters(codes) + self.places
        later = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        return self.head(self.blocks(x, mask=later, is_causal=True))


def _nats(model: nn.Module, text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    logits = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def loss(model: nn.Module, batch_size: int) -> torch.Tensor:
    """Cross entropy of the next characters of random passages."""
    starts = torch.randint(len(TRAIN) - CONTEXT - 1, (batch_size,))
    return _nats(model, TRAIN, starts)


@torch.no_grad()
def perplexity(model: nn.Module) -> float:
    """Perplexity per character of held-out text, over 200 passages."""
    starts = torch.linspace(0, len(TEST) - CONTEXT - 2, 200).long()
    return math.exp(float(_nats(model, TEST, starts)))


TASK = Task(
    Transformer,
    loss,
    perplexity,
    batch_size=8,
    lr=3e-3,
    figure="held-out perplexity per character",
    better=min,
)


def run(argv: Sequence[str] | None = None) -> str:
    """Print the table and return it."""
    return main(TASK, argv, num_steps=600)


if __name__ == "__main__":
    run()
