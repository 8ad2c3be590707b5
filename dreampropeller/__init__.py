"""Solve long recurrences in parallel: `state ← update(state, drift(state))`.

The public names in five groups: problem, solver, control, dispatch, report;
`docs/method.md` holds the mathematics.
"""

# ruff: noqa: I001, sorted by group

# Problem: the trajectory to solve.
from dreampropeller.batched_loss import BatchedLoss as BatchedLoss
from dreampropeller.optimization import OptimizationTrajectory as OptimizationTrajectory
from dreampropeller.rng import StepRandom as StepRandom
from dreampropeller.sharded_loss import Contribution as Contribution
from dreampropeller.sharded_loss import Ratio as Ratio
from dreampropeller.sharded_loss import ShardedLoss as ShardedLoss
from dreampropeller.shards import Shard as Shard
from dreampropeller.shards import ShardRandom as ShardRandom
from dreampropeller.trajectory import Drift as Drift
from dreampropeller.trajectory import Parents as Parents
from dreampropeller.trajectory import Trajectory as Trajectory
from dreampropeller.tree import Aux as Aux
from dreampropeller.tree import State as State

# Solver: the method.
from dreampropeller import checkpoint as checkpoint
from dreampropeller.checkpoint import CheckpointError as CheckpointError
from dreampropeller.picard import PicardSolver as PicardSolver
from dreampropeller.solution import SolverState as SolverState
from dreampropeller.solver import NonFiniteDrift as NonFiniteDrift
from dreampropeller.solver import Sequential as Sequential
from dreampropeller.solver import Solver as Solver
from dreampropeller.solver import solve as solve

# Control: window, threshold, predictor and acceleration of a Picard iteration.
from dreampropeller.acceleration.anderson import Anderson as Anderson
from dreampropeller.acceleration.base import Acceleration as Acceleration
from dreampropeller.acceleration.base import Proposal as Proposal
from dreampropeller.acceleration.secant import Secant as Secant
from dreampropeller.component import Memory as Memory
from dreampropeller.drift_threshold import DriftThreshold as DriftThreshold
from dreampropeller.predictor import FittedMomentum as FittedMomentum
from dreampropeller.predictor import Momentum as Momentum
from dreampropeller.predictor import Predictor as Predictor
from dreampropeller.predictor import RepeatLast as RepeatLast
from dreampropeller.rollout import Evaluation as Evaluation
from dreampropeller.rollout import Rollout as Rollout
from dreampropeller.threshold import EMAThreshold as EMAThreshold
from dreampropeller.threshold import FixedThreshold as FixedThreshold
from dreampropeller.threshold import Threshold as Threshold
from dreampropeller.window import AdaptiveWindow as AdaptiveWindow
from dreampropeller.window import BlockWindow as BlockWindow
from dreampropeller.window import SequentialStart as SequentialStart
from dreampropeller.window import SlidingWindow as SlidingWindow
from dreampropeller.window import Window as Window

# Dispatch: the devices that evaluate drifts.
from dreampropeller.calibration import Calibration as Calibration
from dreampropeller.calibration import calibrate as calibrate
from dreampropeller.calibration import choose_solver as choose_solver
from dreampropeller.dispatch.base import Dispatcher as Dispatcher
from dreampropeller.dispatch.base import InlineDispatcher as InlineDispatcher
from dreampropeller.dispatch.base import WorkerError as WorkerError
from dreampropeller.dispatch.batched import BatchedDispatcher as BatchedDispatcher
from dreampropeller.dispatch.distributed import (
    DistributedDispatcher as DistributedDispatcher,
)
from dreampropeller.dispatch.launcher import launch_workers as launch_workers

# Report: the solution of a solve and its cost.
from dreampropeller.solution import Iteration as Iteration
from dreampropeller.solution import NotConverged as NotConverged
from dreampropeller.solution import Result as Result
from dreampropeller.solution import Solution as Solution
from dreampropeller.solution import Stats as Stats

__version__ = "0.1.0"
