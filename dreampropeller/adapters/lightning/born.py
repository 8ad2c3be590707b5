r"""Buffers that a module registers during a step, such as helpers built on first use.

They are not part of the state, so they must be constants. A helper is dropped after the
first evaluation that built it, and later evaluations build it again: if that of another
step agrees bitwise, it is kept and its buffers may never change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

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
        self._agree = self._again = False
        self._step = self._born_at = -1

    def __contains__(self, name: object) -> bool:
        """Whether a buffer's name is that of a constant born in a step."""
        return name in self._values

    def forget(self, step: int) -> None:
        """Remove what was built at one step only, so that it is built again.

        Args:
            step: The step that is evaluated next.
        """
        self._step = step
        if not self._values or self._agree:
            return
        for owner, children, buffers in self._structure:
            for table, kept in ((owner._modules, children), (owner._buffers, buffers)):
                for name in [name for name in table if name not in kept]:
                    del table[name]
        self._again = True

    def check(self, known: Iterable[str]) -> None:
        """Take note of new buffers after an evaluation, and compare known ones.

        Args:
            known: Names of the buffers that are part of the state.

        Raises:
            NotReproducible: A buffer born in a step is not a constant.
        """
        known = set(known)
        now = {n: b for n, b in self._module.named_buffers() if n not in known}
        if not now and not self._seen:
            return
        for name, value in now.items():
            seen = self._seen.get(name)
            if seen is not None and seen[0] is value and seen[1] == value._version:
                continue
            if name not in self._values:
                self._values[name] = value.detach().clone()
                self._agree = self._again = False
                self._born_at = self._step
            elif not _equal(self._values[name], value):
                raise NotReproducible(
                    f"Buffer `{name}` was registered during a step and is not a "
                    "constant: its values differ between steps. Register it when the "
                    "module is built, so that it is part of the state."
                )
            self._seen[name] = value, value._version
        elsewhere = self._again and self._step != self._born_at
        self._agree |= elsewhere and self._values.keys() <= now.keys()


def _equal(one: Tensor, two: Any) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)
