"""Times two checkouts of this project against each other, taking turns in one run.

    python benchmarks/compare.py OLD NEW [--rounds 7] [--only NAMES] [--torch] [--json FILE]

OLD and NEW are folders, such as two `git worktree`s. Each work starts one process for either side
and keeps both until it is done. One of them is measured at a time; the rounds alternate, and so
does who begins. A number is the median over the rounds, and a ratio the time of NEW over that of
OLD: below 1 NEW is faster. Both must also give the same token ids, or losses.

The two dropout works compare NEW with itself, and --torch adds the loop of torch_loop.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

PACKAGES = ("tinygrad", "numpy", "torch")
WAIT_S = 120  # at most, for the machine to have nothing else to do
COLD_ROUNDS = 3  # at most, of the work that compiles everything anew
MAKE_GPT2 = (
    "import sys, tinygpt as t; "
    "t.GPT(t.GPTConfig.preset('gpt2'), seed=0).save_pretrained(sys.argv[1])"
)


@dataclass(frozen=True)
class Side:
    """One of the two programs that a work compares."""

    label: str
    checkout: Path
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Work:
    name: str
    unit: str  # what the time is of
    program: str  # one of compare_worker.PROGRAMS
    first: Side
    second: Side
    same: bool = True  # whether both must give the same


def works(old: Path, new: Path, gpt2: str) -> Iterator[Work]:
    """All works, in the order in which they are done."""

    def both(name: str, unit: str, program: str, **arguments: Any) -> Work:
        return Work(name, unit, program, Side("old", old, arguments), Side("new", new, arguments))

    def decode(name: str, model: str, dtype: str | None, count: int, **more: Any) -> Work:
        more = {"model": model, "dtype": dtype, "length": 16, "count": count, **more}
        return both(name, "token" if count > 1 else "prompt", "generate", **more)

    for dtype in ("float32", "float16", "int8"):
        yield decode(f"decode-{dtype}", gpt2, dtype, 49)
    yield decode("decode-of-8", gpt2, "float32", 49, batch_size=8)
    for length in (64, 512, 1000):
        yield decode(f"prefill-{length}", gpt2, "float32", 1, length=length)
    yield decode("built-in-greedy", "shakespeare", None, 401)
    yield decode("built-in-top-k", "shakespeare", None, 401, temperature=0.8, top_k=40)
    for size in ("small", "large"):
        plain = {"large": size == "large", "dropout": 0.0}
        dropped = {**plain, "dropout": 0.2}
        ours, ours_dropped = Side("new", new, plain), Side("new, dropout", new, dropped)
        torch = Side("torch", new, {**plain, "torch": True})
        torch_dropped = Side("torch, dropout", new, {**dropped, "torch": True})
        yield both(f"step-{size}", "step", "train", **plain)
        yield Work(f"dropout-{size}", "step", "train", ours, ours_dropped, same=False)
        yield Work(f"torch-{size}", "step", "train", torch, ours)
        yield Work(f"torch-dropout-{size}", "step", "train", torch, torch_dropped, same=False)
    for name in ("start-warm", "start-cold"):
        yield both(name, "start", "start", cold=name == "start-cold")


class Worker:
    """A process for one side of a work."""

    def __init__(self, program: str, side: Side, folder: Path) -> None:
        """
        Args:
            folder: for the compiled kernels of each checkout, and what a worker says on stderr.
        """
        self.said = folder / "stderr"
        checkout = str(side.checkout)
        cache = folder / f"{checkout.replace(os.sep, '-')}.db"
        settings = {"PYTHONPATH": checkout, "CACHEDB": str(cache)}
        script = Path(__file__).with_name("compare_worker.py")
        command = [sys.executable, script, program, json.dumps(side.arguments)]
        with open(self.said, "wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=-1, stdout=-1, stderr=errors, text=True, cwd=checkout,
                env={**os.environ, **settings},
                encoding="utf-8",
            )  # fmt: skip

    def turn(self, number: int) -> dict[str, Any]:
        time.sleep(0.05)  # threads of the other one may still look for work
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
        if reply := self.process.stdout.readline():
            return json.loads(reply)
        lines = self.said.read_text(errors="replace", encoding="utf-8").split("\n")
        raise RuntimeError(next(filter(str.strip, reversed(lines)), "it ended without a word"))

    def close(self) -> None:
        self.process.kill()
        with suppress(BrokenPipeError):
            self.process.communicate()


def compare(work: Work, rounds: int, folder: Path) -> dict[str, Any]:
    """Both sides of a work in turns, after one turn each that is not counted."""
    sides, workers = (work.first, work.second), []
    replies: tuple[list, list] = ([], [])
    try:
        for side in sides:
            own = folder / str(len(workers))
            own.mkdir(exist_ok=True)
            workers.append(Worker(work.program, side, own))
        for number in range(rounds + 1):
            for i in (0, 1) if number % 2 else (1, 0):
                replies[i].append(workers[i].turn(number))
    finally:
        for worker in workers:
            worker.close()
    times = [[reply["s"] for reply in column[1:]] for column in replies]
    ratios = [second / first for first, second in zip(*times, strict=True)]
    made = [[reply["made"] for reply in column] for column in replies]
    peaks = [max(reply["peak_bytes"] or 0 for reply in column) for column in replies]
    return {
        "labels": [side.label for side in sides],
        "unit": work.unit,
        "median_s": [median(column) for column in times],
        "rounds_s": times,
        "ratio": median(times[1]) / median(times[0]),
        "ratio_of_rounds": [min(ratios), max(ratios)],
        "peak_bytes": peaks,
        "same": difference(*made) if work.same else "",
    }


def difference(first: list, second: list) -> str:
    """How far two lists of turns of what came out agree: "equal", or what differs."""
    if first == second:
        return "equal"
    try:
        a, b = np.array(first), np.array(second)
    except ValueError:
        return "different lengths"
    if a.dtype.kind == "f":
        return f"{np.abs(a - b).max():.1e}"
    return f"{(a != b).sum()} of {a.size} differ"


def conditions(old: Path, new: Path, rounds: int) -> dict[str, Any]:
    """The machine and what runs on it, after waiting for a load below 1 for up to WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while (load := os.getloadavg()[0]) >= 1 and time.monotonic() < deadline:
        time.sleep(1)
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(x for x in lines if x.startswith("model name")).partition(": ")[2]
    packages = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)

    def commit(checkout: Path) -> str:
        described = ("git", "describe", "--always", "--dirty", "--exclude=*")
        return subprocess.run(
            described,
            cwd=checkout,
            capture_output=True,
            encoding="utf-8",
        ).stdout.strip()

    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commits": {"old": commit(old), "new": commit(new)},
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": os.environ.get("DEV", ""),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(load, 2),
        "packages": packages,
        "rounds": rounds,
    }


def row(name: str, one: dict[str, Any]) -> str:
    """A work's result as a row of the table."""
    first, second = (f"{1e3 * seconds:.4g}" for seconds in one["median_s"])
    labels = "" if one["labels"] == ["old", "new"] else f" ({' / '.join(one['labels'])})"
    low, high = one["ratio_of_rounds"]
    peaks = " / ".join(f"{peak / 1e6:.0f}" for peak in one["peak_bytes"])
    ratio = f"{one['ratio']:.2f} | {low:.2f} to {high:.2f}"
    cells = (f"{name}{labels}", f"a {one['unit']}", first, second, ratio, one["same"], peaks)
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: 7)")
    parser.add_argument("--only", metavar="NAMES", help="works whose name has one of these, a,b,c")
    parser.add_argument("--torch", action="store_true", help="training also beside torch's loop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    args = parser.parse_args()
    old, new = args.old.resolve(), args.new.resolve()
    with tempfile.TemporaryDirectory(prefix="tinygpt-compare-") as temporary:
        folder = Path(temporary)
        chosen = [
            work
            for work in works(old, new, str(folder / "gpt2"))
            if (args.torch or not work.name.startswith("torch"))
            and (not args.only or any(part in work.name for part in args.only.split(",")))
        ]
        if not chosen or args.rounds < 1:
            parser.error("no work has such a name" if not chosen else "--rounds must be 1 or more")
        if any(work.name.startswith(("decode", "prefill")) for work in chosen):
            command = [sys.executable, "-c", MAKE_GPT2, str(folder / "gpt2")]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(new)})
        result = {"conditions": conditions(old, new, args.rounds), "works": {}, "failures": {}}
        print(json.dumps(result["conditions"]), flush=True)
        head = ("work", "time of", "old, ms", "new, ms", "new / old", "in the rounds", "results")
        print(f"\n| {' | '.join((*head, 'peak MB'))} |\n{'|---' * 8}|", flush=True)
        for work in chosen:
            rounds = min(args.rounds, COLD_ROUNDS) if work.name == "start-cold" else args.rounds
            try:
                result["works"][work.name] = compare(work, rounds, folder)
                print(row(work.name, result["works"][work.name]), flush=True)
            except RuntimeError as error:
                result["failures"][work.name] = str(error)
                print(f"| {work.name} | failed: {error} | | | | | | |", flush=True)
    print(f"\nload after: {os.getloadavg()[0]:.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
