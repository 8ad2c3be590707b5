"""Points in fixed blocks, processed by one process, by several, or by ranks.

Every rank or process sees the same blocks, whatever their number. Results come back in
block order and are added in that order, so the chain is equal bit for bit for any
number of workers. The chain itself is small and runs in every rank.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from dreampropeller.mixtures.family import Block, Family
from dreampropeller.mixtures.inputs import as_device
from dreampropeller.mixtures.states import differing

SIZE = 16384
"""Points in a block: many enough to hide Python, few enough to be shared out."""


Work: TypeAlias = Callable[[Family, Block, int, dict[str, Tensor], dict[str, Any]], Any]
"""A pass over one block: family, block, its number, its slices of the arrays of the
points, and what all blocks share. A function of a module, so that another process can
import it."""


T = TypeVar("T")


class Blocks:
    """All blocks in this process."""

    def __init__(
        self, family: Family, x: Any, device: str = "cpu", size: int = SIZE
    ) -> None:
        self.family, self.x, self.device, self.size = family, x, device, size
        self.num_points = x.shape[0]
        self.num_blocks = -(-self.num_points // size)
        self._ready: dict[int, Block] = {}

    def bounds(self, number: int) -> slice:
        """The rows of a block."""
        return slice(number * self.size, (number + 1) * self.size)

    def run(
        self,
        work: Work,
        numbers: range,
        points: dict[str, Tensor],
        shared: dict[str, Any],
    ) -> list[Any]:
        """A pass over some blocks in this process; `points` starts at the first one.

        Densities are float32 in one thread: the number of threads changes their bits.
        """
        results = []
        for number in numbers:
            if number not in self._ready:
                rows = self.x[self.bounds(number)]
                self._ready[number] = self.family.block(rows, self.device)
            own = self.bounds(number - numbers[0])
            sliced = {name: value[own] for name, value in points.items()}
            block = self._ready[number]
            results.append(work(self.family, block, number, sliced, shared))
        return results

    def map(
        self, work: Work, points: dict[str, Tensor], shared: dict[str, Any]
    ) -> list[Any]:
        """A pass over all blocks; the results in block order."""
        return self.run(work, range(self.num_blocks), points, shared)

    def shares(self, count: int) -> list[range]:
        """The blocks of each of `count` workers, contiguous."""
        ends = [self.num_blocks * i // count for i in range(count + 1)]
        return [range(a, b) for a, b in itertools.pairwise(ends)]

    def lead(self, function: Callable[[], T]) -> T:
        """What a function gives that only the first rank calls."""
        return function()

    def agree(self, mark: dict[str, str]) -> None:
        """Refuse ranks whose marks differ."""

    def close(self) -> None:
        """Release the memory of the workers."""


class RankBlocks(Blocks):
    """Blocks shared out over the ranks of the default `torch.distributed` group.

    Every rank calls the same function with all the points and gets the same result.
    """

    def lead(self, function: Callable[[], T]) -> T:
        """Call on rank 0 and hand the value, or the error, to every rank.

        No rank returns before rank 0 is done, as after a barrier.
        """
        import torch.distributed as dist

        found: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                found[0] = function()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def agree(self, mark: dict[str, str]) -> None:
        """Compare all ranks' marks with rank 0's; every rank raises alike."""
        import torch.distributed as dist

        marks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(marks, mark)
        names = sorted({name for other in marks for name in differing(other, marks[0])})
        if names:
            raise ValueError(
                f"The ranks have different {', '.join(names)}: with `n_jobs='ranks'` "
                "every rank calls `fit` with all points and the same parameters."
            )

    def map(
        self, work: Work, points: dict[str, Tensor], shared: dict[str, Any]
    ) -> list[Any]:
        """Process this rank's blocks, and gather the others."""
        import torch.distributed as dist

        numbers = self.shares(dist.get_world_size())[dist.get_rank()]
        own = _cut(self, numbers, points)
        found = self.run(work, numbers, own, shared) if len(numbers) else []
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found)
        return [result for part in gathered for result in part]


class JobBlocks(Blocks):
    """Blocks shared out over processes of this machine, through joblib."""

    def __init__(
        self, family: Family, x: Any, jobs: int, device: str = "cpu", size: int = SIZE
    ) -> None:
        super().__init__(family, x, device, size)
        import joblib

        self._folder = Path(tempfile.mkdtemp(prefix="dreampropeller-"))
        self._file = str(self._folder / "points")  # not before the family is settled
        self._parallel = joblib.Parallel(jobs, backend="loky", max_nbytes=None)
        self._numbers = [part for part in self.shares(jobs) if len(part)]

    def map(
        self, work: Work, points: dict[str, Tensor], shared: dict[str, Any]
    ) -> list[Any]:
        """Every process works on its own blocks."""
        import joblib

        if not Path(self._file).exists():
            joblib.dump((self.family, self.x, self.device, self.size), self._file)
        found: Any = self._parallel(
            joblib.delayed(_remote)(
                self._file, work, numbers, _cut(self, numbers, points), shared
            )
            for numbers in self._numbers
        )
        return [result for part in found for result in part]

    def close(self) -> None:
        """Delete the file that the processes read the points from."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _cut(
    blocks: Blocks, numbers: range, points: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The rows of contiguous blocks; copies, as a pickled view brings its whole."""
    rows = slice(numbers.start * blocks.size, numbers.stop * blocks.size)
    return {name: value[rows].clone() for name, value in points.items()}


_LOADED: dict[str, Blocks] = {}
"""The points that this worker process has read; one data set at a time."""


def _remote(
    file: str,
    work: Work,
    numbers: range,
    points: dict[str, Tensor],
    shared: dict[str, Any],
) -> list[Any]:
    import joblib

    torch.set_num_threads(1)
    if file not in _LOADED:
        _LOADED.clear()
        family, x, device, size = joblib.load(file, mmap_mode="c")
        _LOADED[file] = Blocks(family, x, device, size)
    return _LOADED[file].run(work, numbers, points, shared)


@contextlib.contextmanager
def opened(
    family: Family, x: Any, n_jobs: int | str | None, device: Any = "cpu"
) -> Iterator[Blocks]:
    """The blocks of a fit, in one thread per process while it lasts.

    Args:
        family: The family of the components.
        x: All points, ``(points, dim)``.
        n_jobs: Number of processes, -1 for one per core, -2 for one less and so on, or
            "ranks" for those of the default group of `torch.distributed`.
        device: Device of the densities.
    """
    import os

    from threadpoolctl import threadpool_limits

    device = as_device(device)
    if n_jobs == "ranks":
        if not torch.distributed.is_initialized():
            raise ValueError(
                "`n_jobs` is 'ranks' and there is no `torch.distributed` group: call "
                "`init_process_group` first, or write a number of processes."
            )
        blocks: Blocks = RankBlocks(family, x, device)
    else:
        assert not isinstance(n_jobs, str)
        jobs = 1 if n_jobs is None else n_jobs
        jobs = jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)
        many = jobs > 1 and x.shape[0] > SIZE
        blocks = (
            JobBlocks(family, x, jobs, device) if many else Blocks(family, x, device)
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield blocks
    finally:
        torch.set_num_threads(threads)
        blocks.close()
