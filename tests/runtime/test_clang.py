"""Which clang compiles, wherever it stands; and that the wheel's writes what the system's does.

`.ci/run` also runs the tests of the operations on a PATH without clang, where the wheel is.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import needs_clang
from program import SHORT, finish, is_refused, start

from tinygpt.runtime import clang, step_store

needs_wheel = pytest.mark.skipif(find_spec("ziglang") is None, reason="extra `clang` not there")


def program(folder: Path, name: str, words: str = "gcc 13") -> str:
    """A program that says what it is, and nothing else."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{words}'\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A PATH without anything on it, a system without the wheel; a folder that is on that PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(clang, "find_spec", lambda _: None)
    clang._command.cache_clear()
    yield tmp_path
    clang._command.cache_clear()


@pytest.mark.parametrize(
    "cc",
    ["gcc", "cc", "ccache gcc", "/no/such/clang", "zig cc", "'clang", "clang-format", "  ", "-O2"],
)
def test_a_compiler_that_is_no_clang_leaves_it_to_the_path(cc, bare, monkeypatch):
    program(bare, "gcc"), program(bare, "cc"), program(bare, "clang-format")
    monkeypatch.setenv("CC", cc)
    assert clang.command() is None
    assert ("CC is" in clang.missing()) == bool(cc.strip())
    clang._command.cache_clear()
    on_path = program(bare, "clang", "clang version 18")
    assert clang.command() == (on_path,)


@pytest.mark.parametrize(
    ("cc", "name"),
    [
        ("clang-17", "clang-17"),
        ("ccache clang-17", "clang-17"),
        ("x86_64-conda-linux-gnu-clang -O3", "x86_64-conda-linux-gnu-clang"),
        ("{folder}/my tools/clang", "my tools/clang"),
        ("cc", "cc"),  # a clang by another name, where there is no other
        ("", "clang-15"),  # a system that has it only under its number
    ],
)
def test_the_clang_that_cc_means_is_taken(cc, name, bare, monkeypatch):
    found = program(bare, name, "Apple clang version 17.0.0")
    monkeypatch.setenv("CC", cc.format(folder=bare))
    assert clang.command() == (found,)


def test_the_wheel_comes_behind_the_path(bare, monkeypatch):
    zig = program(bare / "ziglang", "zig.exe" if os.name == "nt" else "zig")
    wheel = type("Spec", (), {"origin": str(bare / "ziglang" / "__init__.py")})
    monkeypatch.setattr(clang, "find_spec", lambda name: wheel if name == "ziglang" else None)
    monkeypatch.setenv("CC", "gcc")
    assert clang.command() == (zig, "clang")
    on_path = program(bare, "clang")
    clang._command.cache_clear()
    assert clang.command() == (on_path,)


@needs_clang
def test_captured_steps_are_kept_by_the_clang_and_not_by_what_cc_says(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    before = step_store.digest("a step")
    monkeypatch.setenv("CC", "gcc")
    assert step_store.digest("a step") == before
    monkeypatch.setattr(clang, "command", lambda: ("/another/clang",))
    assert step_store.digest("a step") != before


@needs_clang
@pytest.mark.slow
@pytest.mark.parametrize("cc", ["gcc", "ccache clang", "/no/such/compiler"])
def test_another_compiler_in_cc_computes_the_same_in_c(cc, tmp_path):
    """With no kernel of an earlier run; tinygrad alone would start that compiler, or none."""
    runs = []
    for number, given in enumerate((None, cc)):
        env = {"CC": given, "DEV": "CPU", "CACHEDB": str(tmp_path / f"{number}.db")}
        status, out, err = finish(start("Hi", *SHORT, env=env))
        assert status == 0, err
        assert "CPU (clang), C operations" in err
        runs.append(out)
    assert runs[0] == runs[1]


@pytest.fixture(scope="module")
def without_clang(tmp_path_factory):
    """Variables of a system whose PATH has no clang, and whose cache has no kernel."""
    folder = tmp_path_factory.mktemp("without-clang")
    return {"PATH": str(folder), "CC": None, "CACHEDB": str(folder / "kernels.db"), "DEV": None}


def test_without_a_clang_the_advice_is_the_command_that_brings_one(bare, monkeypatch):
    assert clang.advice() in ("pip install 'tinygpt[clang]'", "pip install ziglang")
    monkeypatch.setattr(clang, "distribution", _no_distribution)
    assert clang.advice() == "pip install ziglang"  # another's package may have the name


def _no_distribution(name: str) -> None:
    raise clang.PackageNotFoundError(name)


def test_an_explicit_cpu_without_any_clang_is_one_line_with_the_advice(without_clang):
    script = "from tinygpt.runtime import clang; clang.find_spec = lambda _: None\n"
    script += "import sys; from tinygpt.__main__ import main; sys.exit(main())"
    env = {**without_clang, "DEV": "CPU", "CC": "gcc"}
    words = (
        r"no clang found (CC is 'gcc', which is none). Unset DEV to let the program choose, `pip"
    )
    assert is_refused(finish(start("x", *SHORT, program=("-c", script), env=env)), words)


@needs_wheel
def test_the_wheels_clang_writes_the_systems_text(without_clang, tmp_path):
    """On a PATH without clang: the model in the package, by the wheel's."""
    flags = ["To be", "--max-new-tokens", 40, "--temperature", 0]
    status, out, err = finish(start(*flags, env=without_clang))
    assert status == 0, err
    assert "CPU (clang), C operations" in err
    if shutil.which("clang"):
        env = {"CC": None, "CACHEDB": str(tmp_path / "kernels.db"), "DEV": "CPU"}
        assert finish(start(*flags, env=env))[1] == out
