from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from systems.toybox.local_sgd import LocalSGD
from systems.toybox.train import Budget, Run, train
from systems.toybox.views import ViewSet, build_shard
from tests.rank_pool import RankPool

SMALL = (8, 16, 16)


def state(run: Run) -> dict[str, Tensor]:
    found = {f"model.{n}": p.detach().clone() for n, p in run.model.named_parameters()}
    found |= {f"average.{n}": p.clone() for n, p in run.average.named_parameters()}
    for name, parameter in run.model.named_parameters():
        found[f"moment.{name}"] = run.optimizer.state[parameter]["exp_avg_sq"].clone()
    return found


def take_unequal_steps(folder: str) -> dict[str, Any]:
    """One step on rank 0, three on rank 1, then their average; then a part of a run."""
    layers, cameras = build_shard(0, per_object=1)
    views = ViewSet((layers,), cameras)
    workers = LocalSGD(interval=1e9)
    run = Run(None, widths=SMALL)
    workers.begin(run)
    for _ in range(1 + 2 * workers.rank):
        run.advance(views, 2, 1e-3, f"batch {workers.rank}")
    own = state(run)
    due = workers.due()
    over = workers.average(run, workers.rank == 1, 2)
    found: dict[str, Any] = {"own": own, "mean": state(run), "due": due, "over": over}
    found |= {"step": run.step, "images": run.images}
    again = Run(None, widths=SMALL)
    train(again, Path(folder), Budget(steps=3), views, batch=1)
    return found | {"trained": state(again), "total": again.images}


@pytest.mark.long
def test_workers_continue_from_the_average_of_their_weights(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    first, second = two_ranks(take_unequal_steps, str(tmp_path))
    for name, value in first["mean"].items():
        mean = 0.25 * first["own"][name] + 0.75 * second["own"][name]
        torch.testing.assert_close(value, mean, msg=name)
        assert torch.equal(value, second["mean"][name])
        assert torch.equal(first["trained"][name], second["trained"][name])
    assert not torch.equal(
        first["own"]["model.unet.conv_in.weight"],
        second["own"]["model.unet.conv_in.weight"],
    )
    assert not first["due"]
    assert first["over"]  # the other's part is over, so both end
    assert (
        (first["step"], first["images"]) == (3, 8) == (second["step"], second["images"])
    )
    # Both saw batches of their own, and one wrote the files.
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["images"] == first["total"] == second["total"] >= 6
    assert (tmp_path / "pipeline" / "model_index.json").exists()
