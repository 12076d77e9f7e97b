"""A model's folder by its name: on this machine, or fetched from the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tinygpt.checkpoints.model_files import ADAPTER_CONFIG, ADAPTER_FILES, FILES, shards
from tinygpt.checkpoints.run_folder import followed
from tinygpt.checkpoints.unfinished import sweep, unfinished_folder
from tinygpt.errors import CheckpointError, InputError, reason, say, show
from tinygpt.storage import read_json, read_text, temporary_beside

_NAME = r"([A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}"
_GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# What says how text and ids belong together, and which ids end a text.
_TEXT_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
# The models in the package, by their folders' names: what each was trained on.
BUILT_IN = {
    "tales": "77 books of tales published before 1928",
    "shakespeare": "Shakespeare's plays, byte by byte",
}
DEFAULT = "tales"  # which of them writes where no model is named


def cache_folder() -> Path:
    """Where fetched models are kept: $TINYGPT_CACHE, by default the user's cache folder."""
    return _folder("TINYGPT_CACHE", _folder("XDG_CACHE_HOME", "~/.cache") / "tinygpt")


def _folder(variable: str, default: str | Path) -> Path:
    return Path(os.path.expanduser(os.environ.get(variable) or default))


def resolve(name_or_path: str | Path) -> Path:
    """The local folder or file of a model, downloaded first if it has to be.

    Args:
        name_or_path: a folder, of a model or of a run, of which its best checkpoint is taken; a
            file; one of `BUILT_IN`, the small models that the package carries; or
            a name on the Hugging Face Hub such as "gpt2" or "org/name". Such a one is looked for
            in `cache_folder()`, then in the Hugging Face cache.
    Returns:
        the path; from a cache or the Hub a folder with config.json and all of the weights, or
        with an adapter.
    Raises:
        InputError: when there is no such path or model, or it cannot be fetched or stored.
        CheckpointError: when the model's list of files cannot be trusted.
    """
    given = os.fspath(name_or_path)
    path = os.path.expanduser(given)
    # A name goes before a folder of that name, wherever the program is run; a Path is no name.
    if isinstance(name_or_path, str) and name_or_path in BUILT_IN:
        if os.path.isdir(path):
            say(f"{given} is the model in the package; ./{given} is not it")
        return _built_in(given)
    if os.path.isdir(path) or os.path.isfile(path):
        if isinstance(name_or_path, str) and _is_also_a_name(given):
            say(f"{given} is the folder here, not the model that is called so")
        return followed(Path(path))
    advice = "give a model's folder or file, or a name such as gpt2"
    if os.path.exists(path):
        raise InputError(f"{given!r} is neither a folder nor a file: {advice}")
    if given.startswith(("/", "./", "../", "~")) or "\\" in given or given.count("/") > 1:
        raise InputError(f"no folder or file {given!r}: {advice}")
    # The Hub, too, forbids "--": it stands for the slash in folder names.
    if not re.fullmatch(_NAME, given, re.ASCII) or "--" in given or ".." in given:
        raise InputError(f"{given!r} is neither a path nor a model's name: {advice}")
    repo = _repo(given)
    target = _fetched(repo)
    if _is_fetched(target):
        return target
    found = _in_hugging_face_cache(repo)
    if found is None:
        _download(repo, target)
    return found or target


@contextmanager
def advice_if_fetched(path: Path) -> Iterator[None]:
    """Say of what is wrong in the block with a fetched model how to fetch it again."""
    try:
        yield
    except CheckpointError as error:
        if path.parent != cache_folder() / "models":
            raise
        name = _short(path.name.replace("--", "/", 1))
        again = f"`tinygpt models --remove {name}` removes it, so that it is fetched again"
        raise CheckpointError(f"{error}; {again}") from error


class LocalModel(NamedTuple):
    """A model that is here under a name."""

    name: str
    size_bytes: int
    where: str


def local_models() -> Iterator[LocalModel]:
    """What a name can stand for without a download: built in, fetched, and in Hugging Face's cache.

    Of the last, only what is of GPT-2's kind: other programs keep other models there.
    """
    for name in BUILT_IN:
        yield LocalModel(name, _size_bytes(_built_in(name)), "built in")
    own = cache_folder() / "models"
    for folder in _folders(own):
        if _is_fetched(folder):
            name = _short(folder.name.replace("--", "/", 1))
            yield LocalModel(name, _size_bytes(folder), str(folder))
    for folder in _folders(_hugging_face_cache()):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        if name == folder.name or not re.fullmatch(_NAME, name, re.ASCII):
            continue
        snapshot = _in_hugging_face_cache(name)
        if snapshot and not _is_fetched(_fetched(_repo(name))):
            with suppress(CheckpointError):
                if read_json(snapshot / "config.json").get("model_type") in ("gpt2", "tinygpt"):
                    where = "Hugging Face's cache"
                    yield LocalModel(_short(name), _size_bytes(snapshot), where)


def remove(name: str) -> Path:
    """Remove a fetched model, whole or not at all; the folder where it was.

    Raises:
        InputError: when it is not one that this program has fetched, or it cannot be removed.
    """
    advice = "`tinygpt models` lists what is here"
    if name in BUILT_IN:
        raise InputError(f"{name} is a part of the program and cannot be removed: {advice}")
    repo = _repo(name)
    target = _fetched(repo)
    plain = re.fullmatch(_NAME, name, re.ASCII) and "--" not in name and ".." not in name
    swept = sweep(target.parent, target.name) if plain else []  # of a fetch that was not finished
    if swept and not target.is_dir():
        return swept[0]
    if not plain or not target.is_dir():
        if plain and _in_hugging_face_cache(repo):
            raise InputError(
                f"{name} is in Hugging Face's cache, which is not ours: `hf cache` can remove it"
            )
        raise InputError(f"no fetched model {show(name)}: {advice}")
    temporary = temporary_beside(target)
    try:
        os.rename(target, temporary)  # at once: nobody finds half of a model
        if temporary.is_symlink():
            temporary.unlink()
        else:
            shutil.rmtree(temporary)
    except OSError as error:
        raise InputError(f"cannot remove {target}: {reason(error)}") from error
    return target


def _built_in(name: str) -> Path:
    return Path(__file__).parents[1] / name


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError:  # there is no such cache
        return []


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _short(repo: str) -> str:
    """The name that people use: `gpt2` for openai-community/gpt2."""
    name = repo.removeprefix("openai-community/")
    return name if name in _GPT2 else repo


def _is_also_a_name(given: str) -> bool:
    """Whether a path is the name of a model that somebody may well mean: GPT-2's, or fetched."""
    if not re.fullmatch(_NAME, given, re.ASCII):
        return False
    repo = _repo(given)
    return given in _GPT2 or _fetched(repo).is_dir() or _in_hugging_face_cache(repo) is not None


def _repo(name: str) -> str:
    return f"openai-community/{name}" if name in _GPT2 else name


def _fetched(repo: str) -> Path:
    """Where a model of the Hub is kept."""
    return cache_folder() / "models" / repo.replace("/", "--")


def _hugging_face_cache() -> Path:
    home = _folder("HF_HOME", _folder("XDG_CACHE_HOME", "~/.cache") / "huggingface")
    return _folder("HF_HUB_CACHE", home / "hub")


def _in_hugging_face_cache(repo: str) -> Path | None:
    """The model as another program has fetched it, if all of it is there."""
    cache = _hugging_face_cache()
    old_name = repo.removeprefix("openai-community/")  # before the Hub had organisations
    for name in (repo, old_name if old_name in _GPT2 else repo):
        folder = cache / f"models--{name.replace('/', '--')}"
        # The folder belongs to another program: whatever is wrong in it, we look further.
        with suppress(OSError, ValueError):
            snapshot = (
                folder / "snapshots" / read_text(folder / "refs" / "main", most_bytes=1000).strip()
            )
            if _is_fetched(snapshot) and _is_whole(snapshot):
                return snapshot
    return None


def _is_fetched(folder: Path) -> bool:
    """Whether a folder has what says which model it holds, or which adapter."""
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def _is_whole(folder: Path) -> bool:
    """Whether all of a model's weights are there, or an adapter's."""
    if (folder / ADAPTER_CONFIG).is_file():
        return any((folder / name).is_file() for name in ADAPTER_FILES)
    for name, index in FILES:
        if (folder / name).is_file():
            return True
        if (folder / index).is_file():
            return all((folder / shard).is_file() for shard in shards(folder / index))
    return False


def _download(repo: str, target: Path) -> None:
    """Fetch a model into a folder that only appears under its name when it is complete."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not re.fullmatch(r"https?://([\w.-]+|\[[\w:.]+\])(:\d+)?(/[\w./-]*)?", endpoint, re.ASCII):
        raise InputError(f"HF_ENDPOINT is {endpoint!r}: it must be like https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        here = f"{repo} is not in {target.parent}"
        raise InputError(f"{here}: unset HF_HUB_OFFLINE to fetch it, or give the model's folder")
    try:
        sweep(target.parent)
        with unfinished_folder(target) as unfinished:
            _fetch_all(endpoint, repo, unfinished / "model")
            try:
                os.rename(unfinished / "model", target)
            except OSError:
                if not _is_fetched(target):  # if it is, another process was faster
                    raise
    except OSError as error:
        fact = f"cannot keep {repo} in {target.parent}: {reason(error)}"
        raise InputError(f"{fact}; TINYGPT_CACHE can name another folder") from error


def _fetch_all(endpoint: str, repo: str, folder: Path) -> None:
    """Fetch a model's files, and let nothing else stay in the folder."""
    # Imported here, because HTTP and TLS take longer to import than a small model to load.
    from tinygpt.checkpoints.download import fetch_from_hub

    fetched = set[str]()

    def fetch(name: str) -> bool:
        found = fetch_from_hub(endpoint, repo, name, folder)
        fetched.update([name] if found else [])
        return found

    folder.mkdir(exist_ok=True)
    if not fetch("config.json") and not fetch(ADAPTER_CONFIG):
        raise InputError(f"no model {repo!r} with a config.json at {endpoint}: check the name")
    for name in _TEXT_FILES:
        fetch(name)
    # The weights last: what is wrong with the small ones shows early.
    if ADAPTER_CONFIG in fetched:
        found, names = any(map(fetch, ADAPTER_FILES)), ADAPTER_FILES
    else:
        found, names = _fetch_weights(repo, folder, fetch), tuple(name for name, _ in FILES)
    if not found:
        raise InputError(f"{repo} has no {' or '.join(names)}")
    for path in folder.iterdir():  # of an earlier try, when the model had other files
        if path.name not in fetched:
            path.unlink()


def _fetch_weights(repo: str, folder: Path, fetch: Callable[[str], bool]) -> bool:
    """Fetch a model's file of weights or its shards; whether there are any."""
    for whole, index in FILES:
        if fetch(whole):
            return True
        if fetch(index):
            for name in shards(folder / index):
                if not fetch(name):
                    raise CheckpointError(f"{repo} has no {name}, which its {index} names")
            return True
    return False
