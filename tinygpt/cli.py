"""The command line: parse, call, print. The text goes to stdout, the talk to stderr."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from tinygpt import __version__, backend, doctor, hub
from tinygpt.config import PRESETS, GPTConfig, InputError
from tinygpt.files import reason
from tinygpt.generate import Generator
from tinygpt.model import GPT
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import decode, decode_stream, encode, end_token, load_tokenizer

if TYPE_CHECKING:
    from tiktoken import Encoding

# Flags that describe a new model: flag -> (field of GPTConfig, what argparse needs to know).
_SHAPE: dict[str, tuple[str, dict[str, Any]]] = {
    "--layers": ("n_layer", {"type": int, "help": "transformer blocks"}),
    "--heads": ("n_head", {"type": int, "help": "attention heads in each"}),
    "--dim": ("n_embd", {"type": int, "help": "width of the model"}),
    "--inner": ("n_inner", {"type": int, "help": "width inside the feed-forward (4 * dim)"}),
    "--context": ("block_size", {"type": int, "help": "the window, in tokens"}),
    "--vocab": ("vocab_size", {"type": int, "help": "size of the vocabulary"}),
    "--norm": ("norm", {"choices": ["pre", "post"], "help": "where layer norms stand"}),
    "--position": ("position", {"choices": ["learned", "sinusoidal"], "help": "encodings"}),
    "--activation": ("activation", {"choices": ["gelu_tanh", "gelu", "relu"], "help": "which"}),
    "--no-bias": ("bias", {"action": "store_const", "const": False, "help": "no bias terms"}),
    "--no-shortcut": (
        "shortcut",
        {"action": "store_const", "const": False, "help": "no residual connections"},
    ),
    "--untied": (
        "tie_word_embeddings",
        {"action": "store_const", "const": False, "help": "an output projection of its own"},
    ),
}
_DEFAULT_PRESET = "nano"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on the arguments (by default the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            if argv[:1] == ["doctor"]:
                return doctor.main(_doctor_parser().parse_args(argv[1:]).backends)
            return _generate(_generate_parser().parse_args(argv))
        finally:
            sys.stdout.flush()
    except InputError as error:
        return _complain(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _complain("out of memory: choose a smaller model or a smaller batch")
    except OSError as error:
        return _complain(f"{error.filename or 'cannot write'}: {reason(error)}")


def _complain(error: object) -> int:
    print(f"tinygpt: error: {error}", file=sys.stderr)
    return 2


def _say(text: str) -> None:
    print(f"tinygpt: {text}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line that offers the nearest flag."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            given = message.removeprefix(prefix).split()[0].split("=")[0]
            near = get_close_matches(given, self._option_string_actions, n=1)
            message = f"unknown argument {given!r}"
            message += f": did you mean {near[0]}?" if near else ": quote a prompt of several words"
        raise InputError(f"{message} (`{self.prog} --help` lists what there is)")


def _generate_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tinygpt",
        description="Continue a prompt with a GPT-2. `tinygpt doctor` looks at this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tinygpt {__version__}")
    parser.add_argument("prompt", nargs="?", help="text to continue; - or a pipe reads stdin")
    parser.add_argument(
        "--model",
        help="a folder in Hugging Face form, or a name to fetch, such as gpt2; "
        "without it a new model is built, with random weights",
    )
    group = parser.add_argument_group("the shape of a new model")
    group.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: {_DEFAULT_PRESET})")
    for flag, (field, options) in _SHAPE.items():
        value = {} if "action" in options else {"metavar": options.get("metavar", "N")}
        if "choices" in options:
            value = {"metavar": "|".join(options["choices"])}
        group.add_argument(flag, dest=field, **value, **options)
    group = parser.add_argument_group("text")
    group.add_argument("--tokenizer", help="gpt2, bytes, or a folder (default: the model's own)")
    group.add_argument(
        "--special-tokens",
        action="store_true",
        help="let the prompt's <|endoftext|> be that token, not plain text",
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it")
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    group.add_argument("--temperature", type=float, help="0 is greedy (default: 0 with --model)")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X")
    group.add_argument("--seed", type=int, help="repeats a text (default: another each time)")
    group.add_argument("--num-samples", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _doctor_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tinygpt doctor",
        description="What this machine has, and what would make it better.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--backends", action="store_true", help="also run a small model on each backend"
    )
    return parser


def _generate(args: argparse.Namespace) -> int:
    seed = int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
    if args.num_samples < 1:
        raise InputError(f"--num-samples is {args.num_samples}: it must be 1 or more")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}: it must be a whole number from 0 to 2**63-1")
    temperature = args.temperature
    if temperature is None:
        temperature = 0.0 if args.model else 1.0
    sampling = Sampling(
        temperature=temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
    )
    if args.max_new_tokens < 0:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}: it must be 0 or more")
    if "" in args.stop:
        raise InputError("--stop is empty: give at least one character")
    text = _read_prompt(args.prompt)
    if backend.note:
        _say(backend.note)
    backend.check()
    model, tokenizer = _load(args, seed)
    ids = _prompt_ids(text, tokenizer, args.special_tokens)
    window = model.config.block_size
    if len(ids) > window:
        _say(f"the prompt has {len(ids)} tokens: only its last {max(1, window // 2)} are read")
    run = _Run(args, tokenizer, text or "", ids)
    steps = Generator(model).generate_batch(
        [ids] * args.num_samples,
        args.max_new_tokens,
        # each sample is what its own seed alone would give
        [seed + i for i in range(args.num_samples)],
        [] if end_token(tokenizer) is None else [end_token(tokenizer)],
        **asdict(sampling),
    )
    status = 0
    try:
        run.follow(steps)
    except KeyboardInterrupt:
        status = 130
    run.finish({"model": args.model, "seed": seed, "device": backend.describe()})
    return status


def _read_prompt(given: str | None) -> str | None:
    """The prompt as text; None when there is none, so that the text starts from nothing."""
    if given is None and not _stdin_has_text():
        return None
    if given not in (None, "-"):
        text = given
    else:
        try:
            text = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"the prompt on stdin is not UTF-8: {error.reason}") from error
        if not text and given is None:
            return None
    if not text:
        raise InputError("the prompt is empty: give some text, or leave it out")
    return text


def _stdin_has_text() -> bool:
    """Whether stdin is a pipe or a file; a terminal would only wait."""
    with suppress(OSError, ValueError, AttributeError):
        mode = os.fstat(sys.stdin.fileno()).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    return False


def _load(args: argparse.Namespace, seed: int) -> tuple[GPT, Encoding]:
    shape = {field: getattr(args, field) for field, _ in _SHAPE.values()}
    shape = {field: value for field, value in shape.items() if value is not None}
    if args.model:
        if shape or args.preset:
            flag = "--preset" if args.preset else next(f for f in _SHAPE if _SHAPE[f][0] in shape)
            raise InputError(f"{flag} describes a new model, but --model brings its own shape")
        folder = hub.resolve(args.model)
        model = GPT.from_pretrained(folder)
        tokenizer = load_tokenizer(args.tokenizer or folder, model.config.vocab_size)
        _say(f"{args.model}, {_size(model)} on {backend.describe()}")
        return model, tokenizer
    preset = args.preset or _DEFAULT_PRESET
    config = GPTConfig.preset(preset, **shape)
    name = args.tokenizer or ("gpt2" if config.vocab_size == 50257 else "bytes")
    if args.tokenizer and "vocab_size" not in shape:
        config = GPTConfig.preset(preset, **shape, vocab_size=load_tokenizer(name).n_vocab)
    tokenizer = load_tokenizer(name, config.vocab_size)
    model = GPT(config, seed)
    _say(f"{preset}, {_size(model)} on {backend.describe()}")
    _say(f"untrained: its weights are random (seed {seed}), so the text is noise")
    return model, tokenizer


def _size(model: GPT) -> str:
    return f"{model.config.parameter_count / 1e6:,.1f}M parameters"


def _prompt_ids(text: str | None, tokenizer: Encoding, special: bool) -> list[int]:
    if text is not None:
        return encode(tokenizer, text, special)
    end = end_token(tokenizer)
    return [0 if end is None else end]  # what stands before a text in training


class _Run:
    """One call of the program: shows text as it comes, then says how long it took."""

    def __init__(self, args, tokenizer: Encoding, prompt: str, prompt_ids: list[int]) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.prompt, self.prompt_ids = prompt, prompt_ids
        self.samples: list[list[int]] = [[] for _ in range(args.num_samples)]
        self.start = time.perf_counter()
        self.times: list[float] = []  # seconds after the start, for each step
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        # Bytes from a model are not to move a terminal's cursor or set its title.
        control = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if i not in (9, 10)}
        self.hidden = control if sys.stdout.isatty() else {}

    def follow(self, steps: Iterator[list[int | None]]) -> None:
        """Take all steps, showing the text at once where there is one sample to show."""
        if self.args.json or len(self.samples) > 1:
            for _ in self._collect(steps):
                if self.args.stop and all(map(self._stopped, self.samples)):
                    return
            return
        self._show(self.prompt)
        ids = (row[0] for row in self._collect(steps))
        for piece in decode_stream(self.tokenizer, ids, self.args.stop):
            self._show(piece)

    def _collect(self, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
        for row in steps:
            self.times.append(time.perf_counter() - self.start)
            for sample, token in zip(self.samples, row, strict=True):
                if token is not None:
                    sample.append(token)
            yield row

    def _stopped(self, ids: list[int]) -> bool:
        text = decode(self.tokenizer, ids)
        return any(stop in text for stop in self.args.stop)

    def _show(self, text: str) -> None:
        sys.stdout.write(text.translate(self.hidden))
        sys.stdout.flush()

    def finish(self, facts: dict[str, Any]) -> None:
        """Show what `follow` has not shown, and say how long it took."""
        texts = [
            "".join(decode_stream(self.tokenizer, iter(ids), self.args.stop))
            for ids in self.samples
        ]
        if self.args.json:
            print(json.dumps(self._report(facts, texts), ensure_ascii=False))
        elif len(texts) > 1:
            self._show("\n---\n".join(self.prompt + text for text in texts))
        if not self.args.json:
            self._show("\n")
        if self.times:
            rate = f", then {self._rate():.1f} tokens/s" if len(self.times) > 1 else ""
            total = sum(map(len, self.samples))
            _say(f"{total} tokens, the first after {self.times[0]:.2f} s{rate}")

    def _rate(self) -> float:
        """Tokens a second after the first step, over all samples."""
        later = sum(map(len, self.samples)) - len(self.samples)
        return later / max(self.times[-1] - self.times[0], 1e-9)

    def _report(self, facts: dict[str, Any], texts: list[str]) -> dict[str, Any]:
        samples = [
            {"tokens": ids, "text": text} for ids, text in zip(self.samples, texts, strict=True)
        ]
        timings = {
            "first_token_s": self.times[0] if self.times else None,
            "total_s": self.times[-1] if self.times else None,
            "tokens_per_s": self._rate() if len(self.times) > 1 else None,
        }
        prompt = {"prompt": self.prompt, "prompt_tokens": self.prompt_ids}
        return {**facts, **prompt, "samples": samples, "timings": timings}
