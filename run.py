"""Build the stacked model and sample tokens: the same program as the command `tinygpt`."""

import sys

from tinygpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
