"""Batches against slices taken by hand; positions that survive; damaged folders."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tinygpt.data.dataset import SPLITS, Batches, Dataset, Header, tokens_folder
from tinygpt.data.prepare import prepare
from tinygpt.errors import CheckpointError, InputError
from tinygpt.tokenizer.encoding import char_tokenizer, named_tokenizer

TOKENS = np.arange(1000, 1103, dtype=np.uint16)  # each id is its place, plus 1000
ORDERS = ("random", "epoch")
GOOD = {"tokens": 378, "characters": 378, "bytes": 378, "sha256": ""}  # a split


def equal(one, other) -> bool:
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(np.array(ours), np.array(theirs)) for ours, theirs in pairs)


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_is_windows_of_the_text(order):
    for inputs, targets in islice(Batches(TOKENS, 4, 10, seed=1, order=order), 50):
        assert inputs.dtype == targets.dtype == np.int32
        assert inputs.shape == targets.shape == (4, 10)
        np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(10))
        np.testing.assert_array_equal(targets, inputs + 1)
        assert inputs.min() >= 1000
        assert targets.max() <= 1102


def test_random_windows_start_everywhere_alike():
    batches = Batches(TOKENS, 64, 10, seed=3)
    starts = Counter(int(i) - 1000 for inputs, _ in islice(batches, 300) for i in inputs[:, 0])
    assert set(starts) == set(range(93))  # the last one ends with the last token as a target
    expected = 64 * 300 / 93
    assert sum((starts[i] - expected) ** 2 / expected for i in range(93)) < 160  # 92 on average


def test_an_epoch_is_every_window_once_in_another_order_each_time():
    batches = Batches(TOKENS, 4, 10, seed=2, order="epoch")  # 10 windows: batches cross epochs
    starts = [int(i) - 1000 for inputs, _ in islice(batches, 25) for i in inputs[:, 0]]
    epochs = [starts[i : i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("before", [0, 1, 7])
def test_restored_is_uninterrupted(order, before):
    whole = list(islice(Batches(TOKENS, 4, 10, 5, order), 20))
    first = Batches(TOKENS, 4, 10, 5, order)
    assert equal(islice(first, before), whole[:before])
    state = json.loads(json.dumps(first.state()))
    second = Batches(TOKENS, 4, 10, seed=99, order=order)  # the seed, too, comes from the state
    next(second)
    second.restore(state)
    assert second.state() == state
    assert equal(islice(second, 20 - before), whole[before:])
    assert equal(islice(first, 20 - before), whole[before:])


@pytest.mark.parametrize("order", ORDERS)
def test_seeds_differ(order):
    one, other = (next(Batches(TOKENS, 4, 10, seed, order))[0] for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_the_next_batch_is_made_before_it_is_asked_for():
    class Watched(np.ndarray):
        made = threading.Semaphore(0)

        def __getitem__(self, places):
            self.made.release()
            return np.asarray(self)[places]

    tokens = TOKENS.view(Watched)
    batches = Batches(tokens, 1, 10, seed=1)  # each is one part of the tokens
    assert Watched.made.acquire(timeout=60)  # nobody has asked for the first one yet
    next(batches)
    assert Watched.made.acquire(timeout=60)  # nor for the second
    assert batches.state()["step"] == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 5}, "made with batch_size 5, this run has 4"),
        ({"block_size": None}, "block_size None, this run has 10"),
        ({"tokens": 7}, "tokens 7, this run has 103"),
        ({"order": "epoch"}, "order 'epoch', this run has random"),
        ({"step": -1}, "step -1"),
        ({"step": 1.5}, "step 1.5"),
        ({"seed": "x" * 9999}, "has seed 'xxx"),
    ],
)
def test_a_position_of_another_run_is_refused(change, match):
    batches = Batches(TOKENS, 4, 10, seed=1)
    with pytest.raises(InputError, match=match) as caught:
        batches.restore(batches.state() | change)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number from 1"),
        ({"block_size": True}, "block_size is True"),
        ({"seed": -1}, "seed is -1"),
        ({"order": "epochs"}, "unknown order of batches 'epochs': did you mean 'epoch'"),
        ({"block_size": 103}, "has 103 tokens, too few for a window of 103"),
        ({"tokens": TOKENS[:0]}, "has 0 tokens"),
    ],
)
def test_arguments_that_cannot_work(change, match):
    with pytest.raises(InputError, match=match) as caught:
        Batches(**{"tokens": TOKENS, "batch_size": 4, "block_size": 10, "seed": 1} | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
def test_the_fewest_tokens_that_will_do(order):
    inputs, targets = next(Batches(TOKENS[:11], 3, 10, 0, order))
    np.testing.assert_array_equal(inputs, [TOKENS[:10]] * 3)
    np.testing.assert_array_equal(targets, [TOKENS[1:11]] * 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("hello there, general\n" * 20, encoding="utf-8")
    prepare(folder / "text.txt", folder / "data", "char")
    return folder / "data"


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """To be damaged; without digests, which would tell, as in an older version."""
    ignored = shutil.ignore_patterns("SHA256SUMS")
    return Path(shutil.copytree(made, tmp_path / "data", ignore=ignored))


def test_open_gives_what_is_in_the_files(made):
    data = Dataset.open(made)
    expected = np.fromfile(made / "train.bin", "<u2")
    assert len(data.train) == len(expected) == 378
    for start, stop in ((0, 378), (0, 1), (5, 70), (377, 378), (300, 999), (7, 7)):
        np.testing.assert_array_equal(data.train[start:stop], expected[start:stop])
    assert data.train.highest == expected.max()
    assert data.tokenizer().decode(data.val[:].tolist()) == ("hello there, general\n" * 20)[-42:]


def test_every_bit_that_has_turned_is_seen(made, tmp_path):
    whole, draw = shutil.copytree(made, tmp_path / "data"), random.Random(0)
    names = {path.name for path in whole.iterdir()}
    assert names == {"header.json", "tinygpt_tokenizer.json", "train.bin", "val.bin", "SHA256SUMS"}
    for path in whole.iterdir():
        content = path.read_bytes()
        for place in draw.sample(range(len(content)), 40):
            turned = bytearray(content)
            turned[place] ^= 1 << draw.randrange(8)
            path.write_bytes(turned)
            with pytest.raises(CheckpointError, match=rf"^{tmp_path}.*prepare the text again"):
                Dataset.open(whole)
        path.write_bytes(content)
    assert Dataset.open(whole).header == Header.read(made)


def test_a_folder_is_known_by_any_of_its_files(folder, tmp_path):
    with pytest.raises(InputError, match=r"a run's folder: its tokens are in .*data"):
        tokens_folder(tmp_path)
    (folder / "header.json").unlink()
    assert tokens_folder(tmp_path) is None
    for left in ("train.bin", "val.bin"):
        assert tokens_folder(folder) == folder
        (folder / left).unlink()
    assert tokens_folder(folder) is None


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def cut(path: Path) -> None:
    os.truncate(path, 100)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def other_ids(path: Path) -> None:
    np.zeros(path.stat().st_size // 2, "<u2").tofile(path)


def unknown_ids(path: Path) -> None:
    np.full(path.stat().st_size // 2, 60000, "<u2").tofile(path)


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def through_a_map(path: Path) -> None:
    """As a writer does that does not always change the file's time: unknown ids, the time kept."""
    before = path.stat()
    np.memmap(path, "<u2", "r+")[:] = 60000
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGE = {
    longer: r"it has \d+ bytes, but \d+ tokens of uint16 have \d+",
    cut: "it has 100 bytes, but",
    emptied: "it has 0 bytes, but",
    other_ids: "its SHA-256 is not that of the tokens that were prepared",
    unknown_ids: r"it has the id 60000, the vocabulary \d+ ids",
    one_bit: "its SHA-256|it has the id",
    through_a_map: "it has the id 60000",
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda each: each.__name__)
def test_a_file_that_is_not_what_was_prepared_is_refused_before_and_while_it_is_read(
    damage, split, folder, tmp_path
):
    if split == "val":  # as long as the other
        shutil.rmtree(folder)
        (tmp_path / "text.txt").write_text("hello there, general\n" * 20, encoding="utf-8")
        prepare(tmp_path / "text.txt", folder, "char", val=0.5)
    path = folder / f"{split}.bin"
    os.utime(path, (1, 1))  # clocks of files have ticks, in which two writes are as one
    data = Dataset.open(folder)
    before = getattr(data, split)[:]
    damage(path)
    words = rf"{split}\.bin: (?:{DAMAGE[damage]}).*: remove \S+ and prepare the text again$"
    for read in (
        lambda: Dataset.open(folder),
        lambda: getattr(data, split)[0:5],  # whichever part is read
        lambda: getattr(data, split)[len(before) - 1 :],
        lambda: next(Batches(getattr(data, split), 2, 10, seed=1)),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)
    before.tofile(path)  # it is as it was: the time of the file alone is no reason
    np.testing.assert_array_equal(getattr(data, split)[:], before)


def test_ids_beyond_the_vocabulary_are_refused_whatever_the_header_says_of_the_file(folder):
    ids = np.full(378, 60000, "<u2")
    ids.tofile(folder / "train.bin")
    header = Header.read(folder)
    split = replace(header.splits["train"], sha256=hashlib.sha256(ids).hexdigest())
    replace(header, splits=header.splits | {"train": split}).write(folder)
    with pytest.raises(CheckpointError, match=r"train\.bin: it has the id 60000, the vocabulary"):
        Dataset.open(folder)


def test_a_file_that_is_none_is_named(folder):
    (folder / "train.bin").unlink()
    with pytest.raises(CheckpointError, match=r"train\.bin: no such file"):
        Dataset.open(folder)
    (folder / "train.bin").mkdir()
    with pytest.raises(CheckpointError, match=r"train\.bin: is a directory"):
        Dataset.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "tinygpt data 2"},
        {"dtype": "float32"},
        {"dtype": "uint32"},
        {"vocab_size": 0},
        {"vocab_size": "65"},
        {"splits": {}},
        {"splits": {"train": {}, "val": {}}},
        {"splits": None},
        {"source": 1},
        {"keep_crlf": 1},
        {"special_tokens": None},
        {"special_tokens_found": False},
        *({"splits": {"train": GOOD, "val": GOOD | {name: -1}}} for name in list(GOOD)[:3]),
    ],
)
def test_a_header_that_is_none(folder, change):
    path = folder / "header.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match=r"header\.json") as caught:
        Dataset.open(folder)
    assert "\n" not in str(caught.value)


def test_a_header_survives_writing(made, tmp_path):
    header = Header.read(made)
    header.write(tmp_path)
    assert Header.read(tmp_path) == header
    path = tmp_path / "header.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    new = {"special_tokens": False, "keep_crlf": True, "special_tokens_found": 0}
    old = {name: value for name, value in content.items() if name not in new}  # from before these
    path.write_text(json.dumps(old), encoding="utf-8")
    assert Header.read(tmp_path) == replace(header, **new)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"header\.json: no such file"):
        Dataset.open(tmp_path / "none")


def test_a_model_of_another_vocabulary_is_refused(made):
    data = Dataset.open(made)
    size = data.header.vocab_size
    data.check(size, data.tokenizer())
    data.check(size + 40)  # a padded one
    with pytest.raises(InputError, match=f"a vocabulary of {size}, but the model has {size - 1}"):
        data.check(size - 1)
    pad = replace(data.header, vocab_size=size + 1)  # a token that never occurs
    replace(data, header=pad).check(size)
    other = char_tokenizer("ABCDEFGHIJKLM")
    with pytest.raises(InputError, match="the model's tokenizer 'char' gives other ids"):
        data.check(size, other)
    with pytest.raises(InputError, match="the model's tokenizer 'bytes' gives other ids"):
        data.check(257, named_tokenizer("bytes"))


def test_a_tokenizer_that_is_not_the_headers_is_refused(folder):
    header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
    (folder / "header.json").write_text(json.dumps(header | {"vocab_size": 66}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"its tokenizer has \d+ ids, header.json says 66"):
        Dataset.open(folder).tokenizer()
