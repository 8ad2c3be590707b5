r"""Buffers that a module registers during a step, such as helpers built on first use.

They are not part of the state, so they must be constants. A helper is dropped after the
first evaluation that built it, and built again until one at another state has built it:
if the two agree bitwise, it is kept and its buffers may never change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dreampropeller.tree import State
from dreampropeller.verification import NotReproducible


class Born:
    """Constant buffers that were registered after a module was recorded.

    Args:
        module: The module; what it holds now is its structure.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._structure = [
            (one, frozenset(one._modules), frozenset(one._buffers))
            for one in module.modules()
        ]
        self._values: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._agree = False
        self._first: State = {}

    def __contains__(self, name: object) -> bool:
        """Whether a buffer's name is that of a constant born in a step."""
        return name in self._values

    def forget(self) -> None:
        """Remove what was built once, so that the next evaluation builds it again."""
        if not self._values or self._agree:
            return
        for owner, children, buffers in self._structure:
            for table, kept in ((owner._modules, children), (owner._buffers, buffers)):
                for name in [name for name in table if name not in kept]:
                    del table[name]

    def check(self, y: State) -> None:
        """Take note of new buffers after an evaluation, and compare known ones.

        Args:
            y: The state of the evaluation; its buffers are not born in a step.

        Raises:
            NotReproducible: A buffer born in a step is not a constant.
        """
        now = {n: b for n, b in self._module.named_buffers() if n not in y}
        if not now and not self._seen:
            return
        for name, value in now.items():
            seen = self._seen.get(name)
            if seen is not None and seen[0] is value and seen[1] == value._version:
                continue
            if name not in self._values:
                self._values[name] = value.detach().clone()
                self._agree, self._first = False, y
            elif not _equal(self._values[name], value):
                raise NotReproducible(
                    f"Buffer `{name}` was registered during a step and is not a "
                    "constant: its values differ between steps. Register it when the "
                    "module is built, so that it is part of the state."
                )
            self._seen[name] = value, value._version
        if not self._agree and self._values.keys() <= now.keys():
            self._agree = any(not _equal(y[n], t) for n, t in self._first.items())
            self._first = {} if self._agree else self._first


def _equal(one: Tensor, two: Any) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)
