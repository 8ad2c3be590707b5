"""`python -m dreampropeller_workspace` is the command `dreampropeller`."""

import sys

from dreampropeller_workspace.command import main

if __name__ == "__main__":
    sys.exit(main())
