"""ProlificDreamer's promises: scene and LoRA are one state, exact at threshold 0."""

from __future__ import annotations

import functools
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import dreampropeller as dp
from dreampropeller import checkpoint, identity
from dreampropeller.identity import AnotherProblem
from dreampropeller.precision import LOSS_SCALE
from systems import build
from systems.prolificdreamer import LORA
from systems.runs.folders import load_own_state
from systems.settings.config import load
from systems.settings.reader import ConfigError
from tests.helpers import tree_equal
from tests.rank_pool import RankPool
from tests.systems.prolific import (
    CPU,
    ROOT,
    STEPS,
    exact,
    solve_on,
    solve_on_ranks,
    solve_until_killed,
    tiny,
)
from tests.systems.scenes import SMALL
from tests.systems.test_priors import deep_floyd as deep_floyd
from tests.systems.test_priors import stable_diffusion as stable_diffusion
from tests.systems.test_upstream import CHECKOUT, written

HIDDEN = "system.guidance.guidance_scale_lora=3 system.guidance"
TOYBOX = "configs/prolificdreamer-toybox.yaml"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)


@functools.cache
def _sequential(folder: Path) -> dp.Solution[Any]:
    return dp.solve(tiny(folder).trajectory(), dp.Sequential())


def test_threshold_zero_is_sequential_for_scene_and_lora(
    stable_diffusion: Path,
) -> None:
    plain = _sequential(stable_diffusion)
    start, _ = tiny(stable_diffusion).trajectory().init()
    learned = [n for n in start if n.startswith(f"{LORA}unet.") and "lora_B" in n]
    assert len(learned) >= 8
    for name in ("geometry.encoding.table", *learned):
        assert not torch.equal(plain.value[name], start[name]), name
    solution = dp.solve(tiny(stable_diffusion).trajectory(), exact(4))
    assert tree_equal(solution.value, plain.value)
    assert tree_equal(solution.carry, plain.carry)


def test_two_workers_give_the_same_bytes_and_a_private_lora_does_not(
    stable_diffusion: Path, two_ranks: RankPool
) -> None:
    run = functools.partial(
        solve_on_ranks, stable_diffusion, os.environ["XDG_CACHE_HOME"]
    )
    answers = two_ranks(run)
    alone = {name: solve_on(name, stable_diffusion) for name in ("shared", "local")}
    for answer in answers:
        assert tree_equal(answer["exact"], _sequential(stable_diffusion).value)
        assert tree_equal(answer["shared"], alone["shared"])
        # Each worker's LoRA has seen other steps than that of a single worker.
        table = "geometry.encoding.table"
        assert not torch.equal(answer["local"][table], alone["local"][table])
        assert tree_equal(answer["local"], answers[0]["local"])
    assert not any(name.startswith(LORA) for name in alone["local"])


@pytest.mark.long  # and splats: tests/systems/gaussians/test_trajectory.py
def test_a_killed_run_resumes_to_the_same_bits(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    cache = os.environ["XDG_CACHE_HOME"]
    process = multiprocessing.get_context("spawn").Process(
        target=solve_until_killed, args=(stable_diffusion, cache, tmp_path)
    )
    process.start()
    process.join(300)
    assert process.exitcode == -9
    state = checkpoint.load(tmp_path)
    assert STEPS // 2 <= state.step < STEPS
    system = tiny(stable_diffusion)
    system.check_state(state.y, tmp_path)  # before the model is loaded
    solution = dp.solve(system.trajectory(), exact(3), state=state)
    system.check_state(solution.value, tmp_path)
    assert tree_equal(solution.value, _sequential(stable_diffusion).value)
    assert tree_equal(solution.carry, _sequential(stable_diffusion).carry)


def test_the_scene_is_rendered_without_the_model(stable_diffusion: Path) -> None:
    y = _sequential(stable_diffusion).value
    system = tiny(stable_diffusion, "data.eval_height=8", "data.eval_width=8")
    assert next(system.turntable(y, 1)).shape == (3, 8, 8)
    other = tiny(stable_diffusion, "system.guidance.lora_rank=2").trajectory()
    state = dp.Sequential().init(*tiny(stable_diffusion).trajectory().init())
    state.problem = tiny(stable_diffusion).trajectory().fingerprint()
    with pytest.raises(AnotherProblem, match="lora"):
        dp.solve(other, exact(2), state=state)


def test_each_loss_moves_its_own_part(stable_diffusion: Path) -> None:
    """And each reads the other: that is why they are one state."""
    y = _sequential(stable_diffusion).value

    def drift(y: dp.State, *settings: str) -> dp.State:
        trajectory = tiny(stable_diffusion, *settings).trajectory()
        return trajectory.make_drift(CPU)(1, y)[0]

    names = [n for n in y if n.startswith(LORA)]
    whole = drift(y)
    halved = drift(y, "system.loss.lambda_lora=0.5")
    silent = drift(
        y, *(f"system.loss.lambda_{n}=0" for n in ("vsd", "sparsity", "opaque"))
    )
    for name in names:
        assert torch.allclose(halved[name], whole[name] / 2, atol=1e-7)
        assert torch.equal(silent[name], whole[name])
    table = "geometry.encoding.table"
    assert torch.equal(halved[table], whole[table])
    assert not silent[table].any()
    moved = {**y, **{n: 1.5 * y[n] for n in names if "lora_B" in n}}
    assert not torch.equal(drift(moved)[table], whole[table])
    dimmer = {**y, table: 0.5 * y[table]}
    assert not torch.equal(drift(dimmer)[names[0]], whole[names[0]])


def test_the_embedded_priors_pixels_and_the_camera() -> None:
    """A text-only prior in pixel space: its LoRA is told the camera all the same."""
    system = build(load(TOYBOX, [*SMALL, "trainer.max_steps=2"]))
    trajectory = system.trajectory()
    solution = dp.solve(trajectory, dp.Sequential())
    start, _ = trajectory.init()
    seen = f"{LORA}unet.class_embedding.network.linear_1.weight"
    for name in (seen, "geometry.grid"):
        assert not torch.equal(solution.value[name], start[name])
    blind = build(load(TOYBOX, [*SMALL, "system.guidance.camera_condition_type=none"]))
    assert seen not in blind.trajectory().init()[0]


def test_a_pixel_model_with_a_learned_variance(deep_floyd: Path) -> None:
    """DeepFloyd IF, in threestudio's own kinds of parts."""
    kind = "system.guidance_type=vsd-guidance"
    trajectory = tiny(deep_floyd, kind, "system.guidance.lora_rank=2").trajectory()
    start, _ = trajectory.init()
    value = dp.solve(trajectory, dp.Sequential(), max_iterations=2, throw=False).value
    learned = [n for n in start if n.startswith(LORA) and "lora_B" in n]
    assert learned
    for name in ("geometry.encoding.table", *learned):
        assert not torch.equal(value[name], start[name]), name


def theirs() -> dict[str, Any]:
    """The keys and values of threestudio's `prolificdreamer.yaml`."""
    ours = OmegaConf.load(ROOT / "configs" / "prolificdreamer-sd.yaml")
    content: Any = OmegaConf.to_container(ours)
    del content["solver"]
    content["name"] = "prolificdreamer"
    system, base = content["system"], "stabilityai/stable-diffusion-2-1"
    del system["guidance"]["lora"]
    system["material"]["n_output_dims"] = 3
    system["prompt_processor"]["pretrained_model_name_or_path"] = f"{base}-base"
    system["guidance"] |= {
        "pretrained_model_name_or_path": f"{base}-base",
        "pretrained_model_name_or_path_lora": base,
        "sqrt_anneal": False,
    }
    system["loss"]["lambda_z_variance"] = 0.0
    system["loggers"] = {"wandb": {"enable": False, "project": "x", "name": "None"}}
    content["trainer"] |= {
        **{"log_every_n_steps": 1, "num_sanity_val_steps": 0, "precision": 32},
        "enable_progress_bar": True,
    }
    content["checkpoint"] = {
        **{"save_last": True, "save_top_k": -1},
        "every_n_train_steps": "${trainer.max_steps}",
    }
    return content


def test_their_file_runs_and_equals_ours(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    """As it is but for sizes; with another model for the LoRA, as in theirs."""
    other = tmp_path / "other"
    other.symlink_to(stable_diffusion)
    path = (
        written(theirs(), tmp_path)
        if CHECKOUT is None
        else Path(CHECKOUT) / "configs" / "prolificdreamer.yaml"
    )
    name = "system.prompt_processor.pretrained_model_name_or_path"
    settings = (f"{name}={stable_diffusion}", "trainer.max_steps=2")
    values = [
        dp.solve(
            tiny(stable_diffusion, *settings, path=p, adapted=other).trajectory(),
            dp.Sequential(),
        ).value
        for p in (path, None)
    ]
    assert tree_equal(*values)
    settings = (*settings, "trainer.precision=16-mixed")
    mixed = tiny(stable_diffusion, *settings, path=path)
    assert LOSS_SCALE in dp.solve(mixed.trajectory(), exact(2)).value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("system.loss.lambda_lora=0", "lambda_lora` is 0, so the LoRA never learns"),
        ("system.loss.lambda_lora=[0,0,0,9]", "csd-guidance"),
        ("system.loss.lambda_sds=2", "`loss.lambda_sds` has no effect with"),
        ("system.stage=geometry", "`loss.lambda_sparsity` has no effect on this stage"),
        (
            "system.stage=fine",
            "`system.stage` is `fine`: write coarse or geometry or texture",
        ),
        ("system.guidance.lora=own", "write shared or local"),
        ("system.guidance.lora_targets=to_q", r"write \[a text, …\]"),
        ("system.guidance.lora_rank=0", "`lora_rank` is 0: write 1 or more"),
        (f"{HIDDEN}.camera_condition_type=none", "which `camera.*: none` hides"),
        (f"{HIDDEN}.lora_cfg_training=false", "false` the prediction .* never trained"),
        ("system.guidance.lora_alpha=0", "`lora_alpha` is 0, .*near the rank, .*as 4"),
        ("system.guidance.lora_alpha=-4", "scales the LoRA by -1"),
        ("system.guidance.lora_alpha=1e30", "`lora_alpha` is 1e.30"),
        (
            "system.optimizer.params.guidance.lr=0",
            "LoRA is 0.*csd-guidance",
        ),
        ("system.guidance.camera_condition_type=c2w", "extrinsics or mvp or none"),
        ("system.optimizer.params.guidance=null", "`params.guidance` is `None`"),
        ("data.resolution_milestones=[]", "one more for each milestone"),
        ("data.resolution_milestones=[3,3]", "write rising steps"),
    ],
)
def test_settings_that_cannot_be_used(
    setting: str, message: str, stable_diffusion: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(stable_diffusion, *setting.split())


def test_a_rate_is_needed_for_every_part(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    content = theirs()
    del content["system"]["optimizer"]["params"]["guidance"]
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(content))
    name = "system.prompt_processor.pretrained_model_name_or_path"
    with pytest.raises(ConfigError, match=r"no learning rate: .* `guidance\.\w+`"):
        tiny(stable_diffusion, f"{name}={stable_diffusion}", path=path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora_targets=[to_q,to_x]", r"`to_x`, which matches no layer.*to_out\.0"),
        ("lora_targets=['0']", r"also matches `down_blocks\.0`.*more of the name"),
        ("lora_rank=65", "widest layer of .* has width 16, .*write at most 64"),
    ],
)
def test_a_lora_that_the_model_cannot_take_is_refused(
    setting: str, message: str, stable_diffusion: Path
) -> None:
    system = tiny(stable_diffusion, f"system.guidance.{setting}")
    with pytest.raises(ValueError, match=message):
        system.trajectory()


def test_a_lora_of_another_space_is_refused(
    stable_diffusion: Path, deep_floyd: Path
) -> None:
    """Of images in pixels beside one of latents."""
    system = tiny(stable_diffusion, adapted=deep_floyd)
    with pytest.raises(ValueError, match=r"differs in channels \(3, not 4\)\. Leave"):
        system.trajectory()


def test_the_summary_names_a_local_lora(stable_diffusion: Path) -> None:
    (note,) = tiny(stable_diffusion, "system.guidance.lora=local").notes
    assert "depends on the number of workers" in note
    assert not tiny(stable_diffusion).notes


def test_a_default_that_is_written_out_is_no_other_run(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    made = tiny(stable_diffusion)
    about = identity.plain(made.about())
    tensors = {
        **dict(made.scene.named_parameters()),
        **dict(made.scene.named_buffers()),
    }
    y = {name: tensor.detach() for name, tensor in tensors.items()}
    state = dp.SolverState(0, y, None, problem={"about": about})
    checkpoint.save(tmp_path / "ckpts", state)

    def resumed(*words: str) -> dp.SolverState[Any]:
        settings = [f"system.guidance.{word}" for word in words]
        return load_own_state(tiny(stable_diffusion, f"resume={tmp_path}", *settings))

    found = resumed("camera_condition_type=extrinsics", "lora_rank=4").problem["about"]
    assert found["system"]["guidance"]["lora_rank"] == 4
    assert "lora_rank" not in about["system"]["guidance"]
    with pytest.raises(ConfigError, match="lora_rank` was 4 and is 3"):
        resumed("lora_rank=3")
