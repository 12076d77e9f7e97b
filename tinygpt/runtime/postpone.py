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
    if _NETWORK not in sys.modules:
        sys.modules[_NETWORK] = stand_in = ModuleType(_NETWORK)
        stand_in.RDMACopyQueue = _network_queue  # type: ignore[attr-defined]
        try:
            import_module("tinygrad.runtime.graph.hcq")
        finally:
            del sys.modules[_NETWORK]  # who asks for it by name gets all of it


def _network_queue(*args: Any) -> Any:
    """Copies between machines: what `graph.hcq` takes from the drivers of network cards."""
    return import_module(_NETWORK).RDMACopyQueue(*args)
