"""GPT-2, whole, built from scratch on tinygrad tensors.

Importing this package changes nothing in the process. When the first of its names is asked for, the
environment is checked and tinygrad imported, so that the program can be interrupted before. The
first `GPT` that is made or loaded chooses a backend where the environment variable DEV names none
and tinygrad's own choice would not work here, and changes a few things inside of tinygrad: see
`tinygpt.runtime.device.select`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygpt.checkpoints.load_tokenizer import load_tokenizer
    from tinygpt.config import GPTConfig
    from tinygpt.errors import InputError
    from tinygpt.generator import Generator
    from tinygpt.layers import Record
    from tinygpt.model import GPT
    from tinygpt.writer import generate

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "Generator", "InputError", "Record", "generate", "load_tokenizer"]
# Where each of these names is.
_MODULES = {
    "GPT": "model",
    "GPTConfig": "config",
    "Generator": "generator",
    "InputError": "errors",
    "Record": "layers",
    "generate": "writer",
    "load_tokenizer": "checkpoints.load_tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from tinygpt import environment

    environment.check()
    return globals().setdefault(name, getattr(import_module(f"tinygpt.{_MODULES[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
