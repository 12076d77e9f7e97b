"""`python -m tinygpt`, the command `tinygpt` and run.py: one program.

All that takes time to import is imported inside of `main`, for Ctrl-C to end it like any other
time. So nothing more belongs at the top of this file.
"""

import sys


def main() -> int:
    """Run the program on the process's arguments and return its exit status."""
    try:
        from tinygpt.commands.main import main as program

        return program()
    except KeyboardInterrupt:  # while Python was still importing
        return 130


if __name__ == "__main__":
    sys.exit(main())
