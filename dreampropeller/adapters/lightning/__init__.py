"""Any `LightningModule` with automatic optimisation, as a trajectory."""

from dreampropeller.adapters.lightning.host import Host as Host
from dreampropeller.adapters.lightning.host import Keyed as Keyed
from dreampropeller.adapters.lightning.trajectory import (
    LightningTrajectory as LightningTrajectory,
)
from dreampropeller.adapters.lightning.verification import (
    NotReproducible as NotReproducible,
)
from dreampropeller.adapters.lightning.verification import verify as verify
