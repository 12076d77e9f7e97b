"""Parts of tinygrad that opening the CPU imports and nothing on it uses, put off until they are.

They are bindings, written out by a generator: of LLVM, of Mesa, of PCI devices and network cards.
Together they take 0.25 s of a start.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import LazyLoader, find_spec, module_from_spec
from types import ModuleType
from typing import Any

from tinygrad.helpers import DEV

_NETWORK = "tinygrad.runtime.ops_rdma"
BINDINGS = ("llvm", "mesa", "mlx5", "pci", "vfio", "iokit", "corefoundation", "libusb")


@cache
def postpone() -> None:
    """Have each of these imported when the first of its names is asked for."""
    autogen = import_module("tinygrad.runtime.autogen")
    for name in BINDINGS:
        full = f"{autogen.__name__}.{name}"
        with suppress(ImportError, AttributeError):  # another release may have it elsewhere
            spec = None if full in sys.modules else find_spec(full)
            if spec and spec.loader:
                spec.loader = LazyLoader(spec.loader)
                module = sys.modules[full] = module_from_spec(spec)
                spec.loader.exec_module(module)
                setattr(autogen, name, module)
    _without(_NETWORK, "RDMACopyQueue", _network_queue, "tinygrad.runtime.graph.hcq")
    if "LVP" not in repr(DEV):
        _without("tinygrad.renderer.nir", "LVPRenderer", LVPRenderer, "tinygrad.runtime.ops_cpu")


def _without(left_out: str, name: str, stand_in: object, module: str) -> None:
    """Import a module while something else stands for the one name that it takes from another."""
    if left_out in sys.modules or module in sys.modules:
        return
    sys.modules[left_out] = empty = ModuleType(left_out)
    setattr(empty, name, stand_in)
    try:
        import_module(module)
    finally:
        del sys.modules[left_out]  # who asks for it by name gets all of it


class LVPRenderer:
    """Mesa's compiler for the CPU, which only DEV=CPU:LVP, set before the start, chooses."""

    def __init__(self, *_: Any) -> None:
        raise RuntimeError("start with DEV=CPU:LVP to use Mesa's compiler")


def _network_queue(*args: Any) -> Any:
    """Copies between machines: what `graph.hcq` takes from the drivers of network cards."""
    return import_module(_NETWORK).RDMACopyQueue(*args)
