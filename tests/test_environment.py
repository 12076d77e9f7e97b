"""What the environment says to tinygrad: refused in one line before tinygrad would end in a
traceback, from each way to start the program; and Ctrl-C while all is still being imported."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import sys
from pathlib import Path

import pytest
import tinygrad
from program import SHORT, finish, is_refused, start
from tinygrad.device import Device

from tinygpt import GPTConfig, InputError, environment

ARCH = {"AMD64": "x86_64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
WAYS = {
    "run.py": ("run.py",),
    "module": ("-m", "tinygpt"),
    "command": ("-c", "import sys; from tinygpt.__main__ import main; sys.exit(main())"),
}


@pytest.fixture
def variables(monkeypatch):
    """Sets these alone; "DEV" is not set unless it is among them."""

    def give(**values: str) -> None:
        monkeypatch.delenv("DEV", raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CPU": "1"}, "CPU is '1', as tinygrad had it before: unset it and set DEV=CPU instead"),
        (
            {"DEBUG": "true"},
            "DEBUG is 'true': it must be a whole number, -2147483647 to 2147483647; or unset it",
        ),
        ({"DEV": "A:B:C:D"}, "DEV is 'A:B:C:D': it must be BACKEND, BACKEND:COMPILER or "),
    ],
)
def test_what_tinygrad_cannot_read_is_one_line_however_it_is_started(way, variables, words):
    env = {"DEV": None, **variables}
    assert is_refused(finish(start("Hi", program=way, env=env)), words)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        *((name, "1", f"DEV={name}") for name in ("CUDA", "METAL", "CL", "AMD", "NV", "WEBGPU")),
        ("GPU", "1", "DEV=CL"),
        ("CLANG", "1", "DEV=CPU"),
        ("LLVM", "1", "DEV=CPU:LLVM"),
        ("CPU_LLVM", "1", "DEV=CPU:LLVM"),
        ("CUDA_CC", "PTX", "DEV=CUDA:PTX"),
        ("AMD_IFACE", "PCI", "DEV=PCI+AMD"),
        ("CPU", "native", "set DEV (DEV=CPU)"),
    ],
)
def test_the_old_way_to_name_a_backend_is_told_the_new(name, value, instead, variables):
    variables(**{name: value})
    with pytest.raises(InputError, match=f"{name} is '{value}'.*{re.escape(instead)}"):
        environment.check()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(
            (name, "x", "a whole number, -2147483647 to 2147483647;")
            for name in ("JIT", "NOOPT", "CACHELEVEL")
        ),
        ("BEAM", "x", "a whole number, 0 to 2147483647; or unset it"),
        ("JITBEAM", "-1", "a whole number, 0 to 2147483647; or unset it"),
        *(
            ("CPU_COUNT", value, "a whole number, 1 to 256; or unset it")
            for value in ("1.5", "0", "999")
        ),
        ("BEAM_MIN_PROGRESS", "x", "a number; or unset it"),
        ("DEFAULT_FLOAT", "half", "computed in float32; unset it"),
        ("SUM_DTYPE", "x", "it must be of bool, int8"),
        ("EMULATED_DTYPES", "x", "it must be of bool, int8"),
        ("TYPED", "1", "it must be 0; or unset it"),
        ("CAPTURING", "0", "it must be 1; or unset it"),
        ("CAPTURING", "x", "it must be 1; or unset it"),
        ("HCQ2", "1", "it must be 0; or unset it"),
        ("IOCTL", "1", "it must be 0; or unset it"),
        ("CACHEDB", ":memory:", "the path of a file.*CACHELEVEL=0"),
        ("CACHEDB", "file:x?mode=ro", "the path of a file.*CACHELEVEL=0"),
        ("DEV", "MOCK+AMD", "what stands in for a card is in tinygrad's sources"),
        ("DEV", "MOCK+CPU", "what stands in for a card is in tinygrad's sources"),
        ("DEBUG", "\x1b[2J" + "9" * 9999, r"\\x1b"),
    ],
)
def test_what_is_no_number_is_told_what_is_allowed(name, value, allowed, variables):
    variables(**{name: value})
    with pytest.raises(InputError, match=allowed) as caught:
        environment.check()
    assert len(str(caught.value)) < 400
    assert f"variable {name} is " in str(caught.value)


@pytest.mark.parametrize("value", ["9" * 30, "-" + "9" * 30, str(2**31), "9" * 9999])
def test_a_number_that_no_computer_word_holds_is_refused(value, variables, monkeypatch):
    for name in environment.NUMBERS:
        variables(**{name: value})
        with pytest.raises(InputError, match=f"variable {name} is .*: it must be .*; or unset it"):
            environment.check()
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "dev",
    [
        *("CPU::sparc", "CPU::sparc,native", "CPU:LLVM:sparc,x", "::sparc,native", "CPU::HERE"),
        *("CPU::HERE,", "CUDA;CPU::sparc,native", "cpu::sparc,native", "CPU::x,HERE"),
    ],
)
def test_a_processor_that_is_not_here_is_refused(dev, variables):
    variables(DEV=dev.replace("HERE", ARCH))
    with pytest.raises(InputError, match=f"the processor here is {ARCH}, .* CPU::{ARCH},native"):
        environment.check()


def test_no_variable_that_lets_tinygrad_import_what_its_package_lacks_is_let_through(
    variables, monkeypatch
):
    folder = Path(tinygrad.__file__).parent
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and re.search(
                r"(?m)^(from|import) (extra|test|examples)\b",
                "\n".join(map(ast.unparse, node.body)),
            ):
                found |= {*re.findall(r"getenv\('(\w+)'\)$", ast.unparse(node.test))}
    assert {"HCQ2", "IOCTL"} <= found
    for name in found:
        variables(DEV="CPU", **{name: "1"})
        with pytest.raises(InputError, match=f"variable {name} is "):
            environment.check()
        monkeypatch.delenv(name)


@pytest.mark.parametrize("argument", ["--help", "--version", "models"])
def test_without_a_path_the_program_runs(argument):
    status, out, err = finish(start(argument, env={"PATH": None}))
    assert (status, err) == (0, "")
    assert out


@pytest.mark.parametrize(
    "values",
    [
        {"NO_COLOR": "true"},
        {"NO_COLOR": "", "DEBUG": "", "CPU": ""},
        {"DEBUG": " 1 ", "BEAM": "0", "CPU": "0", "TC_SELECT": "-1", "GPU": "a name"},
        {"DEV": "CPU", "CUDA": "1", "CL": "/nologo", "CUDA_CC": "x"},  # DEV has chosen
        {"DEV": f"CPU::{ARCH},haswell", "CUDA_PATH": "/opt/cuda"},
        {"DEV": "CUDA::sm_80", "HCQ2": "0", "BEAM": str(2**31 - 1), "MM_DEBUG": str(1 - 2**31)},
        {"CACHEDB": "", "IOCTL": " 0"},
        {"DEFAULT_FLOAT": "float32", "EMULATED_DTYPES": "bfloat16,half"},
    ],
)
def test_what_tinygrad_can_read_is_let_through(values, variables):
    variables(**values)
    environment.check()
    assert os.environ.get("NO_COLOR", "1") == "1"


@pytest.mark.parametrize(
    ("given", "read"),
    [("cpu", "CPU"), ("cpu:X86", "CPU:X86"), (f"cpu::{ARCH},haswell", f"CPU::{ARCH},haswell"),
     ("mock+amd;cpu", "mock+AMD;CPU")],
)  # fmt: skip
def test_a_backend_in_small_letters_is_that_in_capitals(given, read, variables):
    variables(DEV=given)
    environment.check()
    assert os.environ["DEV"] == read


@pytest.mark.parametrize(
    "values", [{"VIZ": "1"}, {"TRACK_MATCH_STATS": "2"}, {"DEBUG": "2"}, {"PROFILE": "1"}], ids=str
)
def test_what_tinygrad_prints_is_not_in_the_result(values, tmp_path):
    env = {**values, "TMPDIR": str(tmp_path)}  # where it puts what it has recorded
    status, out, err = finish(start("Hi", *SHORT, "--max-new-tokens", "2", "--json", env=env))
    assert status == 0
    assert json.loads(out)["prompt"] == "Hi"
    assert values == {"PROFILE": "1"} or len(err.splitlines()) > 1


def test_help_needs_no_environment():
    env = {"DEV": None, "CPU": "1", "DEBUG": "true", "CPU_LLVM": "1"}
    status, out, err = finish(start("--help", env=env))
    assert (status, err) == (0, "")
    assert out.startswith(b"usage: ")


def test_python_is_told_in_one_error_of_its_own():
    script = "import tinygpt\ntry: tinygpt.GPT\nexcept ValueError as error: print(error)"
    env = {"DEV": None, "CUDA": "1"}
    assert b"set DEV=CUDA instead" in finish(start(program=("-c", script), env=env))[1]


def test_all_of_tinygrads_backends_and_numbers_are_known():
    assert set(Device._devices) - {"DISK", "TINYFS", "NPY"} <= set(environment._BACKENDS)
    folder = Path(tinygrad.__file__).parent
    elsewhere = ("viz/", "llm/", "nn/", "renderer/amd/", "runtime/support/", "runtime/autogen/")
    elsewhere += tuple(f"runtime/ops_{name}.py" for name in ("amd", "nv", "qcom", "dsp", "tinyfs"))
    for file in folder.rglob("*.py"):
        if file.relative_to(folder).as_posix().startswith(elsewhere):
            continue  # no part that a GPT-2 comes by, or a card that few have
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Name("getenv" | "ContextVar"), [ast.Constant(name), *rest]):
                    plain = not rest or not isinstance(rest[0], ast.Constant)
                    if name in ("CACHEDB", "XDG_CACHE_HOME", "NO_COLOR"):
                        continue
                    known = name in environment.NUMBERS + environment._FLOATS
                    assert known or not (plain or type(rest[0].value) is int), (file, name)


def test_names_come_with_the_package_and_others_do_not():
    import tinygpt

    assert set(tinygpt.__all__) <= set(dir(tinygpt))
    assert tinygpt.GPTConfig is GPTConfig
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tinygpt.nothing  # noqa: B018
    script = "import tinygpt, sys; print('tinygrad' in sys.modules)"
    assert finish(start(program=("-c", script)))[1] == b"False\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ctrl_c_while_importing_ends_without_a_traceback(way):
    """The signal is sent from inside, at the import of a module that comes late."""
    script = """
import builtins, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it
real = builtins.__import__
def interrupted(name, *args, **kwargs):
    if name.startswith("tinygrad"):
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *args, **kwargs)
builtins.__import__ = interrupted
sys.argv = ["tinygpt", "Hi"]
"""
    script += {
        "run.py": "runpy.run_path('run.py', run_name='__main__')",
        "-m": "runpy.run_module('tinygpt', run_name='__main__', alter_sys=True)",
        "-c": WAYS["command"][1],
    }[way[0]]
    assert finish(start(program=("-c", script))) == (130, b"", "")
