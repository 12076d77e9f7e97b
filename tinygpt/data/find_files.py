"""Which files are meant: by a path, a folder, a pattern, and what was perhaps meant instead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from glob import glob, has_magic
from pathlib import Path

from tinygpt.errors import InputError, reason, show

SHAKESPEARE = "shakespeare"  # the text that is fetched by its name


def find_files(sources: Sequence[str | Path], leave_out: Path) -> tuple[list[Path], bool]:
    """The files that are meant, each once, and whether they are several texts.

    Args:
        sources: files, folders with all in them, and patterns such as `texts/**/*.txt`. Those of
            a folder or a pattern are in the order of their paths, without those with a dot in
            front.
        leave_out: a folder that is not looked into.
    Raises:
        InputError: when one stands for no file, or cannot be read.
    """
    found: dict[Path, None] = {}
    several = len(sources) > 1
    for source in map(str, sources):
        try:
            is_folder, is_file = os.path.isdir(source), os.path.isfile(source)
            if is_folder:
                paths = _files_in(Path(source), leave_out)
            elif is_file or not has_magic(source):
                paths = [Path(source)] if is_file else []
            else:
                paths = sorted(Path(name) for name in glob(source, recursive=True))
                paths = [path for path in paths if path.is_file()]
        except OSError as error:
            raise InputError(f"cannot read {source}: {reason(error)}") from error
        if not paths:
            raise InputError(_nothing(source, is_folder))
        several |= not is_file
        found |= dict.fromkeys(paths)
    return [*found], several


def missing(name: str, known: Sequence[str] = ()) -> str:
    """What an error says of a path where nothing is, with what there is of a similar name.

    Args:
        known: names that would have meant something else than a path.
    """
    folder = os.path.dirname(name)
    names = list(known)
    try:
        names += [os.path.join(folder, other) for other in os.listdir(folder or ".")]
    except OSError:
        if folder and not os.path.isdir(folder):
            return f"there is no folder {show(folder)}"
    near = get_close_matches(name[:1000], names[:10_000], n=1, cutoff=0.75)
    hint = f": did you mean {show(near[0])}?" if near else ""
    return f"there is no file or folder {show(name)}{hint}"


def _nothing(source: str, is_folder: bool) -> str:
    if is_folder:
        return f"no file is in folder {show(source)}: give one of UTF-8 text"
    if has_magic(source):
        return f"no file has a name like {show(source)}"
    if os.path.exists(source):
        return f"{show(source)} is no plain file: save what comes from it first"
    return missing(source, [SHAKESPEARE])


def _files_in(source: Path, leave_out: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    found, left_out = list[Path](), os.path.realpath(leave_out)
    for folder, folders, names in os.walk(source, onerror=fail):
        folders[:] = [
            name
            for name in folders
            if name[0] != "." and os.path.realpath(os.path.join(folder, name)) != left_out
        ]
        paths: Iterator[Path] = (Path(folder, name) for name in names if name[0] != ".")
        found += [path for path in paths if path.is_file()]
    return sorted(found)
