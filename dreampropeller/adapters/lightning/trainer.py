r"""Replacement of a Trainer: its attributes, and batches as functions of the step."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from dreampropeller.belongings import Belongings
from dreampropeller.rng import StepRandom
from dreampropeller.tree import Aux, copy_nest, encode


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

    def offer(self, optimizer: Any, scheduler: Any) -> None:
        """Offer the live optimizer and scheduler to the module."""
        self.optimizers = [optimizer]
        self.strategy = SimpleNamespace(
            optimizers=[optimizer], _lightning_optimizers={0: optimizer}
        )
        if scheduler is not None:
            self.lr_scheduler_configs = [SimpleNamespace(scheduler=scheduler)]

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
    shuffling the order is the loader's own. A sampler with a generator or a memory of
    its own draws its epochs in order, as in `Trainer.fit`, and one with `set_epoch` is
    told the epoch.

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
        self._epochs: dict[int, list[Any]] = {}
        self.length = len(loader)
        self._sampler: Any = loader.batch_sampler or loader.sampler
        parts = [self._sampler, getattr(self._sampler, "sampler", None)]
        self._parts = [part for part in parts if part is not None]
        self._memory = Belongings({}, [loader.dataset, *_data_of(self._parts)])
        self._starts = [copy_nest(self._read())]  # memory at the start of each epoch
        self._forgets = False  # known once the first epoch was drawn

    def __call__(self, step: int) -> Any:
        """The batch of a step, collated by the loader's own function."""
        epoch, position = divmod(step, self.length)
        if epoch not in self._epochs:
            self._epochs = {n: o for n, o in self._epochs.items() if n >= epoch - 1}
            with self._random.scope(epoch, "data order"):
                self._epochs[epoch] = self._order(epoch)
        chosen: Any = self._epochs[epoch][position]
        dataset, collate = self.loader.dataset, self.loader.collate_fn
        if self.loader.batch_sampler is None:  # batching is left to the data set
            return collate(dataset[chosen])
        return collate([dataset[index] for index in chosen])

    def _order(self, epoch: int) -> Any:
        """The indices of an epoch; the samplers are left as they were."""
        before = copy_nest(self._read())
        first = epoch if self._forgets else min(epoch, len(self._starts) - 1)
        try:
            order: Any = None
            for one in range(first, epoch + 1):
                start = self._starts[0 if self._forgets else one]
                self._write(copy_nest(start))
                order = self._draw(one)
                after = copy_nest(self._read())
                if one == 0:
                    self._forgets = _equal(after, start)
                if one + 1 == len(self._starts) and not self._forgets:
                    self._starts.append(after)
            return order
        finally:
            self._write(before)

    def _draw(self, epoch: int) -> Any:
        for part in self._parts:
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)
        with self._random.scope(epoch, "data order"):
            if self.loader.generator is not None:  # the seed of the workers
                torch.empty((), dtype=torch.int64).random_(
                    generator=self.loader.generator
                )
            # Not to the end: a sampler draws once more there, and Lightning stops.
            return list(itertools.islice(iter(self._sampler), self.length))

    def _read(self) -> Any:
        self._memory.begin()
        memory = [
            self._memory.read_attributes(part, type(part).__name__, ())
            for part in self._parts
        ]
        return [memory, self._memory.read(self.loader.generator, "generator")]

    def _write(self, nest: Any) -> None:
        self._memory.begin()
        for part, memory in zip(self._parts, nest[0], strict=True):
            self._memory.write_attributes(part, memory, ())
        self._memory.write(nest[1], self.loader.generator)


def _equal(one: Any, two: Any) -> bool:
    (here, found), (there, others) = encode(one), encode(two)
    return here == there and all(
        torch.equal(a, b) for a, b in zip(found, others, strict=True)
    )


def _data_of(samplers: list[Any]) -> list[Any]:
    """What samplers refer to: data, and each other."""
    names = ("data_source", "dataset", "sampler", "weights", "indices")
    return [vars(one)[name] for one in samplers for name in names if name in vars(one)]


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
