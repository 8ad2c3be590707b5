r"""Classifier-free guidance, and rescaling of its result.

$$m = m_\varnothing + s\,(m_c - m_\varnothing), \qquad
  m \leftarrow \phi\, m\, \frac{\mathrm{std}(m_c)}{\mathrm{std}(m)} + (1 - \phi)\, m .$$

References:
    Ho and Salimans 2022, arXiv 2207.12598; Lin et al. 2023, arXiv 2305.08891, Eqs. 15
    and 16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def guided(
    unconditional: Tensor, conditional: Tensor, scale: float, rescale: float = 0.0
) -> Tensor:
    r"""The guided output of a model, in diffusers' order of operations.

    Args:
        unconditional: $m_\varnothing$, shape ``(batch, channels, ...)``.
        conditional: $m_c$, same shape.
        scale: The scale $s$.
        rescale: $\phi$, from 0 (off) to 1.
    """
    found = unconditional + scale * (conditional - unconditional)
    if not rescale:
        return found
    axes = tuple(range(1, conditional.ndim))
    ratio = conditional.std(axes, keepdim=True) / found.std(axes, keepdim=True)
    return rescale * (found * ratio) + (1 - rescale) * found


def repeated(value: Any, size: int, count: int) -> Any:
    """Tensors of a nest whose first axis has a size, repeated along it."""
    if isinstance(value, dict):
        return {name: repeated(child, size, count) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(repeated(child, size, count) for child in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == size:
        return value.repeat(count, *[1] * (value.ndim - 1))
    return value
