"""Look inside a model: what it foresaw, where it reads, which parts decide."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinygpt.checkpoints import hub
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.run_folder import steps
from tinygpt.commands import norms
from tinygpt.commands.flags import add_flag, add_shared, given, spelled
from tinygpt.commands.prompt import read_prompt
from tinygpt.commands.shown_as import add_report_flags, show_report
from tinygpt.errors import InputError, check_int, say, show, unknown
from tinygpt.generator import Generator
from tinygpt.model import GPT
from tinygpt.options import Kind
from tinygpt.study import shown
from tinygpt.study.attention import head_scores, no_halves, rollout
from tinygpt.study.attribution import attribute
from tinygpt.study.explain import explain
from tinygpt.study.heads import leave_out
from tinygpt.study.induction import learn_induction
from tinygpt.study.inside import Inside, as_float32, look
from tinygpt.study.lens import lens
from tinygpt.study.predictions import predictions
from tinygpt.study.report import Report
from tinygpt.tokenizer.tokenizer import Tokenizer

_EXAMPLE = "Once upon a time there was a king"  # for `explain`, which needs any text
_WINDOWS, _WINDOW = 8, 256  # of which `heads` measures the loss
_MOST_SHOWN = 1000  # characters of a text that a page begins with


class _Subject(NamedTuple):
    """What is looked at, and how."""

    model: GPT
    tokenizer: Tokenizer
    text: str
    args: argparse.Namespace

    def look(self) -> Inside:
        """The forward pass of the text."""
        if not self.text:
            raise InputError(f"study {self.args.what} needs a text: give one, or - for stdin")
        return look(self.model, self.tokenizer.encode(self.text, True))


def _tokens(subject: _Subject) -> Report:
    return shown.tokens_report(predictions(subject.look()), subject.tokenizer)


def _explain(subject: _Subject) -> Report:
    ids = subject.tokenizer.encode(subject.text or _EXAMPLE, True)
    _check_place(subject, ("block",))
    return shown.explain_report(explain(subject.model, ids, subject.args.block))


def _lens(subject: _Subject) -> Report:
    inside = subject.look()
    position = _position(subject, inside)
    found = lens(subject.model, inside)
    return shown.lens_report(found, inside, subject.tokenizer, position)


def _attention(subject: _Subject) -> Report:
    args, tokenizer = subject.args, subject.tokenizer
    _check_place(subject, ("block", "head"))
    if args.rollout and args.head is not None:
        raise InputError("--rollout is of all heads together: leave out --head")
    if args.rollout and (why := no_halves(subject.model.config)):
        raise InputError(f"rollout counts each shortcut as a half of what passes: {why}")
    inside = subject.look()
    if args.rollout:
        last = subject.model.config.n_layer - 1 if args.block is None else args.block
        return shown.rollout_report(rollout(inside.attention), inside, tokenizer, last)
    if args.block is not None and args.head is not None:
        return shown.map_report(inside, tokenizer, args.block, args.head)
    return shown.attention_report(inside, head_scores(subject.model), args.block, args.head)


def _check_place(subject: _Subject, names: tuple[str, ...]) -> None:
    shape = subject.model.config
    counts = {"block": shape.n_layer, "head": shape.n_head}
    for name in names:
        if (value := getattr(subject.args, name)) is not None:
            check_int(spelled(subject.args)(name), value, low=0, below=counts[name])


def _heads(subject: _Subject) -> Report:
    model, length = subject.model, min(_WINDOW, subject.model.config.block_size)
    if subject.text:
        ids = subject.tokenizer.encode(subject.text, True)
        count = min(_WINDOWS, (len(ids) - 1) // length)
        if count < 2:
            raise InputError(
                f"the text has {len(ids)} tokens: give {2 * length + 1} or more, which are two "
                "windows, as a text or a file, or none, and the model writes its own"
            )
        starts = np.linspace(0, len(ids) - 1 - length, count).astype(int)
        windows = np.array([ids[start : start + length + 1] for start in starts])
    else:
        say(f"no text is given: the model writes {_WINDOWS} of {length} tokens to be measured on")
        start = subject.tokenizer.start or 0
        prompts, seeds = [[start]] * _WINDOWS, range(_WINDOWS)
        steps = Generator(model).generate_batch(prompts, length, seeds, temperature=1.0)
        windows = np.array([[start] * _WINDOWS, *steps]).T
    scores, by = head_scores(model), subject.args.by or "zero"
    found = leave_out(model, windows, by == "mean")
    return shown.heads_report(scores, found, len(windows), by if by == "zero" else "its mean")


def _attribute(subject: _Subject) -> Report:
    args, inside = subject.args, subject.look()
    if args.token is None:
        raise InputError('study attribute needs --token, as in --token " king"')
    token, against = _one_token(subject, "token"), _one_token(subject, "against")
    position = _position(subject, inside)
    found = attribute(subject.model, inside, token, against, position)
    return shown.attribution_report(found, subject.tokenizer, token, against)


def _one_token(subject: _Subject, name: str) -> int | None:
    """The id of the piece that a flag names."""
    text = getattr(subject.args, name)
    if text is None:
        return None
    ids = subject.tokenizer.encode(text, True)
    if len(ids) != 1:
        pieces = " ".join(shown.piece(subject.tokenizer, each) for each in ids)
        raise InputError(
            f"{spelled(subject.args)(name)} {show(text)} is {len(ids)} pieces: {pieces}; give one"
        )
    return ids[0]


def _position(subject: _Subject, inside: Inside) -> int:
    """The position that is asked for, by default the last."""
    count, position = len(inside.ids), subject.args.position
    if position is None:
        return count - 1
    check_int(spelled(subject.args)("position"), position, low=0, below=count)
    return position


def _compared(args: argparse.Namespace) -> Report:
    """One look at several models: two that are named, or all that a run has kept."""
    look = args.look or "lens"
    if look not in WHATS:
        raise unknown("--look", look, WHATS)
    _refuse_flags(args, WHATS[look].flags)
    names, rest = [args.run], args.text
    if args.run is None:
        names, rest = args.text[:2], args.text[2:]
        if len(names) < 2:
            raise InputError("study compare needs two models and a text, or --run RUN and a text")
    else:
        names = [str(path) for path in sorted(steps(Path(args.run)))]
        if not names:
            raise InputError(f"{args.run} is no run with checkpoints: give the folder of one")
        if len(names) == 1:
            say(f"{args.run} has kept one checkpoint: train --keep-every N keeps one of N steps")
    frames, text = [], _text(rest, look)  # once: there is nothing behind the end of stdin
    for name in names:
        found = _look(WHATS[look], name, text, args)
        frames.append(
            replace(found, title=f"{Path(name).name if args.run else name}: {found.title}")
        )
    result = [
        {"model": name, "found": frame.result} for name, frame in zip(names, frames, strict=True)
    ]
    return Report(f"{look}, compared", result=result, frames=frames)


def _induction(args: argparse.Namespace) -> Report:
    """Train a small model, which needs no other and no text."""
    if args.text:
        raise InputError("study induction takes no text: it trains on random tokens")

    def tell(step: int, first: float, second: float) -> None:
        say(f"step {step}: loss of the first copy {first:.3f}, of the second {second:.3f}")

    steps = 750 if args.steps is None else args.steps
    return shown.induction_report(learn_induction(steps, args.seed or 0, tell=tell))


class _What(NamedTuple):
    function: Callable[[_Subject], Report]
    words: str
    flags: tuple[str, ...] = ()


WHATS = {
    "explain": _What(_explain, "what each operation does, in numbers", ("block",)),
    "tokens": _What(_tokens, "how well each token of a text was foreseen"),
    "lens": _What(
        _lens, "what the model would write if it ended after each sublayer", ("position",)
    ),
    "attention": _What(_attention, "where heads read", ("block", "head", "rollout")),
    "heads": _What(_heads, "what kind of head each is, and the loss without it", ("by",)),
    "attribute": _What(
        _attribute, "a logit as a sum of what each part adds", ("token", "against", "position")
    ),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt study`."""
    words = "; ".join(f"{name}: {what.words}" for name, what in WHATS.items())
    words += "; compare: two models, or with --run all that a run kept, before the text; "
    words += "induction: train a model of attention alone, and see how it learns to copy; "
    words += "norms: train many small ones, and see which learn with which layer norm"
    parser.add_argument("what", metavar="WHAT", help=words)
    words = "to look at; - or a pipe reads stdin. heads measures the loss on it, or on a file "
    words += "that it names; norms: files to train on, or shakespeare to fetch one (default)"
    parser.add_argument("text", nargs="*", metavar="TEXT", help=words)
    words = f"a folder, file, or name to fetch (default: {hub.DEFAULT}, which is built in)"
    add_flag(parser, "-m", "--model", metavar="NAME|PATH", help=words)
    add_shared(parser, "--tokenizer")
    words = "attention: of this block, or with --rollout up to it; explain: open this one"
    add_flag(parser, "--block", kind=int, help=words, low=0)
    add_flag(parser, "--head", kind=int, help="attention: of this head", low=0)
    words = "attention: how much of each token may flow through the blocks"
    add_flag(parser, "--rollout", kind=bool, help=words)
    words = "heads: what stands in the place of one that is left out: zero, or the mean of what it "
    words += "gives over all tokens, so that it adds what it always adds (default: zero)"
    add_flag(parser, "--by", kind=Kind(str, choices=("zero", "mean")), help=words)
    add_flag(parser, "--token", help="attribute: the piece whose logit is taken apart")
    add_flag(parser, "--against", help="attribute: the piece whose logit is taken away")
    words = "lens, attribute: behind which token of the text (default: the last)"
    add_flag(parser, "--position", kind=int, help=words, low=0)
    add_flag(parser, "--steps", kind=int, help="induction: of training (default: 750)", low=1)
    words = "induction: of the weights and the sequences (default: 0)"
    add_flag(parser, "-s", "--seed", kind=int, help=words, low=0, below=2**32)
    words = "norms: only twelve blocks, and one seed"
    add_flag(parser, "--quick", kind=bool, help=words)
    words = "norms: keep what is done here, and go on from it (default: norms.jsonl)"
    add_flag(parser, "-o", "--out", metavar="FILE", help=words)
    add_flag(parser, "--look", metavar="WHAT", help="compare: which look (default: lens)")
    words = "compare: all checkpoints that this run has kept (`train --keep-every N`)"
    add_flag(parser, "--run", metavar="RUN", help=words)
    add_report_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`tinygpt study`: show what one look finds."""
    if args.what == "compare":
        report = _compared(args)
    elif args.what == "induction":
        _refuse_flags(args, ("steps", "seed"))
        report = _induction(args)
    elif args.what == "norms":
        _refuse_flags(args, ("quick", "out"))
        report = norms.study(args.text, bool(args.quick), Path(args.out or "norms.jsonl"))
    elif args.what not in WHATS:
        raise unknown("study", args.what, [*WHATS, "compare", "induction", "norms"])
    else:
        what = WHATS[args.what]
        _refuse_flags(args, what.flags)
        text = _text(args.text, args.what)
        report = _look(what, args.model or hub.DEFAULT, text, args)
    show_report(report, args)
    return 0


def _refuse_flags(args: argparse.Namespace, known: tuple[str, ...]) -> None:
    """Refuse a flag that another look has."""
    every = {
        "steps",
        "seed",
        "quick",
        "out",
        *(flag for each in WHATS.values() for flag in each.flags),
    }
    for name in given(args, ["look", "run"]) if args.what != "compare" else ():
        raise InputError(f"{spelled(args)(name)} is for study compare")
    if args.what not in WHATS and args.model is not None:
        raise InputError(f"{spelled(args)('model')} is not for study {args.what}")
    for name in given(args, every):
        if name not in known:
            raise InputError(f"{spelled(args)(name)} is not for study {args.look or args.what}")


def _text(words: list[str], look: str) -> str:
    """What is looked at; of `heads`, which measures a loss, a file's name stands for its text."""
    if len(words) > 1:
        raise InputError(f"{show(words[1])} is one text too many: put a text in quotes")
    given = words[0] if words else None
    if given and look == "heads" and os.path.isfile(given):
        return read_prompt(None, given)
    return read_prompt(given)


def _look(what: _What, name: str, text: str, args: argparse.Namespace) -> Report:
    report = what.function(_subject(name, text, args))
    shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."
    return replace(report, about=f"The model {name}" + (f", and the text: {shown}" if text else ""))


def _subject(name: str, text: str, args: argparse.Namespace) -> _Subject:
    found = open_checkpoint(name)
    tokenizer, model = found.tokenizer(args.tokenizer), as_float32(found.load())
    return _Subject(model, tokenizer, text, args)
