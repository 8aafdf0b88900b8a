"""`python -m slipstream`: the command, where its script is not on the path, or `torchrun -m slipstream pack ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
