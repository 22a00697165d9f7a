"""`python -m grand_fast.compat SCRIPT.py …`, the same as `grand-fast run`."""

import sys

from grand_fast.compat.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m grand_fast.compat", until_exit=True))
