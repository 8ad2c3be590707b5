"""Parallel sampling with the pipelines and schedulers of `diffusers`."""

from dreampropeller.adapters.diffusers.clean_image import CleanImage as CleanImage
from dreampropeller.adapters.diffusers.pipeline import measure as measure
from dreampropeller.adapters.diffusers.pipeline import sample as sample
from dreampropeller.adapters.diffusers.pipeline import solver_for as solver_for
from dreampropeller.adapters.diffusers.speculative import Speculative as Speculative
from dreampropeller.adapters.diffusers.trajectory import Denoiser as Denoiser
from dreampropeller.adapters.diffusers.trajectory import (
    SamplingTrajectory as SamplingTrajectory,
)
from dreampropeller.adapters.diffusers.trajectory import worst_image as worst_image
