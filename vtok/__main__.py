"""`python -m vtok`: the command `vtok`."""

import sys

from vtok.cli import main

if __name__ == "__main__":
    sys.exit(main())
