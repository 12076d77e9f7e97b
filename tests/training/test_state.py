"""What a run's `state.json` and log may say: a value to which no run can come is one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from prepared import state
from program import is_refused

from tinygpt import InputError
from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.commands.plot import read_log
from tinygpt.data.dataset import Dataset
from tinygpt.errors import CheckpointError
from tinygpt.training import run_files, validation
from tinygpt.training.run import Run
from tinygpt.training.settings import TrainConfig
from tinygpt.training.state import State
from tinygpt.training.step import Counters

LAST = "step-00000004"
NAN, INF, DEEP = math.nan, math.inf, "[" * 20_000 + "]" * 20_000


class Raw(str):
    """JSON as it stands."""


# A path into the state, and what stands there instead; None of a path takes the key away.
GONE = object()
WRONG = [
    *[
        ((key,), GONE)
        for key in ("step", "counters", "best", "data", "source", "minutes", "config")
    ],
    (("extra",), 1),
    (("format",), "tinygpt training 3"),
    (("format",), 2),
    (("format",), ["tinygpt training 2"]),
    (("format",), GONE),
    *[(("step",), value) for value in (-4, 5, 2**63, 10**400, True, 4.0, "4", None, NAN, [4])],
    *[(("step",), value) for value in ("../../etc", "../step-00000004", "4\x1b[2J", {"a": 1})],
    *[(("counters",), value) for value in (None, [], "x", 3, {})],
    *[(("counters", key), GONE) for key in ("step", "loss_scale")],
    (("counters", "stepz"), 4),
    *[(("counters", "step"), value) for value in (-4, 5, 2**31, 10**400, True, 4.0, "../4", NAN)],
    *[(("counters", "updates"), value) for value in (-1, 5, 2**63, False, None, 1e300)],
    *[(("counters", "skipped"), value) for value in (-1, 1, 2**63, "0")],
    *[(("counters", "skipped_in_a_row"), value) for value in (-1, 9, 2**64, False)],
    *[(("counters", "updates_at_scale"), value) for value in (-1, 9, 2**64, 0.5)],
    *[(("counters", "loss_scale"), value) for value in (0, -1.0, NAN, INF, 1e300, "1", True, None)],
    *[(("best",), value) for value in ([], "step-00000004", 4, True, {}, {"step": 4})],
    *[(("best", "step"), value) for value in (0, -4, 5, 2**63, True, 4.0, "../../x", None)],
    *[(("best", "val_loss"), value) for value in (NAN, INF, -INF, -1.0, True, "1", None, 10**400)],
    (("best", "more"), 1),
    *[(("data",), value) for value in (None, [], "x", {})],
    *[(("data", "step"), value) for value in (-4, 5, 2**63, True, 4.0, "../4", NAN)],
    *[(("data", "seed"), value) for value in (-1, 1338, 2**64, 1337.0, None)],
    *[(("data", "order"), value) for value in ("epoch", "../x", 3, None)],
    *[(("data", "tokens"), value) for value in (0, -1, 1.5, True, "9")],
    *[(("data", "batch_size"), value) for value in (0, -2, 2.0, True, 3)],
    *[(("data", "block_size"), value) for value in (0, 8.0, "8", 7)],
    (("data", "more"), 1),
    *[(("source",), value) for value in (None, 3, [], True)],
    *[(("minutes",), value) for value in (0, -1, NAN, INF, True, "5", [5], 10**400)],
    *[(("config",), value) for value in (None, [], "x", 3)],
    (("config", "stepz"), 1),
    *[(("config", "steps"), value) for value in (3, -1, 2**31, True, 4.0, NAN, "4", 10**400)],
    *[(("config", "learning_rate"), value) for value in (NAN, INF, -1, True, "1", 10**400)],
    *[(("config", "optimizer"), value) for value in ("../sgd", 1, None, ["adamw"], {})],
    *[(("config", "keep"), value) for value in (0, -1, True, 2**40)],
    *[(("config", "block_size"), value) for value in (0, 9, True, "8")],
    *[(("config", "bias"), value) for value in (1, "false", None)],
    *[(("config", "n_head"), value) for value in (3, 0, 2**31)],
    *[(("config", "seed"), value) for value in (1, -1, 2**32, True)],
    *[(path, Raw(DEEP)) for path in (("best",), ("data", "order"), ("config", "n_inner"))],
    *[(path, "a" * 100_000) for path in (("step",), ("format",), ("config", "norm"))],
    (("counters", "step"), Raw("9" * 5000)),
    (("counters", "a" * 100_000), 1),
    (("best",), Raw('{"step": 4, "step": 4, "val_loss": 1.0}')),
    (("counters", "step"), Raw("4, " + '"step": 4')),
]
TEXTS = [
    b"", b"{", b"[]", b"null", b"4", b'"x"', b"\x00" * 100, b"\xff\xfe{}", b'{"a": 1', b"{} {}",
    b"{}", b'{"step": 4}', b"{" * 50_000, b'{"a":' * 50_000, b" " * (13 << 20),
    b'\x1b]0;x\x07{"a"}',
]  # fmt: skip


def put(path: Path, text: bytes) -> None:
    """Write a state and let no digest speak of it."""
    (path.parent / "SHA256SUMS").unlink(missing_ok=True)
    path.write_bytes(text)


def changed(content: dict, path: tuple[str, ...], value: object) -> bytes:
    """A state as JSON, in which another value stands at a place, as an older format has it."""
    content = json.loads(json.dumps(content | {"format": "tinygpt training 1"}))
    if content["best"] is None:
        content["best"] = {"step": 4, "val_loss": 1.0}
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = "@raw@" if isinstance(value, Raw) else value
    text = json.dumps(content)
    return text.replace('"@raw@"', value if isinstance(value, Raw) else "").encode()


def test_each_value_to_which_no_run_can_come_is_one_line(run, resume):
    path = run / LAST / "state.json"
    content = json.loads(path.read_bytes())
    put(path, changed(content, ("step",), 4))
    assert resume()[0] == 0  # unchanged it is good
    assert len(WRONG) > 150
    for place, value in WRONG:
        put(path, changed(content, place, value))
        with pytest.raises(CheckpointError) as caught:
            run_files.read_state(run / LAST)
        words = str(caught.value)
        assert words.startswith(f"{path}: "), (place, words)
        assert words.isprintable(), (place, words)
        assert len(words) < 1200 + len(str(run)), (place, words)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12].hex())
def test_what_is_no_state_at_all_is_one_line(text, run, resume):
    put(run / LAST / "state.json", text)
    assert is_refused(resume(), f"{run / LAST / 'state.json'}: ")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("source",), "../../etc/passwd", "was trained on other data"),
        (("data", "tokens"), 10**30, "made with tokens 1000000"),
        (("best", "step"), "../../x", "best.step is '../../x': it must be a whole number"),
        (("counters", "step"), 10**400, "counters.step is 10000"),
        (("config", "keep"), -1, "config.keep is -1: it must be a whole number, 1 or more"),
        (("minutes",), NAN, "minutes is nan: it must be a number, above 0 and at most"),
        (("config", "batch_size"), 2**31 - 1, "data.batch_size is 2: by the rest"),
    ],
)
def test_going_on_from_a_hostile_state_is_one_line(place, value, words, run, resume):
    path = run / LAST / "state.json"
    put(path, changed(json.loads(path.read_bytes()), place, value))
    assert is_refused(resume(), words)


def test_a_state_of_another_step_than_its_folders_is_one_line(run, resume):
    path = run / LAST / "state.json"
    other = json.loads((run / "step-00000002" / "state.json").read_bytes())
    put(path, changed(other, ("step",), 2))
    assert is_refused(resume(), "it is of step-00000002")


@pytest.mark.parametrize(
    "valid",
    [
        state(0),
        state(7),
        replace(state(4), best={"step": 3, "val_loss": 2.5}, source="ab" * 32),
        replace(state(9), minutes=0.5),
        replace(
            state(9),
            counters=Counters(9, 6, 3, 2, 2.0**24, 1),
            config=TrainConfig.of({"block_size": 8, "compute": "float16", "n_inner": 7}),
        ),
    ],
)
def test_a_state_comes_back_as_it_was_written(valid):
    assert State.of(json.loads(json.dumps(valid.to_json(), allow_nan=False))) == valid


LINES = [
    b'{"step": "x", "loss": 1}', b'{"step": true, "loss": 1}', b'{"step": null}', b'{"step": [1]}',
    b'{"step": NaN, "loss": 1}', b'{"step": -1, "loss": 1}', b'{"loss": 1}', b"[1]", b"null", b"7",
    b"[" * 50_000, b'{"step":' + b"[" * 50_000, b'{"step": ' + b"9" * 5000 + b"}", b"\xff\xfe\x00",
    b'{"step": 1e400, "loss": 1}', b'{"step": 1.5, "loss": 2}', b"{", b"\x1b]0;x\x07",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_damaged_lines_of_a_log_end_no_run_and_are_told_of(line, run, resume):
    log = run / "log.jsonl"
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
    status, _, words = resume("--steps=6")
    assert status == 0
    assert f"{log}: line 4 is damaged, and taken out" in words
    assert log.read_bytes().startswith(b"\n".join(lines))
    assert checkpoint_in(run, "last").name == "step-00000006"


@pytest.mark.parametrize("line", LINES)
def test_damaged_lines_of_a_log_are_not_drawn(line, run):
    log = run / "log.jsonl"
    drawn = read_log(run)
    log.write_bytes(line + b"\n" + log.read_bytes())
    if b"\xff" in line:
        with pytest.raises(InputError, match=r"log\.jsonl: "):
            read_log(run)
    else:
        assert read_log(run) == drawn


def test_a_last_line_that_a_killed_run_left_is_no_damage(run, resume):
    with open(run / "log.jsonl", "ab") as file:
        file.write(b'{"step": 5, "lo')
    status, _, words = resume()
    assert status == 0
    assert "damaged" not in words


def test_a_validation_loss_that_is_no_number_is_never_the_best(run, monkeypatch):
    monkeypatch.setattr(validation, "sum_of_losses", lambda *_: (math.nan, 1))
    job = Run.resume(run, Dataset.open(run / "data"), steps=6)
    before = job.best
    assert job.go() is None
    assert job.best == before
    assert run_files.read_state(checkpoint_in(run, "last")).best == before
