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

ANY: tuple[Any, ...] = ()
"""In `SETTINGS`: any value is accepted, because it has no effect on the object."""
_NO: tuple[Any, ...] = (None, False, 0)

_CAMERAS: Mapping[str, tuple[Any, ...]] = {
    "eval_batch_size": ANY,
    "n_val_views": ANY,
    "progressive_until": (0,),
    "rays_d_normalize": (True,),
}

SETTINGS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "": {
        "description": ANY,
        "use_timestamp": ANY,
        "timestamp": ANY,
        "exp_dir": ANY,
        "trial_name": ANY,
        "trial_dir": ANY,
        "n_gpus": (1,),
    },
    "trainer": {  # arguments of Lightning's `Trainer`
        "accelerator": ANY,
        "barebones": ANY,
        "benchmark": ANY,
        "callbacks": ANY,
        "check_val_every_n_epoch": ANY,
        "default_root_dir": ANY,
        "detect_anomaly": ANY,
        "deterministic": ANY,
        "enable_checkpointing": ANY,
        "enable_model_summary": ANY,
        "enable_progress_bar": ANY,
        "inference_mode": ANY,
        "limit_predict_batches": ANY,
        "limit_test_batches": ANY,
        "limit_val_batches": ANY,
        "logger": ANY,
        "max_epochs": ANY,  # the single epoch is endless
        "min_epochs": ANY,
        "min_steps": ANY,
        "num_sanity_val_steps": ANY,
        "profiler": ANY,
        "reload_dataloaders_every_n_epochs": ANY,
        "strategy": ANY,
        "sync_batchnorm": ANY,
        "use_distributed_sampler": ANY,
        "accumulate_grad_batches": (1,),
        "devices": (None, "auto", 1, "1"),
        "fast_dev_run": _NO,
        "gradient_clip_algorithm": ANY,
        "gradient_clip_val": _NO,
        "limit_train_batches": (None, 1.0),
        "max_time": (None,),
        "num_nodes": (1,),
        "overfit_batches": _NO,
        "plugins": (None, []),
    },
    "checkpoint": {  # arguments of Lightning's `ModelCheckpoint`
        "auto_insert_metric_name": ANY,
        "dirpath": ANY,
        "enable_version_counter": ANY,
        "every_n_epochs": ANY,
        "filename": ANY,
        "mode": ANY,
        "monitor": ANY,
        "save_last": ANY,
        "save_on_train_epoch_end": ANY,
        "save_top_k": ANY,
        "save_weights_only": ANY,
        "train_time_interval": ANY,
        "verbose": ANY,
    },
    "data": {
        **_CAMERAS,
        "rays_noise_scale": _NO,  # single images, like the next
        "requires_depth": ANY,
        "requires_normal": ANY,
        "use_random_camera": (True,),
    },
    "data.random_camera": _CAMERAS,
    "system": {
        "cleanup_after_test_step": ANY,
        "cleanup_after_validation_step": ANY,
        "exporter": ANY,
        "exporter_type": ANY,
        "loggers": ANY,
        "visualize_samples": ANY,
        "weights_ignore_modules": ANY,
        "refinement": _NO,
        "geometry_convert_from": (None,),
        "geometry_convert_inherit_texture": ANY,
        "geometry_convert_override": ANY,
        "scheduler": (None,),
        "weights": (None,),
    },
    "system.freq": {"guidance_eval": ANY},
    "system.geometry": {
        "anneal_density_blob_std_config": (None,),
        "isosurface": ANY,
        "isosurface_chunk": ANY,
        "isosurface_coarse_to_fine": ANY,
        "isosurface_deformable_grid": ANY,
        "isosurface_method": ANY,
        "isosurface_outlier_n_faces_threshold": ANY,
        "isosurface_remove_outliers": ANY,
        "n_input_dims": (3,),
        "force_shape_init": _NO,
        "shape_init": (None,),
        "shape_init_mesh_front": ANY,  # of `shape_init`, like the next
        "shape_init_mesh_up": ANY,
        "shape_init_params": ANY,
    },
    "system.geometry.pos_encoding_config": {
        "include_xyz": _NO,
        "interpolation": ("Linear",),
    },
    "system.geometry.mlp_network_config": {
        "activation": ("ReLU",),
        "otype": ("VanillaMLP",),
        "output_activation": (None, "none"),
    },
    "system.material": {
        "input_feature_dims": (None,),
        "mlp_network_config": (None,),
        "n_output_dims": (3, 0),  # 0: a stage whose colours are not rendered
        "requires_normal": ANY,
    },
    "system.background": {
        "dir_encoding_config": ({"otype": "SphericalHarmonics", "degree": 3},),
        "n_output_dims": (3,),
    },
    "system.background.mlp_network_config": {
        "activation": ("ReLU",),
        "otype": ("VanillaMLP",),
        "output_activation": (None, "none"),
    },
    "system.renderer": {
        "context_type": ANY,
        "estimator": ("occgrid",),
        "far_plane": (1e10,),
        "near_plane": (0.0,),
        "num_samples_per_ray_importance": ANY,  # of other estimators, like the next
        "num_samples_per_ray_proposal": ANY,
        "prop_optimizer_config": ANY,
        "prop_scheduler_config": ANY,
        "proposal_network_config": ANY,
        "prune_alpha_threshold": ANY,  # skips samples that are not visible
        "return_comp_normal": ANY,
    },
    "system.prompt_processor": {
        "perp_neg_f_fs": ANY,  # no effect without `use_perp_neg`, like the next
        "perp_neg_f_fsb": ANY,
        "perp_neg_f_sb": ANY,
        "perp_neg_f_sf": ANY,
        "pretrained_model_name_or_path_prompt_debiasing": ANY,
        "prompt_back": (None,),
        "prompt_debiasing_mask_ids": ANY,
        "prompt_front": (None,),
        "prompt_overhead": (None,),
        "prompt_side": (None,),
        "spawn": ANY,
        "use_cache": ANY,
        "use_perp_neg": _NO,
        "use_prompt_debiasing": _NO,
        "view_dependent_prompt_front": _NO,
    },
    "system.guidance": {
        "enable_attention_slicing": ANY,
        "enable_channels_last_format": ANY,
        "enable_sequential_cpu_offload": ANY,
        "max_items_eval": ANY,
        "pretrained_config": ANY,  # of zero123, like the next
        "vram_O": ANY,
        "sqrt_anneal": _NO,
        "token_merging": _NO,
        "token_merging_params": ANY,
        "trainer_max_steps": ANY,  # of `sqrt_anneal`
        "use_img_loss": _NO,
        "use_sjc": _NO,
        "var_red": ANY,  # of `use_sjc`
    },
    "system.loss": {  # a weight of zero at every step has no effect
        "lambda_sds_img": _NO,
        "lambda_z_variance": _NO,
        "lambda_normal_consistency": _NO,
        "lambda_laplacian_smoothness": _NO,
        "lambda_normal_smooth": _NO,
        "lambda_3d_normal_smooth": _NO,
        "lambda_eikonal": _NO,
        "lambda_rgb": _NO,
        "lambda_mask": _NO,
        "lambda_depth": _NO,
        "lambda_depth_rel": _NO,
        "lambda_normal": _NO,
        "lambda_vsd": _NO,
        "lambda_lora": _NO,
        "lambda_sd": _NO,
        "lambda_sd_img": _NO,
        "lambda_3d_sd": _NO,
    },
}
"""Settings of threestudio that we lack, by section: the values that are accepted."""

VALUES: Mapping[str, Callable[[Any], bool]] = {
    "system.geometry.normal_type": lambda value: value == "pred",
}
"""Settings that exist here, and values that only threestudio supports."""

_ON_TETRAHEDRA = frozenset(
    {
        "system.geometry_convert_from",
        "system.geometry_convert_inherit_texture",
        "system.geometry.isosurface_deformable_grid",
        "system.loss.lambda_normal_consistency",
        "system.loss.lambda_laplacian_smoothness",
    }
)

_REFERENCE = frozenset({"system.loss.lambda_rgb", "system.loss.lambda_mask"})

OWN: Mapping[str, frozenset[str]] = {
    "textmesh-system": frozenset({"system.loss.lambda_eikonal"}),
    "magic3d-system": _ON_TETRAHEDRA | {"system.refinement"},
    "zero123-system": _REFERENCE
    | {
        "system.loss.lambda_depth",
        "system.loss.lambda_depth_rel",
        "system.loss.lambda_normal_smooth",
        "system.loss.lambda_3d_normal_smooth",
    },
    "zero123-gaussian-system": _REFERENCE,
    "prolificdreamer-system": _ON_TETRAHEDRA
    | {"system.loss.lambda_vsd", "system.loss.lambda_lora"},
}
"""Settings in `SETTINGS` that a system of ours has, by the name of the system."""

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
    return harmless is _NO and isinstance(value, list) and not any(values_of(value))


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
