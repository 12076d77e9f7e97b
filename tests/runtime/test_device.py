from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from conftest import reference_of
from program import ROOT
from tinygrad import Tensor, helpers
from tinygrad import device as tinygrad_device

from tinygpt import InputError
from tinygpt.commands import doctor
from tinygpt.runtime import device, disk_cache


def test_a_backend_works_or_does_not():
    assert device.works(os.environ.get("DEV") or "PYTHON")
    assert not device.works("FOO")
    assert not device.works("CPU:FOO")


def python(script: str, **env: str | None) -> str:
    """What a Python prints, in a process of its own; None takes a variable away."""
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=env, capture_output=True, cwd=ROOT, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_changes_nothing(tmp_path):
    script = """
import os
from tinygrad import device
from tinygrad.helpers import DEV
before = dict(os.environ), str(DEV), device.diskcache_get, device.diskcache_put
import tinygpt
assert before == (dict(os.environ), str(DEV), device.diskcache_get, device.diskcache_put)
assert not device.Device._opened_devices
"""
    python(script, DEV=None, PATH=str(tmp_path), CC=None)


def test_bindings_that_the_cpu_does_not_use_are_not_imported():
    script = """
import sys
from tinygpt.runtime import device
device.check()
from tinygrad.runtime.autogen import llvm, pci
assert llvm is sys.modules["tinygrad.runtime.autogen.llvm"]
print(*(type(module).__name__ for module in (llvm, pci)))
assert pci.PCI_VENDOR_ID == 0  # they come when they are asked for
print(type(pci).__name__)
assert "tinygrad.runtime.ops_rdma" not in sys.modules  # drivers of network cards
from tinygrad.runtime import ops_rdma
assert issubclass(ops_rdma.RDMACopyQueue, object) and ops_rdma.RDMADevice
assert "tinygrad.renderer.nir" not in sys.modules  # Mesa's compiler
from tinygrad.renderer import nir
assert nir.LVPRenderer.__module__ == nir.__name__
"""
    assert python(script, DEV="CPU:X86") == "_LazyModule _LazyModule\nmodule\n"


LOADS = """
from tinygrad import Tensor
from tinygpt import GPT, Generator
from tinygpt.checkpoints.hub import DEFAULT
{before}
model = GPT.from_pretrained(DEFAULT, dtype={dtype!r})
print(len(list(Generator(model).generate([1, 2, 3], max_new_tokens=2, temperature=0))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_python_use_works_without_clang(dtype, tmp_path):
    """The first model chooses another compiler, as the command line does when it starts."""
    env = {"DEV": None, "PATH": str(tmp_path), "CC": None, "NOOPT": "0"}
    assert python(LOADS.format(before="", dtype=dtype), **env) == "2\n"


@pytest.mark.slow
def test_python_use_works_without_clang_where_a_tensor_came_first(tmp_path):
    """For it tinygrad has chosen a device, as here, which stays, and no compiler yet."""
    env = {"DEV": None, "PATH": str(tmp_path), "CC": None, "NOOPT": "0"}
    before = "import os; os.environ['DEV'] = 'CPU'; x = Tensor([1, 2, 3], device='CPU')"
    assert python(LOADS.format(before=before, dtype=None), **env) == "2\n"


def test_the_users_choice_stands(tmp_path):
    script = """
import os
from tinygrad.helpers import DEV
from tinygpt import GPT, GPTConfig
{before}
GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5), seed=None)
print(DEV, os.environ.get("DEV"))
"""
    assert python(script.format(before=""), DEV="PYTHON") == "PYTHON PYTHON\n"
    env = {"DEV": None, "PATH": str(tmp_path), "CC": None}
    assert python(script.format(before="DEV.value = 'PYTHON'"), **env) == "PYTHON None\n"


def test_a_pc_without_a_gpu_is_told_by_its_bus(tmp_path, monkeypatch):
    for name, kind in {"bridge": "0x060000", "disk": "0x010802"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "class").write_text(f"{kind}\n", encoding="utf-8")
    monkeypatch.setattr(device.platform, "system", lambda: "Linux")
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    assert device._no_gpu(tmp_path)
    (tmp_path / "disk" / "class").write_text("0x030200\n", encoding="utf-8")
    assert not device._no_gpu(tmp_path)
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")  # has GPUs on no bus
    (tmp_path / "disk" / "class").write_text("0x010802\n", encoding="utf-8")
    assert not device._no_gpu(tmp_path)


def test_what_the_processor_lacks_is_not_assembled_for(tmp_path, monkeypatch):
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    about = tmp_path / "cpuinfo"
    assert device._runs_assembled(about)  # as on systems without such a file
    for flags, runs in {"fpu avx2 f16c": True, "fpu sse2 avx": False}.items():
        about.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="utf-8")
        assert device._runs_assembled(about) == runs
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
    assert not device._runs_assembled(about)
    assert not device.works("CPU:X86")
    monkeypatch.setattr(device, "renderer", lambda: "X86")
    with pytest.raises(InputError, match="the processor lacks AVX2"):
        device.check()


@pytest.mark.parametrize(("chosen", "advice"), [("CPU", "Unset DEV"), ("", "`pip install ")])
def test_the_advice_fits_who_chose_the_backend(chosen, advice, monkeypatch):
    monkeypatch.setenv("DEV", chosen)
    monkeypatch.setattr(device, "renderer", lambda: "ClangJIT")
    monkeypatch.setattr(device.clang, "command", lambda: None)
    with pytest.raises(InputError, match=rf"no clang found.*\. {advice}"):
        device.check()


@pytest.mark.parametrize(
    ("dev", "advice"),
    [
        ("GPU", "Set DEV to CL, unset DEV"),
        ("CLANG", "Set DEV to CPU, unset DEV"),
        ("LLVM", "Set DEV to CPU:LLVM, unset DEV"),
        ("XYZ", "Set DEV to one of METAL, AMD, .* CPU, .* unset DEV"),
        ("CPU:XYZ", "Unset DEV"),
    ],
)
def test_the_advice_for_a_backend_that_there_is_not_names_one_that_there_is(
    dev, advice, monkeypatch
):
    monkeypatch.setattr(device.clang, "command", lambda: ("clang",))
    monkeypatch.setenv("DEV", dev)
    with helpers.Context(DEV=dev), pytest.raises(InputError, match=rf"\. {advice}") as caught:
        device.check()
    assert "pip install" not in str(caught.value)


@pytest.mark.slow
def test_the_python_backend_equals_the_reference():
    """tinygrad's own emulator: any backend's arithmetic, far too slowly for more than this."""
    model = doctor.toy()
    script = (
        "from tinygrad import Tensor; from tinygpt.commands import doctor; "
        "print(doctor.toy()(Tensor([[3, 1]])).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "DEV": "PYTHON"},
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    expected = reference_of(model)([[3, 1]])
    np.testing.assert_allclose(json.loads(run.stdout), expected, atol=doctor.TOLERANCE)
    np.testing.assert_allclose(model(Tensor([[3, 1]])).numpy(), expected, atol=doctor.TOLERANCE)


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A file for compiled kernels, in place of the user's."""
    path = tmp_path / "kernels.db"
    monkeypatch.setattr(helpers, "CACHEDB", str(path))
    monkeypatch.setattr(helpers, "_db_connection", None)
    monkeypatch.setattr(helpers, "_db_tables", set())
    monkeypatch.setattr(helpers.CACHELEVEL, "value", 2)
    yield path
    if helpers._db_connection:
        helpers._db_connection.close()


def test_a_damaged_kernel_is_compiled_again_and_kept(kernels):
    assert tinygrad_device.Compiler("mine").compile_cached("text") == b"text"
    connection = helpers.db_connection()
    with connection:
        connection.execute(f"UPDATE mine_{helpers.VERSION} SET val = ?", (b"\x80\x04\x95",))
    assert tinygrad_device.Compiler("mine").compile_cached("text") == b"text"
    assert helpers.diskcache_get("mine", "text") == b"text"


@pytest.mark.parametrize("first", ["tinygrad", "steps"])
@pytest.mark.parametrize("where", ["no database", "no folder", "locked", "wholly locked"])
def test_kernels_are_compiled_where_none_can_be_kept(where, first, kernels, monkeypatch, capsys):
    """One wait and one line, whichever asks first, and then nothing asks that file again."""
    tries = []
    real = disk_cache._connect
    monkeypatch.setattr(disk_cache, "_connect", lambda: tries.append(1) or real())
    monkeypatch.setattr(disk_cache, "_WAIT_S", 0.01)
    content = b"damaged" * 1000
    holder = None
    if where == "no folder":
        monkeypatch.setattr(helpers, "CACHEDB", os.path.join(os.devnull, "kernels.db"))
    if where.endswith("locked"):
        holder = sqlite3.connect(kernels, isolation_level=None)
        holder.execute(f"BEGIN {'EXCLUSIVE' if where == 'wholly locked' else 'IMMEDIATE'}")
        content = kernels.read_bytes()
    else:
        kernels.write_bytes(content)
    if first == "steps":
        disk_cache.write("mine", "key", 1)
    for number in range(9):
        text = f"text {number}"
        assert tinygrad_device.Compiler("mine").compile_cached(text) == text.encode()
        disk_cache.write("mine", text, number)
        assert disk_cache.read("mine", text) is None
    assert len(tries) == 1
    assert kernels.read_bytes() == content  # it may be some other file of the user's
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiles without the cache of kernels, " in line
    advice = "\n".join(doctor._advice())
    assert "it keeps no compiled kernels" in advice
    assert ("end the program that has locked" if holder else "remove") in advice
    if holder:
        holder.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only Unix limits the size of files")
def test_a_full_disk_keeps_no_kernels_and_ends_nothing(tmp_path):
    script = """
import resource
from tinygpt.runtime import device, disk_cache
from tinygrad.device import Compiler
device.forgive_cache()
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
assert Compiler("mine").compile_cached("text") == b"text"
disk_cache.write("mine", "text", 1)
assert Compiler("mine").compile_cached("text") == b"text"
print("compiled")
"""
    env = {"CACHEDB": str(tmp_path / "kernels.db"), "CACHELEVEL": None}
    assert python(script, **env) == "compiled\n"


def test_a_cache_without_a_folder_in_its_name_makes_none(tmp_path):
    """tinygrad alone would make a folder of the file's name."""
    script = """
import os
os.chdir(os.environ["WHERE"])
from tinygpt.runtime import device
from tinygrad import helpers
device.forgive_cache()
helpers.diskcache_put("mine", "text", 1)
print(os.path.isfile("kernels.db"), helpers.diskcache_get("mine", "text"))
"""
    env = {"CACHEDB": "kernels.db", "CACHELEVEL": None, "WHERE": str(tmp_path)}
    assert python(script, **env) == "True 1\n"
