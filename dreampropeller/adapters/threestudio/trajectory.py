r"""A threestudio system with automatic optimisation, as a trajectory.

threestudio is not imported: the system brings it. What differs from any other
LightningModule is the data (cameras are drawn while a batch is collated, from a data
set whose resolution follows the step) and objects that are updated by step without
being modules.

A batch belongs to its step: the data set is set to step t, then the cameras of t are
drawn. Lightning fetches one batch ahead, so there a resolution milestone takes effect
two steps later and the cameras are others; the distribution is the same.

Reference: threestudio at 28d9d80, https://github.com/threestudio-project/threestudio.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from dreampropeller.adapters.lightning import trainer
from dreampropeller.adapters.lightning.trajectory import LightningTrajectory
from dreampropeller.adapters.lightning.verification import verify as verify_trajectory

_HISTORY = ("edit_frames", "per_editing_step")
"""Attributes of systems whose data remembers earlier renderings."""


class ThreestudioTrajectory(LightningTrajectory):
    """A threestudio system with automatic optimisation (Eqs. 10 and 11).

    The state holds every parameter of the system's optimizer (geometry, material,
    background, renderer, and LoRA layers where guidance trains them) and all buffers,
    the occupancy grid among them.

    Args:
        system: The system, as `threestudio.find(cfg.system_type)(cfg.system)` made it.
        datamodule: The data module, as `threestudio.find(cfg.data_type)(cfg.data)`.
        config: The experiment's config, or any mapping with `trainer` and `seed`.
            Read: `trainer.max_steps`, `precision`, `gradient_clip_val`,
            `gradient_clip_algorithm`, and `seed`.
        num_steps: The number of steps; default: `trainer.max_steps`.
        seed: The seed; default: `seed` of the config.
        batches: Gives the batch of a step in place of the data module.
        verify: Evaluate steps in different orders before the run, and refuse a system
            whose drift depends on it; see `adapters.lightning.verification`.
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
        verify: bool = False,
        **options: Any,
    ) -> None:
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
        self._given_batches = batches
        super().__init__(system, datamodule, num_steps, seed=seed, **options)
        if verify:
            verify_trajectory(self)

    def _refuse(self, module: Any) -> None:
        kind = type(module).__name__
        if not hasattr(module, "do_update_step"):
            raise TypeError(
                f"`{kind}` is no threestudio system (it has no `do_update_step`). For "
                "another LightningModule use `LightningTrajectory`."
            )
        for name in _HISTORY:
            if hasattr(module, name):
                raise ValueError(
                    f"`{kind}` edits its own training images along the way "
                    f"(`{name}`), so a step depends on all steps before. Run it with "
                    "threestudio itself."
                )
        renderer = getattr(module, "renderer", None)
        if hasattr(renderer, "prop_optim"):
            raise ValueError(
                "`system.renderer.estimator: proposal` trains its network with an "
                "optimizer of its own, by a count of past calls. Write `estimator: "
                "occgrid` or `estimator: importance`."
            )
        super()._refuse(module)

    def _find_batches(
        self, data: Any, seed: int
    ) -> tuple[Callable[[int], Any], Any, Any, int | None]:
        loader = data.train_dataloader()
        if self._given_batches is not None:
            return self._given_batches, loader, data, None
        if not isinstance(loader.dataset, IterableDataset):
            keyed = trainer.KeyedLoader(loader, seed)
            return functools.partial(self._keyed_batch, keyed), loader, data, None
        return functools.partial(self._collated_batch, loader), loader, data, None

    def _collated_batch(self, loader: Any, step: int) -> Any:
        """The cameras of a step: threestudio draws them while collating."""
        self._update_dataset(loader.dataset, step)
        item = next(iter(loader.dataset))
        size = loader.batch_size
        return loader.collate_fn(item if size is None else [item] * size)

    def _keyed_batch(self, keyed: trainer.KeyedLoader, step: int) -> Any:
        self._update_dataset(keyed.loader.dataset, step)
        return keyed(step)

    def _update_dataset(self, dataset: Any, step: int) -> None:
        if hasattr(dataset, "do_update_step"):
            dataset.do_update_step(0, step)

    def _follow(self, value: object) -> bool:
        return hasattr(type(value), "do_update_step")


def _get(config: Any, key: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(key)
    get = getattr(config, "get", None)  # OmegaConf's containers
    return get(key) if callable(get) else getattr(config, key, None)
