"""`tinygpt doctor`: what this machine has, what would help it, and whether it computes right."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

import tinygpt
from tinygpt.checkpoints import hub
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.run_folder import NAMES, checkpoint_in, followed, steps
from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.commands.prompt import read_prompt
from tinygpt.commands.shown_as import add_report_flags, show_report
from tinygpt.config import GPTConfig
from tinygpt.data.dataset import Dataset
from tinygpt.errors import CheckpointError, InputError, one_line, reason, show
from tinygpt.generator import Generator
from tinygpt.model import GPT
from tinygpt.runtime import clang, device, graph, memory
from tinygpt.study.attribution import no_sum
from tinygpt.study.inside import as_float32
from tinygpt.study.proofs import prove
from tinygpt.study.shown import proofs_report
from tinygpt.training import run_files

# The small model that `--backends` runs, and the logits of its prompt. They come from the NumPy
# reference in the tests, and a test holds the two equal, so that no second model need live here.
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=64, vocab_size=8)
PROMPT = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5]
LOGITS = (
    -0.485781, -0.668749, 1.122855, -0.400923, -0.740921, 1.106752, -0.31341, -0.808186,
)  # fmt: skip
_TEXT = "Once upon a time there was a king who had three sons."  # for --prove, where none is given
TOLERANCE = 1e-4  # the largest error of a logit that counts as right, in float32


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    words = "a run or a checkpoint of one: whether its files are as they were written, only that; "
    words += "with --prove, a text"
    parser.add_argument("run", nargs="?", metavar="RUN|TEXT", help=words)
    words = "compute the logits of a text (- reads stdin) in each way that there is, and "
    words += "compare; with --json or --html FILE as such"
    add_flag(parser, "--prove", metavar="MODEL", help=words)
    add_shared(parser, "--tokenizer", help="of the model that --prove names (default: its own)")
    words = "also run a small model on each backend"
    add_flag(parser, "--backends", kind=bool, help=words)
    add_report_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; with --backends, also run the small model on each backend found.

    With a run or --prove, only what is found of the run or the model. The exit status is 1 when a
    backend computes wrong numbers, a run is damaged, or two ways differ. A backend that does not
    run, such as an OpenCL without its compiler, does no harm, and is only reported.
    """
    if args.backends and (args.prove or args.run):
        raise InputError("--backends tries a small model of its own: leave out --prove and the run")
    if not args.prove and (args.json or args.html):
        raise InputError("--json and --html show what --prove finds: name a model by it")
    if args.tokenizer and not args.prove:
        raise InputError("--tokenizer is for doctor --prove MODEL: name a model by it")
    if args.prove:
        return _report_proofs(args)
    if args.run:
        return _report_run(Path(args.run))
    devices = device.devices()
    for name, value in {**_versions(), **_machine(), **_caches()}.items():
        _show(name, value)
    for name, state in devices.items():
        _show("device", f"{name}: {state}")
    for advice in _advice():
        _show("advice", advice)
    if not args.backends:
        return 0
    outcomes = [_report_probe(target) for target in _targets(devices)]
    return 0 if True in outcomes and False not in outcomes else 1


def _report_proofs(args: argparse.Namespace) -> int:
    """Say how far apart the ways are in which a model's logits of a text can be computed."""
    text = read_prompt(args.run) or _TEXT
    found = open_checkpoint(args.prove)
    tokenizer, model = found.tokenizer(args.tokenizer), as_float32(found.load())
    proofs = prove(model, tokenizer.encode(text, True))
    about = f"The model {args.prove}, and the text: {text}"
    show_report(replace(proofs_report(proofs, no_sum(model.config)), about=about), args)
    return 0 if all(each.holds for each in proofs) else 1


def _report_run(path: Path) -> int:
    """Say whether a run, or the one checkpoint given, is as it was written.

    Raises:
        InputError: when it is neither.
    """
    checks: dict[str, Callable[[], str]] = {}
    if found := steps(path):
        checks = {name: partial(_check_name, path, name) for name in NAMES}
    elif ((one := followed(path)) / "state.json").is_file():
        found = [one]
    for step in found:
        checks[step.name] = partial(_check_step, step)
    if (path / "data" / "header.json").is_file():
        checks["data"] = partial(_check_tokens, path / "data")
    if not checks:
        raise InputError(f"{path} is no run: give the folder of one, or of one of its checkpoints")
    is_whole = True
    for what, check in checks.items():
        try:
            said = check()
        except CheckpointError as error:
            is_whole, said = False, f"DAMAGED: {error}"
        print(f"{what:<15}{one_line(said)}")
    return 0 if is_whole else 1


def _check_name(run: Path, name: str) -> str:
    found = checkpoint_in(run, name)
    return f"is {found.name}" if found else "is none yet"


def _check_step(folder: Path) -> str:
    has_digests = run_files.verify(folder)
    run_files.read_state(folder)
    return "as it was written" if has_digests else "older than digests are: it cannot be checked"


def _check_tokens(folder: Path) -> str:
    Dataset.open(folder)
    return "as it was written"


def _show(name: str, value: str) -> None:
    """One line of the report, whatever the environment holds."""
    print(f"{name:<13}{one_line(value)}")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = [f"{name} {version(name)}" for name in ("tinygrad", "numpy", "tiktoken")]
    return {
        "tinygpt": tinygpt.__version__,
        "with": ", ".join(packages),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }


def _machine() -> dict[str, str]:
    free = memory.available_memory_bytes()
    on_device = ""
    if device.default().split(":")[0] not in memory.SHARE_MEMORY:
        card = memory.device_memory_bytes()
        on_device = ", on the device " + (f"{card / 1e9:.1f} GB" if card else "unknown")
    chosen = os.environ.get("DEV") or f"unset, tinygrad takes {device.default()}"
    return {
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "memory": "unknown" if free is None else f"{free / 1e9:.1f} GB free{on_device}",
        "DEV": chosen if device.note is None else f"{chosen} ({device.note})",
        "clang": _clang(),
        "operations": device.describe_operations(),
        "steps": graph.describe(),
    }


def _clang() -> str:
    start = clang.command()
    if start is None:
        return clang.missing()
    found, cc = f"{' '.join(start)}, {clang.version(start) or 'which does not run'}", ""
    if (given := os.environ.get("CC")) and given != start[0]:
        cc = f" (CC is {show(given)})"
    return found + cc


def _caches() -> dict[str, str]:
    names = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")  # in the order in which tiktoken looks
    tiktoken = next(filter(None, map(os.environ.get, names)), None)
    return {
        "models": _size(hub.cache_folder() / "models"),
        "kernels": _size(device.kernel_cache()[0]),
        "vocabulary": _size(Path(tiktoken or Path(tempfile.gettempdir(), "data-gym-cache"))),
    }


def _size(path: Path) -> str:
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    total = sum(file.stat().st_size for file in files if file.is_file())
    return f"{path} ({total / 1e6:.1f} MB)" if path.exists() else f"{path} (empty)"


def _advice() -> list[str]:
    advice = []
    if clang.command() is None:
        advice.append(
            f"`{clang.advice()}` brings a clang, which makes kernels for the CPU 5 to 7 times "
            "faster: 100 MB to fetch, 400 MB on the disk (or install your system's clang)"
        )
    try:
        device.check()
    except InputError as error:
        advice.append(str(error))
    file, error = device.kernel_cache()
    if error:
        fact = f"it keeps no compiled kernels ({reason(error)})"
        locked = "locked" in str(error)
        first = f"end the program that has locked {file}" if locked else f"remove {file}"
        advice.append(f"{first}, or let CACHEDB name another file: {fact}")
    free = memory.available_memory_bytes()
    if free is not None and free < 2e9:
        advice.append("free some memory: GPT-2 124M needs about 1.3 GB to load")
    return advice or ["none: this machine is set up well"]


def _targets(devices: dict[str, str]) -> list[str]:
    """Every value of DEV worth trying: the devices found, and the CPU with each compiler."""
    found = [name for name, state in devices.items() if state.startswith("found")]
    targets = [name for name in found if name != "CPU"]
    targets += ["CPU"] if clang.command() else []
    return targets + [target for target in device.FALLBACKS if device.works(target)]


def _report_probe(target: str) -> bool | None:
    """Whether the backend computes right; None when it does not run.

    `probe` runs in a process of its own, because a broken driver may end it.
    """
    command = [sys.executable, "-c", "from tinygpt.commands.doctor import probe; probe()"]
    environment = {**os.environ, "DEV": target, "PYTHONPATH": os.pathsep.join(sys.path)}
    result, fault = None, "it takes too long"
    with suppress(subprocess.TimeoutExpired, ValueError, IndexError):
        run = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=300,
        )
        fault = shorten(run.stderr.strip().rpartition("\n")[2], 70) or f"exit {run.returncode}"
        result = json.loads(run.stdout.splitlines()[-1])
    if result is None:
        _show("backend", f"{target}: does not run here ({fault})")
        return None
    right = result["error"] <= TOLERANCE
    found = f"largest error of a logit {result['error']:.1e}"
    speed = f"{result['tokens_per_s']:.0f} tokens/s on a toy model"
    _show("backend", f"{target}: {'right' if right else 'WRONG'}, {found}, {speed}")
    return right


def probe() -> None:
    """Print, as JSON, the small model's error against the reference and its speed, on this DEV."""
    device.keep_stdout()
    model = toy()
    logits = model(Tensor([PROMPT])).numpy()[0, -1]
    steps = Generator(model).generate(PROMPT, max_new_tokens=30, temperature=0)
    next(steps), next(steps)
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    print(
        json.dumps(
            {
                "error": float(np.abs(logits - np.array(LOGITS)).max()),
                "tokens_per_s": count / (time.perf_counter() - start),
            }
        )
    )


def toy() -> GPT:
    """The small model, with weights from a formula: the same on every machine and version."""
    model = GPT(CONFIG, seed=None)
    for i, parameter in enumerate(get_state_dict(model).values()):
        value = np.sin(np.arange(parameter.numel()) * 1.7 + i).reshape(parameter.shape)
        value = 0.4 * value + (parameter.ndim == 1)
        parameter.replace(Tensor(value.astype(np.float32)).to(parameter.device)).realize()
    return model
