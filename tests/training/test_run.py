from __future__ import annotations

import argparse
import errno
import io
import json
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from conftest import NARROW, weights_of
from prepared import TEXT, prepared
from tinygrad import Tensor, dtypes

from tinygpt import GPT, GPTConfig, InputError, load_tokenizer
from tinygpt.checkpoints.quantization import convert, dtype_of
from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.commands import train
from tinygpt.data.dataset import Dataset
from tinygpt.tokenizer.encoding import char_tokenizer, encode, save_tokenizer
from tinygpt.training import run_files
from tinygpt.training.progress import Progress
from tinygpt.training.settings import RECIPES, TrainConfig, usual_text
from tinygpt.writer import Writer

ROOT = Path(__file__).parents[2]
TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 12,
    "warmup_steps": 3, "learning_rate": 0.01, "eval_every": 4, "eval_batches": 3,
    "sample_tokens": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return Dataset.open(prepared(tmp_path_factory.mktemp("data") / "data"))


def flags(settings: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def command(*argv) -> int:
    parser = argparse.ArgumentParser()
    train.add_flags(parser)
    return train.run(parser.parse_args([str(word) for word in argv]))


def log(run: Path) -> list[dict]:
    return [
        json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def timeless(entries: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in entries]


def same_files(a: Path, b: Path) -> None:
    one, other = (checkpoint_in(run, "last") for run in (a, b))
    for name in ("model.safetensors", "training.safetensors", "state.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that nothing interrupted, with dropout."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.start(folder, data, TINY | {"dropout": 0.2}).go() is None
    return folder


def test_a_run_learns_logs_and_saves(whole, data):
    entries = log(whole)
    steps = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "val_loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert [entry["step"] for entry in evaluations] == [0, 4, 8, 12]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.1
    best = min(evaluations[1:], key=lambda entry: entry["val_loss"])
    assert checkpoint_in(whole, "best").name == f"step-{best['step']:08d}"
    assert checkpoint_in(whole, "last").name == "step-00000012"
    rates = [entry["learning_rate"] for entry in steps]
    np.testing.assert_allclose(rates[:3], [0.0025, 0.005, 0.0075])
    assert rates[3] == 0.01
    tokenizer = load_tokenizer(whole / "last")
    assert tokenizer.n_vocab == data.header.vocab_size
    model = GPT.from_pretrained(whole / "last")
    assert model(Tensor([encode(tokenizer, "1 times")])).shape == (1, 7, tokenizer.n_vocab)


@pytest.mark.parametrize("stop_at", [3, 8])
def test_resuming_is_exact(stop_at, whole, data, tmp_path):
    run = train.start(tmp_path / "run", data, TINY | {"dropout": 0.2})
    step = run._step

    def until(*args):
        step(*args)
        if run.counters.step == stop_at:
            run.signal = signal.SIGTERM

    run._step = until
    assert run.go() == signal.SIGTERM
    assert checkpoint_in(tmp_path / "run", "last").name == f"step-{stop_at:08d}"
    again = train.Run.resume(tmp_path / "run", data)
    assert again.counters.step == stop_at
    assert again.go() is None
    same_files(whole, tmp_path / "run")
    assert timeless(log(whole)) == timeless(log(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "muon", "order": "epoch"}, {"lora_rank": 2, "accumulate": 2, "batch_size": 2}],
)
def test_resuming_is_exact_with(settings, data, tmp_path):
    settings = TINY | {"steps": 6, "eval_every": 3} | settings
    assert train.start(tmp_path / "whole", data, settings).go() is None
    run = train.start(tmp_path / "run", data, settings)
    run.trainer.config = TrainConfig.of(settings, {"keep": 5})
    assert run.go() is None
    run_files.point(tmp_path / "run", "last", tmp_path / "run" / "step-00000003")
    assert train.Run.resume(tmp_path / "run", data).go() is None
    for name in ("model.safetensors", "training.safetensors"):
        a, b = (checkpoint_in(tmp_path / part, "last") / name for part in ("whole", "run"))
        assert a.read_bytes() == b.read_bytes()


PROGRAM = """
import argparse, sys
from tinygpt import InputError
from tinygpt.checkpoints.quantization import convert
from tinygpt.commands import train
parser = argparse.ArgumentParser()
train.add_flags(parser)
try:
    sys.exit(train.run(parser.parse_args()))
except InputError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


def process(*argv) -> subprocess.Popen:
    argv = [sys.executable, "-c", PROGRAM, *map(str, argv)]
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8")


def log_steps(run: Path) -> int:
    path = run / "log.jsonl"
    return path.read_text(encoding="utf-8").count('"loss"') if path.exists() else 0


def wait_for_steps(run: Path, step: int, child: subprocess.Popen, old_log: int | None = None):
    """Until the log, another file than the one of inode `old_log`, has come to a step."""
    path = run / "log.jsonl"
    while child.poll() is None:
        fresh = path.exists() and path.stat().st_ino != old_log
        if fresh and path.read_text(encoding="utf-8").count('"loss"') >= step:
            return
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_the_weights_are_the_same(data, tmp_path):
    # a checkpoint every second step: many of the moments lie in the writing of one
    settings = TINY | {"steps": 200, "eval_every": 2, "batch_size": 2, "sample_tokens": 0}
    assert train.start(tmp_path / "whole", data, settings).go() is None
    run, moments, old_log, step = tmp_path / "run", random.Random(0), None, 0
    child = process(data.folder, "-o", run, *flags(settings))
    for _ in range(20):
        wait_for_steps(run, step + moments.randint(3, 9), child, old_log)
        time.sleep(moments.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        step = int(checkpoint_in(run, "last").name.removeprefix("step-"))
        old_log = (run / "log.jsonl").stat().st_ino
        child = process(data.folder, "-o", run, "--resume")
    _, words = child.communicate()
    assert child.returncode == 0, words
    same_files(tmp_path / "whole", run)
    assert timeless(log(tmp_path / "whole")) == timeless(log(run))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends(number, data, tmp_path):
    child = process(
        data.folder, "-o", tmp_path / "run", *flags(TINY | {"steps": 10**6, "eval_every": 10**6})
    )
    wait_for_steps(tmp_path / "run", 3, child)
    child.send_signal(number)
    if number != signal.SIGINT:  # systems and shells may tell a program twice
        child.send_signal(number)
    _, words = child.communicate()
    assert child.returncode == 128 + number, words
    step = log(tmp_path / "run")[-1]["step"]
    assert f"stopped at step {step}" in words
    assert checkpoint_in(tmp_path / "run", "last").name == f"step-{step:08d}"


def asked_at(run: train.Run, place: str, count: int) -> list[int]:
    """Let a signal come in the middle of the call of this number; the calls begun."""
    owner, _, name = place.rpartition(".")
    holder = attrgetter(owner)(run) if owner else run
    usual, calls = getattr(holder, name), []

    def watched(*args, **options):
        calls.append(len(calls))
        if len(calls) == count:
            run.signal = signal.SIGHUP
        return usual(*args, **options)

    setattr(holder, name, watched)
    return calls


# What is called in the course of a step or an evaluation, at a call of its middle, and the step
# that is saved then.
MOMENTS = [
    ("trainer._part", 10, 3),  # the first of the fourth step's batches
    ("trainer._part", 11, 3),
    ("trainer._part", 12, 4),  # its last: it is made, and the evaluation is not begun
    ("validation.scorer.losses", 8, 8),  # the second batch of the evaluation of step 8
    ("validation.scorer.losses", 1, 0),
    ("trainer._end", 12, 12),  # the last step, whose evaluation is still to come
]


@pytest.mark.parametrize(("place", "count", "saved"), MOMENTS)
def test_a_signal_amid_a_step_or_an_evaluation_keeps_the_last_whole_step(
    place, count, saved, data, tmp_path
):
    settings = TINY | {"accumulate": 3, "batch_size": 2, "dropout": 0.2, "sample_tokens": 2}
    run = train.start(tmp_path / "run", data, settings)
    calls = asked_at(run, place, count)
    assert run.go() == signal.SIGHUP
    assert len(calls) == count  # nothing more was begun
    assert run.counters.step == saved
    if saved:
        assert checkpoint_in(tmp_path / "run", "last").name == f"step-{saved:08d}"
        assert train.Run.resume(tmp_path / "run", data).go() is None
    else:
        assert checkpoint_in(tmp_path / "run", "last") is None
        assert train.start(tmp_path / "run", data, settings).go() is None
    assert train.start(tmp_path / "whole", data, settings).go() is None
    same_files(tmp_path / "whole", tmp_path / "run")
    assert timeless(log(tmp_path / "whole")) == timeless(log(tmp_path / "run"))
    whole, other = (checkpoint_in(tmp_path / name, "best").name for name in ("whole", "run"))
    assert whole == other


def test_a_signal_ends_a_sample_that_would_never_end(data, tmp_path):
    run = train.start(tmp_path / "run", data, TINY | {"sample_tokens": 10**8})
    usual = run.generator.generate

    def generate(*args, **options):
        for i, token in enumerate(usual(*args, **options)):
            run.signal = signal.SIGTERM if i == 3 else None
            yield token

    run.generator.generate = generate
    assert run.go() == signal.SIGTERM


@pytest.mark.slow
def test_a_step_of_endless_batches_is_ended_by_a_signal(data, tmp_path):
    """Its batches are made one by one, and none of them is waited for."""
    child = process(data.folder, "-o", tmp_path / "run", *flags(TINY | {"accumulate": 10**9}))
    while child.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.01)
    time.sleep(1)
    child.send_signal(signal.SIGTERM)
    _, words = child.communicate()
    assert child.returncode == 128 + signal.SIGTERM, words
    assert "stopped at step 0, nothing to save" in words
    assert "Traceback" not in words


@pytest.mark.parametrize("room", [0, 70, 1500])
def test_a_log_that_cannot_be_written_further_loses_no_step(room, data, tmp_path, monkeypatch):
    """A full disk takes a part of a line, and a checkpoint may yet have a place on another."""
    run = train.start(tmp_path / "run", data, TINY)
    left = room

    class Full(io.FileIO):
        def write(self, line):
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = super().write(line[:left])
            left -= written
            return written

    monkeypatch.setattr("tinygpt.training.run.FileIO", Full)
    with pytest.raises(InputError) as caught:
        run.go()
    monkeypatch.undo()
    step, path = run.counters.step, tmp_path / "run" / "log.jsonl"
    assert (step > 3) == (room == 1500)
    saved = f"; step {step} is saved, from which --resume goes on" if step else ""
    assert str(caught.value) == f"cannot write {path}: no space left on device{saved}"
    if step:
        assert train.Run.resume(tmp_path / "run", data).go() is None
        assert log(tmp_path / "run")[-1]["step"] == 12


def test_a_batch_that_no_machine_holds_is_refused_before_it_is_made(data, tmp_path):
    with pytest.raises(InputError, match=r"a batch of 2147483647 needs [\d,]+ MiB of memory"):
        command(data.folder, "-o", tmp_path / "run", *flags(TINY | {"batch_size": 2**31 - 1}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("minutes", [1e308, 1e9, 527041, 0, -1, math.nan])
def test_minutes_beyond_a_year_are_refused(minutes, data, tmp_path):
    with pytest.raises(InputError, match=r"^--minutes is .*: .*above 0 and at most 527040"):
        command(data.folder, "-o", tmp_path / "run", *flags(TINY), f"--minutes={minutes}")


def test_a_year_of_steps_is_as_many_as_there_can_be(data, tmp_path):
    run = train.start(tmp_path / "run", data, TINY, minutes=527040)
    run.times = [1e-6] * 20
    run._fit(0.0)
    assert run.config.steps == 2**31 - 1


def test_a_terminal_that_is_closed_saves_and_ends(data, tmp_path):
    """What is written to it from then on fails, and the program is told by SIGHUP."""
    master, slave = os.openpty()
    settings = TINY | {"steps": 10**6, "eval_every": 10**6}
    argv = [sys.executable, "-c", PROGRAM, data.folder, "-o", tmp_path / "run", *flags(settings)]
    take = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(2, termios.TIOCSCTTY, 0); "
    take += "os.execv(sys.executable, sys.argv[1:])"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    child = subprocess.Popen([sys.executable, "-c", take, *map(str, argv)], cwd=ROOT, **streams)
    os.close(slave)
    while child.poll() is None and log_steps(tmp_path / "run") < 3:
        if select.select([master], [], [], 0.01)[0]:
            os.read(master, 65536)
    os.close(master)
    assert child.wait() == 128 + signal.SIGHUP
    step = log(tmp_path / "run")[-1]["step"]
    assert checkpoint_in(tmp_path / "run", "last").name == f"step-{step:08d}"


def test_a_closed_terminal_does_not_end_what_was_told_to_ignore_it(data, tmp_path):
    settings = flags(TINY | {"steps": 200, "eval_every": 200})
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PROGRAM
    argv = [sys.executable, "-c", ignoring, data.folder, "-o", tmp_path / "run", *settings]
    child = subprocess.Popen(list(map(str, argv)), cwd=ROOT, stderr=subprocess.PIPE)
    wait_for_steps(tmp_path / "run", 3, child)
    child.send_signal(signal.SIGHUP)
    _, words = child.communicate()
    assert child.returncode == 0, words


def cut(path: Path) -> None:
    os.truncate(path, 10)


def other_numbers(path: Path) -> None:
    np.full(path.stat().st_size // 2, 65535, np.uint16).tofile(path)


def zeros(path: Path) -> None:
    np.zeros(path.stat().st_size // 2, np.uint16).tofile(path)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", [cut, other_numbers, zeros], ids=lambda each: each.__name__)
def test_tokens_that_are_damaged_in_a_run_end_it_in_a_line_with_the_last_step_saved(
    damage, split, whole, tmp_path
):
    """It is a process of its own: a file that is cut while it is mapped ends one by SIGBUS."""
    folder = prepared(tmp_path / "data")
    settings = flags(TINY | {"steps": 10**6, "eval_every": 20, "keep": 10**6})
    child = process(folder, "-o", tmp_path / "run", *settings)
    wait_for_steps(tmp_path / "run", 3, child)
    damage(folder / f"{split}.bin")
    _, words = child.communicate()
    step = log(tmp_path / "run")[-1]["step"]
    assert child.returncode == 2, words
    (error,) = [line for line in words.split("\n") if line.startswith("error")]
    assert re.search(rf"{split}\.bin: .*prepare the text again; step {step} is saved", error)
    assert checkpoint_in(tmp_path / "run", "last").name == f"step-{step:08d}"
    with pytest.raises(InputError, match=rf"{split}\.bin: .*prepare the text again$"):
        command(folder, "-o", tmp_path / "run", "--resume")
    shutil.rmtree(folder)
    again = train.Run.resume(tmp_path / "run", Dataset.open(prepared(folder)), steps=step + 2)
    assert again.go() is None
    same = log(tmp_path / "run")
    assert [entry["step"] for entry in same if "loss" in entry] == list(range(1, step + 3))


def test_a_loss_that_stays_nan_stops_the_run_at_the_last_good_state(data, tmp_path):
    run = train.start(tmp_path / "run", data, TINY | {"steps": 50, "eval_every": 50})
    step, good = run.trainer.step, {}

    def poisoned(batches):
        if run.counters.step == 5:
            good.update(weights_of(run.trainer.model))
        if run.counters.step >= 5:  # the loss of a target that is no token is no number
            batches = [(tokens, np.full_like(targets, -1)) for tokens, targets in batches]
        return step(batches)

    run.trainer.step = poisoned
    with pytest.raises(InputError, match=r"not finite in 10 steps in a row, to step 15: .*last"):
        run.go()
    saved = weights_of(GPT.from_pretrained(tmp_path / "run" / "last"))
    for name, value in good.items():
        np.testing.assert_array_equal(saved[name], value)
    skipped = [entry for entry in log(tmp_path / "run") if entry.get("skipped")]
    assert len(skipped) == 10
    assert skipped[0]["loss"] is None


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(data, tmp_path, monkeypatch):
    run = train.start(tmp_path / "run", data, TINY)
    usual, saves = os.fsync, []

    def full(descriptor):
        if len(saves) > 15:
            raise OSError(28, "No space left on device")
        saves.append(descriptor)
        usual(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"^cannot write .*no space left on device") as caught:
        run.go()
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert train.Run.resume(tmp_path / "run", data).counters.step == 4


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4}])
def test_fine_tuning_lowers_the_loss(lora, whole, data, tmp_path):
    settings = {"steps": 30, "learning_rate": 0.01, "eval_every": 30, "sample_tokens": 5}
    settings |= {"batch_size": 4, "block_size": 8, "eval_batches": 3, "warmup_steps": 0}
    run = train.start(tmp_path / "run", data, settings | lora, model=str(whole / "best"))
    assert run.go() is None
    first, last = (entry for entry in log(tmp_path / "run") if "val_loss" in entry)
    assert last["val_loss"] < first["val_loss"] - 0.05
    assert len(last["sample"]) == 5
    saved, base = (
        weights_of(GPT.from_pretrained(p)) for p in (run.folder / "last", whole / "best")
    )
    same = np.array_equal(saved["wte.weight"], base["wte.weight"])
    assert same == bool(lora)


@pytest.fixture(scope="module", params=["float32", *NARROW])
def base(request, data, tmp_path_factory) -> Path:
    """A model that is held in one of the dtypes, and its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}
    model = GPT(GPTConfig(vocab_size=data.header.vocab_size, **shape))
    convert(model, request.param).save_pretrained(folder)
    save_tokenizer(data.tokenizer(), folder)
    return folder


SHORT = {"steps": 4, "eval_every": 2, "sample_tokens": 0, "eval_batches": 1, "learning_rate": 0.01}


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}])
def test_a_model_held_in_any_dtype_is_trained_in_float32(lora, base, data, tmp_path):
    run = train.start(tmp_path / "run", data, SHORT | lora, model=str(base))
    assert all(weight.dtype == dtypes.float32 for weight in run.trainer.weights.values())
    assert run.go() is None
    assert run.counters.updates == 4
    first, last = (
        weights_of(GPT.from_pretrained(path, "float32")) for path in (base, tmp_path / "run")
    )
    name = "blocks.0.mlp.c_fc.weight"
    assert np.abs(last[name] - first[name]).max() > 0.001
    losses = [entry["val_loss"] for entry in log(tmp_path / "run") if "val_loss" in entry]
    assert losses[-1] < losses[0] - 0.001


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}])
def test_checkpoints_in_fewer_bits_are_gone_on_with_exactly(dtype, lora, data, tmp_path):
    settings = TINY | {"steps": 4, "eval_every": 2, "keep": 5} | lora
    for folder, kind in (("wide", "float32"), ("whole", dtype), ("run", dtype)):
        run = train.start(tmp_path / folder, data, settings | {"dtype": kind})
        assert run.go() is None
    run_files.point(tmp_path / "run", "last", tmp_path / "run" / "step-00000002")
    again = train.Run.resume(tmp_path / "run", data)
    assert again.go() is None
    same_files(tmp_path / "whole", tmp_path / "run")
    assert timeless(log(tmp_path / "whole")) == timeless(log(tmp_path / "run"))
    wide = weights_of(GPT.from_pretrained(tmp_path / "wide" / "last"))
    narrow = GPT.from_pretrained(tmp_path / "run" / "last")
    assert dtype_of(narrow.wte) == dtype
    kept = weights_of(convert(GPT.from_pretrained(tmp_path / "wide" / "last"), dtype))
    for name, value in weights_of(narrow).items():
        np.testing.assert_array_equal(value, kept[name])  # rounded once, not at every save
    for name, value in weights_of(again.trainer.model).items():
        np.testing.assert_array_equal(value, wide[name])


def test_steps_are_kept_between_evaluations_and_gone_on_with_exactly(data, tmp_path):
    settings = TINY | {"steps": 7, "eval_every": 4, "keep": 1, "keep_every": 3}
    for name in ("whole", "run"):
        assert train.start(tmp_path / name, data, settings).go() is None
        steps = {path.name for path in (tmp_path / name).glob("step-*")}
        assert steps >= {f"step-{step:08}" for step in (3, 6, 7)}
    run_files.point(tmp_path / "run", "last", tmp_path / "run" / "step-00000003")
    assert train.Run.resume(tmp_path / "run", data).go() is None
    same_files(tmp_path / "whole", tmp_path / "run")
    assert timeless(log(tmp_path / "whole")) == timeless(log(tmp_path / "run"))


def test_a_finished_run_is_given_more_steps(data, tmp_path):
    """At a constant rate it comes to what a run of so many steps from the start comes to."""
    settings = TINY | {"schedule": "constant", "dropout": 0.2, "steps": 6, "keep": 5}
    before = tmp_path / "run" / "step-00000006" / "model.safetensors"
    for folder, steps in (("whole", 12), ("run", 6)):
        run = train.start(tmp_path / folder, data, settings | {"steps": steps, "eval_every": 3})
        assert run.go() is None
    kept, entries = before.read_bytes(), log(tmp_path / "run")
    argv = [data.folder, "-o", tmp_path / "run", "--resume"]
    assert command(*argv, "--steps", "12") == 0
    same_files(tmp_path / "whole", tmp_path / "run")
    assert timeless(log(tmp_path / "whole")) == timeless(log(tmp_path / "run"))
    assert before.read_bytes() == kept
    assert log(tmp_path / "run")[: len(entries)] == entries


def test_more_steps_move_the_schedule_as_if_there_had_always_been_so_many(data, tmp_path):
    for folder, steps in (("long", 12), ("run", 6)):
        run = train.start(tmp_path / folder, data, TINY | {"steps": steps})
        assert run.go() is None
    assert train.Run.resume(tmp_path / "run", data, steps=12).go() is None
    long, more = (
        {entry["step"]: entry["learning_rate"] for entry in log(tmp_path / name) if "loss" in entry}
        for name in ("long", "run")
    )
    assert [more[step] for step in range(7, 13)] == [long[step] for step in range(7, 13)]
    assert more[6] < more[7]  # the short run's rate had come to its end


def test_a_finished_run_is_given_more_minutes(data, tmp_path, capsys):
    settings = TINY | {"steps": 3, "eval_every": 1000}
    assert train.start(tmp_path / "run", data, settings).go() is None
    argv = [data.folder, "-o", tmp_path / "run", "--resume"]
    assert command(*argv) == 0
    assert "its 3 steps are made: --steps N or --minutes M gives it more" in capsys.readouterr().err
    assert command(*argv, "--minutes", "0.02") == 0
    run = train.Run.resume(tmp_path / "run", data)
    assert run.finished
    assert run.counters.step > 3 + 20
    assert [e["step"] for e in log(tmp_path / "run") if "loss" in e] == [
        *range(1, run.counters.step + 1)
    ]


def test_minutes_fit_the_schedule(data, tmp_path):
    run = train.start(tmp_path / "run", data, TINY | {"eval_every": 1000}, minutes=0.04)
    assert run.go() is None
    assert run.minutes is None
    assert run.counters.step == run.config.steps > 20
    assert run.config.steps != 12
    state = json.loads(
        (checkpoint_in(tmp_path / "run", "last") / "state.json").read_text(encoding="utf-8")
    )
    assert state["config"]["steps"] == run.config.steps


def test_transformers_finds_the_same_validation_loss(whole, data):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint_in(whole, "last")).eval()
    count = len(data.val) // 8 * 8
    ids = torch.tensor(data.val[: count + 1].astype(np.int64))
    places = range(0, count if len(data.val) > count else count - 8, 8)
    chosen = np.linspace(0, len(places) - 1, min(len(places), 12)).astype(int)
    rows = torch.stack([ids[8 * i : 8 * i + 9] for i in chosen])
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert log(whole)[-1]["val_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_the_cpu_recipe_is_nanogpts_at_twice_the_rate():
    config = TrainConfig.of(RECIPES["shakespeare-cpu"])
    expected = {
        "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12,
        "steps": 2000, "dropout": 0.0, "learning_rate": 2e-3, "min_learning_rate": 2e-4,
        "warmup_steps": 100, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "grad_clip": 1.0,
        "bias": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    for recipe in RECIPES.values():
        TrainConfig.of(recipe)


@pytest.mark.slow
def test_settings_come_from_recipe_then_flags(data, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in TINY.items()), encoding="utf-8")
    run = tmp_path / "run"
    argv = [data.folder, "-o", run, "--recipe", "shakespeare-gpu", "--config", file, "--steps", 2]
    assert command(*argv, "--dropout", "0.5", "--bias") == 0
    config = TrainConfig.of(
        json.loads((checkpoint_in(run, "last") / "state.json").read_text(encoding="utf-8"))[
            "config"
        ]
    )
    flags = {"steps": 2, "dropout": 0.5, "bias": True}
    assert config == TrainConfig.of(RECIPES["shakespeare-gpu"], TINY, flags)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stepz": 1}, r"unknown setting 'stepz': did you mean 'steps'\?"),
        ({"steps": 1.5}, "steps is 1.5: it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number, 1 or more"),
        ({"beta2": 1.0}, "beta2 is 1.0: it must be a number, 0 or more and below 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd': allowed are adamw, muon"),
        ({"n_head": 3}, "n_embd 128 is not divisible by n_head 3"),
        ({"dropout": 1}, "dropout is 1: it must be"),
        ({"steps": float("inf")}, "steps is inf: it must be a whole number"),
        ({"steps": 10**400}, r"steps is 1000.*: it must be a whole number, 0 or more and below"),
        ({"learning_rate": 10**400}, "learning_rate is 1000.*: it must be a finite number"),
        ({"learning_rate": -(10**400)}, "learning_rate is -1000.*: it must be a finite number"),
    ],
)
def test_settings_that_cannot_work_are_one_line(settings, words):
    with pytest.raises(InputError, match=words):
        TrainConfig.of(settings)


def test_bad_input_is_one_line(data, whole, tmp_path):
    def error(*argv) -> str:
        with pytest.raises(InputError) as caught:
            command(*argv)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    out = tmp_path / "out"
    assert "unknown recipe 'x'" in error(data.folder, "-o", out, "--recipe", "x")
    assert "no file is in folder" in error(tmp_path, "-o", out)
    (tmp_path / "file").write_text("", encoding="utf-8")
    blocked = tmp_path / "file" / "run"
    assert "cannot write" in error(data.folder, "-o", blocked)
    assert "--resume" in error(data.folder, "-o", whole)
    assert "no checkpoint" in error(data.folder, "-o", out, "--resume")
    assert "--seed cannot change" in error(data.folder, "-o", whole, "--resume", "--seed", "3")
    fewer = error(data.folder, "-o", whole, "--resume", "--steps", "12")
    assert fewer.startswith("--steps is 12, but ")
    assert "has made 12 steps already" in fewer
    both = error(data.folder, "-o", whole, "--resume", "--steps", "20", "--minutes", "1")
    assert "give one of them" in both
    assert "--minutes is 0.0" in error(data.folder, "-o", out, "--minutes", "0")
    (tmp_path / "bad.toml").write_text("steps = ", encoding="utf-8")
    assert "not TOML" in error(data.folder, "-o", out, "--config", tmp_path / "bad.toml")
    shape = error(data.folder, "-o", out, "--model", whole / "last", "--n-layer", "2")
    assert shape.startswith("--n-layer describes a new model, but --model brings its own shape")
    long = error(data.folder, "-o", out, "--model", whole / "last", "--block-size", "9")
    assert "--block-size is 9, but the window" in long
    long = error(data.folder, "-o", out, "--model", whole / "last", "--context", "9")
    assert "--context is 9, but the window" in long


@pytest.mark.parametrize("width", [200, 80, 40, 10])
def test_the_line_of_progress_fits_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    progress = Progress()
    progress.show(12_345, 600_000, 10.25, 10.5, 123_456.0, 36_061.0)
    line = capsys.readouterr().err
    facts = "12345/600000  loss 10.250  val 10.500  123,456 tokens/s  10:01:01 left"
    assert line[0] == "\r"
    assert len(line) == width
    assert line.strip("\r #-").startswith(facts[: width - 1].strip())
    progress.show(5, 20, 2.5, None, 1234.5, 61.0)
    line = capsys.readouterr().err.strip()
    if width >= 80:
        assert line == f"{'#' * 5}{'-' * 15} 5/20  loss 2.500  1,234 tokens/s  1:01 left"


def test_without_a_terminal_progress_is_one_line_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress()
    for step in range(1, 181):
        now[0] = float(step)
        progress.show(step, 180, 2.5, 2.25, 1234.5, 180.0 - step)
    progress.clear()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == ("tinygpt: step 60/180  loss 2.500  val 2.250  1,234 tokens/s  2:00 left")


def test_too_short_a_split_is_one_line(tmp_path):
    short = Dataset.open(prepared(tmp_path / "short", TEXT[:60]))
    with pytest.raises(
        InputError, match="validation split has 6 tokens, too few for a window of 8"
    ):
        train.start(tmp_path / "run", short, TINY)


def test_other_data_is_refused(whole, tmp_path):
    other = Dataset.open(prepared(tmp_path / "other", TEXT + TEXT[::-1]))
    with pytest.raises(InputError, match="other data"):
        train.Run.resume(whole, other)
    letters = char_tokenizer("abcdefghijklmnopqrstuvwxyz 0123456789.")
    strange = Dataset.open(prepared(tmp_path / "strange", TEXT, letters))
    with pytest.raises(InputError, match="vocabulary"):
        train.start(tmp_path / "run", strange, {}, model=str(whole / "last"))


def test_the_same_text_in_tokens_of_another_tokenizer_is_refused(whole, data, tmp_path):
    """To go on with other ids would undo what was learnt, and no loss would say why."""
    letters = char_tokenizer(TEXT + "#")  # "#" comes first, so that each id is another
    other = Dataset.open(prepared(tmp_path / "other", TEXT, letters))
    assert other.header.source == data.header.source
    with pytest.raises(InputError, match=r"vocabulary|other ids"):
        train.Run.resume(whole, other)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_a_log_with_odd_line_ends_in_a_sample_is_kept_whole(odd, tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        json.dumps({"step": step, "sample": f"a{odd}b"}, ensure_ascii=False) for step in range(3)
    ]
    log.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    run_files.cut_log(tmp_path, 1)
    kept = log.read_text(encoding="utf-8")
    assert [json.loads(line)["sample"] for line in kept.split("\n")[:-1]] == [f"a{odd}b"] * 2


@pytest.mark.parametrize(
    "text",
    [
        "steps = 1e400",
        f"steps = {'9' * 5000}",
        f"learning_rate = 1{'0' * 400}",
        f"steps = {'[' * 5000}",
        f"a{'.a' * 5000} = 1",
        "steps = 2024-01-01",
        "steps = nan",
        "\x00",
    ],
)
def test_settings_in_a_file_that_no_number_can_hold_are_one_line(text, data, tmp_path):
    """Infinite, of thousands of digits, deeper than Python's stack, of another type."""
    file = tmp_path / "settings.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        command(data.folder, "-o", tmp_path / "run", "--config", file)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_whole_number_stands_for_a_float(data, tmp_path):
    config = TrainConfig.of({"learning_rate": 1, "dropout": 0, "grad_clip": 1})
    assert type(config.learning_rate) is type(config.dropout) is float
    assert config == TrainConfig.of({"learning_rate": 1.0, "dropout": 0.0, "grad_clip": 1.0})
    model = GPT(GPTConfig(1, 1, 8, 8, 9, layer_norm_epsilon=0, initializer_range=1))
    assert type(model.config.layer_norm_epsilon) is float
    assert np.isfinite(model(Tensor([[1, 2]])).numpy()).all()


@pytest.mark.parametrize(
    ("recipe", "size", "expected"),
    [
        (None, 10**6, {"tokenizer": "bpe:1024"}),
        (None, 10**4, {"tokenizer": "char"}),
        ("shakespeare-cpu", 10**6, {"tokenizer": "char"}),
        ("tales", 10**4, {"tokenizer": "bpe:8192", "val": 0.01}),
    ],
)
def test_a_text_is_read_with_what_suits_its_length_or_the_recipe(recipe, size, expected):
    assert usual_text(recipe, size) == expected


@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_a_run_is_sampled_from_as_its_samples_were(temperature, data, tmp_path):
    settings = TINY | {"steps": 2, "sample_temperature": temperature}
    assert train.start(tmp_path / "run", data, settings).go() is None
    assert train.Run.resume(tmp_path / "run", data, steps=3).go() is None
    for path in (tmp_path / "run", tmp_path / "run" / "last"):
        assert Writer.open(str(path)).sampling == {"temperature": temperature}
