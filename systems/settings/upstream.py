"""Configs of threestudio, read unchanged.

A file of threestudio has settings that this workspace lacks. Accepted are those that do
not change the resulting object (a progress bar, a logger), and those that request the
behaviour of this workspace (`accumulate_grad_batches: 1`). The others are listed
together by `systems.build`. Names and defaults are those of threestudio at
its last commit (https://github.com/threestudio-project/threestudio, December 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from omegaconf import ListConfig, OmegaConf

from systems.settings.reader import Foreign
from systems.settings.schedules import values_of
from systems.settings.upstream_table import ANY, NO, OWN, SETTINGS, VALUES

DATA_TYPES = ("random-camera-datamodule", "single-image-datamodule")


@dataclass(frozen=True)
class Translation:
    """A config in our settings.

    Attributes:
        settings: The settings that exist here.
        ignored: Dotted names of omitted settings without effect.
        unsupported: Settings that change the object and are unsupported, one sentence
            each.
    """

    settings: dict[str, Any]
    ignored: tuple[str, ...]
    unsupported: tuple[str, ...]


def translate(settings: Mapping[str, Any]) -> Translation:
    """Separate threestudio's own settings from a config with resolved values."""
    ignored: list[str] = []
    unsupported: list[str] = []
    own = OWN.get(str(settings.get("system_type")), frozenset())
    kept = _section(settings, "", own, ignored, unsupported)
    kind = kept.get("data_type", DATA_TYPES[0])
    if kind not in DATA_TYPES:
        unsupported = [p for p in unsupported if not p.startswith("`data.")]
        known = "` or `".join(DATA_TYPES)
        unsupported.append(_refusal("data_type", kind, f"write `{known}`"))
        kept |= {"data_type": DATA_TYPES[0], "data": {}}
    _rename(kept)
    return Translation(kept, tuple(ignored), tuple(unsupported))


def _section(
    section: Mapping[str, Any],
    where: str,
    own: frozenset[str],
    ignored: list[str],
    unsupported: list[str],
) -> dict[str, Any]:
    """The settings of a section that exist here; the rest goes into the lists."""
    table = SETTINGS.get(where, {})
    kept: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{where}.{key}" if where else key
        if name in VALUES and VALUES[name](value):
            unsupported.append(_refusal(name, value))
        elif key not in table or name in own:
            kept[key] = (
                _section(value, name, own, ignored, unsupported)
                if isinstance(value, dict)
                else value
            )
        elif table[key] is ANY:
            ignored.append(name)
        elif not _asks_for_nothing(value, table[key]):
            unsupported.append(_refusal(name, value))
        else:
            ignored.append(name)
    return kept


def _asks_for_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    if value in harmless:
        return True
    return harmless is NO and isinstance(value, list) and not any(values_of(value))


def _refusal(name: str, value: Any, advice: str = "not supported here") -> Foreign:
    return Foreign(f"`{name}` is `{value}`: {advice}.")


def _rename(settings: dict[str, Any]) -> None:
    """Rename and move settings that are named otherwise here, in place."""
    checkpoint, trainer = settings.get("checkpoint"), settings.get("trainer")
    if isinstance(checkpoint, dict) and checkpoint.get("every_n_train_steps") == 0:
        steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
        del checkpoint["every_n_train_steps"]  # only at the end
        if isinstance(steps, int):
            checkpoint["every_n_train_steps"] = steps
    system = settings.get("system")
    if not isinstance(system, dict):
        return
    guidance, prompts = system.get("guidance"), system.get("prompt_processor")
    if isinstance(guidance, dict) and "view_dependent_prompting" in guidance:
        chosen = guidance.pop("view_dependent_prompting")
        if isinstance(prompts, dict):
            prompts.setdefault("view_dependent", chosen)
    background = system.get("background")
    if isinstance(background, dict):
        network = background.get("mlp_network_config")
        if isinstance(network, dict):
            del background["mlp_network_config"]
            background |= network


@contextmanager
def resolvers() -> Iterator[None]:
    """The OmegaConf resolvers of threestudio, inside the block.

    Already registered resolvers stay. Ours are removed afterwards, because threestudio
    registers its own when it is imported and must not find ours.
    """
    # OmegaConf 2.4 renames the function that registers resolvers.
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
    ours = {n: f for n, f in _RESOLVERS.items() if not OmegaConf.has_resolver(n)}
    for name, function in ours.items():
        register(name, function)
    try:
        yield
    finally:
        for name in ours:
            OmegaConf.clear_resolver(name)


def _plain(value: Any) -> Any:
    return (
        OmegaConf.to_container(value, resolve=True)
        if isinstance(value, ListConfig)
        else value
    )


def _largest(value: Any) -> float:
    return max(values_of(_plain(value)))


_RESOLVERS: Mapping[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "idiv": lambda a, b: a // b,
    "not": lambda a: not a,
    "gt0": lambda a: a > 0,
    "cmaxgt0": lambda a: _largest(a) > 0,
    "cmaxgt0orcmaxgt0": lambda a, b: _largest(a) > 0 or _largest(b) > 0,
    "tuple2": lambda a: [float(a), float(a)],
    "basename": lambda path: PurePath(str(path)).name,
    "rmspace": lambda text, by: str(text).replace(" ", str(by)),
    "calc_exp_lr_decay_rate": lambda factor, n: math.pow(factor, 1 / n),
}
