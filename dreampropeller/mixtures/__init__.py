"""Dirichlet process and hierarchical Dirichlet process mixtures.

    pip install dreampropeller[mixtures]

The core does not import this package; `docs/mixtures.md` holds the mathematics.
"""

from dreampropeller.mixtures.estimators import DPMixture as DPMixture
from dreampropeller.mixtures.estimators import HDPMixture as HDPMixture
from dreampropeller.mixtures.inputs import NIW as NIW
from dreampropeller.mixtures.inputs import Dirichlet as Dirichlet
