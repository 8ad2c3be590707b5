"""Detection of evaluations that write into their parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor


class Guard:
    """Refuses writes into parameters: a drift is a function of step and state.

    It uses torch's version counters: a write through `.data` is not seen, and a tensor
    made under `torch.inference_mode` has no counter.

    Args:
        parameters: Parameters by name, before the evaluation.
        trainable: Names of the parameters that an optimizer holds.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], trainable: Collection[str]
    ) -> None:
        self._seen = {
            name: (tensor, tensor._version)
            for name, tensor in parameters.items()
            if not tensor.is_inference()
        }
        self._trainable = trainable

    def check(self) -> None:
        """Check the parameters after the evaluation.

        Raises:
            ValueError: A parameter was written into; the message says what to do.
        """
        for name, (tensor, version) in self._seen.items():
            if tensor._version == version:
                continue
            if name in self._trainable:
                raise ValueError(
                    f"The step changed parameter `{name}` itself, which only the "
                    "optimizer may do; a parameter's guess must stay as it is. Clamp "
                    "it where it is read, or in the optimizer's `step`."
                )
            raise ValueError(
                f"The step changed `{name}`, a parameter that no optimizer holds, so "
                "it is not part of the state, and another step would see its value. "
                "Register it as a buffer, or keep an average of the weights in the "
                "optimizer's state."
            )
