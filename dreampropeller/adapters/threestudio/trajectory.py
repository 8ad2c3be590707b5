r"""Any threestudio system as a trajectory; threestudio is not imported.

A system with automatic optimisation is lent to a `SystemHost`, one whose Gaussians grow
to a `GrowingHost`.

Reference: threestudio at 28d9d80, https://github.com/threestudio-project/threestudio.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

from dreampropeller.adapters.lightning.trajectory import LightningTrajectory
from dreampropeller.adapters.lightning.verification import verify as verify_trajectory
from dreampropeller.adapters.threestudio.growing import GrowingHost, grows
from dreampropeller.adapters.threestudio.system import SystemHost

_UNTRAINED = (
    *("eval_", "n_val_views", "n_test_views", "test_", "loggers", "exporter"),
    *("cleanup_after_", "use_cache", "spawn"),
)
"""Beginnings of the names of settings that do not change the training."""


class ThreestudioTrajectory(LightningTrajectory):
    """A threestudio system's training run (Eqs. 18 and 19).

    The state holds every parameter of the system's optimizer (geometry, material,
    background, renderer, and LoRA layers where guidance trains them) and all buffers,
    the occupancy grid among them. Gaussians that grow do so in jumps
    (`dreampropeller.adapters.threestudio.growing`).

    Args:
        system: The system, as `threestudio.find(cfg.system_type)(cfg.system)` made it.
        datamodule: The data module, as `threestudio.find(cfg.data_type)(cfg.data)`. A
            state can be resumed only with the settings of system and data that it was
            made with, the prompt among them.
        config: The experiment's config, or any mapping with `trainer` and `seed`.
            Read: `trainer.max_steps`, `precision`, `gradient_clip_val`,
            `gradient_clip_algorithm`, and `seed`.
        num_steps: The number of steps; default: `trainer.max_steps`.
        seed: The seed; default: `seed` of the config.
        batches: Function that returns the batch of a step, instead of the data module.
        verify: Verify that no step depends on more than its index and state: now
            (True), never (False), or when a solve begins.
        **options: Further arguments of `LightningTrajectory`.

    Raises:
        ValueError: The system cannot be evaluated ahead of time; the message says why
            and what to write instead.
    """

    def __init__(
        self,
        system: Any,
        datamodule: Any,
        config: Any = None,
        *,
        num_steps: int | None = None,
        seed: int | None = None,
        batches: Callable[[int], Any] | None = None,
        verify: bool | None = None,
        **options: Any,
    ) -> None:
        _refuse_import()
        config = {} if config is None else config
        settings = _get(config, "trainer") or {}
        num_steps = _get(settings, "max_steps") if num_steps is None else num_steps
        if num_steps is None or num_steps < 1:
            raise ValueError(
                f"The number of steps is {num_steps}: pass `num_steps`, or a config "
                "with `trainer.max_steps`."
            )
        accumulated = _get(settings, "accumulate_grad_batches") or 1
        if accumulated != 1:
            raise ValueError(
                f"`trainer.accumulate_grad_batches` is {accumulated}: gradients that "
                "add up over steps are not supported. Write 1, and raise "
                "`data.batch_size` instead."
            )
        for key in ("precision", "gradient_clip_val", "gradient_clip_algorithm"):
            if _get(settings, key) is not None:
                options.setdefault(key, _get(settings, key))
        seed = int(_get(config, "seed") or 0) if seed is None else seed
        host = GrowingHost(batches) if grows(system) else SystemHost(batches)
        options["about"] = {**about(system, datamodule), **(options.get("about") or {})}
        super().__init__(system, datamodule, num_steps, seed=seed, host=host, **options)
        self.verifies = verify is not False
        if verify:
            self.verified = verify_trajectory(self)


def _refuse_import() -> None:
    """End a process of the prompt processor that imports the script again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(
            "threestudio embeds prompts in a process of its own, which imports this "
            'script again: put what it does under `if __name__ == "__main__":`, or '
            "write `system.prompt_processor.spawn=false`."
        )


def about(system: Any, datamodule: Any) -> dict[str, Any]:
    """The settings that a state belongs to: those of system and data.

    What only validation, tests, logs and export read may change between two parts of a
    run, and is left out.
    """
    return {
        name: _trained(OmegaConf.to_container(cfg, resolve=True))
        for name, owner in (("system", system), ("data", datamodule))
        for cfg in [getattr(owner, "cfg", None)]
        if OmegaConf.is_config(cfg)
    }


def _trained(section: Any) -> Any:
    if not isinstance(section, dict):
        return section
    return {
        name: _trained(value)
        for name, value in section.items()
        if not str(name).startswith(_UNTRAINED)
    }


def _get(config: Any, key: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(key)
    get = getattr(config, "get", None)  # OmegaConf's containers
    return get(key) if callable(get) else getattr(config, key, None)
