"""WebGPU: its library Dawn, from the wheel `dawn-python`, and the card that it has found."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinygrad import Device

from tinygpt.errors import quiet

_LIBRARY = {"Darwin": "libwebgpu_dawn_{}.dylib", "Windows": "libwebgpu_dawn.dll"}


def use() -> None:
    """Have tinygrad load the wheel's library, unless WEBGPU_PATH names another."""
    wheel = find_spec("pydawn")
    if wheel and wheel.origin and not os.environ.get("WEBGPU_PATH"):
        name = _LIBRARY.get(platform.system(), "libwebgpu_dawn_{}.so").format(platform.machine())
        if (path := Path(wheel.origin).with_name("lib") / name).is_file():
            os.environ["WEBGPU_PATH"] = str(path)


def card(name: str) -> str:
    """Open a device, and tell the card that computes, or what stands for one: "llvmpipe (...)".

    Raises:
        RuntimeError: when there is none. Dawn then opens one that takes everything and computes
            nothing.
    """
    with quiet():  # of what drivers it has tried
        device: Any = Device[name]
    inside: Any = import_module("tinygrad.runtime.autogen.webgpu")
    about = inside.WGPUAdapterInfo()
    inside.wgpuDeviceGetAdapterInfo(device.device_res, about)
    if about.backendType == inside.WGPUBackendType_Null:
        raise RuntimeError("it finds no graphics driver")
    return ctypes.string_at(about.device.data, about.device.length).decode(errors="replace")


def advice() -> str:
    """What would bring the library or, where that is there, a driver."""
    if not os.environ.get("WEBGPU_PATH"):
        return "`pip install 'tinygpt[webgpu]'` brings its library"
    packages = " (mesa-vulkan-drivers in Debian and Ubuntu)" * (platform.system() == "Linux")
    return f"install the driver of a graphics card{packages}"
