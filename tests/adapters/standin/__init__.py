"""A small package that speaks threestudio's protocol, awkward parts included.

Own code. It keeps what a wrapper must cope with: a registry, updates that walk over
every public attribute, `global_step` from the trainer, cameras drawn while collating,
guidance built in `on_fit_start`, buffers that are rebound, a mask that only grows,
Python's `random` in the material, networks outside of the module tree, Gaussians that
replace their parameters.
"""

from __future__ import annotations

from typing import Any

_MODULES: dict[str, Any] = {}


def register(name: str) -> Any:
    def decorate(cls: Any) -> Any:
        assert name not in _MODULES
        _MODULES[name] = cls
        return cls

    return decorate


def find(name: str) -> Any:
    return _MODULES[name]


from tests.adapters.standin import data, growing, parts, systems  # noqa: E402, F401
