"""The command that writes text: builds or loads a model, shows what it generates as it comes."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from tinygpt.checkpoints import hub
from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.checkpoints.open_checkpoint import Checkpoint, open_checkpoint
from tinygpt.checkpoints.quantization import DTYPES, check_dtype, convert
from tinygpt.commands.terminal import KINDS
from tinygpt.config import PRESETS, GPTConfig
from tinygpt.errors import InputError, say
from tinygpt.generate import Generator
from tinygpt.model import GPT
from tinygpt.runtime import device
from tinygpt.sampling import Sampling
from tinygpt.tokenizer.encoding import decode, decode_stream, encode, end_token

if TYPE_CHECKING:
    from tiktoken import Encoding

_DEFAULT_PRESET = "nano"
# The built-in model starts from a new line where there is no prompt; its tokens are short; and it
# has learned too little to be followed into its every fancy.
_BUILT_IN_START, _BUILT_IN_TOKENS, _BUILT_IN_TEMPERATURE = "\n", 300, 0.8
# flag -> (kind: one of KINDS, or how the help writes a text; what it is; field of GPTConfig).
_SHAPE = {
    "--layers": (int, "transformer blocks", "n_layer"),
    "--heads": (int, "attention heads in each; they divide the width", "n_head"),
    "--dim": (int, "width of the model", "n_embd"),
    "--inner": (int, "width inside the feed-forward (default: 4 * dim)", "n_inner"),
    "--context": (int, "the window: how many tokens it sees at once", "block_size"),
    "--vocab": (int, "how many token ids there are", "vocab_size"),
    "--norm": ("pre|post", "layer norms before or after each sublayer", "norm"),
    "--position": ("learned|sinusoidal", "positional encodings", "position"),
    "--activation": ("gelu_tanh|gelu|relu", "in the feed-forward", "activation"),
    "--no-bias": (False, "no bias terms", "bias"),
    "--no-shortcut": (False, "no residual connections", "shortcut"),
    "--untied": (False, "an output projection of its own", "tie_word_embeddings"),
}
_TEXT = {
    "--tokenizer": ("T", "gpt2, bytes, or a folder (default: the model's own)"),
    "--special-tokens": (True, "let the prompt's <|endoftext|> be that token, not plain text"),
    "--max-new-tokens": (int, "how many at most (default: 128; of the built-in's bytes 300)"),
    "--stop": (list, "end just before this text; may be given more than once"),
    "--num-samples": (int, "how many texts, each with the next seed (default: 1)"),
    "--seed": (int, "gives the same text again (default: another each time)"),
}
_SAMPLING = {
    "--temperature": (float, "0 takes the likeliest (default: 0.8; with --model 0; untrained 1)"),
    "--top-k": (int, "only the N likeliest tokens"),
    "--top-p": (float, "only the likeliest that together reach X"),
    "--min-p": (float, "only those at least X times as likely as the likeliest"),
    "--repetition-penalty": (float, "above 1 against what is in prompt or text (default: 1)"),
    "--frequency-penalty": (float, "against a token each time it is in the text (default: 0)"),
    "--presence-penalty": (float, "against a token that is in the text at all (default: 0)"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="text to continue; - or a pipe reads stdin")
    models = "a folder, or a name to fetch, such as gpt2 (default: the built-in shakespeare)"
    add("--model", metavar="NAME|PATH", help=models)
    words = "a new model of random weights; so does --tokenizer, or any flag of its shape"
    add("--untrained", action="store_true", default=None, help=words)
    bits = f"hold weights in {', '.join(DTYPES)} (default: as stored)"
    add("--dtype", metavar="TYPE", help=bits)
    add("--json", action="store_true", help="print one JSON object instead of text")
    presets = f"where to start: {', '.join(PRESETS)} (default: {_DEFAULT_PRESET})"
    shape = {"--preset": ("P", presets), **_SHAPE}
    groups = {"the shape of a new model": shape, "text": _TEXT, "sampling": _SAMPLING}
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag, (kind, words, *field) in flags.items():
            dest = field[0] if field else flag[2:].replace("-", "_")
            options = KINDS.get(kind, {"metavar": kind})
            group.add_argument(flag, dest=dest, help=words, **options)
    parser.set_defaults(num_samples=1, stop=[], repetition_penalty=1.0)
    parser.set_defaults(frequency_penalty=0.0, presence_penalty=0.0)


def run(args: argparse.Namespace) -> int:
    """Write the text, and say on stderr what wrote it and how fast; the exit status."""
    seed, sampling = _complete(args)
    run = _Run(args, _read_prompt(args.prompt))
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not where it is ignored, as in a background job
        signal.signal(signal.SIGINT, run.interrupt)
    try:
        device.check(kernel=False)  # the model itself runs as soon as one would
        check_dtype(args.dtype or "float32")
        found, config, tokenizer = _plan(args)
        end = end_token(tokenizer)  # what stands before a text in training, and after it
        text = run.prompt or (_BUILT_IN_START if args.model == hub.BUILT_IN else "")
        ids = encode(tokenizer, text, args.special_tokens) if text else [end or 0]
        run.tokenizer, run.prompt_ids = tokenizer, ids
        if found:
            model = found.load(args.dtype)
        else:
            model = convert(GPT(config, seed), args.dtype or "float32")
        prompts, seeds = [ids] * args.num_samples, [seed + i for i in range(args.num_samples)]
        ends, count = [] if end is None else [end], args.max_new_tokens
        steps = Generator(model).generate_batch(prompts, count, seeds, ends, **sampling)
        if device.note:
            say(device.note)
        name = args.model or args.preset or _DEFAULT_PRESET
        say(f"{name}, {config.parameter_count:,} parameters on {device.describe()}")
        if found is None:
            say(f"untrained: its weights are random (seed {seed}), so the text is noise")
        if len(ids) > (window := config.block_size):
            many = f"the prompt has {len(ids)} tokens, the model's window {window}"
            say(f"{many}: only its last {max(1, window // 2)} are read")
        run.follow(steps)
    except KeyboardInterrupt:
        run.interrupted = True
    except (InputError, OSError, MemoryError):
        raise
    except Exception:
        device.check()  # is it the backend's fault, that says so
        raise
    finally:
        if usual is signal.default_int_handler:
            signal.signal(signal.SIGINT, usual)
    if run.prompt_ids:  # else Ctrl-C came before anything
        run.finish({"model": args.model, "seed": seed, "device": device.describe()})
    return 130 if run.interrupted else 0


def _complete(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Fill in what was not given, and refuse what cannot work before anything is read or built.

    Returns:
        the seed, and the fields of Sampling.
    """
    seed = int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}: it must be a whole number from 0 to 2**63-1")
    if args.num_samples < 1:
        raise InputError(f"--num-samples is {args.num_samples}: it must be 1 or more")
    if "" in args.stop:
        raise InputError("--stop is empty: give at least one character")
    tokens, temperature = 128, 0.0 if args.model else 1.0
    if not args.model and _new_shape(args) is None:
        args.model, tokens, temperature = hub.BUILT_IN, _BUILT_IN_TOKENS, _BUILT_IN_TEMPERATURE
    args.max_new_tokens = tokens if args.max_new_tokens is None else args.max_new_tokens
    args.temperature = temperature if args.temperature is None else args.temperature
    if args.max_new_tokens < 0:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}: it must be 0 or more")
    sampling = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    Sampling(**sampling)
    return seed, sampling


def _read_prompt(given: str | None) -> str:
    """The prompt as text; "" when there is none, so that the text starts from nothing."""
    text, piped = given or "", False
    if given is None:
        with suppress(OSError, ValueError):  # from a terminal it would only wait
            mode = os.fstat(sys.stdin.fileno()).st_mode
            piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    if piped or given == "-":
        try:
            text = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"the prompt on stdin is not UTF-8: {error.reason}") from error
    if not text and given is not None:
        raise InputError("the prompt is empty: give some text, or leave it out")
    return text


def _new_shape(args: argparse.Namespace) -> str | None:
    """The first flag given that is about a new model, if there is one."""
    fields = {"--untrained": "untrained", "--preset": "preset"}
    fields |= {flag: field for flag, (*_, field) in _SHAPE.items()} | {"--tokenizer": "tokenizer"}
    given = (flag for flag, field in fields.items() if getattr(args, field) is not None)
    return next(given, None)


def _plan(args: argparse.Namespace) -> tuple[Checkpoint | None, GPTConfig, Encoding]:
    """The model's checkpoint (None for a new one), its configuration and its tokenizer."""
    if args.model:
        if (flag := _new_shape(args)) not in (None, "--tokenizer"):
            raise InputError(f"{flag} describes a new model, but --model brings its own shape")
        found = open_checkpoint(args.model)
        return found, found.config, found.tokenizer(args.tokenizer)
    shape = {field: getattr(args, field) for *_, field in _SHAPE.values()}
    shape = {field: value for field, value in shape.items() if value is not None}
    try:
        config = GPTConfig.preset(args.preset or _DEFAULT_PRESET, **shape)
    except InputError as error:  # in the words that the user typed
        flags = {field: flag for flag, (*_, field) in _SHAPE.items()}
        message = re.sub(r"\w+", lambda word: flags.get(word[0], word[0]), str(error))
        raise InputError(message) from error
    name = args.tokenizer or ("gpt2" if config.vocab_size == 50257 else "bytes")
    if args.tokenizer and args.vocab_size is None:
        config = replace(config, vocab_size=load_tokenizer(name).n_vocab)
    return None, config, load_tokenizer(name, config.vocab_size)


class _Run:
    """One call of the program: shows text as it comes, then says how long it took."""

    tokenizer: Encoding  # this and prompt_ids are set before `follow`

    def __init__(self, args: argparse.Namespace, prompt: str) -> None:
        self.args, self.prompt, self.prompt_ids = args, prompt, []
        self.samples: list[list[int]] = [[] for _ in range(args.num_samples)]
        self.times: list[float] = []  # seconds after the start, for each token
        self.interrupted = False
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        # Bytes from a model are not to move a terminal's cursor or set its title.
        control = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if i not in (9, 10)}
        self.hidden = control if sys.stdout.isatty() else {}

    def interrupt(self, *_: object) -> None:
        """Ctrl-C: once there is text, stop at the next token; if asked again, at once."""
        # An exception inside tinygrad may be lost in a destructor, or leave it waiting for 30 s.
        again, self.interrupted = self.interrupted, True
        if again or not self.times:
            sys.unraisablehook = lambda _: None  # what destructors say of half-made objects
            raise KeyboardInterrupt

    def follow(self, steps: Iterator[list[int | None]]) -> None:
        """Take all steps, showing the text at once where there is one sample to show."""
        self.start = time.perf_counter()
        if self.args.json or len(self.samples) > 1:
            for _ in self._collect(steps):
                if all(map(self._stopped, self.samples)):
                    return
            return
        self._show(self.prompt)
        ids = (row[0] for row in self._collect(steps))
        try:
            for piece in decode_stream(self.tokenizer, ids, self.args.stop):
                self._show(piece)
        except Exception:  # which is said on a line of its own
            self._show("\n")
            raise

    def _collect(self, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
        for row in steps:
            now = time.perf_counter() - self.start
            for sample, token in zip(self.samples, row, strict=True):
                if token is not None:
                    sample.append(token)
                    self.times.append(now)
            yield row
            if self.interrupted:
                return

    def _stopped(self, ids: list[int]) -> bool:
        return any(stop in decode(self.tokenizer, ids) for stop in self.args.stop)

    def _show(self, text: str) -> None:
        sys.stdout.write(text.translate(self.hidden))
        sys.stdout.flush()

    def finish(self, facts: dict[str, Any]) -> None:
        """Show what `follow` has not shown, and say how long it took."""
        samples = [self._sample(ids) for ids in self.samples]
        first, last = (self.times[0], self.times[-1]) if self.times else (None, None)
        later = sum(moment > first for moment in self.times)
        rate = later / (last - first) if later else None
        if self.args.json:
            timings = {"first_token_s": first, "total_s": last, "tokens_per_s": rate}
            facts |= {"prompt": self.prompt, "prompt_tokens": self.prompt_ids}
            facts |= {"samples": samples, "timings": timings}
            self._show(json.dumps(facts, ensure_ascii=False))
        elif len(samples) > 1:
            self._show("\n---\n".join(self.prompt + sample["text"] for sample in samples))
        self._show("\n")
        if self.times:
            speed = f", then {rate:.1f} tokens/s" if rate else ""
            say(f"{len(self.times)} tokens, the first after {first:.2f} s{speed}")

    def _sample(self, ids: list[int]) -> dict[str, Any]:
        """A sample's text, and its tokens up to where a stop text ended it."""
        unread = iter(ids)
        text = "".join(decode_stream(self.tokenizer, unread, self.args.stop))
        return {"tokens": ids[: len(ids) - len(list(unread))], "text": text}
