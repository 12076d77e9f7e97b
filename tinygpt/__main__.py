"""`python -m tinygpt`: the same program as the command `tinygpt`."""

import sys

from tinygpt.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
