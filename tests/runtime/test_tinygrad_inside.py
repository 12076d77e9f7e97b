"""Each part of tinygrad's inside that `runtime` builds on, by its name.

When the pin moves, this says first what moved: see docs/moving-tinygrad.md.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

from tinygpt.runtime import capture

FOLDER = Path(capture.__file__).parent


def names() -> list[tuple[str, str]]:
    """What the files of `runtime` import of tinygrad: (module, name)."""
    found = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinygrad"):
                found |= {(node.module, alias.name) for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), names(), ids=lambda value: value)
def test_tinygrad_has(module, name):
    assert hasattr(import_module(module), name), f"{module} has no {name}"


def test_the_renderers_by_whose_names_forms_are_chosen():
    for module, name in (
        ("tinygrad.renderer.cstyle", "ClangJITRenderer"),
        ("tinygrad.renderer.llvmir", "CPULLVMRenderer"),
        ("tinygrad.renderer.isa.x86", "X86Renderer"),
    ):
        assert hasattr(import_module(module), name), f"{module} has no {name}"
