"""Checks annotated functions of `dreampropeller` at run time, in every test.

An int is a float, as Python has it. Imported before the package.
"""

from beartype import BeartypeConf
from beartype.claw import beartype_package

beartype_package(
    "dreampropeller",
    conf=BeartypeConf(
        is_pep484_tower=True,
        claw_is_pep526=False,
        # They name types that are imported for the static checker alone, or stand in
        # for a U-Net's `forward` and do not return what it does.
        claw_skip_package_names=(
            "dreampropeller.adapters.diffusers.loop",
            "dreampropeller.adapters.lightning.verification",
            "dreampropeller.dispatch.ray",
            "dreampropeller.dispatch.ray_replica",
            "dreampropeller.verification",
        ),
    ),
)
