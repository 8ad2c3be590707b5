"""Solve long recurrences in parallel: `state ← update(state, drift(state))`.

The public names, from the bottom up; `docs/method.md` holds the mathematics.
"""

from dreampropeller.acceleration.anderson import Anderson as Anderson
from dreampropeller.acceleration.secant import Secant as Secant
from dreampropeller.calibration import Calibration as Calibration
from dreampropeller.calibration import calibrate as calibrate
from dreampropeller.calibration import choose as choose
from dreampropeller.checkpoint import CheckpointError as CheckpointError
from dreampropeller.dispatch.base import Dispatcher as Dispatcher
from dreampropeller.dispatch.base import InlineDispatcher as InlineDispatcher
from dreampropeller.dispatch.base import WorkerError as WorkerError
from dreampropeller.dispatch.batched import BatchedDispatcher as BatchedDispatcher
from dreampropeller.dispatch.distributed import (
    DistributedDispatcher as DistributedDispatcher,
)
from dreampropeller.dispatch.launcher import launch as launch
from dreampropeller.drift_threshold import DriftThreshold as DriftThreshold
from dreampropeller.optimization import OptimizationTrajectory as OptimizationTrajectory
from dreampropeller.picard import PicardSolver as PicardSolver
from dreampropeller.predictor import Auto as Auto
from dreampropeller.predictor import Momentum as Momentum
from dreampropeller.predictor import Predictor as Predictor
from dreampropeller.predictor import RepeatLast as RepeatLast
from dreampropeller.rng import StepRandom as StepRandom
from dreampropeller.solution import Iteration as Iteration
from dreampropeller.solution import NotConverged as NotConverged
from dreampropeller.solution import Result as Result
from dreampropeller.solution import Solution as Solution
from dreampropeller.solution import Stats as Stats
from dreampropeller.solver import Sequential as Sequential
from dreampropeller.solver import Solver as Solver
from dreampropeller.solver import SolverState as SolverState
from dreampropeller.solver import solve as solve
from dreampropeller.threshold import EMAThreshold as EMAThreshold
from dreampropeller.threshold import FixedThreshold as FixedThreshold
from dreampropeller.threshold import Threshold as Threshold
from dreampropeller.trajectory import Drift as Drift
from dreampropeller.trajectory import Trajectory as Trajectory
from dreampropeller.tree import Aux as Aux
from dreampropeller.tree import State as State
from dreampropeller.window import AdaptiveWindow as AdaptiveWindow
from dreampropeller.window import SlidingWindow as SlidingWindow
from dreampropeller.window import Window as Window

__version__ = "0.1.0"
