"""The interface of every field: values, features and normals at points in space."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from systems.settings.checks import at_least, one_of


@dataclass(frozen=True)
class FieldConfig:
    """Settings of all fields (`system.geometry` in a config).

    Args:
        radius: Radius of the ball that holds the object.
        n_feature_dims: Number of feature channels passed to the material.
        normal_type: Normals: "finite_difference", "analytic" (by differentiation), or
            null for none, where neither light nor loss needs them.
        finite_difference_normal_eps: Step of the finite differences.
        isosurface_threshold: Value at the surface of the exported mesh; "auto"
            chooses it from the object's silhouettes.
        isosurface_resolution: Grid points per side for the exported mesh.
    """

    radius: float = 1.0
    n_feature_dims: int = 3
    normal_type: str | None = "finite_difference"
    finite_difference_normal_eps: float | str = 0.01
    isosurface_threshold: float | str = "auto"
    isosurface_resolution: int = 128

    def __post_init__(self) -> None:
        at_least("radius", self.radius, 1e-3)
        at_least("n_feature_dims", self.n_feature_dims, 3)
        at_least("isosurface_resolution", self.isosurface_resolution, 8)
        self._check_eps()
        if isinstance(self.isosurface_threshold, str):
            one_of(
                "isosurface_threshold", self.isosurface_threshold, ("auto", "a number")
            )
        if self.normal_type is not None:
            one_of("normal_type", self.normal_type, self._normal_types())

    def _check_eps(self) -> None:
        if isinstance(self.finite_difference_normal_eps, str):
            raise ValueError(
                f"`finite_difference_normal_eps` is "
                f"`{self.finite_difference_normal_eps}`: write a number, such as 0.01."
            )
        at_least(
            "finite_difference_normal_eps", self.finite_difference_normal_eps, 1e-9
        )

    def _normal_types(self) -> tuple[str, ...]:
        return ("finite_difference", "analytic")


class Field(nn.Module, abc.ABC):
    """Values that rise into the object, and features, at points in space.

    `step` is the step on the trajectory, for encodings that sharpen over time; None:
    the final form.

    Attributes:
        outside: The value where there certainly is no object.
        translucent: Whether rays see into the object, beyond its surface.
    """

    Config: type[FieldConfig]
    config: Any
    outside: float = 0.0
    translucent: bool = True

    def __init__(self, config: FieldConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def level(self) -> float | None:
        """The value at the surface; None: that which matches the silhouettes."""
        chosen = self.config.isosurface_threshold
        return None if isinstance(chosen, str) else chosen

    @abc.abstractmethod
    def raw(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """The learned part: a value, and features."""

    @abc.abstractmethod
    def forward(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """Values and features."""

    @abc.abstractmethod
    def normals(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points 3"]:
        """Unit vectors along which the values fall fastest; differentiable."""
