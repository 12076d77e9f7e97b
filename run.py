"""Build the stacked model and sample tokens: the same program as the command `tinygpt`."""

import sys

if __name__ == "__main__":
    try:
        from tinygpt.commands.main import main

        sys.exit(main())
    except KeyboardInterrupt:  # while Python was still importing
        sys.exit(130)
