"""A file of prompts, each continued once, and the file of the texts, which can be gone on with."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import FileIO
from typing import TYPE_CHECKING, Any, NamedTuple

from tinygpt.commands.interrupts import Interrupts
from tinygpt.commands.output import Sample
from tinygpt.commands.prompt import MAX_PROMPT_BYTES
from tinygpt.errors import InputError, reason, show
from tinygpt.model import NOT_NUMBERS
from tinygpt.sampling import Sampling
from tinygpt.storage import open_plain, parse_json, read_bytes, write_whole
from tinygpt.training import world
from tinygpt.writer import Writer

if TYPE_CHECKING:
    from tinygpt.commands.generate import Request

AT_ONCE = 16  # texts side by side
_TELLS_S = 1.0  # between two times at which ranks tell each other of their texts
_MOST_BYTES = 1 << 30  # of a file of prompts or texts


class Asked(NamedTuple):
    """One prompt of a file."""

    id: str | int
    prompt: str


class Done(NamedTuple):
    """A text that is whole."""

    id: str | int
    text: str
    finish: str  # "stop" or "length"
    tokens: int


def read_asked(path: str) -> list[Asked]:
    """The prompts of a file of JSON lines.

    A line is an object with `prompt`, and `id`, a text or a whole number, which is the line's
    number where there is none. What else it has is not read.

    Raises:
        InputError: when it cannot be read, a line is none of these, or two have one id.
    """
    asked, lines = list[Asked](), dict[str | int, int]()
    for number, record in _records(_read(path), path):
        where = f"{path}, line {number}"
        prompt, name = record.get("prompt"), record.get("id", number)
        if not isinstance(prompt, str):
            raise InputError(f"{where}: prompt is {show(prompt)}: it must be a text")
        if len(prompt) > MAX_PROMPT_BYTES:
            raise InputError(f"{where}: its prompt has more than {MAX_PROMPT_BYTES >> 20} MiB")
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise InputError(f"{where}: id is {show(name)}: it must be a text or a whole number")
        try:
            f"{name}{prompt}".encode()
        except UnicodeEncodeError as error:
            fact = "half of a surrogate pair, which is not valid Unicode"
            raise InputError(f"{where}: its prompt or id has {fact}: take it out") from error
        if name in lines:
            raise InputError(f"{where}: its id {show(name)} is that of line {lines[name]} too")
        lines[name] = number
        asked.append(Asked(name, prompt))
    if not asked:
        raise InputError(f"{path} is empty: give a line of JSON with a prompt for each text")
    return asked


def _read(path: str) -> bytes:
    try:
        return read_bytes(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def _records(data: bytes, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of each line that is not empty its number, and what it says."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {reason(error)}") from error


class Texts:
    """Where the texts go, a line of JSON for each, as soon as it is whole."""

    def __init__(self, file: FileIO | None, done: set[str | int]) -> None:
        self._file, self.done = file, done
        self.tokens = 0  # that were written

    def add(self, *texts: Done) -> None:
        """Write some."""
        for each in texts:
            found = {"id": each.id, "text": each.text, "finish_reason": each.finish}
            line = json.dumps(found, ensure_ascii=False) + "\n"
            if self._file is None:
                sys.stdout.write(line)
                sys.stdout.flush()
            else:
                try:
                    write_whole(self._file, line.encode())
                except OSError as error:
                    fact = f"cannot write {self._file.name}: {reason(error)}"
                    raise InputError(f"{fact}; the same command goes on from here") from error
            self.done.add(each.id)
            self.tokens += each.tokens


@contextmanager
def opened(path: str | None, asked: Sequence[Asked]) -> Iterator[Texts]:
    """The file of texts, made or gone on with; None is stdout.

    Of a line that was cut when the program was killed, what is there goes away.

    Raises:
        InputError: when it cannot be written, another program writes it, or it has texts of other
            prompts.
    """
    if path is None:
        yield Texts(None, set())
        return
    try:
        if os.path.exists(path):
            open_plain(path).close()  # a pipe would keep it waiting
        file = open(path, "ab", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}; name another --out") from error
    with file:
        _lock(file, path)
        done, known = set[str | int](), {each.id for each in asked}
        whole, _, cut = _read(path).rpartition(b"\n")
        for number, record in _records(whole, path):
            name, is_text = record.get("id"), isinstance(record.get("text"), str)
            if not isinstance(name, str | int) or name not in known or not is_text:
                fact = f"{path}, line {number}, is no text of a prompt that was given"
                raise InputError(f"{fact}: name another --out, or remove it")
            if name in done:
                raise InputError(f"{path}, line {number}: {show(name)} stands there twice")
            done.add(name)
        try:
            if cut:
                file.truncate(os.fstat(file.fileno()).st_size - len(cut))
            yield Texts(file, done)
            os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {path}: {reason(error)}") from error


def _lock(file: FileIO, path: str) -> None:
    """Let no other program write it, as long as it is open."""
    with suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another program is writing {path}: wait for it, or name another --out"
            ) from error
        except OSError:  # a drive without locks
            return


class _Text:
    """One that is being written."""

    def __init__(self, asked: Asked, sample: Sample) -> None:
        self.asked, self.sample = asked, sample

    def add(self, token: int, ends: Collection[int], most: int) -> str | None:
        """Take one more token; why the text ends with it, where it does."""
        if token in ends:
            return "stop"
        self.sample.add(token)
        if self.sample.stream.stopped:
            return "stop"
        return "length" if len(self.sample.tokens) == most else None

    def end(self, finish: str) -> Done:
        """All of it."""
        self.sample.end()
        return Done(self.asked.id, self.sample.text, finish, len(self.sample.tokens))


def continued(
    request: Request, writer: Writer, waiting: deque[tuple[int, Asked]], interrupts: Interrupts
) -> Iterator[list[Done]]:
    """Continue prompts, several side by side; at each step what has been finished with it.

    Args:
        waiting: the prompts with their numbers. One is continued with the seed of its number: its
            text is the same whatever stands beside it, and whenever the program was started.
    """
    settings, most = Sampling.of(**request.sampling), request.max_new_tokens
    if not most:
        yield [Done(each.id, "", "length", 0) for _, each in waiting]
        return
    running, at_once = dict[int, _Text](), min(AT_ONCE, len(waiting))
    if not at_once:
        return
    writer.generator.require_memory(at_once)
    with writer.generator.slots(at_once) as slots:
        while (waiting or running) and not interrupts.came:
            while waiting and slots.free:
                number, each = waiting.popleft()
                ids = writer.encode(each.prompt, request.special_tokens)
                sample = Sample(writer.text_stream(request.stop, request.sentence_after))
                slot = slots.start(ids, settings, request.seeds[0] + number)
                running[slot] = _Text(each, sample)
            done, found = list[Done](), slots.step()
            for slot, text in [each for each in running.items() if each[0] in found]:
                token = found[slot].token
                if not 0 <= token < writer.model.config.vocab_size:
                    raise InputError(NOT_NUMBERS)
                interrupts.has_text = True
                if finish := text.add(token, writer.tokenizer.ends, most):
                    slots.stop(slot)
                    del running[slot]
                    done.append(text.end(finish))
            yield done


def write_all(request: Request, writer: Writer, texts: Texts, interrupts: Interrupts) -> None:
    """Write the text of each prompt that has none yet; under `mpirun` those of all ranks.

    Rank r has every size-th of the prompts, from the r-th on. All tell each other now and then what
    they have finished, and the first writes.
    """
    others, seed, done = world.current, request.seeds[0], list(texts.done)
    rank, size = (others.rank, others.size) if others else (0, 1)
    if others:
        first = others.exchange({"seed": seed, "done": done})[0]
        seed, done = first["seed"], first["done"]
        others.starting, others.doing = False, "tell of its texts"
        others.advice = "the same command goes on with what is missing"
    request, known = replace(request, seeds=range(seed, seed + 1)), set(done)
    left = [each for each in enumerate(request.asked) if each[1].id not in known]
    steps = continued(request, writer, deque(left[rank::size]), interrupts)
    if not others:
        for found in steps:
            texts.add(*found)
        return
    ended = False
    while not ended:
        mine, until = list[Done](), time.monotonic() + _TELLS_S
        while (found := next(steps, None)) is not None and time.monotonic() < until:
            mine += found
        told = others.exchange(
            {"texts": [*mine, *(found or [])], "ended": found is None, "came": interrupts.came}
        )
        if not rank:
            texts.add(*(Done(*each) for theirs in told for each in theirs["texts"]))
        interrupts.came = next((each["came"] for each in told if each["came"]), None)
        ended = all(each["ended"] for each in told) or interrupts.came is not None
