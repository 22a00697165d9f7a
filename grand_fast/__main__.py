"""`python -m grand_fast`: the command line."""

import sys

from grand_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
