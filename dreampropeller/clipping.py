"""Gradient clipping, as torch's own functions do it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dreampropeller.tree import State


@dataclass(frozen=True)
class Clipping:
    """The bounds of gradients.

    Args:
        norm: Largest norm of all gradients taken together; None: no bound.
        value: Largest absolute value of a gradient entry; None: no bound.
    """

    norm: float | None
    value: float | None

    def in_place(self, parameters: list[Tensor]) -> None:
        """Clip the gradients of parameters."""
        if self.norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.norm)
        if self.value is not None:
            nn.utils.clip_grad_value_(parameters, self.value)

    def __call__(self, gradients: State) -> State:
        """Clipped copies of gradients."""
        if self.norm is None and self.value is None:
            return gradients
        holders = [nn.Parameter(gradient) for gradient in gradients.values()]
        for holder, gradient in zip(holders, gradients.values(), strict=True):
            holder.grad = gradient.clone()  # clipping writes in place
        self.in_place([*holders])
        clipped = [holder.grad for holder in holders]
        return {n: g for n, g in zip(gradients, clipped, strict=True) if g is not None}
