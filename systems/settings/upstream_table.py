"""Settings of threestudio that are lacking here, and the values that are accepted.

Names are those of threestudio at its last commit (December 2024). `upstream` reads
configs by this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

ANY: tuple[Any, ...] = ()
"""In `SETTINGS`: any value is accepted, because it has no effect on the object."""
NO: tuple[Any, ...] = (None, False, 0)
"""In `SETTINGS`: only what asks for nothing is accepted."""

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
        "fast_dev_run": NO,
        "gradient_clip_algorithm": ANY,
        "gradient_clip_val": NO,
        "limit_train_batches": (None, 1.0),
        "max_time": (None,),
        "num_nodes": (1,),
        "overfit_batches": NO,
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
        "rays_noise_scale": NO,  # single images, like the next
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
        "refinement": NO,
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
        "force_shape_init": NO,
        "shape_init": (None,),
        "shape_init_mesh_front": ANY,  # of `shape_init`, like the next
        "shape_init_mesh_up": ANY,
        "shape_init_params": ANY,
    },
    "system.geometry.pos_encoding_config": {
        "include_xyz": NO,
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
        "pretrained_model_name_or_path_prompt_debiasing": ANY,
        "prompt_back": (None,),
        "prompt_debiasing_mask_ids": ANY,
        "prompt_front": (None,),
        "prompt_overhead": (None,),
        "prompt_side": (None,),
        "spawn": ANY,
        "use_cache": ANY,
        "use_prompt_debiasing": NO,
        "view_dependent_prompt_front": NO,
    },
    "system.guidance": {
        "enable_attention_slicing": ANY,
        "enable_channels_last_format": ANY,
        "enable_sequential_cpu_offload": ANY,
        "max_items_eval": ANY,
        "pretrained_config": ANY,  # of zero123, like the next
        "vram_O": ANY,
        "sqrt_anneal": NO,
        "token_merging": NO,
        "token_merging_params": ANY,
        "trainer_max_steps": ANY,  # of `sqrt_anneal`
        "use_img_loss": NO,
        "use_sjc": NO,
        "var_red": ANY,  # of `use_sjc`
    },
    "system.loss": {  # a weight of zero at every step has no effect
        "lambda_sds_img": NO,
        "lambda_z_variance": NO,
        "lambda_normal_consistency": NO,
        "lambda_laplacian_smoothness": NO,
        "lambda_normal_smooth": NO,
        "lambda_3d_normal_smooth": NO,
        "lambda_eikonal": NO,
        "lambda_rgb": NO,
        "lambda_mask": NO,
        "lambda_depth": NO,
        "lambda_depth_rel": NO,
        "lambda_normal": NO,
        "lambda_vsd": NO,
        "lambda_lora": NO,
        "lambda_sd": NO,
        "lambda_sd_img": NO,
        "lambda_3d_sd": NO,
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
