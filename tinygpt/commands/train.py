"""The command that trains: from scratch, from where a run stopped, or from any loadable model."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tinygpt.checkpoints.load_tokenizer import GENERATION, load_tokenizer, with_files
from tinygpt.checkpoints.open_checkpoint import Checkpoint, open_checkpoint
from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.commands.flags import add_flag, add_options, add_shared, given, spelled
from tinygpt.commands.interrupts import asking, handled
from tinygpt.commands.texts import KINDS, TEXTS, add_text_flags, prepared
from tinygpt.commands.together import facts
from tinygpt.config import GPTConfig
from tinygpt.data.dataset import Dataset
from tinygpt.errors import CheckpointError, InputError, say, visible
from tinygpt.model import GPT
from tinygpt.options import defaults
from tinygpt.runtime import device
from tinygpt.tokenizer.tokenizer import Tokenizer
from tinygpt.training import run_files, world
from tinygpt.training.lock import locked
from tinygpt.training.ranks import Alone, Ranks, count, need_even, settle
from tinygpt.training.run import Run
from tinygpt.training.settings import (
    MINUTES,
    RECIPES,
    SHAPE,
    TrainConfig,
    fine_tuning,
    read_settings,
    settings_of,
    usual_text,
)
from tinygpt.training.state import State
from tinygpt.training.step import sharing_weights
from tinygpt.training.world import World

# What --rank-timeout can be: a day is longer than a step takes.
_TIMEOUTS = {"above": 0, "most": 24 * 60 * 60}


def plan(
    settings: dict[str, Any], model: str | None, spelled: Callable[[str], str] = str
) -> tuple[TrainConfig, Checkpoint | None]:
    """All settings of a new run, and the model that it begins with, opened.

    Args:
        settings: fields of TrainConfig that differ from the defaults.
        model: name or folder of the model to begin with; None makes a new one.
        spelled: a setting's name -> what the user calls it, for an error.
    Raises:
        InputError: when the settings cannot work, or not with that model.
    """
    if model is None:
        return TrainConfig.of(settings, spelled=spelled), None
    for name in (*SHAPE, "init"):
        if name in settings and name != "block_size":
            raise InputError(
                f"{spelled(name)} describes a new model, but --model brings its own shape"
            )
    found = open_checkpoint(model)
    shape = {name: getattr(found.config, name) for name in SHAPE}
    defaults = fine_tuning(found.config.block_size, bool(settings.get("lora_rank")))
    config = TrainConfig.of(shape, defaults, settings, spelled=spelled)
    if config.block_size > (most := found.config.block_size):
        name = spelled("block_size")
        raise InputError(f"{name} is {config.block_size}, but the window of {model} has {most}")
    return config, found


def begin(
    folder: Path,
    data: Dataset,
    config: TrainConfig,
    base: Checkpoint | None = None,
    minutes: float | None = None,
    ranks: Alone | None = None,
    devices: int = 1,
) -> Run:
    """A new run, of a new model or from one that was opened.

    Raises:
        InputError: when the model and the data do not go together.
    """
    if base is None:
        gpt = GPT(config.gpt_config(data.header.vocab_size), config.seed, config.init)
        tokenizer = _sampled(data.tokenizer(), config.sample_temperature)
        return Run(folder, data, tokenizer, gpt, config, minutes, ranks, devices)
    tokenizer = base.tokenizer()
    data.check(base.config.vocab_size, tokenizer)
    gpt = base.load("float32")  # gradients need it, whatever the file holds
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), float(config.dropout))
    gpt = sharing_weights(gpt, replace(gpt.config, **dropouts))
    tokenizer = _sampled(tokenizer, config.sample_temperature)
    return Run(folder, data, tokenizer, gpt, config, minutes, ranks, devices)


def _sampled(tokenizer: Tokenizer, temperature: float) -> Tokenizer:
    """The tokenizer of checkpoints that are sampled from where nothing else is asked for.

    What a small model thinks likeliest goes round in circles. A model that brings its own way of
    sampling keeps it.
    """
    ends = tokenizer.ends
    says = {"bos_token_id": tokenizer.start, "eos_token_id": ends[0] if len(ends) == 1 else [*ends]}
    says |= {"do_sample": temperature > 0, "temperature": temperature or None}
    says = {name: value for name, value in says.items() if value not in (None, [])}
    return with_files(tokenizer, {GENERATION: says | tokenizer.kept.get(GENERATION, {})})


def start(
    folder: Path,
    data: Dataset,
    settings: dict[str, Any],
    model: str | None = None,
    minutes: float | None = None,
) -> Run:
    """A new run: `plan` and `begin` in one."""
    _need_new(folder)
    return begin(folder, data, *plan(settings, model), minutes)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt train`."""
    words = f"a folder of prepared tokens, or {TEXTS}"
    parser.add_argument("data", nargs="+", metavar="DATA", help=words)
    words = (
        f"of a text: {KINDS} (default: --model's or the recipe's; else bpe:1024, and char for a "
    )
    add_shared(parser, "--tokenizer", help=words + "short text)")
    add_shared(parser, "--plain")
    words = "the run's folder, made if need be"
    add_flag(parser, "-o", "--out", metavar="RUN", required=True, help=words)
    add_flag(parser, "--recipe", metavar="R", help=f"where to start: {', '.join(RECIPES)}")
    add_flag(parser, "--config", metavar="FILE", help="settings in TOML, instead of the recipe's")
    words = "fine-tune this model instead of a new one, by default at a tenth of the rate or less"
    add_flag(parser, "--model", metavar="NAME|PATH", help=words)
    words = "go on from RUN's last checkpoint, exactly; with --steps or --minutes for longer"
    add_flag(parser, "--resume", kind=bool, help=words)
    words = "make as many steps as fit into this time, with --resume from now on"
    add_flag(parser, "--minutes", kind=float, metavar="M", help=words, **MINUTES)
    words = "under mpirun, how many seconds one process waits for another before all end"
    add_flag(
        parser, "--rank-timeout", kind=float, metavar="S", default=60.0, help=words, **_TIMEOUTS
    )
    words = "share each batch out over so many devices of the backend (default: 1)"
    add_shared(parser, "--devices", help=words)
    add_text_flags(parser.add_argument_group("how a text is read"))
    words = (
        "by their fields' names, n_layer for --n-layer, these and those below are also the keys "
    )
    words += "of --config's file"
    group = parser.add_argument_group("the shape of a new model", words)
    add_options(group, TrainConfig, SHAPE)
    group = parser.add_argument_group("the training")
    add_options(group, TrainConfig, [name for name in defaults(TrainConfig) if name not in SHAPE])


def shares(args: argparse.Namespace) -> bool:
    """Whether the processes of `mpirun` share the work: they train one model."""
    return True


def run(args: argparse.Namespace) -> int:
    """`tinygpt train`: 0 at the end, 128 and the signal's number after a signal."""
    folder, others = Path(args.out), world.current
    if others:
        settle(others)
    if args.steps is not None and args.minutes is not None:
        raise InputError("--steps and --minutes both say how long to train: give one of them")
    device.check()
    ranks = Alone()
    if others:
        others.need_same(facts(args))
        ranks = Ranks(others, args.rank_timeout)
    if others and others.rank:
        return _train(_following(others, ranks, folder))
    with locked(folder):
        job = (_resumed if args.resume else _new)(args, folder, ranks)
        if others:
            told = {"model": asdict(job.trainer.model.config), "state": job.state.to_json()}
            told |= {"data": str(job.data.folder), "evaluated": job.evaluated}
            told |= {"tokens": _tokens(job.data)}
            others.exchange(told)
            _meet(job, others)
        return _train(job)


def _following(others: World, ranks: Ranks, folder: Path) -> Run:
    """The run that rank 0 has in its folder, in another rank, which needs only the tokens."""
    told = others.exchange({})[0]
    try:
        data = Dataset.open(told["data"])
    except CheckpointError as error:
        raise CheckpointError(f"{error} (each rank reads the prepared tokens there)") from error
    for name, ours in _tokens(data).items():
        if ours != (theirs := told["tokens"][name]):
            raise InputError(f"{data.folder}: the {name} is {ours}, in rank 0 {theirs}")
    state = State.of(told["state"])
    model = GPT(GPTConfig(**told["model"]), state.config.seed)
    job = Run(folder, data, data.tokenizer(), model, state.config, state.minutes, ranks)
    job.follow(state)
    job.evaluated = told["evaluated"]
    _meet(job, others)
    return job


def _tokens(data: Dataset) -> dict[str, str]:
    """What tells prepared tokens from others."""
    digests = {f"SHA-256 of {name}.bin": each.sha256 for name, each in data.header.splits.items()}
    return digests | {"type of the tokens": data.header.dtype.name}


def _meet(job: Run, others: World) -> None:
    """Once every rank has the run, give it the tensors of the first."""
    others.exchange({})
    job.ranks.take({**job.trainer.weights, **job.trainer.tensors})
    others.starting, others.doing = False, "the next step"
    others.advice = "--rank-timeout S waits longer, and --resume goes on from the last checkpoint"


def _new(args: argparse.Namespace, folder: Path, ranks: Alone) -> Run:
    """A new run. Where it is refused, the folder is left such that another try can be made."""
    _need_new(folder)
    filed = read_settings(args.config) if args.config else {}
    settings = settings_of(args.recipe) | filed | given(args, defaults(TrainConfig))
    config, base = plan(settings, args.model, spelled(args, elsewhere=filed))
    ranks.check_batch(config.batch_size)
    need_even(config.batch_size, args.devices, "devices")
    tokens = folder / "data"
    mark = tokens / ".by-train"  # what the user has prepared there himself is not touched

    def forget() -> None:
        if mark.is_file():
            shutil.rmtree(tokens, ignore_errors=True)

    forget()  # what a try has left that was killed before its first checkpoint
    had_tokens = tokens.exists()
    try:
        usual = usual_text(args.recipe, _text_bytes(args.data))
        source = prepared(args, tokens, usual | ({"tokenizer": base.tokenizer()} if base else {}))
        if source == tokens and not had_tokens:
            mark.touch()
        return begin(folder, Dataset.open(source), config, base, args.minutes, ranks, args.devices)
    except InputError:
        forget()
        raise


def _resumed(args: argparse.Namespace, folder: Path, ranks: Alone) -> Run:
    """The run that is in the folder, perhaps with more steps or time than it was to have."""
    fixed = {"recipe": args.recipe, "config": args.config, "model": args.model}
    for name, value in (fixed | given(args, defaults(TrainConfig))).items():
        if value is not None and name != "steps":
            flag = spelled(args)(name)
            raise InputError(
                f"{flag} cannot change a run: --resume goes on with its settings, but for --steps "
                "and --minutes"
            )
    last = run_files.newest(folder)
    data = Dataset.open(prepared(args, folder / "data", {"tokenizer": load_tokenizer(last)}))
    return Run.resume(folder, data, args.steps, args.minutes, last, ranks, args.devices)


def _train(job: Run) -> int:
    config, model = job.config, job.trainer.model.config
    where = job.trainer.model.placement.describe()
    if job.ranks.size > 1:
        where += f", {job.ranks.size} ranks, each of {count(device.cpu_count(), 'thread')}"
    say(f"{model.parameter_count:,} parameters on {where}")
    if job.finished:
        say(f"its {config.steps} steps are made: --steps N or --minutes M gives it more")

    def stop(number: int, _: object) -> None:
        if job.signal is not None and number == signal.SIGINT:  # asked twice: at once
            raise KeyboardInterrupt
        job.signal = job.signal or number

    # Ctrl-C always: to go on with a run that was stopped is easy. mpirun kills its processes half a
    # second after that; SIGUSR1 it passes on to them.
    own = {signal.SIGINT} if job.ranks.size == 1 else {signal.SIGINT, signal.SIGUSR1}
    with handled(stop, {*own, *asking()}):
        stopped, name = job.go(), job.folder
    if stopped is not None:
        saved = f"saved in {name}: --resume goes on" if job.counters.step else "nothing to save"
        say(f"stopped at step {job.counters.step}, {saved}")
        return 128 + stopped
    if job.best is not None:  # None where no validation loss was a number
        say(f"lowest validation loss {job.best['val_loss']:.4f}, in {name}/best")
    say(f"done: tinygpt generate --model {name}")
    if job.sample:
        print(visible(job.sample))
    return 0


def _need_new(folder: Path) -> None:
    if checkpoint_in(folder, "last"):
        raise InputError(
            f"{folder} already holds a run: pass --resume to go on with it, or another folder"
        )


def _text_bytes(data: list[str]) -> float:
    """How long the texts are; what is no file is taken to be long."""
    return sum(os.path.getsize(each) if os.path.isfile(each) else math.inf for each in data)
