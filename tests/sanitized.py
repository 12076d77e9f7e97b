"""Each C operation as a program of its own, which one of clang's sanitizers watches: threads of
pthread call it on memory of just the sizes that the comments beside its parameters tell.

A program takes a seed and sizes as its arguments, so that one serves many shapes.
"""

from __future__ import annotations

import functools
import random
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tinygpt.runtime import launch

# ThreadSanitizer goes with no other; MemorySanitizer sees numbers that nobody wrote.
SANITIZERS = ("thread", "address,undefined", "memory")
# What whole numbers in memory are drawn from, both ends included: also ids that no table has.
_INTS = {
    "ids": "-1, V",
    "targets": "-1, V",
    "slots": "B - 1 - i, B - 1 - i",  # no two rows have the same
    "starts": "-1, S - T + 1",
    "draws": "0, 0x7fffffff",
}
_NUMBERS = {
    "float": "random_in(-60, 60) / 16.0f",
    "unsigned": "random_in(0, 0xffffffff)",
    "u64": "(u64)random_in(0, 0x7fffffff) << 32 | random_in(0, 0xffffffff)",
}
_WEIGHTS = {"signed char": "random_in(-127, 127)", "unsigned short": "0xbf80 - random_in(0, 9)"}
# What is written, but read before; and what has room that is neither.
_BOTH = ("totals", "parameter", "mean", "square", "keys", "values")
_SCRATCH = ("scratch", "scores", "probs")
_HARNESS = """
#undef select
#include <pthread.h>
#include <stdlib.h>
static unsigned long drawn;
static long random_in(long low, long high) {{
  drawn = drawn * 6364136223846793005ul + 1442695040888963407ul;
  return low + (long)(drawn >> 33) % (high - low + 1);
}}
#if __has_feature(memory_sanitizer)
void __msan_check_mem_is_initialized(const void *, unsigned long);
#else
#define __msan_check_mem_is_initialized(p, size)
#endif
enum {{ threads = 3 }};
#define min MIN
#define H n_head
{declared}
static void *work(void *id) {{
  int core_id = {core_id};
  {function}({given});
  return 0;
}}
int main(int argc, char **argv) {{
  pthread_t started[threads];
  drawn = atol(*++argv);
  {read}
  {allocated}
  for (long i = 0; i < threads; i++) pthread_create(started + i, 0, work, (void *)i);
  for (int i = 0; i < threads; i++) pthread_join(started[i], 0);
  {checked}
}}
"""


@functools.cache
def works(sanitizer: str) -> bool:
    """Whether clang links it here."""
    if not shutil.which("clang"):
        return False
    command = ["clang", f"-fsanitize={sanitizer}", "-x", "c", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=b"int main(void) { }", capture_output=True).returncode == 0


def build(
    file: Path,
    function: str,
    sanitizer: str,
    program: Path,
    macros: Mapping[str, object] | None = None,
    core_id: str = "(int)(long)id",
) -> None:
    """Compile the program of an operation."""
    macros = {"WEIGHT": "float", "ACTIVATION": "gelu_tanh", **(macros or {})}
    numbers = _NUMBERS | {"WEIGHT": _WEIGHTS.get(str(macros["WEIGHT"]), _NUMBERS["float"])}
    comments = _comments(file, function)
    declared, read, allocated, checked, given = [], [], [], [], []
    size = ""
    for p in launch.signature(file, function):
        given.append(p.name if p.pointer or p.type != "float" else "0.5f")
        if p.name in ("core_id", "threads") or given[-1] == "0.5f":
            continue
        declared.append(f"static {p.type} {'*' * p.pointer}{p.name};")
        if not p.pointer:
            read.append(f"{p.name} = atol(*++argv);")
            continue
        comment = comments.get(p.name, "")
        if shape := re.match(r"\(((?:[^()]|\([^()]*\))*?),?\)", comment):  # else that of the last
            sizes = re.split(r", (?![^()]*\))", shape[1])
            size = " * ".join(f"(long)({each})" for each in sizes)
        fill = f"{p.name} = malloc({size} * sizeof *{p.name});"
        if p.const or p.name in _BOTH:
            draw = f"random_in({_INTS[p.name]})" if p.type == "int" else numbers[p.type]
            fill += f" for (long i = 0; i < {size}; i++) {p.name}[i] = {draw};"
        elif p.name not in _SCRATCH:
            test = f"__msan_check_mem_is_initialized({p.name}, {size} * sizeof *{p.name});"
            checked.append(f"if ({p.name}) {{ {test} }}")
        allocated.append(f"if (random_in(0, 2)) {{ {fill} }}" if "absent" in comment else fill)
    if "n_head" in comments:
        declared.append("#define C (n_head * D)")
    body = _HARNESS.format(
        declared="\n".join(declared), core_id=core_id, function=function, given=", ".join(given),
        read=" ".join(read), allocated="\n  ".join(allocated), checked=" ".join(checked),
    )  # fmt: skip
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    source = "\n".join([*lines, "#define select vec_select", launch.source(file), body])
    command = ["clang", "-O0", "-g", f"-fsanitize={sanitizer}", "-march=native", "-w", "-x", "c"]
    command += ["-", "-pthread", "-o", str(program)]
    subprocess.run(command, input=source.encode(), check=True)


def _comments(file: Path, function: str) -> dict[str, str]:
    """What is said beside each parameter, "" for nothing."""
    found = re.search(rf"static void {function}\((.*?)\) {{$", launch.source(file), re.M | re.S)
    assert found
    pattern = r"\**(\w+)(?:,|$)(?:[ ]*// (.*))?"
    return dict(re.findall(pattern, found[1], re.M))


def random_sizes(draw: random.Random, few: bool) -> dict[str, int]:
    """Sizes that an operation may be called with.

    Args:
        few: so few rows as `linear.c` and `attention.c` have a way of their own for.
    """
    sizes = {
        name: draw.choice([draw.randint(1, 9), draw.randint(1, 40), draw.randint(1, 300)])
        for name in ("n", "row_size", "M", "N", "K", "R", "C", "V", "count", "T")
    }
    sizes |= {name: draw.randint(1, 3) for name in ("B", "batch", "n_head")}
    sizes |= {name: draw.randint(0, 1) for name in ("a_transposed", "b_transposed")}
    sizes |= {"D": draw.randint(1, 80), "place": draw.randint(0, 99), "threshold": 2**30}
    sizes |= {"row": 0, "few": 0}
    if few:
        sizes["few"] = sizes["M"] = draw.randint(1, 16)
    sizes["S"] = sizes["T"] + draw.randint(0, 70)
    sizes["start_pos"] = draw.randint(0, sizes["S"] - sizes["T"])
    return sizes


def run(program: Path, file: Path, function: str, sizes: Mapping[str, int], seed: int = 0) -> str:
    """What the sanitizer says of a call, "" for nothing."""
    if function == "attention_few":  # one query of several, or as many as there are tokens
        T = sizes["T"]
        own = {"M": 1, "row": seed % T} if seed % 2 else {"M": min(8, T), "T": min(8, T)}
        sizes = {**sizes, **own}
    passed = [
        str(sizes[p.name])
        for p in launch.signature(file, function)
        if not p.pointer and p.type != "float" and p.name not in ("core_id", "threads")
    ]
    command = [str(program), str(seed), *passed]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    return done.stderr if done.stderr or not done.returncode else f"exit status {done.returncode}"
