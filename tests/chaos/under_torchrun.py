"""A rank that `torchrun` starts, with a fault in its first attempt."""

import json
import os
import sys

from tests.chaos import faults
from tests.chaos.faults import Fault

first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
fault = Fault(**json.loads(os.environ["CHAOS_FAULT"]))
here = first and os.environ["RANK"] == os.environ["CHAOS_RANK"]
sys.exit(faults.run(sys.argv[1:], [fault] if here else []))
