"""Build the stacked model and sample tokens: the same program as the command `tinygpt`."""

import sys

from tinygpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
