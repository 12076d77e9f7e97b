"""GGUF files against the package `gguf`, and headers that claim what is not so."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tinygpt.checkpoints import gguf_file
from tinygpt.errors import CheckpointError, InputError

WEIGHT = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)


def number(form: str, *values: object) -> bytes:
    return struct.pack(f"<{form}", *values)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return number("Q", len(data)) + data


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = number(f"I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + number("IQ", kind, offset)


def put(
    path: Path, values: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3
) -> Path:
    """A file by hand, of whole parts that may be wrong."""
    head = b"GGUF" + number("IQQ", version, len(tensors), len(values)) + b"".join(values + tensors)
    path.write_bytes(head.ljust(len(head) + -len(head) % 32, b"\0") + data)
    return path


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + number("I", kind) + data


# With what is not ours.


@pytest.mark.parametrize("kind", gguf_file.BLOCKS)
def test_blocks_have_the_values_that_the_reference_finds(kind):
    """Of any bytes: each type's every bit counts."""
    theirs = pytest.importorskip("gguf")
    _, numbers, size = gguf_file.BLOCKS[kind]
    count = 24
    raw = np.random.default_rng(1).integers(0, 256, (count, size), np.uint8)
    for at in {"Q6_K": [size - 2], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0]}.get(kind, [0, 2]):
        scales = np.random.default_rng(2).normal(size=count).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(count, 2)
    info = gguf_file.TensorInfo(kind, (4, count // 4 * numbers), 0, raw.size)
    want = theirs.dequantize(raw, theirs.GGMLQuantizationType[kind]).reshape(info.shape)
    np.testing.assert_allclose(
        gguf_file.dequantize(raw.reshape(-1), info), want, rtol=1e-5, atol=1e-5
    )


def test_no_blocks_have_no_values():
    info = gguf_file.TensorInfo("Q8_0", (0, 32), 8, 8)
    assert gguf_file.dequantize(np.zeros(0, np.uint8), info).shape == (0, 32)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0, 1e-30])
def test_q8_0_is_made_as_the_reference_makes_it(scale):
    theirs = pytest.importorskip("gguf")
    weight = WEIGHT * np.float32(scale)
    weight[0, :32] = np.arange(32) - 15.5  # halves, and a maximum of either sign
    want = theirs.quantize(weight, theirs.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(gguf_file.quantize_q8_0(weight), want)


def test_what_we_write_the_reference_reads(tmp_path):
    theirs = pytest.importorskip("gguf")
    metadata = {
        "general.architecture": "gpt2", "a.bool": True, "a.number": 7, "a.float": 0.5,
        "a.texts": ["x", "ü", ""], "a.numbers": [1, -2], "a.none": [],
    }  # fmt: skip
    layout = {
        "w": ("F32", (6, 64)),
        "h": ("F16", (6, 64)),
        "q": ("Q8_0", (6, 64)),
        "b": ("F32", (3,)),
    }
    arrays = {"w": WEIGHT, "h": WEIGHT, "q": WEIGHT, "b": np.ones(3, np.float32)}
    path = tmp_path / "x.gguf"
    gguf_file.write(path, metadata, layout, arrays.__getitem__)
    reader = theirs.GGUFReader(path)
    found = {t.name: theirs.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    np.testing.assert_array_equal(found["w"], WEIGHT)
    np.testing.assert_array_equal(found["h"], WEIGHT.astype(np.float16))
    assert np.abs(found["q"] - WEIGHT).max() < np.abs(WEIGHT).max() / 200
    read = {name: field.contents() for name, field in reader.fields.items()}
    assert {**metadata, "a.none": read["a.none"]}.items() <= read.items()
    tensors, back = gguf_file.read_header(path)
    assert {
        k: v if isinstance(v, str | int | float) else list(v) for k, v in back.items()
    } == metadata
    assert {name: (info.dtype, info.shape) for name, info in tensors.items()} == layout


# Files that lie.

FLAT = value("general.alignment", 4, number("I", 32))
ARRAY = 9
FAULTS: dict[str, tuple[list[bytes], list[bytes], bytes, str]] = {
    "a long text": ([text("k") + number("IQ", 8, 2**63)], [], b"", "a length in it"),
    "a long key": ([number("Q", 2**40) + bytes(9)], [], b"", "a length in it"),
    "an array longer than the file": (
        [value("k", ARRAY, number("IQ", 4, 2**40))], [], b"", "claims 1099511627776 entries"
    ),
    "an array of texts longer than the file": (
        [value("k", ARRAY, number("IQ", 8, 2**40))], [], b"", "claims 1099511627776 entries"
    ),
    "arrays in an array": (
        [value("k", ARRAY, number("IQIQ", 9, 1, 9, 1))], [], b"", "neither of numbers nor of texts"
    ),
    "an unknown type of value": ([value("k", 13, b"")], [], b"", "metadata of type 13"),
    "a text that is none": ([value("k", 8, text(b"\xff"))], [], b"", "is not UTF-8"),
    "a key twice": ([FLAT, FLAT], [], b"", "'general.alignment' appears twice"),
    "no alignment": (
        [value("general.alignment", 4, number("I", 0))], [], b"", "general.alignment is 0"
    ),
    "an odd alignment": (
        [value("general.alignment", 4, number("I", 12))], [], b"", "general.alignment is 12"
    ),
    "an alignment of text": (
        [value("general.alignment", 8, text("32"))], [], b"", "general.alignment is '32'"
    ),
    "no dimension": ([], [entry("w", ())], b"", "0 dimensions"),
    "many dimensions": ([], [entry("w", (1,) * 5)], b"", "5 dimensions"),
    "a huge shape": ([], [entry("w", (2**40, 2**40))], b"", "is too large"),
    "a shape that overflows": ([], [entry("w", (2**32, 2**32, 0))], b"", "is too large"),
    "an unknown type": ([], [entry("w", (2,), 99)], b"", "type 99 is unsupported"),
    "a type that was given up": ([], [entry("w", (32,), 4)], b"", "type 4 is unsupported"),
    "half a block": ([], [entry("w", (2, 16), 8)], b"", "rows of 16 in blocks of 32"),
    "past the end": ([], [entry("w", (9,))], bytes(32), "ends at byte"),
    "far past the end": ([], [entry("w", (1,), offset=2**63)], bytes(32), "ends at byte"),
    "not aligned": ([], [entry("w", (1,), offset=4)], bytes(32), "not aligned to 32"),
    "over another": ([], [entry("v", (16,)), entry("w", (1,), offset=32)], bytes(64), "overlaps"),
    "the same place": ([], [entry("v", (1,)), entry("w", (1,))], bytes(32), "overlaps tensor 'v'"),
    "a name twice": (
        [], [entry("w", (1,)), entry("w", (1,), offset=32)], bytes(64), "'w' is there twice"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_header_that_lies_is_refused(kind, tmp_path):
    values, tensors, data, words = FAULTS[kind]
    path = put(tmp_path / "x.gguf", values, tensors, data)
    with pytest.raises(CheckpointError, match=words) as caught:
        gguf_file.read_header(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"GGUF" + number("IQQ", 3, 2**60, 0), "claims 1152921504606846976 tensors: at most 20000"),
        (b"GGUF" + number("IQQ", 3, 0, 2**60), "claims 1152921504606846976 keys: at most 10000"),
        (b"GGUF" + number("IQQ", 1, 0, 0), "of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "of version 50331648"),
        (b"GGUF\3", "it is cut"),
        (b"", "it is cut"),
        (b"GGML" + bytes(40), "no GGUF file"),
    ],
)
def test_a_start_that_lies_is_refused(head, words, tmp_path):
    (tmp_path / "x.gguf").write_bytes(head)
    with pytest.raises(CheckpointError, match=words):
        gguf_file.read_header(tmp_path / "x.gguf")


def test_as_much_as_fits_into_a_file_is_read(tmp_path):
    shortest = [value("", 0, b"\7"), value("x", 7, b"\1")]
    (tmp_path / "x").write_bytes(b"GGUF" + number("IQQ", 2, 0, 1) + shortest[0])
    assert gguf_file.read_header(tmp_path / "x") == ({}, {"": 7})
    texts = value("k", ARRAY, number("IQ", 8, 3) + text("") * 3)
    path = put(tmp_path / "x", [texts, *shortest], [entry("w", (1, 1, 1, 0))])
    tensors, metadata = gguf_file.read_header(path)
    assert metadata == {"k": [""] * 3, "": 7, "x": True}
    assert tensors["w"].shape == (1, 1, 1, 0)
    for alignment in (8, 1 << 16):
        put(path, [value("general.alignment", 4, number("I", alignment))], [])
        gguf_file.read_header(path)
    for alignment in (4, 1 << 17):
        put(path, [value("general.alignment", 4, number("I", alignment))], [])
        with pytest.raises(CheckpointError, match=f"general.alignment is {alignment}"):
            gguf_file.read_header(path)


def test_a_list_longer_than_any_vocabulary_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_MAX_TEXTS", 1)
    texts = value("k", ARRAY, number("IQ", 8, 2) + text("a") + text("b"))
    with pytest.raises(CheckpointError, match="a list of 2 texts: at most 1 are read"):
        gguf_file.read_header(put(tmp_path / "x.gguf", [texts], [], b""))


def test_cut_anywhere_is_refused(tmp_path):
    path = put(tmp_path / "x", [FLAT], [entry("w", (2, 3))], WEIGHT[0, :6].tobytes())
    tensors, _ = gguf_file.read_header(path)
    assert tensors["w"].shape == (2, 3)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            gguf_file.read_header(path)


def test_a_value_too_large_for_its_type_is_refused_and_leaves_nothing(tmp_path):
    for kind in ("F16", "Q8_0"):
        layout = {"w": (kind, (6, 64))}
        with pytest.raises(InputError, match=f"too large for {kind}: choose float32"):
            gguf_file.write(tmp_path / "x", {}, layout, lambda _: WEIGHT * np.float32(1e9))
    assert list(tmp_path.iterdir()) == []
