r"""Replacement of a Trainer: its attributes, and batches as functions of the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from dreampropeller.rng import StepRandom
from dreampropeller.tree import Aux


class Shim:
    """The trainer attributes that modules read.

    Attributes:
        global_step: The step to evaluate, set before each evaluation.
        current_epoch: Likewise.
    """

    def __init__(self, num_steps: int, datamodule: Any, loader: Any) -> None:
        self.global_step = 0
        self.current_epoch = 0
        self.max_steps = self.estimated_stepping_batches = num_steps
        self.max_epochs = -1
        self.datamodule = datamodule
        self.train_dataloader = loader
        self.val_dataloaders = self.test_dataloaders = self.predict_dataloaders = None
        self.logger, self.loggers, self.callbacks = None, [], []
        self.global_rank = self.local_rank = self.node_rank = 0
        self.world_size = self.num_devices = self.accumulate_grad_batches = 1
        self.is_global_zero = self.training = self.barebones = True
        self.sanity_checking = self.validating = self.testing = False
        self.predicting = self.fast_dev_run = self.should_stop = False
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The module asked its trainer for `{name}`, which exists only during "
            "`Trainer.fit`. Steps are driven without a trainer here; take the value "
            "from the module's own settings instead."
        )


class KeyedLoader:
    """Batches of a map-style `DataLoader` as a function of the step.

    Epoch e is ordered by the loader's own sampler, drawn under the key (seed, e), so
    step t always holds the same examples; they are fetched in this process. Without
    shuffling the order is the loader's own.

    Args:
        loader: The loader; its workers are not used.
        seed: The seed of the run.

    Raises:
        ValueError: The data set is iterable, without examples by index.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f"`{type(loader.dataset).__name__}` is an iterable data set: batch 7 "
                "exists only after batch 6. Pass a function of the step instead of "
                "the loader: `LightningTrajectory(module, lambda step: batch, …)`."
            )
        self.loader = loader
        self._random = StepRandom(seed)
        self._epoch: tuple[int, list[Any]] | None = None
        self.length = len(loader)

    def __call__(self, step: int) -> Any:
        """The batch of a step, collated by the loader's own function."""
        epoch, position = divmod(step, self.length)
        if self._epoch is None or self._epoch[0] != epoch:
            sampler = self.loader.batch_sampler or self.loader.sampler
            with self._random.scope(epoch, "data order"):
                self._epoch = epoch, list(sampler)
        chosen: Any = self._epoch[1][position]
        dataset, collate = self.loader.dataset, self.loader.collate_fn
        if self.loader.batch_sampler is None:  # batching is left to the data set
            return collate(dataset[chosen])
        return collate([dataset[index] for index in chosen])


@dataclass(frozen=True)
class Batches:
    """Batches as a function of the step.

    Attributes:
        of_step: Function that returns the batch of a step.
        loader: The loader of the batches, if there is one.
        datamodule: The data module, if there is one.
        epoch_length: The number of batches in an epoch; None: endless.
    """

    of_step: Callable[[int], Any]
    loader: Any = None
    datamodule: Any = None
    epoch_length: int | None = None


def batches(data: Any, seed: int) -> Batches:
    """Make batches a function of the step.

    Args:
        data: A function of the step, a `DataLoader`, or a data module whose
            `prepare_data` and `setup("fit")` have been called.
        seed: The seed of the run.

    Raises:
        TypeError: It is none of these.
        ValueError: The data set is iterable.
    """
    if isinstance(data, DataLoader):
        keyed = KeyedLoader(data, seed)
        return Batches(keyed, data, None, keyed.length)
    if hasattr(data, "train_dataloader"):
        keyed = KeyedLoader(data.train_dataloader(), seed)
        return Batches(keyed, keyed.loader, data, keyed.length)
    if callable(data):
        return Batches(data)
    raise TypeError(
        f"`data` is a `{type(data).__name__}`: pass a `DataLoader`, a "
        "`LightningDataModule`, or a function `step -> batch`."
    )


def overrides(module: object, name: str) -> bool:
    """Whether a subclass of `LightningModule` overrides a hook."""
    base = next(
        (c for c in type(module).__mro__ if c.__name__ == "LightningModule"), None
    )
    return base is not None and getattr(type(module), name, None) is not getattr(
        base, name, None
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a nest; its containers are new."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [to_device(value, device) for value in batch]
        named = hasattr(batch, "_fields")
        return type(batch)(*moved) if named else type(batch)(moved)
    move = getattr(batch, "to", None)
    return (
        move(device) if callable(move) and not isinstance(batch, nn.Module) else batch
    )


def transfer(batch: Any, module: Any, datamodule: Any, device: torch.device) -> Any:
    """Move a batch, between the hooks of the data module and of the module."""
    owners = [owner for owner in (datamodule, module) if owner is not None]
    for owner in owners:
        batch = owner.on_before_batch_transfer(batch, 0)
    batch = to_device(batch, device)
    for owner in owners:
        batch = owner.on_after_batch_transfer(batch, 0)
    return batch


def call(function: Callable[..., Any], batch: Any, index: int) -> Any:
    """Call a hook with as many of (batch, index) as it takes."""
    arguments = inspect.signature(function).parameters.values()
    if any(argument.kind is argument.VAR_POSITIONAL for argument in arguments):
        return function(batch, index)
    return function(batch, index) if len(arguments) > 1 else function(batch)


def detached(output: Any, loss: Any) -> Any:
    """The argument of `on_train_batch_end`."""
    if loss is None:
        return None
    return {**(output if isinstance(output, dict) else {}), "loss": loss.detach()}


def numbers(logged: dict[str, Any]) -> Aux:
    """The logged scalars, without stateful metrics."""
    return {
        str(name): float(value.detach() if isinstance(value, Tensor) else value)
        for name, value in logged.items()
        if isinstance(value, (bool, int, float))
        or (isinstance(value, Tensor) and value.numel() == 1)
    }
