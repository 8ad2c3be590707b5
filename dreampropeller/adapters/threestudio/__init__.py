"""Unmodified threestudio systems, accelerated."""

from dreampropeller.adapters.threestudio.accelerate import accelerate as accelerate
from dreampropeller.adapters.threestudio.growing import GrowingHost as GrowingHost
from dreampropeller.adapters.threestudio.system import SystemHost as SystemHost
from dreampropeller.adapters.threestudio.trajectory import (
    ThreestudioTrajectory as ThreestudioTrajectory,
)
