"""Each C operation under clang's sanitizers: no two threads may touch one place, nothing outside of
what is given may be touched, and nothing done that C does not define."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sanitized
from conftest import needs_clang
from operations import operations

from tinygpt.ops import fast
from tinygpt.runtime import launch

pytestmark = needs_clang
HERE = Path(fast.__file__).parent


@pytest.mark.parametrize("sanitizer", sanitized.SANITIZERS)
@pytest.mark.parametrize(
    ("file", "function"), operations(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_sanitizers_see_nothing_in_an_operation(file, function, sanitizer, tmp_path):
    if not sanitized.works(sanitizer):
        pytest.skip(f"no -fsanitize={sanitizer} to link")
    program, draw = tmp_path / "program", random.Random(0)
    sanitized.build(file, function, sanitizer, program)
    for seed in range(6):
        sizes = sanitized.random_sizes(draw, few=seed % 2 == 0)
        assert sanitized.run(program, file, function, sizes, seed) == "", sizes


@pytest.mark.parametrize("held", launch.WEIGHTS.values(), ids=lambda held: str(held["WEIGHT"]))
@pytest.mark.parametrize("function", ["linear", "embedding", "cross_entropy"])
def test_narrow_weights_are_widened_as_c_defines(function, held, tmp_path):
    if not sanitized.works("address,undefined"):
        pytest.skip("no -fsanitize=address,undefined to link")
    program, file = tmp_path / "program", HERE / f"{function}.c"
    sanitized.build(file, function, "address,undefined", program, held)
    for few in (False, True):
        sizes = sanitized.random_sizes(random.Random(1), few)
        assert sanitized.run(program, file, function, sizes) == ""


def test_the_sanitizers_see_faults(tmp_path):
    """All threads think that they are the first, and so write the same part; or that they are
    one before, whose part nobody has made room for."""
    file, program = HERE / "activation.c", tmp_path / "program"
    for sanitizer, core_id, words in (
        ("thread", "0", "data race"),
        ("address,undefined", "(int)(long)id - 1", "heap-buffer-overflow"),
        ("memory", "0", "use-of-uninitialized-value"),
    ):
        if not sanitized.works(sanitizer):
            continue
        sanitized.build(file, "activation", sanitizer, program, core_id=core_id)
        sizes = {"n": 17}
        assert words in sanitized.run(program, file, "activation", sizes), sanitizer
