"""What a file or folder is that holds no model to load, told in the words of who has it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from tinygpt.errors import show
from tinygpt.storage import open_plain

_GIVE = "give a model's folder or file, or a name such as gpt2"
# How to come from a form that only other programs read to one that is read here.
_BY_TRANSFORMERS = (
    "convert them in that folder with transformers below 5: from transformers import "
    "GPT2LMHeadModel as M; M.from_pretrained('.', from_{}=True).save_pretrained('OUT')"
)
_TENSORFLOW = (
    "a checkpoint of TensorFlow: convert its folder with transformers below 5 and tensorflow: "
    "python -m transformers.models.gpt2.convert_gpt2_original_tf_checkpoint_to_pytorch "
    "--gpt2_checkpoint_path FOLDER --pytorch_dump_folder_path OUT, and --gpt2_config_file for "
    "another size than 124M"
)
_H5 = f"weights for TensorFlow: {_BY_TRANSFORMERS.format('tf')}"
_FLAX = f"weights for Flax: {_BY_TRANSFORMERS.format('flax')}"
_ONNX = "a graph for ONNX: give the model that it was exported from"
_TRAINING = "what training keeps beside a model: give the model's folder"
_FOLDER = "a part of a model's folder: give the folder"
_ARCHIVE = "an archive: unpack it, and give the model inside"
_NUMPY = f"of NumPy, which has no form of model that is known: {_GIVE}"
_PICKLE = (
    "a pickle by another program than torch: give a file as torch.save(model.state_dict(), PATH) "
    "writes it, or a model's folder"
)
_IMAGE = f"an image: {_GIVE}"
# By the name, as a regular expression, and by how the content begins.
_NAMES = {
    r"checkpoint|.*\.(index|meta|data-\d{1,9}-of-\d{1,9})": _TENSORFLOW,
    r".*\.(h5|hdf5|keras)": _H5,
    r".*\.msgpack": _FLAX,
    r".*\.onnx": _ONNX,
    r"(optimizer|scheduler|scaler|rng_state\w{0,9}|training_args)\.(pt|pth|bin)": _TRAINING,
    r"adapter_model\.\w{1,20}": "an adapter without its adapter_config.json: fetch that too",
    r"(train|val|test)\.bin": f"a file of tokens, to train on: {_GIVE}",
    r"(config|\w{1,40}_config|tokenizer|vocab|\w{1,40}_map|added_tokens|encoder)\.json": _FOLDER,
    r"merges\.txt|vocab\.(txt|bpe)|meta\.pkl|.*\.index\.json": _FOLDER,
    r".*\.(tar|tgz|zip|7z|rar|(tar\.)?(gz|bz2|xz|zst))": _ARCHIVE,
    r".*\.(npy|npz)": _NUMPY,
    r".*\.(pkl|pickle|joblib)": _PICKLE,
}
_STARTS = {
    b"version https://git-lfs": "a pointer of git-lfs: get the file itself with git lfs pull",
    b"\x89HDF": _H5,
    b"\x89PNG": _IMAGE,
    b"\xff\xd8\xff": _IMAGE,
    b"GIF8": _IMAGE,
    b"%PDF": f"a PDF: {_GIVE}",
    b"\x1f\x8b": _ARCHIVE,
    b"BZh": _ARCHIVE,
    b"\xfd7zXZ": _ARCHIVE,
    b"7z\xbc\xaf": _ARCHIVE,
    b"\x28\xb5\x2f\xfd": _ARCHIVE,
    b"Rar!": _ARCHIVE,
    b"PK\5\6": f"an archive with nothing in it: {_GIVE}",
    b"\x93NUMPY": _NUMPY,
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
    b"lmgg": "of the form before GGUF: convert the model again with a newer llama.cpp",
}
_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)


def of_file(path: Path) -> str | None:
    """What a file is that is neither of torch nor GGUF; None where it may be of safetensors."""
    try:
        with open_plain(path) as file:
            start = file.read(512)
    except OSError:  # its reader says so
        return None
    if not start:
        return "empty: fetch it again"
    if start[8:9] == b"{" and not any(start[5:8]):  # after a length that is no text
        return None
    for begin, what in _STARTS.items():
        if start.startswith(begin):
            return what
    if what := _by_name(path.name):
        return what
    if _PAGE.match(start):
        return "a page of the web: fetch the file itself (on the Hub, /resolve/ and not /blob/)"
    if start[257:262] == b"ustar":
        return _ARCHIVE
    if _is_text(start):
        return f"a text: {_GIVE}"
    # Of safetensors it can only be a damaged one.
    return None if path.suffix == ".safetensors" else f"no model's file that is known: {_GIVE}"


def is_page(path: Path) -> bool:
    """Whether a file is a page of the web, which a server has given in its place."""
    with open_plain(path) as file:
        return bool(_PAGE.match(file.read(512)))


def is_weights(path: Path) -> bool:
    """Whether a file may be a whole model's, by its name."""
    return not _by_name(path.name)


def of_folder(folder: Path, usual: tuple[str, ...], adapter: str) -> str:
    """What a folder without weights is, and what to do.

    Args:
        usual: the names of files that a folder with weights has.
        adapter: the name of the file that a folder with an adapter has.
    Raises:
        OSError: when it cannot be read.
    """
    with os.scandir(folder) as entries:
        folders = {entry.name: entry.is_dir() for entry in entries}
    names = sorted(folders)
    files = [name for name in names if not folders[name]]
    if found := _told(files, _TENSORFLOW, _H5, _FLAX, _ONNX):
        return found
    inner, models = [n for n in names if folders[n]], (*usual, adapter)
    inside = [n for n in inner if any((folder / n / name).is_file() for name in models)]
    if inside:
        last = max(inside, key=lambda name: [int(n) for n in re.findall(r"\d{1,9}", name)])
        return f"it has models in folders of their own: give one, such as {folder / last}"
    below = []
    for name in inner[:100]:
        with suppress(OSError):  # one that is not ours to read
            below += [os.path.join(name, file) for file in sorted(os.listdir(folder / name))]
    if found := _told(below, _TENSORFLOW, _H5, _FLAX) or _told(files, _ARCHIVE):
        return found
    if {"header.json", "train.bin"} & {*names}:
        return f"it is a folder of tokens, to train on: {_GIVE}"
    there = f"only {', '.join(show(name) for name in names[:3])}" if names else "nothing"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"none of {', '.join(usual)} is there, {there}{more}: {_GIVE}"


def _told(files: list[str], *kinds: str) -> str | None:
    """What is said of the first of the files that is of one of these kinds."""
    for file in files:
        if (what := _by_name(os.path.basename(file))) in kinds:
            return f"it has no weights of torch, but {show(file)}, {what}"
    return None


def _by_name(name: str) -> str | None:
    return next((what for of, what in _NAMES.items() if re.fullmatch(of, name)), None)


def _is_text(start: bytes) -> bool:
    """Whether the first bytes of a file are of a text in UTF-8, perhaps cut in a character."""
    text = start.decode("utf-8", "replace")
    body = text[:-1] if len(start) == 512 else text
    return all(c.isprintable() or c in "\t\n\r\f" for c in body) and "\ufffd" not in body
