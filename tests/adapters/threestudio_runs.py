"""Configs of the stand-in systems, and their own runs under Lightning, recorded."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from dreampropeller.adapters.threestudio import ThreestudioTrajectory
from tests.adapters import standin
from tests.adapters.recording import Replay

NUM_STEPS = 60

_DATA = {
    "resolution_milestones": [12],
    "sizes": [4, 6],
    "batch_sizes": [2, 1],
    "progressive_until": 20,
}
_SCENE = {
    "geometry_type": "volume",
    "geometry": {"start_step": 5},
    "renderer_type": "volume-renderer",
    "renderer": {},
    "material": {"ambient_only_steps": 10},
    "guidance": {"max_step_percent": [0, 0.98, 0.5, 30]},
}
_RULES = {
    "prune_from_iter": 3,
    "prune_until_iter": 50,
    "prune_interval": 10,
    "densify_from_iter": 6,
    "densify_until_iter": 50,
    "densification_interval": 8,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "dreamfusion-like": {
        **_SCENE,
        "loss": {"lambda_sds": 1.0, "lambda_sparsity": [0, 1.0, 0.1, 40]},
        "optimizer": {
            "name": "Adam",
            "args": {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-15},
            "params": {"geometry": 0.01, "background": 0.001},
        },
    },
    "prolificdreamer-like": {
        **_SCENE,
        "loss": {"lambda_vsd": 1.0, "lambda_lora": 1.0, "lambda_sparsity": 0.5},
        "optimizer": {
            "name": "AdamW",
            "args": {"betas": [0.9, 0.99], "eps": 1e-15},
            "params": {"geometry": 0.01, "background": 0.001, "guidance": 0.001},
        },
    },
    "growing-like": {
        "geometry": {
            "num": 20,
            "min_color": 0.004,
            "max_num": 1000,
            "lr": {"xyz": [0, 0.01, 0.001, 60], "color": 0.02},
            **_RULES,
        },
    },
}
_BATCH = {"growing-like": {**_DATA, "batch_sizes": [1, 1]}}


def build(name: str, **changes: Any) -> tuple[Any, Any]:
    """System and data module, as their launch script builds them."""
    pl.seed_everything(0, verbose=False)
    datamodule = standin.find("cameras")(_BATCH.get(name, _DATA))
    return standin.find(name)({**SYSTEMS[name], **changes}), datamodule


def make(name: str, **options: Any) -> ThreestudioTrajectory:
    return ThreestudioTrajectory(*build(name), num_steps=NUM_STEPS, **options)


class Recording(Replay, pl.Callback):
    """A Trainer's run, to be replayed."""


def fit(name: str) -> tuple[Any, Recording, pl.Trainer]:
    """The system's own run under Lightning, look-ahead and all."""
    system, datamodule = build(name)
    recording = Recording()
    trainer = pl.Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[recording],
    )
    trainer.fit(system, datamodule=datamodule)
    return system, recording, trainer
