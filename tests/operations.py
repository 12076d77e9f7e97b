"""Which C functions there are that tensors are passed to."""

from __future__ import annotations

import re
from pathlib import Path

from tinygpt.ops import fast


def operations() -> list[tuple[Path, str]]:
    """Each of them, with its file."""
    found = []
    for file in sorted(Path(fast.__file__).parent.glob("*.c")):
        functions = re.findall(
            r"static void (\w+)\((.*?)\) {$", file.read_text(encoding="utf-8"), re.S | re.M
        )
        found += [(file, name) for name, parameters in functions if "core_id" in parameters]
    return found
