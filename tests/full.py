"""Files as full as the readers allow, or fuller: what a small file can make of memory and time.

Each is a few megabytes, and asks for far more. `fuzz --full` loads them as it does damaged ones.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from string import ascii_lowercase

LETTERS = ["".join(x) for x in product(ascii_lowercase, repeat=4)]
NUMBERED = [*enumerate(LETTERS[:400_000])]
SHAPE = {"n_embd": 8, "n_head": 1, "vocab_size": 8, "n_positions": 8}


def torch_file(path: Path, body: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", body)
        file.writestr("x/data/0", bytes(24))
    return path


def arguments() -> bytes:
    """What torch calls to make a tensor of 32 dimensions, and with what."""
    plain = {x: pickle.dumps(x, 2)[2:-1] for x in ("storage", "0", "cpu", 6)}
    storage = b"(" + plain["storage"] + b"ctorch\nFloatStorage\n" + plain["0"] + plain["cpu"]
    ones = b"(" + b"K\1" * 32 + b"t"
    rest = b"K\0" + ones + ones + b"\x89}t"
    return b"ctorch._utils\n_rebuild_tensor_v2\nq\1(" + storage + plain[6] + b"tQ" + rest + b"q\2"


def one_tensor_by_many_names(folder: Path) -> Path:
    names = b"".join(b"\x8c\4" + name.encode() + b"h\3" for name in LETTERS[:120_000])
    first = b"\x8c\1w" + arguments() + b"Rq\3"
    return torch_file(folder / "x.pt", b"\x80\4}(" + first + names + b"u.")


def many_tensors_in_a_pickle(folder: Path) -> Path:
    body = b"h\1h\2R" * 200_000
    return torch_file(folder / "x.pt", b"\x80\4](" + arguments() + b"R" + body + b"e.")


def safetensors(folder: Path, n_layer: int, count: int = 120_000) -> Path:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(LETTERS[:count], entry), separators=(",", ":")).encode()
    data = struct.pack("<Q", len(header)) + header
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"n_layer": n_layer, **SHAPE}), encoding="utf-8")
    return folder


def gguf(folder: Path, values: list[bytes], tensors: list[bytes]) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    (folder / "x.gguf").write_bytes(head + b"".join(values + tensors) + bytes(64))
    return folder / "x.gguf"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_tensors(folder: Path, count: int) -> Path:
    shape = {"block_count": count, "embedding_length": 1, "context_length": 1}
    shape["attention.head_count"] = 1
    values = [text(f"gpt2.{name}") + struct.pack("<II", 4, n) for name, n in shape.items()]
    values.append(text("gpt2.attention.layer_norm_epsilon") + struct.pack("<If", 6, 1e-5))
    values.append(text("general.architecture") + struct.pack("<I", 8) + text("gpt2"))
    table = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 1, 1, 0, 0)
    empty = struct.pack("<IQIQ", 1, 0, 0, 32)
    return gguf(folder, values, [table] + [text(name) + empty for name in LETTERS[:count]])


def gguf_keys(folder: Path) -> Path:
    return gguf(folder, [text(name) + struct.pack("<IB", 0, 1) for name in LETTERS] * 2, [])


def gguf_texts(folder: Path) -> Path:
    count = 2_000_000
    return gguf(folder, [text("k") + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)], [])


def tokenizer(folder: Path, vocab: str, merges: str = "") -> Path:
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return folder / "vocab.json"


FILES: dict[str, Callable[[Path], Path]] = {
    "one tensor by many names": one_tensor_by_many_names,
    "many tensors in a pickle": many_tensors_in_a_pickle,
    "many tensors, safetensors": lambda x: safetensors(x, 12),
    "many layers, safetensors": lambda x: safetensors(x, 3000, 20_000),
    "many tensors, GGUF": lambda x: gguf_tensors(x, 380_000),
    "many layers, GGUF": lambda x: gguf_tensors(x, 19_000),
    "many keys, GGUF": gguf_keys,
    "many texts, GGUF": gguf_texts,
    "many merges": lambda x: tokenizer(x, '{"a": 0}', "a b\n" * 15_000_000),
    "as many merges as are read": lambda x: tokenizer(x, '{"a": 0}', "a b\n" * 1_000_000),
    "many special tokens": lambda x: tokenizer(x, json.dumps({f"<{n}>": i for i, n in NUMBERED})),
    "a long special token": lambda x: tokenizer(x, '{"a": 0, "<%s>": 1}' % ("x" * 5_000_000)),
    "nested JSON": lambda x: tokenizer(x, '{"a": [%s0]}' % ("[]," * 3_900_000)),
}  # fmt: skip
