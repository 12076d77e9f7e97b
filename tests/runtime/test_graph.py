"""The table of calls against the same calls one by one, on random graphs and several threads."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tinygpt.runtime import graph, placing, thread_pool
from tinygpt.runtime.compiling import compile_all
from tinygpt.runtime.graph import Access, Call, Graph

pytestmark = pytest.mark.skipif(graph.missing() is not None, reason=str(graph.missing()))

# Each mixes what it reads into what it writes, so that another order gives other numbers. The
# threads of one call share its elements out; `delay` makes some threads late.
KERNELS = """
#define MIX(x, y) ((x) * 1664525u + (y) + 1013904223u)
static void wait_a_little(int turns) { for (volatile int i = 0; i < turns; i++) {} }
void mix_N(unsigned *out, SOURCES int size, int threads, int delay, int core_id) {
  wait_a_little(delay * (core_id % 2 ? 1 : 3));
  for (int i = core_id; i < size; i += threads) {
    unsigned x = PLUS ? out[i] : 7;
    ADD
    out[i] = x;
  }
}
"""
SIZE = 48  # elements of a part; buffers hold three parts


def kernel(sources: int, adds: bool) -> str:
    """A kernel of so many sources; with `adds` it reads what it writes over."""
    parameters = "".join(f"const unsigned *s{i}, " for i in range(sources))
    # From the far end, so that a thread reads what others have written.
    lines = " ".join(f"x = MIX(x, s{i}[size - 1 - i]);" for i in range(sources))
    text = KERNELS.replace("SOURCES ", parameters).replace("ADD", lines)
    entry = text.index("void mix_N")
    text = text[:entry].replace("static void", "static inline void") + text[entry:]
    return text.replace("PLUS", str(int(adds))).replace("mix_N", f"mix_{sources}_{int(adds)}")


@pytest.fixture(scope="module")
def kernels() -> list[tuple[int, bool, object, int]]:
    """(how many sources, whether it reads what it writes, program, address) of each."""
    kinds = [(sources, adds) for sources in (1, 2, 3) for adds in (False, True)]
    binaries = compile_all([kernel(*kind) for kind in kinds])
    return [(*kind, *thread_pool.load(b, "mix")) for kind, b in zip(kinds, binaries, strict=True)]


def random_calls(rng: random.Random, kernels, count: int, buffers: int, most: int) -> list[Call]:
    calls = []
    while len(calls) < count:
        number = rng.randrange(len(kernels))
        sources, adds, *_ = kernels[number]
        threads = rng.choice([1, 1, most, rng.randint(1, most)])
        # Parts of buffers that lie at any element, so that they overlap in part.
        places = [(rng.randrange(buffers), rng.randrange(2 * SIZE)) for _ in range(sources + 1)]
        out = places[0]
        # A kernel may not read what another of its threads writes.
        if any(b == out[0] and abs(at - out[1]) < SIZE for b, at in places[1:]):
            continue
        accesses = [
            Access(b, 4 * at, 4 * SIZE, i > 0 or adds, i == 0) for i, (b, at) in enumerate(places)
        ]
        size = rng.choice([SIZE, "size"])
        delay = rng.choice([0, 0, 0, 500])
        values = (size, threads, delay, None)
        work = rng.choice([0, 1e4, 1e6])
        calls.append(Call(f"call {len(calls)}", number, tuple(accesses), values, threads, work))
    return calls


def one_by_one(calls, kernels, memory: list[np.ndarray], size: int) -> None:
    """The same kernels called from Python in their order, each thread's part in turn."""
    for call in calls:
        address = kernels[call.function][3]
        pointers = [ctypes.c_void_p(memory[a.buffer].ctypes.data + a.offset) for a in call.accesses]
        function = ctypes.CFUNCTYPE(None)(address)
        for core in range(call.threads):
            known = {"size": size, None: core}
            function(*pointers, *(ctypes.c_int(known.get(v, v)) for v in call.values))


def check_random_graph(seed: int, kernels, most: int) -> Graph:
    rng = random.Random(seed)
    buffers = rng.randint(2, 8)
    inputs = rng.randint(0, min(2, buffers - 1))
    calls = random_calls(rng, kernels, rng.randint(1, 24), buffers, most)
    numbers = np.random.default_rng(seed)
    memory = [numbers.integers(2**32, size=3 * SIZE, dtype=np.uint32) for _ in range(buffers)]
    expected = [array.copy() for array in memory]
    addresses = [array.ctypes.data for array in memory]
    functions = [address for *_, address in kernels]
    made = Graph(calls, functions, addresses, inputs, memory, threads=most)
    for turn in range(2):
        size = SIZE - turn
        with thread_pool.running:
            for i in range(inputs):  # the second time somewhere else
                memory[i] = memory[i].copy()
                made.set_address(i, memory[i].ctypes.data)
            made.set_variable("size", size)
            made.run()
        one_by_one(calls, kernels, expected, size)
        for i, (got, want) in enumerate(zip(memory, expected, strict=True)):
            assert np.array_equal(got, want), (seed, most, turn, i, made.placed)
    return made


@pytest.mark.parametrize("most", range(1, 9))
def test_random_graphs(kernels, most):
    made = [check_random_graph(1000 * most + seed, kernels, most) for seed in range(40)]
    if most > 1:  # threads did meet, and also did not where there was no need
        meets = [p.meets for g in made for p in g.placed]
        assert 0 < sum(meets) < len(meets)


@pytest.mark.slow
def test_thousands_of_random_graphs(kernels):
    for seed in range(5000):
        check_random_graph(100_000 + seed, kernels, seed % 8 + 1)


def test_a_missing_meeting_would_be_noticed(kernels, monkeypatch):
    """The random graphs do find a table without meetings to be wrong."""
    real = graph.place_calls

    def blind(calls, spaces, most):
        return [placed._replace(meets=False) for placed in real(calls, spaces, most)]

    monkeypatch.setattr(graph, "place_calls", blind)

    def check() -> None:
        for seed in range(300):
            check_random_graph(seed, kernels, 4)

    with pytest.raises(AssertionError):
        check()


def test_more_arguments_than_the_runner_passes():
    count = graph.MOST_ARGUMENTS + 45
    names = [f"v{i}" for i in range(count)]
    total = " + ".join(f"{i + 1}LL * v{i}" for i in range(count))
    parameters = ", ".join(f"int {name}" for name in names)
    text = f"void many(long long *out, {parameters}, int core_id) {{ out[core_id] = {total}; }}"
    program, address = thread_pool.load(compile_all([text])[0], "many")
    out = np.zeros(2, np.int64)
    values = (*range(-3, count - 4), "last", None)
    calls = [Call("many", 0, (Access(0, 0, 16, False, True),), values, threads=2)]
    made = Graph(calls, [address], [out.ctypes.data], 0, (out, program))
    with thread_pool.running:
        made.set_variable("last", 5)
        made.run()
    want = sum((i + 1) * v for i, v in enumerate([*range(-3, count - 4), 5]))
    assert out.tolist() == [want, want]


def test_careful_runs_calls_that_overlap_in_order(kernels):
    """An input moved onto another buffer makes a dependency that the table does not know of."""
    rng = random.Random(3)
    for seed in range(40):
        memory = [np.arange(3 * SIZE, dtype=np.uint32) + 1000 * i for i in range(4)]
        calls = random_calls(rng, kernels, 12, 4, 4)
        calls = [c for c in calls if not {0, 1} <= {a.buffer for a in c.accesses}]
        expected = [array.copy() for array in memory]
        expected[0] = expected[1]
        addresses = [array.ctypes.data for array in memory]
        made = Graph(calls, [k[3] for k in kernels], addresses, 1, memory, threads=4)
        with thread_pool.running:
            made.set_address(0, memory[1].ctypes.data)
            made.set_variable("size", SIZE)
            made.run(careful=True)
        one_by_one(calls, kernels, expected, SIZE)
        assert all(map(np.array_equal, memory[1:], expected[1:])), seed


def test_many_python_threads_run_tables_of_their_own(kernels):
    errors = []

    def work(number: int) -> None:
        try:
            for seed in range(20):
                check_random_graph(5000 + 20 * number + seed, kernels, 3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_threads_end_and_start_again(kernels):
    check_random_graph(1, kernels, 4)
    assert "tinygpt-runner-1" in {t.name for t in threading.enumerate()}
    thread_pool.stop()
    assert not [t for t in threading.enumerate() if t.name.startswith("tinygpt-runner")]
    check_random_graph(2, kernels, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_starts_threads_of_its_own(kernels):
    check_random_graph(7, kernels, 3)
    with thread_pool.running:  # as another thread may hold it at that moment
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for seed in range(20):
                    check_random_graph(seed, kernels, 3)
                status = 0
            finally:
                os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    check_random_graph(8, kernels, 3)


def test_it_says_how_steps_are_started(monkeypatch):
    assert "threads of our own" in graph.describe()
    monkeypatch.setenv("TINYGPT_GRAPH", "0")
    assert graph.describe() == "tinygrad starts each kernel (TINYGPT_GRAPH=0)"
    monkeypatch.delenv("TINYGPT_GRAPH")
    monkeypatch.setattr(graph.platform, "system", lambda: "Windows")
    assert graph.missing() == "no threads of our own on Windows"
    monkeypatch.setattr(graph.platform, "system", lambda: "Linux")
    monkeypatch.setattr(graph.platform, "machine", lambda: "riscv64")
    assert graph.missing() == "no calling convention for riscv64"


def test_a_process_ends_while_threads_wait():
    script = "from tinygpt.runtime import thread_pool; print(thread_pool.start_threads(3).count)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr


# What follows compiles runner.c by itself.

RUNNER = Path(graph.__file__).with_name("runner.c")
HARNESS = Path(__file__).with_name("harness.c")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The harness with ThreadSanitizer, by whichever compiler can link it."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "empty.c").write_text("int main(void) { return 0; }\n", encoding="utf-8")
    flags = ["-fsanitize=thread,signed-integer-overflow", "-g", "-O1", "-pthread"]
    for compiler in filter(shutil.which, ("clang", "gcc")):
        build = [compiler, *flags, "-o", "empty", "empty.c"]
        if subprocess.run(build, cwd=folder, capture_output=True).returncode:
            continue
        if subprocess.run([folder / "empty"], capture_output=True).returncode:
            continue  # it links, but this kernel's memory does not suit it
        runner = ["-DSPINS=20", f"-I{RUNNER.parent}", str(HARNESS)]
        subprocess.run([compiler, *flags, *runner, "-o", "harness"], cwd=folder, check=True)
        return folder / "harness"
    pytest.skip("no compiler links ThreadSanitizer")


def sanitize(harness: Path, tables: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([harness], input="".join(tables), capture_output=True, encoding="utf-8")


def random_table(seed: int, meets: bool = True) -> str:
    """A table as numbers, whose functions and buffers are the harness's own."""
    rng = random.Random(seed)
    kinds = [(sources, adds) for sources in (1, 2, 3) for adds in (False, True)]
    most, buffers = rng.randint(1, 6), rng.randint(2, 8)
    calls = random_calls(rng, kinds, rng.randint(1, 30), buffers, most)
    placed = placing.place_calls(calls, [(i, 0) for i in range(buffers)], most)
    lines = [f"{most} {len(calls)}"]
    for call, (first, meet) in zip(calls, placed, strict=True):
        sources, adds = kinds[call.function]
        parts = " ".join(f"{a.buffer} {a.offset // 4}" for a in call.accesses)
        lines.append(f"{sources} {int(adds)} {first} {call.threads} {int(meet and meets)} {parts}")
    return "\n".join(lines) + "\n"


def test_threads_never_touch_the_same_memory_unordered(sanitized):
    done = sanitize(sanitized, [random_table(seed) for seed in range(150)])
    assert (done.returncode, done.stderr[:3000]) == (0, "")
    assert done.stdout.split() == ["150", "tables"]


def test_the_sanitizer_notices_a_missing_meeting(sanitized):
    done = sanitize(sanitized, [random_table(seed, meets=False) for seed in range(50)])
    assert "data race" in done.stderr


@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
@pytest.mark.parametrize(
    "target",
    [
        "x86_64-linux-gnu",
        "x86_64-none-unknown-elf",
        "aarch64-linux-gnu",
        "arm64-none-unknown-elf",
        "arm64-apple-macos",
    ],
)
def test_the_runner_compiles_for(target, tmp_path):
    flags = ["-O2", "-fPIC", "-ffreestanding", "-nostdlib", "-Wall", "-Wextra", "-Werror"]
    unused = ["-Wno-unused-function"]  # what PROFILE alone uses
    for defines in (["-DSPINS=5"], ["-DSPINS=5", "-DPROFILE"]):
        made = tmp_path / "runner.o"
        command = ["clang", f"--target={target}", *flags, *unused, *defines, "-c", str(RUNNER)]
        subprocess.run([*command, "-o", str(made)], check=True)
        symbols = shutil.which("nm") and subprocess.run(
            ["nm", "-u", str(made)],
            capture_output=True,
            encoding="utf-8",
        )
        if symbols and symbols.returncode == 0:
            assert not symbols.stdout.split(), "it needs a function that nobody gives it"


@pytest.mark.skipif(
    not all(map(shutil.which, ("clang", "ld.lld", "qemu-aarch64"))), reason="needs qemu and lld"
)
def test_it_passes_arguments_on_as_arm_wants_them(tmp_path):
    """A table of one thread on an emulated aarch64, with few and with many arguments."""
    source, made = Path(__file__).with_name("arguments.c"), tmp_path / "arguments"
    flags = ["--target=aarch64-linux-gnu", "-O1", "-ffreestanding", "-nostdlib", "-static"]
    flags += ["-fuse-ld=lld", "-DSPINS=5", f"-I{RUNNER.parent}"]
    subprocess.run(["clang", *flags, str(source), "-o", str(made)], check=True)
    assert subprocess.run(["qemu-aarch64", str(made)]).returncode == 0


@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
def test_it_passes_arguments_on_as_this_machine_wants_them(tmp_path):
    source, made = Path(__file__).with_name("arguments.c"), tmp_path / "arguments"
    flags = ["-O1", "-DHOSTED", "-DSPINS=5", f"-I{RUNNER.parent}"]
    subprocess.run(["clang", *flags, str(source), "-o", str(made)], check=True)
    assert subprocess.run([made]).returncode == 0
