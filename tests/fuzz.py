"""Damaged checkpoints of every form, by the thousand: each must load with finite weights or be
refused with CheckpointError, in little memory and little time.

    python tests/fuzz.py --count 20000 --seed 0

`--minutes M` goes on for so long instead, and `--full` loads the files of `full`. The valid files
that are damaged are written by `writers` (which needs torch, transformers, safetensors and gguf),
in a process of its own, so that the memory measured is this package's. Prints one JSON object; exit
status 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

FORMS = (
    "Hugging Face, safetensors", "Hugging Face, pytorch_model.bin", "Hugging Face, .bin in shards",
    "Hugging Face, .bin before 1.6", "minGPT", "nanoGPT", "build-nanogpt", "the book, fused",
    "the book, checkpoint", "the book, safetensors", "GGUF F32", "GGUF F16",
    "GGUF Q8_0", "GGUF Q4_0",
)  # fmt: skip
# Of the processor's time, which other programs do not lengthen, and of memory.
MAX_S, MAX_BYTES = 5.0, 10**9
# What tends to upset readers: numbers at the edges, and structures inside one another.
NUMBERS = [0, 1, 2, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**47, 2**63, 2**64 - 1]
JSON_PIECES = [
    b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b"1e999", b"-1", b"null", b"NaN", b'""', b"[]",
    b"{}", b'"F64"', b'"I8"', b'"BF16"', b"\xff", b"0.5", b'"\\ud800"',
]  # fmt: skip
PICKLE_PIECES = [
    b"(" * 3000, b"]" * 3000, b"]\x85" * 3000, b"cos\nsystem\n", b"\x85R", b"cposix\nsystem\n",
    b"ctorch\nFloatStorage\n", b"Q", b"b", b"R", b"0", b"2", b"u", b"e", b"}", b"N", b"h\0",
    b"j\xff\xff\xff\xff", b"r\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 8, b"\x93", b"\x81",
    b"X\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b".",
]  # fmt: skip
GGUF_PIECES = [
    struct.pack("<IIQ", 9, 9, 2**20), struct.pack("<IIQ", 9, 8, 2**40), b"\xff" * 8,
    struct.pack("<IQ", 8, 2**63), struct.pack("<IIQ", 9, 0, 2**24),
]  # fmt: skip


def write_seeds(folder: str) -> None:
    """One small valid checkpoint of each form, each in a folder of its own."""
    import writers

    writers.SHAPE |= {"n_layer": 1}
    for form in FORMS:
        place = Path(folder, form)
        place.mkdir()
        path, _ = writers.WRITERS[form][1](place)
        (place / "which").write_text("." if path == place else path.name, encoding="utf-8")


class Seed:
    """A valid checkpoint, and what of it may be damaged."""

    def __init__(self, folder: Path) -> None:
        self.form = folder.name
        self.path = (folder / "which").read_text(encoding="utf-8")
        kept = (x for x in folder.iterdir() if x.name not in ("which", "generation_config.json"))
        self.files = {x.name: x.read_bytes() for x in kept}
        big = [name for name in self.files if not name.endswith(".json")]
        self.names = sorted(self.files) + 3 * sorted(big)  # more of what is more complex

    def damage(self, draw: random.Random, place: Path) -> str:
        """Write it with one file damaged; what was done."""
        name = draw.choice(self.names)
        data = self.files[name]
        if name.endswith(".json"):
            words, data = _mutate(draw, data, 0, len(data), JSON_PIECES)
        elif data[:2] == b"PK":
            words, data = _mutate_zip(draw, data)
        elif data[:4] == b"\x80\2\x8a\n":  # pickles by themselves; the numbers are as many bytes
            end = data.rfind(b".", 0, len(data) // 2) if draw.random() < 0.1 else 8000
            words, data = _mutate(draw, data, 0, min(end, len(data)), PICKLE_PIECES)
        elif data[:4] == b"GGUF":
            tensors = data.find(b"token_embd.weight") - 8  # the list of them, after the metadata
            places = [(0, 600), (tensors - 200, tensors), (tensors, tensors + 1100), (0, len(data))]
            words, data = _mutate(draw, data, *draw.choice(places), GGUF_PIECES)
        else:
            words, data = _mutate_safetensors(draw, data)
        for other, content in self.files.items():
            (place / other).write_bytes(data if other == name else content)
        return f"{name}: {words}"


def _mutate_zip(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """The archive itself, or the pickle in an archive that is whole."""
    if draw.random() < 0.4:
        start = 0 if draw.random() < 0.3 else data.rfind(b"PK\1\2", 0, -1500)
        return _mutate(draw, data, start, len(data), [b"PK\5\6", b"PK\1\2", b"../", b"\0"])
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("/data.pkl"):
                words, content = _mutate(draw, content, 0, len(content), PICKLE_PIECES)
            new.writestr(name, content)
    return f"pickle {words}", out.getvalue()


def _mutate_safetensors(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """The length before the header, the data after it, or the header with its length put right."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.3:
        return _mutate(draw, data, 0, 8 if draw.random() < 0.3 else len(data), NOTHING)
    words, header = _mutate(draw, data[8 : 8 + length], 0, length, JSON_PIECES)
    return f"header {words}", struct.pack("<Q", len(header)) + header + data[8 + length :]


NOTHING = [b"\0", b"\xff"]


def _mutate(
    draw: random.Random, data: bytes, start: int, end: int, pieces: list[bytes]
) -> tuple[str, bytes]:
    """One to three changes between two places."""
    changed, words = bytearray(data), []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        end = max(start + 1, min(end, len(changed)))
        at = draw.randrange(start, end)
        kind = draw.choice(["flip", "cut", "number", "piece", "swap", "drop", "twice", "digits"])
        words.append(f"{kind} at {at}")
        if kind == "flip":
            for _ in range(draw.randint(1, 8)):
                where = draw.randrange(start, end)
                if where < len(changed):
                    changed[where] ^= 1 << draw.randrange(8)
        elif kind == "cut" and draw.random() < 0.3:
            del changed[at:]
        elif kind == "number":
            size = draw.choice([1, 2, 4, 8])
            number = draw.choice([*NUMBERS, len(changed), len(changed) - at, draw.getrandbits(64)])
            changed[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == "piece":
            size = draw.choice([0, 0, 1, 8])
            changed[at : at + size] = draw.choice(pieces)
        elif kind == "swap":
            other, size = draw.randrange(start, end), draw.choice([1, 4, 8, 40])
            one, two = changed[at : at + size], changed[other : other + size]
            changed[at : at + size], changed[other : other + size] = two, one
        elif kind == "drop":
            del changed[at : at + draw.choice([1, 2, 8, 100])]
        elif kind == "twice":
            changed[at:at] = changed[at : at + draw.choice([1, 8, 60, 400])]
        elif found := [*re.finditer(rb"\d+", changed[start:end])]:
            digits = draw.choice(found)
            number = str(draw.choice([*NUMBERS, -1, 3, 33, 64, 300])).encode()
            changed[start + digits.start() : start + digits.end()] = number
    return ", ".join(words), bytes(changed)


def attempt(path: Path) -> str:
    """Load it: "loads" or "is refused"; anything else is raised."""
    import numpy as np
    from tinygrad.nn.state import get_state_dict

    from tinygpt import load_tokenizer
    from tinygpt.checkpoints.gguf_vocabulary import tokenizer_from_metadata
    from tinygpt.checkpoints.open_checkpoint import open_checkpoint
    from tinygpt.errors import CheckpointError

    try:
        if path.name == "vocab.json":
            load_tokenizer(path)
            return "loads"
        found = open_checkpoint(path)
        model = found.load()
        tokenizer_from_metadata(found.metadata, path)
    except CheckpointError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
        return "is refused"
    for name, parameter in get_state_dict(model).items():
        if not np.isfinite(parameter.numpy()).all():
            raise AssertionError(f"{name} is not finite")
    return "loads"


def peak_memory_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) * 1024


def run(seeds: Path, first: int, count: int, seed: int, minutes: float | None) -> dict:
    """Damage, load, count; numbers `first` to `first + count` of the seed's row."""
    warnings.simplefilter("error")
    # tinygrad waits for itself where its worker thread is the one that collects garbage
    gc.disable()
    known = [Seed(folder) for folder in sorted(seeds.iterdir())]
    for one in known:
        assert attempt(seeds / one.form / one.path) == "loads", one.form
    # blocks take tinygrad ten times as long as all the rest
    often = [one for one in known for _ in range(1 if " Q" in one.form else 3)]
    outcomes: Counter[str] = Counter()
    faults, slowest, start = [], 0.0, time.perf_counter()
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    number = first
    while number < first + count if minutes is None else time.perf_counter() - start < 60 * minutes:
        draw = random.Random(f"{seed} {number}")
        chosen = draw.choice(often)
        words = chosen.damage(draw, place)
        before = time.process_time()
        try:
            outcome = attempt(place / chosen.path)
        except Exception as error:
            outcome = "fails"
            faults.append(f"{number} {chosen.form}: {words}: {type(error).__name__} {error}"[:400])
        took = time.process_time() - before
        if took > MAX_S:
            faults.append(f"{number} {chosen.form}: {words}: took {took:.1f} s")
        slowest = max(slowest, took)
        outcomes[f"{chosen.form} {outcome}"] += 1
        for file in place.iterdir():
            file.unlink()
        number += 1
        if number % 200 == 0:
            gc.collect()
    shutil.rmtree(place)
    return {
        "files": number - first,
        "outcomes": dict(sorted(outcomes.items())),
        "faults": faults,
        "slowest_s": round(slowest, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "total_s": round(time.perf_counter() - start, 1),
    }


def run_full() -> dict:
    """As `run`, with the files of `full`."""
    import full

    faults, times = [], {}
    for name, write in full.FILES.items():
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            path, before = write(Path(place)), time.process_time()
            if (outcome := attempt(path)) != "is refused":
                faults.append(f"{name} {outcome}")
            times[name] = round(time.process_time() - before, 2)
            if times[name] > MAX_S:
                faults.append(f"{name} took {times[name]} s")
    return {"faults": faults, "times_s": times, "peak_memory_bytes": peak_memory_bytes()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="begin at this number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seeds", type=Path, help="a folder that write_seeds has filled")
    args = parser.parse_args(argv)
    if args.full:
        found = run_full()
        print(json.dumps(found, indent=1))
        return int(bool(found["faults"]) or found["peak_memory_bytes"] > MAX_BYTES)
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as seeds:
        if args.seeds is None:
            writer = multiprocessing.get_context("spawn").Process(target=write_seeds, args=(seeds,))
            writer.start()
            writer.join()
            if writer.exitcode:
                return 2
        found = run(args.seeds or Path(seeds), args.first, args.count, args.seed, args.minutes)
    print(json.dumps(found, indent=1))
    return int(bool(found["faults"]) or found["peak_memory_bytes"] > MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())
