r"""A host for threestudio systems: their data, and the refusal of some systems.

Two things differ from other LightningModules: the data (cameras are drawn while a batch
is collated, from a data set whose resolution follows the step) and objects that are
updated by step without being modules.

A batch is a function of its step: the data set is set to step t, then the cameras of t
are drawn. Lightning fetches one batch ahead, so there a resolution milestone takes
effect two steps later and the cameras differ; the distribution is the same.

Reference: threestudio at 28d9d80, https://github.com/threestudio-project/threestudio.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset

from dreampropeller.adapters.lightning import trainer
from dreampropeller.adapters.lightning.host import Host, Keyed, Settings
from dreampropeller.attributes import Attributes
from dreampropeller.tree import State

_HISTORY = ("edit_frames", "per_editing_step")
"""Attributes of systems whose data depends on earlier renderings."""


def check_system(module: Any) -> None:
    """Refuse a system whose steps depend on more than their index.

    Raises:
        TypeError: The module is not a threestudio system.
        ValueError: The system depends on earlier steps.
    """
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


def system_batches(
    data: Any, seed: int, given: Callable[[int], Any] | None
) -> trainer.Batches:
    """Batches of a threestudio data module, whose cameras are drawn while collating.

    Args:
        data: The data module.
        seed: The seed of the run.
        given: Function that returns the batch of a step instead.
    """
    loader = data.train_dataloader()
    draw = functools.partial(_collated_batch, loader)
    if given is not None:
        draw = given
    elif not isinstance(loader.dataset, IterableDataset):
        draw = functools.partial(_keyed_batch, trainer.KeyedLoader(loader, seed))
    return trainer.Batches(draw, loader, data)


def _collated_batch(loader: Any, step: int) -> Any:
    """The cameras of a step: threestudio draws them while collating."""
    _update_dataset(loader.dataset, step)
    item = next(iter(loader.dataset))
    size = loader.batch_size
    return loader.collate_fn(item if size is None else [item] * size)


def _keyed_batch(keyed: trainer.KeyedLoader, step: int) -> Any:
    _update_dataset(keyed.loader.dataset, step)
    return keyed(step)


def _update_dataset(dataset: Any, step: int) -> None:
    if hasattr(dataset, "do_update_step"):
        dataset.do_update_step(0, step)


def is_updated(value: object) -> bool:
    """Whether threestudio updates an object by step."""
    return hasattr(type(value), "do_update_step")


class Milestones:
    """States of a data set between its resolution milestones.

    At a milestone a data set may draw random numbers and read files, once for all steps
    that follow: a single image is scaled, and its rays are jittered. Such a step is
    evaluated as it is. For a later one the data set is put into the state that the
    milestone's own update left, under the milestone's random numbers.

    Args:
        dataset: The data set, in its state at the start.
        random: Keys the random streams of a step.
    """

    def __init__(self, dataset: Any, random: Keyed) -> None:
        self._dataset, self._random = dataset, random
        found = [
            one
            for _, owner in self._record().objects()
            for one in getattr(owner, "resolution_milestones", ())
            if isinstance(one, int) and one >= 0
        ]
        self._steps = sorted(set(found))
        self._records: list[Attributes] = []

    def enter(self, step: int) -> None:
        """Put the data set into the state that the last milestone left."""
        count = sum(one < step for one in self._steps)
        for milestone in self._steps[len(self._records) : count]:
            if self._records:
                self._records[-1].restore()
            with self._random.scope(milestone):
                _update_dataset(self._dataset, milestone)
            self._records.append(self._record())
        if count:
            self._records[count - 1].restore()

    def _record(self) -> Attributes:
        return Attributes({"": self._dataset}, is_updated, Host.skip)


class CameraHost(Host):
    """A system whose batches are cameras that a data set draws for the step.

    Args:
        batches: Function that returns the batch of a step, instead of the data module.
    """

    def __init__(self, batches: Callable[[int], Any] | None = None) -> None:
        self._given = batches

    def open(self, module: Any, data: Any, settings: Settings) -> None:
        """Set up the module, and find the data set's milestones."""
        super().open(module, data, settings)
        dataset = self.shim.train_dataloader.dataset
        self._milestones = Milestones(dataset, self.random)

    def find_batches(self, data: Any, seed: int) -> trainer.Batches:
        """Cameras of a step."""
        return system_batches(data, seed, self._given)

    def follows(self, value: object) -> bool:
        """Whether threestudio updates an object by step that is not a module."""
        return is_updated(value)

    def enter(self, step: int, y: State, restore: bool = True) -> None:
        """Put module and data set into their state at the start of a step."""
        super().enter(step, y, restore)
        if restore:
            self._milestones.enter(step)


class SystemHost(CameraHost):
    """A threestudio system with automatic optimisation."""

    def refuse(self, module: Any) -> None:
        """Refuse systems that depend on earlier steps, too."""
        check_system(module)
        super().refuse(module)
