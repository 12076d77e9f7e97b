"""Each C operation on several threads, under ThreadSanitizer: no two may touch one place."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import needs_clang
from operations import operations

from tinygpt.ops import fast
from tinygpt.runtime import launch

# So many threads, and sizes that they do not divide.
THREADS = 3
SIZES = {"n": 1003, "H": 2, "n_head": 2, "D": 5, "T": 13, "B": 2, "S": 40, "V": 31, "C": 10}
HARNESS = """
#undef select
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
static void *work(void *id) {{
  {call}
  return 0;
}}
int main(void) {{
  pthread_t threads[{threads}];
  {allocate}
  for (long i = 0; i < {threads}; i++) pthread_create(threads + i, 0, work, (void *)i);
  for (int i = 0; i < {threads}; i++) pthread_join(threads[i], 0);
}}
"""


@functools.cache
def sanitizer_works() -> bool:
    """Whether clang links its ThreadSanitizer here."""
    if not shutil.which("clang"):
        return False
    command = ["clang", "-fsanitize=thread", "-x", "c", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=b"int main(void) { }", capture_output=True).returncode == 0


def run(
    file: Path, function: str, place: Path, few: int = 0, core_id: str = "(int)(long)id"
) -> str:
    """What the sanitizer says of a call on zeros, "" for nothing."""
    known = {**SIZES, "few": few, "M": few or 13, "threads": THREADS, "N": 37, "K": 21, "R": 11}
    known |= {"count": 11, "batch": 2, "start_pos": 3, "row": 0}
    declared, allocated, given = [], [], []
    for p in launch.signature(file, function):
        if p.pointer:
            declared.append(f"static {p.type} *{p.name};")
            allocated.append(f"{p.name} = calloc(1 << 16, sizeof *{p.name});")
            given.append(p.name)
        elif p.name == "core_id":
            given.append(core_id)
        else:
            given.append("0.5f" if p.type == "float" else str(known.get(p.name, 1)))
    lines = ["#define WEIGHT float", "#define ACTIVATION gelu_tanh", "#define select vec_select"]
    body = HARNESS.format(
        call=f"{function}({', '.join(given)});", allocate=" ".join(allocated), threads=THREADS
    )
    source = "\n".join([*lines, launch.source(file), *declared, body])
    made = place / "harness"
    command = ["clang", "-O0", "-g", "-fsanitize=thread", "-march=native", "-w", "-x", "c", "-"]
    subprocess.run([*command, "-lpthread", "-o", str(made)], input=source.encode(), check=True)
    return subprocess.run([str(made)], capture_output=True, encoding="utf-8").stderr


@needs_clang
@pytest.mark.skipif(not sanitizer_works(), reason="no ThreadSanitizer to link")
@pytest.mark.parametrize(
    ("file", "function"), operations(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_no_two_threads_touch_one_place(file, function, tmp_path):
    for few in (0, 3):
        assert run(file, function, tmp_path, few=few) == ""


@needs_clang
@pytest.mark.skipif(not sanitizer_works(), reason="no ThreadSanitizer to link")
def test_the_sanitizer_sees_threads_that_do(tmp_path):
    """All threads think that they are the first, and so write the same part."""
    file = Path(fast.__file__).with_name("activation.c")
    assert "data race" in run(file, "activation", tmp_path, core_id="0")
