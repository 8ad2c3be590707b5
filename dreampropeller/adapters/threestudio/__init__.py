"""Unmodified threestudio systems, accelerated."""

from dreampropeller.adapters.threestudio.accelerate import accelerate as accelerate
from dreampropeller.adapters.threestudio.accelerate import (
    make_trajectory as make_trajectory,
)
from dreampropeller.adapters.threestudio.growing import (
    GrowingTrajectory as GrowingTrajectory,
)
from dreampropeller.adapters.threestudio.trajectory import (
    ThreestudioTrajectory as ThreestudioTrajectory,
)
