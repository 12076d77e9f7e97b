"""Files and folders that are no model: what each is, and what to do, in one line."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, randomize

from tinygpt import GPT
from tinygpt.checkpoints import other_files, safetensors_file


def put(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".").replace("_dash_", "-")).write_bytes(content)
    return folder


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/config.json", "{}")
    return out.getvalue()


def arrays() -> bytes:
    out = io.BytesIO()
    np.savez(out, a=np.zeros(3))
    return out.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"
TENSORFLOW = {
    "checkpoint": b'model_checkpoint_path: "model-100"\n',
    "model_dash_100__data_dash_00000_dash_of_dash_00001": b"\7" * 2000,
    "model_dash_100__index": b"\0" * 200,
    "model_dash_100__meta": b"\1" * 200,
    "hparams__json": b"{}",
}
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(1000)
# Name and content of a file -> what it is called, and what to do.
FILES = {
    "a text": ("notes.txt", b"To be, or not to be\n", "it is a text: give a model's folder"),
    "a text, cut in a character": ("x", "ä".encode() * 300, "it is a text"),
    "JSON": ("settings.json", b'{"a": 1}', "it is a text"),
    "nothing": ("model.safetensors", b"", "it is empty: fetch it again"),
    "an image": ("x.png", b"\x89PNG\r\n\x1a\n" + bytes(900), "it is an image"),
    "a photo called as weights": (
        "model.safetensors",
        b"\xff\xd8\xff\xe0" + bytes(900),
        "an image",
    ),
    "a pointer": ("model.safetensors", POINTER, "a pointer of git-lfs: .* git lfs pull"),
    "a pointer, .bin": ("pytorch_model.bin", POINTER, "a pointer of git-lfs: .* git lfs pull"),
    "a page": (
        "pytorch_model.bin",
        b"\n<!DOCTYPE html><html>",
        "a page of the web: fetch",
    ),
    "gzip": ("model.tar.gz", gzip.compress(b"x" * 99), "it is an archive: unpack it"),
    "tar": ("model.tar", tar(), "it is an archive: unpack it"),
    "tar by another name": ("model.bin", tar(), "it is an archive: unpack it"),
    "bzip2": ("model.tar.bz2", b"BZh9" + bytes(range(200)), "it is an archive: unpack it"),
    "an empty zip": ("a.zip", b"PK\5\6" + bytes(18), "an archive with nothing in it: give a model"),
    "arrays": ("x.npz", arrays(), "it holds arrays of NumPy, no model"),
    "arrays, cut": ("x.npz", b"PK\3\4" + bytes(range(200)), "archive is damaged or cut: .*fetch"),
    "a pickle": ("q.pkl", pickle.dumps({"a": 1}), "a pickle by another program than torch: give"),
    "a pickle by another name": ("q.bin", pickle.dumps([1], 2), "a pickle by another program"),
    "a pickle of lines": ("q.pkl", pickle.dumps({"a": 1}, 0), "a pickle by another program"),
    "noise by another name": ("x.ckpt", bytes(range(256)), "no model's file that is known: give a"),
    "zip": ("model.zip", zipped(), "is compressed or encrypted.*unpack"),
    "config.json": ("config.json", b"{}", "a part of a model's folder: give the folder"),
    "tokenizer": ("merges.txt", b"#version", "a part of a model's folder: give the folder"),
    "TensorFlow's list": ("checkpoint", b"model_checkpoint_path", "a checkpoint of TensorFlow"),
    "TensorFlow's index": ("model-100.index", bytes(200), "a checkpoint of TensorFlow"),
    "HDF5": ("tf_model.h5", HDF5, "weights for TensorFlow.*from_tf=True"),
    "HDF5 by another name": ("weights.data", HDF5, "weights for TensorFlow.*from_tf=True"),
    "Flax": ("flax_model.msgpack", b"\x81\xa1a" * 99, "weights for Flax.*from_flax=True"),
    "ONNX": ("model.onnx", b"\x08\x07" * 99, "a graph for ONNX"),
    "NumPy": ("x.npy", b"\x93NUMPY" + bytes(99), "of NumPy, which has no form of model"),
    "GGML": ("ggml-model.bin", struct.pack("<I", 0x67676D6C) + bytes(99), "the form before GGUF"),
    "tokens": ("train.bin", bytes(99), "a file of tokens"),
    "noise": ("model.safetensors", bytes(range(256)), "cut or no safetensors file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_file_given_as_a_model_is_told_in_one_line(kind, tmp_path, cli):
    name, content, words = FILES[kind]
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, words, cli)


def refuses(path: Path, words: str, cli: Callable) -> None:
    status, out, err = cli("generate", "hello", "--model", path)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert len(err) < len(str(path)) + 700
    assert re.search(words, err), err


def trainer(folder: Path) -> None:
    for number in (500, 1000, 90):
        put(folder / f"checkpoint-{number}", pytorch_model__bin=b"x")


# What is in a folder -> what it is called, and what to do.
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda f: None, "none of model.safetensors, .* is there, nothing: give a model's"),
    "a README": (lambda f: put(f, README__md=b"x"), "none of .* is there, only 'README.md': give"),
    "many files": (
        lambda f: put(f, a=b"", b=b"", c=b"", d=b""), "only 'a', 'b', 'c' and 1 more: give a model"
    ),
    "a hostile name": (lambda f: put(f, **{"a\nb\x1b": b""}), r"only 'a\\nb\\x1b'"),
    "a trainer's": (trainer, "models in folders of their own: give one, such as .*checkpoint-1000"),
    "a trainer's with settings": (
        lambda f: (trainer(f), put(f, training_args__bin=b"PK\3\4", optimizer__pt=b"PK\3\4")),
        "give one, such as .*checkpoint-1000",
    ),
    "adapters one level down": (
        lambda f: put(f / "checkpoint-7", adapter_config__json=b"{}"),
        "give one, such as .*checkpoint-7",
    ),
    "a model one level down": (
        lambda f: put(f / "inner", model__safetensors=b"x"), "give one, such as .*inner"
    ),
    "TensorFlow's": (lambda f: put(f, **TENSORFLOW), "'checkpoint', a checkpoint of TensorFlow"),
    "TensorFlow's without its list": (
        lambda f: put(f, **{k: v for k, v in TENSORFLOW.items() if k != "checkpoint"}),
        "'model-100.data-00000-of-00001', a checkpoint of TensorFlow.*python -m transformers",
    ),
    "TensorFlow's one level down": (
        lambda f: put(f / "run1", **TENSORFLOW),
        "no weights of torch, but 'run1/checkpoint', a checkpoint of TensorFlow: convert",
    ),
    "Flax's one level down": (
        lambda f: put(f / "a", flax_model__msgpack=b"x"), "'a/flax_model.msgpack', weights for Flax"
    ),
    "a model beside TensorFlow's, one level down": (
        lambda f: (put(f / "a", **TENSORFLOW), put(f / "b", model__safetensors=b"x")),
        "models in folders of their own: give one, such as .*b",
    ),
    "an archive": (
        lambda f: put(f, model__tar__gz=b"\x1f\x8b", README__md=b"x"),
        "'model.tar.gz', an archive: unpack it, and give the model inside",
    ),
    "an archive beside models one level down": (
        lambda f: (trainer(f), put(f, logs__zip=b"PK")), "give one, such as .*checkpoint-1000"
    ),
    "h5": (lambda f: put(f, tf_model__h5=HDF5, config__json=b"{}"), "'tf_model.h5', weights for T"),
    "Flax": (lambda f: put(f, flax_model__msgpack=b"x"), "'flax_model.msgpack', weights for Flax"),
    "ONNX": (lambda f: put(f, model__onnx=b"x"), "'model.onnx', a graph for ONNX"),
    "tokens": (
        lambda f: put(f, header__json=b"{}", train__bin=b"x", val__bin=b"x"), "a folder of tokens"
    ),
    "what training keeps": (
        lambda f: put(f, optimizer__pt=b"PK\3\4", scheduler__pt=b"PK\3\4"), "none of .* only 'optim"
    ),
    "an adapter without its settings": (
        lambda f: put(f, adapter_model__safetensors=b"x"), "only 'adapter_model.safetensors'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_a_model_is_told_in_one_line(kind, tmp_path, cli):
    make, words = FOLDERS[kind]
    (tmp_path / "x").mkdir()
    make(tmp_path / "x")
    refuses(tmp_path / "x", words, cli)


def test_what_training_keeps_beside_a_model_is_not_taken_for_one(tmp_path):
    path = put(tmp_path / "x", optimizer__pt=b"", rng_state__pth=b"", training_args__bin=b"")
    randomize(GPT(SMALL)).save_pretrained(path)
    (path / "model.safetensors").rename(path / "mine.safetensors")
    assert GPT.from_pretrained(path).config == SMALL


@pytest.mark.parametrize("name", ["checkpoint", "tf_model.h5", "config.json", "notes.txt"])
def test_weights_by_the_name_of_something_else_are_weights(name, tmp_path):
    layout = {"a": ("F32", (2,))}
    safetensors_file.write(tmp_path / name, layout, lambda _: np.ones(2, "f4"))
    assert other_files.of_file(tmp_path / name) is None
    header = json.dumps({}).encode()
    (tmp_path / name).write_bytes(struct.pack("<Q", len(header)) + header)
    assert other_files.of_file(tmp_path / name) is None
