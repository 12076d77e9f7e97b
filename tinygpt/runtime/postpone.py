"""Parts of tinygrad that opening the CPU imports and nothing on it uses, put off until they are.

They are bindings, written out by a generator: of LLVM, of Mesa, of PCI devices and network cards.
Together they take 0.25 s of a start.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import cache
from importlib.util import LazyLoader, find_spec, module_from_spec

BINDINGS = ("llvm", "mesa", "mlx5", "pci", "vfio", "iokit", "corefoundation", "libusb")


@cache
def postpone() -> None:
    """Have each of these imported when the first of its names is asked for."""
    from tinygrad.runtime import autogen

    for name in BINDINGS:
        full = f"{autogen.__name__}.{name}"
        with suppress(ImportError, AttributeError):  # another release may have it elsewhere
            spec = None if full in sys.modules else find_spec(full)
            if spec and spec.loader:
                spec.loader = LazyLoader(spec.loader)
                module = sys.modules[full] = module_from_spec(spec)
                spec.loader.exec_module(module)
                setattr(autogen, name, module)
