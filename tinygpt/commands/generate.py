"""The command that writes text: builds or loads a model, shows what it generates as it comes."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tinygpt.checkpoints import hub
from tinygpt.commands.flags import add_flag, add_options, add_shared, given, spelled
from tinygpt.commands.interrupts import Ended, Interrupts
from tinygpt.commands.output import Output
from tinygpt.commands.prompt import read_ids, read_prompt, stop_text, typed_prompts
from tinygpt.commands.prompts_file import Asked, opened, read_asked, write_all
from tinygpt.commands.together import facts
from tinygpt.config import PRESETS, SHAPE, GPTConfig
from tinygpt.devices import share_blocks, split_heads
from tinygpt.errors import InputError, say
from tinygpt.options import Kind, defaults
from tinygpt.runtime import device
from tinygpt.sampling import Sampling
from tinygpt.training import world
from tinygpt.training.ranks import settle
from tinygpt.writer import Writer

_DEFAULT_PRESET = "nano"
_SPLITS = {"layers": share_blocks, "heads": split_heads}  # what --devices shares out


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt generate`, which are those of `tinygpt` alone."""
    words = "text to continue; - or a pipe reads stdin"
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help=words)
    add_flag(parser, "--prompt-file", metavar="FILE", help="the text to continue is in a file")
    words = "continue each prompt of a file of JSON lines, with prompt and id in each"
    add_flag(parser, "--prompts", metavar="FILE", help=words)
    words = "where the texts of --prompts go, an id's on a line; started again, it goes on "
    words += "(default: stdout)"
    add_flag(parser, "-o", "--out", metavar="FILE", help=words)
    words = "continue one line after the other, typed or from a pipe; Ctrl-D ends"
    add_flag(parser, "-i", "--interactive", kind=bool, help=words)
    models = f"a folder, file, or name to fetch, such as gpt2; or {' or '.join(hub.BUILT_IN)}, "
    models += f"which are built in (default: {hub.DEFAULT})"
    add_flag(parser, "-m", "--model", metavar="NAME|PATH", help=models)
    words = "a new model of random weights; so does --tokenizer, or any flag of its shape"
    add_flag(parser, "--untrained", kind=bool, help=words)
    add_shared(parser, "--dtype")
    words = "share the model out over so many devices of the backend (default: 1)"
    add_shared(parser, "--devices", help=words)
    words = "how: by its blocks, where one device has no room for all, or by the heads in each "
    add_flag(
        parser, "--split", kind=Kind(str, choices=tuple(_SPLITS)), help=words + "(default: layers)"
    )
    add_shared(parser, "--plain")
    add_shared(parser, "--json", help="print one JSON object instead of text")
    group = parser.add_argument_group("the shape of a new model")
    presets = f"where to start: {', '.join(PRESETS)} (default: {_DEFAULT_PRESET})"
    add_flag(group, "--preset", metavar="P", help=presets)
    add_options(group, GPTConfig, defaults=dict.fromkeys(PRESETS[_DEFAULT_PRESET], ""))
    group = parser.add_argument_group("text")
    add_shared(group, "--tokenizer")
    words = "ids to continue in place of PROMPT, with commas or spaces between them"
    add_flag(group, "--ids", help=words)
    words = "let the prompt's <|endoftext|> be that token, not plain text (default: yes)"
    off = ("--no-special-tokens",)
    add_flag(group, "--special-tokens", kind=bool, default=True, off=off, help=words)
    words = "how many at most (default: as the model's files say, else 128)"
    add_flag(group, "-n", "--max-new-tokens", kind=int, help=words, low=0)
    words = "after N tokens, end with the first whole sentence (default: as the model's files say, "
    words += "else anywhere; anywhere too with -n)"
    add_flag(group, "--sentence-after", kind=int, help=words, low=0, below=2**31)
    words = "end just before this text (\\n is a newline; also \\t \\r \\uXXXX \\\\); repeatable"
    add_flag(group, "--stop", help=words, default=[], many=True)
    words = "how many texts, each with the next seed (default: 1)"
    add_flag(group, "--num-samples", kind=int, help=words, default=1, low=1, below=2**31)
    words = "gives the same text again (default: another each time)"
    add_flag(group, "-s", "--seed", kind=int, help=words, low=0, below=2**63)
    group = parser.add_argument_group("sampling")
    temperatures = "as the model's files say, else 0; untrained 1"
    add_options(group, Sampling, defaults={"temperature": temperatures})


@dataclass(frozen=True)
class Request:
    """What one call of the program is to do, with all that was not given filled in."""

    prompt: str
    ids: list[int] | None  # in place of a prompt
    model: str | None  # None is a new one, of this shape
    shape: GPTConfig
    preset: str  # where the shape began
    fit_vocabulary: bool  # whether the shape has no number of ids of its own
    tokenizer: str | None
    dtype: str | None
    devices: int
    split: str
    special_tokens: bool
    max_new_tokens: int | None  # None is as many as the model has it
    stop: list[str]
    sentence_after: int | None
    seeds: range  # one for each sample
    sampling: dict[str, Any]
    json: bool
    interactive: bool
    asked: list[Asked]  # the prompts of a file, in place of one
    out: str | None


def parse(args: argparse.Namespace) -> Request:
    """The request, from the flags.

    Raises:
        InputError: for what cannot work, before anything is built or fetched.
    """
    model = args.model
    new = _first_of_a_new_model(args)
    if model and new not in (None, "--tokenizer"):
        raise InputError(f"{new} describes a new model, but --model brings its own shape")
    if not model and not new:
        model = hub.DEFAULT
    sampling = {} if model else {"temperature": 1.0}
    if args.prompt_file is not None and (args.prompt, args.ids) != (None, None):
        raise InputError("--prompt-file and a prompt or --ids are two texts: give one of them")
    ids = read_ids(args.ids, args.prompt)
    asked = _asked(args)
    nothing = ids or asked or (args.interactive and (args.prompt, args.prompt_file) == (None, None))
    preset = args.preset or _DEFAULT_PRESET
    shape = given(args, SHAPE)
    if preset in PRESETS:
        GPTConfig.check({**defaults(GPTConfig), **PRESETS[preset], **shape}, spelled(args))
    if args.split and args.devices == 1:
        raise InputError("--split is for several devices: give --devices N too")
    seed = int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
    return Request(
        prompt="" if nothing else read_prompt(args.prompt, args.prompt_file),
        ids=ids,
        model=model,
        shape=GPTConfig.preset(preset, **shape),
        preset=preset,
        fit_vocabulary=bool(args.tokenizer) and args.vocab_size is None,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        devices=args.devices,
        split=args.split or "layers",
        special_tokens=args.special_tokens,
        max_new_tokens=args.max_new_tokens,
        stop=[stop_text(text) for text in args.stop],
        sentence_after=args.sentence_after,
        seeds=range(seed, seed + args.num_samples),
        sampling={**sampling, **given(args, defaults(Sampling))},
        json=bool(args.json),
        interactive=bool(args.interactive),
        asked=asked,
        out=args.out,
    )


def _asked(args: argparse.Namespace) -> list[Asked]:
    """The prompts of --prompts; none without it."""
    if args.prompts is None:
        if args.out is not None:
            raise InputError("--out is for the texts of --prompts FILE: > FILE keeps what is shown")
        return []
    others = {
        "a prompt": args.prompt, "--prompt-file": args.prompt_file, "--ids": args.ids,
        "--interactive": args.interactive, "--json": args.json,
        "--num-samples": args.num_samples > 1,
    }  # fmt: skip
    for name, other in others.items():
        if other not in (None, False):
            raise InputError(f"{name} is for one prompt: leave it out, or --prompts")
    return read_asked(args.prompts)


def _first_of_a_new_model(args: argparse.Namespace) -> str | None:
    """The first flag given that is about a new model, as it was typed, if there is one."""
    names = ("untrained", "preset", *SHAPE, "tokenizer")
    return next((spelled(args)(name) for name in names if getattr(args, name) is not None), None)


def open_writer(request: Request) -> Writer:
    """The model and the tokenizer that a request names, loaded or made."""
    place = partial(_SPLITS[request.split], count=request.devices)
    if request.model:
        ids, advice = request.ids is not None, "; or give ids in place of text (--ids)"
        return Writer.open(request.model, request.dtype, request.tokenizer, ids, advice, place)
    seed, fit = request.seeds[0], request.fit_vocabulary
    writer = Writer.new(request.shape, seed, request.dtype, request.tokenizer, fit)
    place(writer.model)
    return writer


def shares(args: argparse.Namespace) -> bool:
    """Whether the processes of `mpirun` share the work: many prompts."""
    return args.prompts is not None


def run(args: argparse.Namespace) -> int:
    """Write the text, and say on stderr what wrote it and how fast; the exit status."""
    if world.current:
        settle(world.current)
    request, writer = parse(args), None
    if world.current:
        digest = hashlib.sha256(repr(request.asked).encode()).hexdigest()
        world.current.need_same({**facts(args), "SHA-256 of the prompts": digest})
    with Interrupts() as interrupts, _backend_is_asked_first():
        writer = open_writer(request)
    if writer is None:  # a signal came before there was a model
        return 128 + interrupts.came
    if request.asked:
        return _write_file(request, writer)
    if not request.interactive:
        came = _write(request, writer, first=True)
        return 128 + came if came else 0
    if request.prompt or request.ids:
        _need_going_on(_write(request, writer, first=True))
    else:
        introduce(request, writer)
    for number, prompt in enumerate(typed_prompts(), 1):
        start = request.seeds[0] + number * args.num_samples
        try:
            seeds = range(start, start + args.num_samples)
            again = replace(request, prompt=prompt, ids=None, seeds=seeds)
            _need_going_on(_write(again, writer))
        except InputError as error:  # the next line may be better
            say(f"error: {error}")
    return 0


def _need_going_on(came: int | None) -> None:
    """Ctrl-C ends a text that was asked for by typing; any other signal the program too."""
    if came not in (None, signal.SIGINT):
        raise Ended(came)


def _write(request: Request, writer: Writer, first: bool = False) -> int | None:
    """Continue one prompt, and say how fast; the signal that has ended it, if one has."""
    output = None
    with Interrupts() as interrupts, _backend_is_asked_first():
        ids = request.ids or writer.encode(request.prompt, request.special_tokens)
        if request.ids:
            request = replace(request, prompt=writer.tokenizer.decode(ids))
        request = _as_the_model_says(request, writer)
        steps = writer.stream(ids, request.max_new_tokens, request.seeds, **request.sampling)
        if first:
            introduce(request, writer)
        _say_what_is_read(len(ids), writer.model.config.block_size)
        output = Output(request, writer, ids, interrupts)
        output.follow(steps)
    if output:  # else it was ended before anything
        output.finish()
    return interrupts.came


def _write_file(request: Request, writer: Writer) -> int:
    """Continue the prompts of a file; the exit status."""
    request, others = _as_the_model_says(request, writer), world.current
    introduce(request, writer)
    out = None if others and others.rank else request.out  # only the first needs the folder
    with opened(out, request.asked) as texts:
        already, start = len(texts.done), time.perf_counter()
        if already:
            say(f"{already} of {len(request.asked)} texts are in {request.out}")
        with Interrupts() as interrupts, _backend_is_asked_first():
            write_all(request, writer, texts, interrupts)
        made, took_s = len(texts.done) - already, time.perf_counter() - start
        say(f"{made} texts, {texts.tokens} tokens, {texts.tokens / took_s:.1f} tokens/s")
    return 128 + interrupts.came if interrupts.came else 0


def _as_the_model_says(request: Request, writer: Writer) -> Request:
    """The request with all that the model's files say and it does not."""
    request = replace(request, sampling={**writer.sampling, **request.sampling})
    if request.max_new_tokens is not None:  # a text is as long as was asked for
        return request
    after = writer.sentence_after if request.sentence_after is None else request.sentence_after
    return replace(request, max_new_tokens=writer.max_new_tokens, sentence_after=after)


@contextmanager
def _backend_is_asked_first() -> Iterator[None]:
    """Where something fails that no user's mistake explains, see whether the backend works.

    If it does not, `device.check` raises and says so, in place of a traceback from inside it.
    """
    try:
        yield
    except (InputError, OSError, MemoryError):
        raise
    except Exception:
        device.check()
        raise


def introduce(request: Request, writer: Writer) -> None:
    """Say what is about to write."""
    config = writer.model.config
    if device.note:
        say(device.note)
    name = request.model or request.preset
    about = f", trained on {hub.BUILT_IN[name]}," if name in hub.BUILT_IN else ""
    where = writer.model.placement.describe()
    say(f"{name}, {config.parameter_count:,} parameters{about} on {where}")
    if not request.model:
        say(f"untrained: its weights are random (seed {request.seeds[0]}), so the text is noise")


def _say_what_is_read(count: int, window: int) -> None:
    if count > window:
        many = f"the prompt has {count} tokens, the model's window {window}"
        say(f"{many}: only its last {max(1, window // 2)} are read")
