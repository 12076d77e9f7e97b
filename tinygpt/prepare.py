"""Text to token files: read in pieces, tokenised on all cores, there whole or not at all."""

from __future__ import annotations

import argparse
import codecs
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.bpe import bpe_tokenizer, train_bpe
from tinygpt.config import InputError, show, unknown
from tinygpt.data import SPLITS, Dataset, Header, Split, ids_dtype
from tinygpt.files import parse_json, reason
from tinygpt.hub import cache_folder, fetch
from tinygpt.tokenizer import char_tokenizer, encode, end_token, load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from tiktoken import Encoding

_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_Piece = tuple[str, str, bool]  # split, text, whether a document ends with it
_KINDS = ("char", "bytes", "gpt2", "bpe:N")
_PIECE_BYTES = 4 << 20
_LINE_BYTES = 256 << 20  # more in one line of JSONL, and it surely is something else
_LEARN_BYTES = 64 << 20  # of this much text, spread evenly, a BPE is learnt

# GPT-2's pattern never matches across a change from anything else to white space, nor looks over
# it: the tokens of what is before and behind are those of the whole. (Python counts as white space
# all that tiktoken does, and more.)
_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)
_SPACES = re.compile(r"\s{7}")  # in every 1250th character, where 9999 white ones are in a row


def prepare(
    source: str | Path,
    out: str | Path,
    tokenizer: str,
    val: float = 0.1,
    field: str | None = None,
) -> Header:
    """Turn text into a folder of token files that `Dataset.open` reads.

    The last part of the text is for validation: of plain text, from the first character that
    starts at or past the byte (1 - val) * size; of JSONL, the lines that start there. In a folder,
    and in JSONL, each document ends with `<|endoftext|>` (for char, which has none, a line feed).

    Args:
        source: a UTF-8 file; a folder of them, taken in the order of their paths, hidden ones left
            out; or "shakespeare" (a str), char-rnn's file, fetched once. Larger than memory is fine.
        out: the folder to make. One that holds this very text prepared in this way is left as it
            is; any other that is not empty is refused.
        tokenizer: char, bytes, gpt2, or bpe:N to learn N ids from the training text (64 MiB of it).
        val: the fraction for validation, 0 <= val < 1.
        field: the source is JSONL, with the text under this key.
    Returns:
        the header of the folder.
    Raises:
        InputError: for an argument or text that cannot work, or when `out` cannot be written; then
            nothing is left behind.
    """
    if isinstance(val, bool) or not isinstance(val, int | float) or not 0 <= val < 1:
        raise InputError(f"--val is {show(val)}: it must be a fraction, 0 or more and below 1")
    size = re.fullmatch(r"bpe:([0-9]{1,9})", tokenizer)
    if not size and tokenizer not in _KINDS[:-1]:
        raise unknown("tokenizer", tokenizer, _KINDS)
    if source == "shakespeare":
        source = cache_folder() / "data" / "shakespeare.txt"
        if not source.is_file():
            fetch(_SHAKESPEARE[0], source, _SHAKESPEARE[1])
    out = Path(out)
    text = _Source.find(Path(source), out, field, val, "\n" if tokenizer == "char" else "")
    settings = {"source": text.sha256(), "tokenizer": tokenizer, "val": val, "field": field}
    if os.path.lexists(out) and not (out.is_dir() and not os.listdir(out)):
        return _existing(out, settings)
    with _atomic_folder(out) as folder:
        encoding = _tokenizer(tokenizer, int(size[1]) if size else 0, text)
        save_tokenizer(encoding, folder)
        splits = _write(folder, encoding, text)
        header = Header(vocab_size=encoding.n_vocab, splits=splits, **settings)
        header.write(folder)
        text.check_unchanged()
    return header


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `tinygpt prepare` takes."""
    add = parser.add_argument
    add("source", metavar="FILE|FOLDER", help="UTF-8 text, or shakespeare to fetch char-rnn's file")
    kinds = "char, bytes, gpt2, or bpe:N to learn N ids from the text (default: char)"
    add("--tokenizer", metavar="T", default="char", help=kinds)
    add("--val", metavar="X", type=float, default=0.1, help="for validation (default: 0.1)")
    add("--field", metavar="KEY", help="the source is JSONL, with the text under this key")
    add("-o", "--out", metavar="DIR", help="the folder to make (default: named after the source)")


def run(args: argparse.Namespace) -> int:
    """`tinygpt prepare`: make the folder and say what is in it."""
    name = f"{Path(args.source).stem}-{args.tokenizer.replace(':', '')}"
    out = Path(args.out or name)
    header = prepare(args.source, out, args.tokenizer, args.val, args.field)
    counts = " and ".join(f"{header.splits[name].tokens:,} {name}" for name in SPLITS)
    print(f"tinygpt: {out}: {counts} tokens of {header.vocab_size:,} ids", file=sys.stderr)
    return 0


def _existing(out: Path, settings: dict[str, Any]) -> Header:
    """The header of a folder that is there already, if it was made with these settings."""
    if not out.is_dir() or not (out / "header.json").is_file():
        raise InputError(f"{out} is there and holds something else: pass another -o")
    header = Dataset.open(out).header
    for name, value in settings.items():
        if (had := getattr(header, name)) != value:
            raise InputError(
                f"{out} was prepared with {name} {show(had)}, not {show(value)}: pass another "
                "-o, or remove it first"
            )
    return header


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that has its name only once the block is through, and is gone if that fails."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, target)  # which takes the place of an empty folder, of no other
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}; pass another -o") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class _Source:
    """The files to read, where their validation part starts, and how documents end."""

    files: dict[Path, os.stat_result]
    field: str | None
    documents: bool  # whether there is more than one text, so that each needs an end
    end: str  # text that ends a document, where no token does
    total: int  # bytes
    cut: int  # the first byte of the validation part, counted through all files

    @classmethod
    def find(cls, source: Path, out: Path, field: str | None, val: float, end: str) -> _Source:
        documents = field is not None or source.is_dir()
        try:
            paths = _files_in(source, out) if source.is_dir() else [source]
            files = {path: path.stat() for path in paths if path.is_file()}
        except OSError as error:
            raise InputError(f"cannot read {source}: {reason(error)}") from error
        if not source.is_dir() and not files:
            raise InputError(f"no file or folder {str(source)!r}: give one with UTF-8 text")
        if field is None and (lines := [path for path in files if path.suffix == ".jsonl"]):
            raise InputError(f"{lines[0]} is JSONL: name the key that holds the text with --field")
        total = sum(stat.st_size for stat in files.values())
        if total == 0:
            raise InputError(f"{source} is empty: give some text")
        return cls(files, field, documents, end, total, int(total * (1 - val)))

    def sha256(self) -> str:
        """What was read: the files' bytes, lengths, and whether they are one text or several."""
        digest = hashlib.sha256(b"documents" if self.documents else b"text")
        for path, stat in self.files.items():
            digest.update(stat.st_size.to_bytes(8, "little"))
            with _reading(path) as file:
                while data := file.read(_PIECE_BYTES):
                    digest.update(data)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        for path, then in self.files.items():
            with _reading(path) as file:
                now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                raise InputError(f"{path} changed while it was read: prepare again")

    def pieces(self, title: str) -> Iterator[_Piece]:
        """Yield all of the text, the training part first."""
        from tinygrad.helpers import tqdm

        start = 0
        with tqdm(total=self.total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
            for path, stat in self.files.items():
                if self.field is not None:
                    for at, text in _json_lines(path, self.field, bar.update):
                        yield SPLITS[start + at >= self.cut], text + self.end, True
                else:
                    middle = _character_start(path, min(max(self.cut - start, 0), stat.st_size))
                    parts = (0, middle), (middle, stat.st_size)
                    for split, (first, last) in zip(SPLITS, parts, strict=True):
                        for text in _recut(_decoded(path, first, last, bar.update)):
                            yield split, text, False
                        if self.documents and first < last:
                            yield split, self.end, True
                start += stat.st_size


def _files_in(source: Path, out: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    found, made = [], os.path.realpath(out)
    for folder, folders, names in os.walk(source, onerror=fail):
        folders[:] = [
            name
            for name in folders
            if name[0] != "." and os.path.realpath(os.path.join(folder, name)) != made
        ]
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def _character_start(path: Path, at: int) -> int:
    """The first position from `at` on that is not inside a UTF-8 character."""
    with _reading(path) as file:
        file.seek(at)
        for byte in file.read(3):
            if byte & 0xC0 != 0x80:
                break
            at += 1
    return at


def _decoded(path: Path, at: int, end: int, count: Callable[[int], None]) -> Iterator[str]:
    """The text between two positions in a file, in pieces that end anywhere."""
    rest = b""
    with _reading(path) as file:
        file.seek(at)
        while at < end and (data := file.read(min(_PIECE_BYTES, end - at))):
            try:
                data, at = rest + data, at + len(data)
                text, used = codecs.utf_8_decode(data, "strict", at == end)
            except UnicodeDecodeError as error:
                place = at - len(data) + error.start
                raise InputError(
                    f"{path} is not UTF-8 text: byte {data[error.start]:#04x} at position {place}; "
                    "convert it, or leave it out"
                ) from error
            count(len(data) - len(rest))
            rest = data[used:]
            yield text


def _recut(texts: Iterable[str]) -> Iterator[str]:
    """The same text, cut only where GPT-2's pattern always cuts."""
    held = ""
    for text in texts:
        held += text
        if cut := _CUT.match(held):
            yield cut[0]
            held = held[cut.end() :]
    if held:
        yield held


def _json_lines(path: Path, field: str, count: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Each line's position and the text under `field`; lines without any are left out."""
    at = 0
    with _reading(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES), b""), 1):
            try:
                text = _text_in(line, field) if line.strip() else ""
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {reason(error)}") from error
            if text:
                yield at, text
            at += len(line)
            count(len(line))


def _text_in(line: bytes, field: str) -> str:
    if len(line) == _LINE_BYTES:
        raise ValueError(f"it has {_LINE_BYTES >> 20} MiB or more, too much for one document")
    content = parse_json(line)
    if not isinstance(text := content.get(field), str):
        raise ValueError(f"--field {field} must name a text, but the line holds {show(content)}")
    text.encode()  # JSON can spell half of a surrogate pair
    return text


def _tokenizer(kind: str, size: int, text: _Source) -> Encoding:
    if kind == "char":
        seen = np.zeros(0x110000, bool)
        for _, piece, _ in text.pieces("alphabet"):
            seen[_codes(piece)] = True
        return char_tokenizer(map(chr, np.flatnonzero(seen)))
    if size:
        learnt = (piece for split, piece, _ in text.pieces("words") if split == "train")
        every = -(-text.cut // _LEARN_BYTES) or 1
        return bpe_tokenizer(train_bpe(islice(learnt, 0, None, every), size))
    return load_tokenizer(kind)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _write(folder: Path, tokenizer: Encoding, text: _Source) -> dict[str, Split]:
    """Write both token files."""
    counts = {split: np.zeros(3, np.int64) for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    with ExitStack() as stack:
        files = {s: stack.enter_context(open(folder / f"{s}.bin", "wb")) for s in SPLITS}
        parts = _grouped(text.pieces("tokens"))
        for split, ids, counted in _on_all_cores(_converter(tokenizer), parts):
            files[split].write(ids)
            digests[split].update(ids)
            counts[split] += len(ids), *counted
        for split, file in files.items():
            if not file.tell() and not (split == "val" and text.cut == text.total):
                raise InputError(f"no text is left for {split}: give more text or another --val")
            file.flush()
            os.fsync(file.fileno())
    return {s: Split(*map(int, counts[s]), digests[s].hexdigest()) for s in SPLITS}


def _grouped(pieces: Iterable[_Piece]) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Pieces of one split together until they are worth a thread's while."""
    of, group, size = SPLITS[0], [], 0
    for split, text, ends in pieces:
        if group and (split != of or size >= _PIECE_BYTES):
            yield of, group
            group, size = [], 0
        group.append((text, ends))
        of, size = split, size + len(text)
    if group:
        yield of, group


def _converter(tokenizer: Encoding) -> Callable[..., tuple[str, np.ndarray, tuple[int, int]]]:
    """What turns a group of pieces into (split, ids, (characters, bytes))."""
    dtype, end = ids_dtype(tokenizer.n_vocab), end_token(tokenizer)
    last = [] if end is None else [np.array([end], dtype)]
    if tokenizer.name == "char":
        table = np.zeros(0x110000, dtype)
        for character, number in tokenizer._mergeable_ranks.items():
            table[ord(character.decode())] = number

    def convert(text: str) -> np.ndarray:
        if tokenizer.name == "char":
            return table[_codes(text)]
        if tokenizer.name == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        if _SPACES.search(text[::1250]):
            return np.array(encode(tokenizer, text))
        # Unlike encode, this holds Python's lock hardly ever, so that threads do run at once.
        return tokenizer.encode_to_numpy(text, disallowed_special=())

    def convert_group(group: tuple[str, list[tuple[str, bool]]]):
        split, pieces = group
        arrays = []
        for text, ends in pieces:
            arrays += [convert(text).astype(dtype)] if text else []
            arrays += last if ends else []
        characters = sum(len(text) for text, _ in pieces)
        size = sum(len(text.encode()) for text, _ in pieces)
        return split, np.concatenate(arrays), (characters, size)

    return convert_group


def _on_all_cores(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The function of each item, in order; only a few items are in memory at a time."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores, waiting = len(usable(0)), deque()
    with ThreadPoolExecutor(cores) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > cores + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
