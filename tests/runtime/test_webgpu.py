"""DEV=WEBGPU as a user has it: the wheel's library is found, and what is missing is one line."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import pytest
from program import SHORT, finish, is_refused, start

from tinygpt.runtime import device, webgpu

needs_wheel = pytest.mark.skipif(find_spec("pydawn") is None, reason="the extra webgpu is not here")


@pytest.mark.parametrize(
    ("system", "machine", "name"),
    [
        ("Linux", "x86_64", "libwebgpu_dawn_x86_64.so"),
        ("Linux", "aarch64", "libwebgpu_dawn_aarch64.so"),
        ("Darwin", "arm64", "libwebgpu_dawn_arm64.dylib"),
        ("Windows", "AMD64", "libwebgpu_dawn.dll"),
    ],
)
def test_the_wheels_library_is_found_by_its_name(system, machine, name, tmp_path, monkeypatch):
    package = tmp_path / "pydawn"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    (package / "lib" / name).touch()
    monkeypatch.delitem(sys.modules, "pydawn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(webgpu.platform, "system", lambda: system)
    monkeypatch.setattr(webgpu.platform, "machine", lambda: machine)
    monkeypatch.setenv("WEBGPU_PATH", "")
    webgpu.use()
    assert os.environ["WEBGPU_PATH"] == str(package / "lib" / name)
    monkeypatch.setenv("WEBGPU_PATH", "mine")
    webgpu.use()
    assert os.environ["WEBGPU_PATH"] == "mine"


def test_without_the_library_one_line_says_what_brings_it():
    script = "from tinygpt.runtime import webgpu; webgpu.find_spec = lambda _: None\n"
    script += "import sys; from tinygpt.__main__ import main; sys.exit(main())"
    env = {"DEV": "WEBGPU", "WEBGPU_PATH": None, "LD_LIBRARY_PATH": None}
    words = ". `pip install 'tinygpt[webgpu]'` brings its library, unset DEV"
    assert is_refused(finish(start("x", *SHORT, program=("-c", script), env=env)), words)


@needs_wheel
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system itself is the driver")
@pytest.mark.parametrize("command", [["x", *SHORT], ["bench"], ["generate", "Hi"]])
def test_without_a_driver_one_line_says_what_brings_one(command):
    """Dawn then opens a device that takes everything, computes nothing, and gives zeros."""
    nowhere = {"VK_ICD_FILENAMES": os.devnull, "VK_DRIVER_FILES": os.devnull}
    run = finish(start(*command, env={"DEV": "WEBGPU", **nowhere}))
    assert is_refused(run, "it finds no graphics driver. Install the driver of a graphics card (")


def test_the_doctor_names_the_card_or_what_brings_one(monkeypatch):
    monkeypatch.setattr(device, "ALL_DEVICES", ["WEBGPU"])
    monkeypatch.setattr(webgpu, "card", lambda name: f"card of {name}")
    assert device.devices() == {"WEBGPU": "found, card of WEBGPU"}
    monkeypatch.setattr(webgpu, "card", lambda name: [][0])
    monkeypatch.delenv("WEBGPU_PATH", raising=False)
    (state,) = device.devices().values()
    assert state.startswith("no (list index out of range; `pip install 'tinygpt[webgpu]'` brings ")
