"""What a GPU of NVIDIA's would run: it compiles by their own compiler, and grows no more unseen."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from program import finish, start

needs_nvrtc = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.cuda_nvrtc") is None,
    reason="the extra nvrtc is not here",
)
SETTINGS = {"NOOPT": None, "PYTHONPATH": "benchmarks"}


@needs_nvrtc
@pytest.mark.slow
def test_every_kernel_compiles_and_none_is_added_unseen():
    process = start(program=("benchmarks/gpu_kernels.py",), env=SETTINGS)
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()


@needs_nvrtc
def test_a_kernel_that_does_not_compile_ends_the_count():
    script = """
import gpu_kernels as kernels
from tinygrad.renderer.cstyle import CUDARenderer
real = CUDARenderer.render_kernel
CUDARenderer.render_kernel = lambda *args, **more: real(*args, **more).replace("{", "{ oh dear;", 1)
kernels.count_all()
"""
    status, out, err = finish(start(program=("-c", script), env=SETTINGS))
    assert (status, out) == (1, b"")
    assert "Nvrtc Error" in err
    assert 'identifier "oh" is undefined' in err


@needs_nvrtc
def test_a_number_that_grows_and_a_case_that_is_lost_are_told():
    script = """
import json
import gpu_kernels as kernels
table = json.loads(kernels.TABLE.read_text(encoding="utf-8"))
assert len(table) > 20 and kernels.beyond(table, table) == []
assert kernels.beyond({case: (0, 0) for case in table}, table) == []
for case, (number, size) in table.items():
    for more, word in ((number + 1, size), "kernels"), ((number, size + 1), "bytes"):
        (line,) = kernels.beyond({**table, case: more}, table)
        assert line.startswith(f"{case}: ") and word in line, line
    rest = {name: count for name, count in table.items() if name != case}
    assert len(kernels.beyond(rest, table)) == 1
    assert len(kernels.beyond(table, rest)) == 2
print("told")
"""
    assert finish(start(program=("-c", script), env=SETTINGS)) == (0, b"told\n", "")
