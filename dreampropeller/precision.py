r"""Mixed precision as part of the state.

Half precision multiplies the loss by a scale $2^e$ that backs off when a gradient
overflows and grows after $G$ steps that did not. The drift reads it, so it is part of
the state, as integers $(e, \text{steps since the last change})$: exact, and not in the
distance between states. With $G = 2000$, as in torch,

$$(e, n) \leftarrow (e - 1, 0) \text{ on overflow, } (e + 1, 0) \text{ if } n + 1 = G
\text{, else } (e, n + 1).$$
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from dreampropeller.tree import State

LOSS_SCALE = "precision/scale"
"""Name of the loss scale in a state."""
_FOUND_INF = "precision/found_inf"
_INITIAL_EXPONENT = 16
_GROWTH_INTERVAL = 2000


class Precision:
    """The `precision` of a trainer: autocast, and a loss scale if needed.

    Args:
        name: "32-true", "bf16-mixed" or "16-mixed" (also "32" and "16").
        device: Device of the module.

    Raises:
        ValueError: The precision is unknown.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        types = {
            "32-true": None,
            "32": None,
            "bf16-mixed": torch.bfloat16,
            "16-mixed": torch.float16,
            "16": torch.float16,
        }
        if name not in types:
            raise ValueError(
                f"`precision` is {name!r}: write one of `32-true`, `bf16-mixed`, "
                "`16-mixed`."
            )
        self._dtype = types[name]
        self._device = device
        self.scales = self._dtype is torch.float16

    def init(self) -> State:
        """The initial loss scale, if there is one; int64, shape ``(2,)``."""
        if not self.scales:
            return {}
        return {LOSS_SCALE: torch.tensor([_INITIAL_EXPONENT, 0], device=self._device)}

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def scale(self, loss: Tensor, y: State) -> Tensor:
        """The loss that is differentiated."""
        return loss * self._factor(y) if self.scales else loss

    def refuse_parts(self, step: int, leaves: Iterable[Tensor]) -> None:
        """Refuse gradients without a scale beside those of the scaled loss.

        Raises:
            ValueError: The loss has gone backward itself.
        """
        if self.scales and any(leaf.grad is not None for leaf in leaves):
            raise ValueError(
                f"The loss of step {step} goes backward itself, and the loss scale of "
                '`precision="16-mixed"` applies to what it returns alone. Return the '
                'sum of all parts, or write `precision="bf16-mixed"`.'
            )

    def unscale(self, gradients: Iterable[Tensor | None], y: State) -> State:
        """Divide the scale out of gradients, in place.

        Returns:
            The drift's entry: whether a gradient overflowed, so that the step must not
            be taken. Empty if there is no scale.
        """
        if not self.scales:
            return {}
        inverse = self._factor(y).reciprocal()
        found = torch.zeros((), dtype=torch.bool, device=inverse.device)
        for gradient in gradients:
            if gradient is not None:
                found |= ~torch.isfinite(gradient).all()
                gradient.mul_(inverse)
        return {_FOUND_INF: found}

    @staticmethod
    def overflowed(drift: State) -> bool:
        """Whether a drift's gradients overflowed, so that no optimizer may step."""
        return _FOUND_INF in drift and bool(drift[_FOUND_INF])

    def update(self, y: State, drift: State) -> State:
        """The scale after a step."""
        if not self.scales:
            return {}
        exponent, count = y[LOSS_SCALE].unbind()
        overflow = drift.get(_FOUND_INF)
        if overflow is None:  # a skipped or predicted step
            return {}
        grows = ~overflow & (count + 1 == _GROWTH_INTERVAL)
        exponent = exponent + grows.long() - overflow.long()
        count = torch.where(overflow | grows, 0, count + 1)
        return {LOSS_SCALE: torch.stack([exponent, count])}

    def _factor(self, y: State) -> Tensor:
        if LOSS_SCALE not in y:
            raise ValueError(
                'The state has no loss scale, which `precision="16-mixed"` needs: it '
                "is of a run in another precision. Go on with that one."
            )
        return torch.exp2(y[LOSS_SCALE][0].float())
