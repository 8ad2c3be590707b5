"""Compare an unmodified threestudio checkout with itself; run by its own Python.

    THREESTUDIO_ROOT=… python -m tests.adapters.real_threestudio dreamfusion

Prints a line of JSON. The environment is that of threestudio's users, so this file
needs neither pytest nor `lightning`. On a machine without a GPU, stand-ins for its CUDA
packages must be on the path, and register a guidance `toy-sds-guidance`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dreampropeller import (
    DriftThreshold,
    EMAThreshold,
    FixedThreshold,
    PicardSolver,
    Sequential,
    SlidingWindow,
    solve,
)
from dreampropeller.adapters.threestudio import ThreestudioTrajectory
from tests.adapters.recording import Replay

_CAMERAS = [
    "data.batch_size=[1,1]",
    "data.width=[12,16]",
    "data.height=[12,16]",
    "data.n_val_views=1",
    "data.n_test_views=2",
    "trainer.precision=32",
    "system.prompt_processor.prompt=a_pineapple",
]
_TOY = ["system.guidance_type=toy-sds-guidance"]
_GRID = [
    "system.geometry.pos_encoding_config.n_levels=4",
    "system.geometry.pos_encoding_config.log2_hashmap_size=10",
    "system.geometry.pos_encoding_config.base_resolution=8",
    "system.renderer.num_samples_per_ray=32",
]
CASES: dict[str, tuple[str, int, list[str]]] = {
    "dreamfusion": (
        "configs/dreamfusion-sd.yaml",
        40,
        [
            *_CAMERAS,
            *_TOY,
            *_GRID,
            "data.resolution_milestones=[12]",
            "system.geometry.pos_encoding_config.start_level=1",
            "system.geometry.pos_encoding_config.start_step=6",
            "system.geometry.pos_encoding_config.update_steps=8",
            "system.material.ambient_only_steps=10",
        ],
    ),
    "prolificdreamer": (
        "configs/prolificdreamer.yaml",
        8,
        [*_CAMERAS, *_GRID, "data.resolution_milestones=[4]"],
    ),
    "3dgs": (
        "custom/threestudio-3dgs/configs/gaussian_splatting.yaml",
        20,
        [
            *_CAMERAS,
            *_TOY,
            "data.resolution_milestones=[10]",
            "system.geometry.init_num_pts=128",
            "system.geometry.densify_from_iter=3",
            "system.geometry.densify_until_iter=20",
            "system.geometry.densification_interval=4",
            "system.geometry.prune_from_iter=3",
            "system.geometry.prune_until_iter=20",
            "system.geometry.prune_interval=5",
            "system.geometry.densify_grad_threshold=0.0001",
            "system.geometry.split_thresh=0.05",
            "system.loss.lambda_tv_loss=0.0",
            "system.loss.lambda_depth_tv_loss=0.0",
        ],
    ),
}


def build(case: str, scratch: str) -> tuple[Any, Any, Any]:
    """System, data module and config, as threestudio's `launch.py` makes them."""
    from omegaconf import OmegaConf

    pl: Any = importlib.import_module("pytorch_lightning")
    threestudio: Any = importlib.import_module("threestudio")
    load_config = importlib.import_module("threestudio.utils.config").load_config
    path, num_steps, changes = CASES[case]
    extra = [f"trainer.max_steps={num_steps}", f"exp_root_dir={scratch}"]
    if case == "prolificdreamer":
        model = str(Path(scratch) / "tiny-sd")
        extra += [
            f"system.prompt_processor.pretrained_model_name_or_path={model}",
            f"system.guidance.pretrained_model_name_or_path={model}",
            f"system.guidance.pretrained_model_name_or_path_lora={model}",
            "system.guidance.half_precision_weights=false",
        ]
    read = OmegaConf.load(path)
    if _TOY[0] in changes:  # replaced, not merged
        percent = [0, 0.98, 0.5, 30]
        read.system.guidance = {"max_step_percent": percent}
        extra += ["system.prompt_processor_type=no-prompts"]
    text = OmegaConf.to_yaml(read)
    cfg = load_config(text, cli_args=[*changes, *extra], from_string=True, n_gpus=1)
    pl.seed_everything(cfg.seed)
    datamodule = threestudio.find(cfg.data_type)(cfg.data)
    system = threestudio.find(cfg.system_type)(cfg.system)
    system.set_save_dir(os.path.join(scratch, "save"))
    return system, datamodule, cfg


def compare(
    make: Callable[[], tuple[Any, Any, Any]], recording: Any, loose: bool
) -> dict[str, Any]:
    """The system's own Lightning run against ours, then sequential against parallel.

    Args:
        make: Function that returns a new system, data module and config.
        recording: Its own run under Lightning.
        loose: Whether to measure the default and the published rule, too.
    """
    replayed = ThreestudioTrajectory(*make(), random=recording, batches=recording.batch)
    equal, first = replay(replayed, recording)
    trajectory = ThreestudioTrajectory(*make(), verify=True)
    start = time.perf_counter()
    sequential = solve(trajectory, Sequential())
    seconds = time.perf_counter() - start
    window = SlidingWindow(min(7, trajectory.num_steps // 2))
    zero = PicardSolver(window, FixedThreshold(0), "momentum")
    exact = solve(trajectory, zero)
    begun, _ = trajectory.init()
    rules = loose_rules(trajectory, window, sequential) if loose else {}
    return {
        "lightning": importlib.import_module("pytorch_lightning").__version__,
        "window": window.size,
        "steps_compared": len(equal),
        "steps_equal": sum(equal),
        "first_difference": first,
        "sizes": sorted({_height(batch) for batch in recording.batches}),
        "rows": {
            n: [len(begun[n]), len(t)]
            for n, t in sequential.value.items()
            if t.ndim and begun[n].shape != t.shape
        },
        "changed_buffers": [
            n
            for n, t in sequential.value.items()
            if n not in trajectory.host.parameters and not torch.equal(begun[n], t)
        ],
        "moved": any(
            begun[n].shape != t.shape or not torch.equal(begun[n], t)
            for n, t in sequential.value.items()
        ),
        "threshold_zero_equal": all(
            t.shape == sequential.value[n].shape and torch.equal(t, sequential.value[n])
            for n, t in exact.value.items()
        ),
        "threshold_zero_iterations": exact.stats.num_iterations,
        **rules,
        "seconds_per_sequential_step": seconds / trajectory.num_steps,
    }


def _height(batch: Any) -> int:
    """The height of a batch's images; some data sets give the whole schedule."""
    height = batch["height"]
    return height if isinstance(height, int) else batch["rays_o"].shape[-3]


def own_run(system: Any, datamodule: Any, cfg: Any) -> Any:
    """The system's own run under Lightning, recorded."""
    pl: Any = importlib.import_module("pytorch_lightning")

    class Recording(Replay, pl.Callback):
        pass

    recording = Recording()
    options = {k: v for k, v in cfg.trainer.items() if "progress" not in k}
    trainer = pl.Trainer(
        **{**options, "limit_val_batches": 0},
        accelerator="gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        callbacks=[recording],
    )
    trainer.fit(system, datamodule=datamodule)
    return recording


def replay(
    trajectory: ThreestudioTrajectory, recording: Any
) -> tuple[list[bool], dict[str, int]]:
    """Which steps of a replayed run equal the recorded one, and what differs first."""
    equal: list[bool] = []
    first: dict[str, int] = {}

    def look(state: Any, iteration: Any) -> None:
        step = iteration.begin
        if trajectory.next_jump(step) == step + 1 < trajectory.num_steps:
            return  # the state shown is already behind the next step
        theirs = recording.states[step]
        different = [
            n
            for n, t in state.y.items()
            if theirs[n].shape != t.shape or not torch.equal(theirs[n], t)
        ]
        equal.append(not different)
        for name in different:
            first.setdefault(name, step)

    solve(trajectory, Sequential(), on_iteration=look)
    return equal, first


def loose_rules(
    trajectory: ThreestudioTrajectory, window: Any, sequential: Any
) -> dict[str, Any]:
    """Speed-up and deviation of the default and of the published rule."""
    begun, _ = trajectory.init()
    published = EMAThreshold(5e-6, 0.9, "median")
    rules: dict[str, Any] = {}
    for name, threshold in (("default", DriftThreshold()), ("published", published)):
        found = solve(trajectory, PicardSolver(window, threshold, "momentum"))
        rules[name] = {
            "iterations": found.stats.num_iterations,
            "speed_up": trajectory.num_steps / found.stats.num_iterations,
            "deviation": deviation(begun, sequential.value, found.value),
        }
    return rules


def deviation(begun: Any, reference: Any, found: Any) -> float | None:
    """Distance between two results relative to the way from the start; None: rows."""
    away, way = 0.0, 0.0
    for name, value in reference.items():
        if not value.is_floating_point() or not value.numel():
            continue
        if not begun[name].shape == value.shape == found[name].shape:
            return None
        away += float((found[name] - value).double().square().sum())
        way += float((begun[name] - value).double().square().sum())
    return (away / way) ** 0.5


def prompts() -> None:
    """A prompt processor that needs no language model."""
    threestudio: Any = importlib.import_module("threestudio")
    BaseObject: Any = importlib.import_module("threestudio.utils.base").BaseObject

    @threestudio.register("no-prompts")
    class NoPrompts(BaseObject):
        from dataclasses import dataclass as _dataclass

        @_dataclass
        class Config(BaseObject.Config):
            pretrained_model_name_or_path: str = ""
            prompt: str = ""

        def __call__(self) -> None:
            return None


def load_extension(path: Path) -> None:
    """Import a custom extension the way threestudio's launcher does."""
    name = str(path)
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def main(case: str) -> None:
    root = Path(os.environ["THREESTUDIO_ROOT"])
    os.chdir(root)
    sys.path.insert(0, str(root))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    importlib.import_module("threestudio")
    if case == "3dgs":
        extension = Path(os.environ["THREESTUDIO_3DGS_ROOT"])
        load_extension(extension)
        path, num_steps, changes = CASES[case]
        path = str(extension / "configs" / Path(path).name)
        CASES[case] = (path, num_steps, changes)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(root)
        prompts()
        if case == "prolificdreamer":
            from tests.adapters.tiny_sd import write

            write(Path(scratch) / "tiny-sd")
        recording = own_run(*build(case, scratch))
        found = compare(lambda: build(case, scratch), recording, loose=True)
        print(json.dumps({"case": case, **found}))


if __name__ == "__main__":
    main(sys.argv[1])
