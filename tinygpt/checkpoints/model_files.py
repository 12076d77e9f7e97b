"""Which files of a folder hold a model's weights: their usual names, whole or in shards."""

from __future__ import annotations

import re
from pathlib import Path

from tinygpt.checkpoints import other_files
from tinygpt.errors import CheckpointError, reason, show
from tinygpt.storage import read_json

WEIGHTS = "model.safetensors"
# The usual names, the preferred first: of a whole file, and of the index of one in shards.
FILES = tuple((name, f"{name}.index.json") for name in (WEIGHTS, "pytorch_model.bin"))
# Of an adapter: what it says of itself, and the file with its tensors.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def weight_files(path: Path) -> list[Path]:
    """The file or files with a model's tensors.

    Args:
        path: such a file, or a folder with `model.safetensors`, `pytorch_model.bin`, shards of
            either, or else a single file of another name.
    Raises:
        CheckpointError: when there is none, or more than one to choose from.
    """
    if not path.is_dir():
        return [path]
    for whole, index in FILES:
        if (path / whole).is_file():
            return [path / whole]
        if (path / index).is_file():
            return [path / name for name in shards(path / index)]
    try:
        files = [x for x in sorted(path.iterdir()) if x.suffix in _SUFFIXES and x.is_file()]
        others = [x for x in files if other_files.is_weights(x)]
        names = tuple(name for pair in FILES for name in pair)
        fact = other_files.of_folder(path, names, ADAPTER_CONFIG) if not others else ""
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    if len(others) == 1:
        return others
    if others:
        found = ", ".join(show(x.name)[1:-1] for x in others[:3])
        fact = f"none of {', '.join(names)}, but {found}: give the one file's path"
    raise CheckpointError(f"{path}: {fact}")


def shards(index: str | Path) -> list[str]:
    """The files that a sharded model's index names.

    Raises:
        CheckpointError: when it cannot be read, or names anything but files of its own folder.
    """
    index = Path(index)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{index.name}: weight_map must map each tensor to its file")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    plain = re.compile(rf"[\w-][\w.-]{{0,200}}\{suffix}", re.ASCII)
    for file in files.values():
        if not isinstance(file, str) or not plain.fullmatch(file):
            raise CheckpointError(f"{index.name}: {show(file)} is not a plain {suffix} name")
    return sorted(set(files.values()))
