"""A model's folder by its name: on this machine, or fetched from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tinygpt.checkpoints.model_files import FILES, shards
from tinygpt.errors import CheckpointError, InputError, reason
from tinygpt.storage import MAX_TEXT_BYTES, atomic_file, byte_bar, temporary_beside

_GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
BUILT_IN = "shakespeare"  # the folder of the model in the package, and its name
_TIMEOUT_S = 30  # of silence; a download that keeps coming may take as long as it needs


def cache_folder() -> Path:
    """Where fetched models are kept: $TINYGPT_CACHE, by default the user's cache folder."""
    return _folder("TINYGPT_CACHE", _folder("XDG_CACHE_HOME", "~/.cache") / "tinygpt")


def _folder(variable: str, default: str | Path) -> Path:
    return Path(os.path.expanduser(os.environ.get(variable) or default))


def resolve(name_or_path: str | Path) -> Path:
    """The local folder or file of a model, downloaded first if it has to be.

    Args:
        name_or_path: a folder; a file; "shakespeare", the small model that the package carries; or
            a name on the Hugging Face Hub such as "gpt2" or "org/name". Such a one is looked for
            in `cache_folder()`, then in the Hugging Face cache.
    Returns:
        the path; from a cache or the Hub a folder with config.json and all of the weights.
    Raises:
        InputError: when there is no such path or model, or it cannot be fetched or stored.
        CheckpointError: when the model's list of files cannot be trusted.
    """
    given = os.fspath(name_or_path)
    path = os.path.expanduser(given)
    if name_or_path == BUILT_IN:  # whatever else the folder one is in calls so; a Path is no name
        return Path(__file__).parents[1] / BUILT_IN
    if os.path.isdir(path) or os.path.isfile(path):
        return Path(path)
    advice = "give a model's folder or file, or a name such as gpt2"
    if os.path.exists(path):
        raise InputError(f"{given!r} is neither a folder nor a file: {advice}")
    if given.startswith(("/", "./", "../", "~")) or "\\" in given or given.count("/") > 1:
        raise InputError(f"no folder or file {given!r}: {advice}")
    part = r"[A-Za-z0-9_][\w.-]{0,95}"
    # The Hub, too, forbids "--": it stands for the slash in folder names.
    if not re.fullmatch(rf"({part}/)?{part}", given, re.ASCII) or "--" in given or ".." in given:
        raise InputError(f"{given!r} is neither a path nor a model's name: {advice}")
    repo = f"openai-community/{given}" if given in _GPT2 else given
    target = cache_folder() / "models" / repo.replace("/", "--")
    if os.path.isfile(target / "config.json"):
        return target
    found = _in_hugging_face_cache(repo)
    if found is None:
        _download(repo, target)
    return found or target


def _in_hugging_face_cache(repo: str) -> Path | None:
    """The model as another program has fetched it, if all of it is there."""
    home = _folder("HF_HOME", _folder("XDG_CACHE_HOME", "~/.cache") / "huggingface")
    cache = _folder("HF_HUB_CACHE", home / "hub")
    old_name = repo.removeprefix("openai-community/")  # before the Hub had organisations
    for name in (repo, old_name if old_name in _GPT2 else repo):
        folder = cache / f"models--{name.replace('/', '--')}"
        with suppress(OSError, ValueError):  # not our folder: whatever is wrong there, look further
            snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
            if (snapshot / "config.json").is_file() and _is_whole(snapshot):
                return snapshot
    return None


def _is_whole(folder: Path) -> bool:
    """Whether all of a model's weights are there."""
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
    temporary = temporary_beside(target)
    try:
        temporary.mkdir(parents=True)
        _fetch_all(endpoint, repo, temporary)
        try:
            os.rename(temporary, target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster
                raise
    except OSError as error:
        fact = f"cannot keep {repo} in {target.parent}: {reason(error)}"
        raise InputError(f"{fact}; TINYGPT_CACHE can name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch_all(endpoint: str, repo: str, folder: Path) -> None:
    """Fetch a model's files, the weights last: what is wrong with the small ones shows early."""
    if not _fetch(endpoint, repo, "config.json", folder):
        raise InputError(f"no model {repo!r} with a config.json at {endpoint}: check the name")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        _fetch(endpoint, repo, name, folder)
    for whole, index in FILES:
        if _fetch(endpoint, repo, whole, folder):
            return
        if _fetch(endpoint, repo, index, folder):
            for name in shards(folder / index):
                if not _fetch(endpoint, repo, name, folder):
                    raise CheckpointError(f"{repo} has no {name}, which its {index} names")
            return
    raise InputError(f"{repo} has no {' or '.join(name for name, _ in FILES)}")


def _fetch(endpoint: str, repo: str, name: str, folder: Path) -> bool:
    """Download one file; False when the Hub has none of that name."""
    response, stated = _open(endpoint, repo, name)
    if response is None:
        return False
    limit = None if name.endswith((".safetensors", ".bin")) else MAX_TEXT_BYTES
    with response, open(folder / name, "wb") as file:
        digest = _receive(response, endpoint, name, limit, file)
        if stated and digest != stated:
            fact = f"{endpoint} sent {name} with SHA-256 {digest}, where it states {stated}"
            raise InputError(f"{fact}: try again")
        file.flush()
        os.fsync(file.fileno())
    return True


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download a file whose contents are known: all of it and nothing else, or no file.

    Raises:
        InputError: when it cannot be fetched or kept, or has other contents.
    """
    parts = urlsplit(url)
    host, name = f"{parts.scheme}://{parts.netloc}", parts.path.rpartition("/")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep {name} in {path.parent}: {reason(error)}") from error
    try:
        request = Request(url, headers={"User-Agent": "tinygpt"})
        response = build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)
    except InputError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(f"cannot fetch {url}: {reason(error)}; try again") from error
    with response, atomic_file(path) as file:
        digest = _receive(response, host, name, MAX_TEXT_BYTES, file)
        if digest != sha256:
            raise InputError(f"{url} has SHA-256 {digest}, not {sha256}: it is not kept")


def _receive(
    response: HTTPResponse, endpoint: str, name: str, limit: int | None, file: BinaryIO
) -> str:
    """Write an answer's body to a file, watched by length; its SHA-256."""
    length = response.length  # what the server announced, or None
    free = shutil.disk_usage(os.path.dirname(file.name)).free
    if length and length > free:
        raise OSError(f"{name} has {length >> 20} MiB, but only {free >> 20} MiB are free")
    received, digest = 0, hashlib.sha256()
    with byte_bar(name, length) as bar:
        for chunk in _chunks(response, endpoint, name):
            received += len(chunk)
            if limit and received > limit:
                raise InputError(f"{name} is larger than {limit >> 20} MiB")
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    if length is not None and received != length:
        raise InputError(f"{endpoint} sent {received} of {length} bytes of {name}: try again")
    return digest.hexdigest()


def _open(endpoint: str, repo: str, name: str) -> tuple[HTTPResponse | None, str | None]:
    """The Hub's answer to a request for a file, None for 404; and the SHA-256 it states, if any."""
    request = Request(f"{endpoint}/{repo}/resolve/main/{name}", headers={"User-Agent": "tinygpt"})
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise InputError("HF_TOKEN is not a token: it has spaces or other unusual characters")
    if token:  # urllib would hand on an ordinary header to whichever host a redirect names
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    redirects = _Redirects()
    try:
        response = build_opener(redirects).open(request, timeout=_TIMEOUT_S)
        redirects.note(request.full_url, response.headers, response.geturl())
        return response, redirects.sha256
    except HTTPError as error:
        error.close()
        if error.code == 404:
            return None, None
        if error.code in (401, 403):
            fact = f"{endpoint} does not give out {repo} (HTTP {error.code})"
            advice = "check the name; if it is private or gated, set HF_TOKEN"
            raise InputError(f"{fact}: {advice}") from error
        raise InputError(f"{endpoint} answered HTTP {error.code} for {repo} {name}") from error
    except InputError:
        raise
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to nonsense
        fact = f"cannot fetch {name} from {endpoint}: {reason(error)}"
        raise InputError(
            f"{fact}; give --model a folder, or set HF_ENDPOINT to a mirror"
        ) from error


def _chunks(response: HTTPResponse, endpoint: str, name: str) -> Iterator[bytes]:
    """The body in pieces; apart from the writing, so that only network errors are caught here."""
    try:
        while chunk := response.read(1 << 20):
            yield chunk
    except (OSError, HTTPException) as error:
        fact = f"cannot fetch {name} from {endpoint}: {reason(error)}"
        raise InputError(f"{fact}; try again") from error


class _Redirects(HTTPRedirectHandler):
    """Follows redirects without giving up encryption or showing the token to another host.

    What the Hub itself states of a large file it states where it sends on to the host that has it.
    Source: huggingface_hub's `HUGGINGFACE_HEADER_X_LINKED_ETAG`; of such files it is the SHA-256.
    """

    sha256: str | None = None

    def note(self, asked: str, headers: Message, answered: str) -> None:
        """Remember the SHA-256 that an answer of the host that was asked states."""
        stated = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag") or "")
        if stated and urlsplit(asked).netloc == urlsplit(answered).netloc:
            self.sha256 = self.sha256 or stated[1]

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme != "https" and new.scheme != old.scheme:
            fp.close()
            raise InputError(f"{old.netloc} redirects from {old.scheme} to {new.scheme}: refused")
        self.note(req.full_url, headers, req.full_url)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if request and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.add_unredirected_header("Authorization", token)
        return request
