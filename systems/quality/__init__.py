"""Quality of an object: against the ground truth, or by CLIP."""

from systems.quality.mesh import MeshQuality, measure_mesh
from systems.quality.truth import (
    GREY,
    NUM_VIEWS,
    SIZE,
    Quality,
    against_truth,
    by_clip,
    fixed_views,
    measure,
    psnr_so_far,
    truth_of,
)

__all__ = [
    "GREY",
    "NUM_VIEWS",
    "SIZE",
    "MeshQuality",
    "Quality",
    "against_truth",
    "by_clip",
    "fixed_views",
    "measure",
    "measure_mesh",
    "psnr_so_far",
    "truth_of",
]
