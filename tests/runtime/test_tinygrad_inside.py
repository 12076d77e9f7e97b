"""Each part of tinygrad's inside that `runtime` builds on, by its name.

When the pin moves, this says first what moved (see docs/moving-tinygrad.md). So it imports nothing
of this package, which would end at the first name: `pytest --noconftest` with this file alone.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "tinygpt" / "runtime"
# What is reached through a name that is imported, and not imported itself.
REACHED = {
    "tinygrad.device": ["Buffer.ensure_allocated", "Buffer.copyin", "BufferSpec.nolru"],
    "tinygrad.helpers": ["db_connection", "_db_connection"],
    "tinygrad.renderer.cstyle": ["ClangJITRenderer"],
    "tinygrad.runtime.graph.hcq": ["RDMACopyQueue"],
    "tinygrad.runtime.ops_cpu": ["CPUAllocator._alloc", "LVPRenderer"],
    "tinygrad.runtime.ops_rdma": ["RDMACopyQueue"],
    "tinygrad.runtime.support.compiler_cpu": ["subprocess.check_output"],
    "tinygrad.renderer.llvmir": ["CPULLVMRenderer"],
    "tinygrad.renderer.isa.x86": ["X86Renderer"],
    "tinygrad.tensor": ["Tensor.gradient", "Tensor.replace", "Tensor.threefry"],
    "tinygrad.uop.ops": [
        "Ops.AFTER", "Ops.BIND", "Ops.BUFFER", "Ops.CALL", "Ops.COPY", "Ops.PARAM", "Ops.PROGRAM",
        "UOp.placeholder_like", "UOp.call", "UOp.store", "UOp.after", "UOp.param", "UOp.new_buffer",
        "UOp.unbind", "ProgramInfo.vals", "ProgramInfo.runtimevars",
    ],
}  # fmt: skip


def names() -> list[tuple[str, str]]:
    """What the files of `runtime` use of tinygrad: (module, name)."""
    found = {(module, name) for module, reached in REACHED.items() for name in reached}
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinygrad"):
                found |= {(node.module, alias.name) for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), names(), ids=lambda value: value)
def test_tinygrad_has(module, name):
    place = import_module(module)
    for part in name.split("."):
        assert hasattr(place, part), f"{module} has no {name}"
        place = getattr(place, part)
