"""Compiles the kernels of a captured step side by side.

tinygrad compiles one kernel after the other, each in a process of clang that it waits for. Here the
processes of a step's kernels run side by side, and while tinygrad still writes the next kernel.
What tinygrad itself does stays in one thread, because its rewriting is not made for several.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tinygrad import Device, UOp
from tinygrad.codegen import (
    ALLOW_TF32,
    DISABLE_FAST_IDIV,
    EMULATED_DTYPES,
    IMAGE,
    NOLOCALS,
    NOOPT,
    TRANSCENDENTAL,
    USE_TC,
    full_rewrite_to_sink,
    pm_to_program,
    to_program_cache,
)
from tinygrad.device import Compiler
from tinygrad.engine.realize import compile_linear
from tinygrad.helpers import BEAM, CPU_COUNT, DEBUG, getenv
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import Ops, ProgramInfo, graph_rewrite

from tinygpt.runtime import disk_cache

# Compiled code by the digest of its text and its compiler. tinygrad's cache on disk may be off,
# damaged, or opened by another thread, and no text should be compiled twice even then.
_compiled: dict[bytes, bytes] = {}


class _Batch(Compiler):
    """A compiler in tinygrad's eyes that only takes orders, and has them carried out meanwhile."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        super().__init__()
        self.compiler: Any = Device["CPU"].compiler  # clang's, which alone has `args`
        self.orders: dict[bytes, tuple[str, Future[bytes]]] = {}  # by digest, in their order
        self.executor = executor

    def compile_cached(self, source: str) -> bytes:
        """The digest by which `finish` gives the compiled code."""
        kind = f"{type(self.compiler).__name__} {self.compiler.args}".encode()
        digest = hashlib.sha256(kind + source.encode()).digest()
        if digest not in self.orders and digest not in _compiled:
            table = self.compiler.cachekey
            found = disk_cache.read(table, source) if table else None
            if isinstance(found, bytes) and found:
                _compiled[digest] = found
            else:
                try:
                    order = self.executor.submit(self.compiler.compile, source)
                except RuntimeError:  # the main thread has ended, after which none is started
                    order = Future()
                    order.set_result(self.compiler.compile(source))
                self.orders[digest] = source, order
        return digest

    def finish(self) -> None:
        """Wait for all orders, and keep what they gave."""
        for digest, (source, order) in self.orders.items():
            _compiled[digest] = order.result()
            if self.compiler.cachekey:
                disk_cache.write(self.compiler.cachekey, source, _compiled[digest])


def compile_all(sources: Iterable[str]) -> list[bytes]:
    """C texts compiled for the CPU device, side by side.

    Raises:
        subprocess.CalledProcessError: where clang refuses one.
    """
    with ThreadPoolExecutor(CPU_COUNT.value) as executor:
        batch = _Batch(executor)
        digests = [batch.compile_cached(source) for source in sources]
        batch.finish()
    return [_compiled[digest] for digest in digests]


def compile_calls(linear: UOp, also: Iterable[str] = ()) -> UOp:
    """As tinygrad's `compile_linear`, for calls of the CPU devices that clang compiles.

    Args:
        linear: calls of SINK and PROGRAM, among others.
        also: C texts to compile besides, for `compile_all` to find them done.
    """
    beam = getenv("JITBEAM", BEAM.value)
    if beam or DEBUG >= 4:  # a search runs what it compiles; DEBUG shows kernel after kernel
        return compile_linear(linear, beam=beam)
    real = Device["CPU"].renderer
    with ThreadPoolExecutor(CPU_COUNT.value) as executor:
        batch = _Batch(executor)
        renderer = copy.copy(real)
        renderer.compiler = batch
        for source in also:
            batch.compile_cached(source)
        programs: dict[UOp, UOp] = {}
        for call in linear.src:
            ast = call.src[0]
            if ast.op in (Ops.SINK, Ops.PROGRAM) and ast not in programs:
                made = to_program_cache.get(_key(ast, real))
                programs[ast] = _to_program(ast, renderer) if made is None else made
        batch.finish()
    for ast, program in programs.items():
        if len(program.src) > 4 and program.src[4].arg in _compiled:
            binary = UOp(Ops.BINARY, arg=_compiled[program.src[4].arg])
            program = program.replace(src=(*program.src[:4], binary))
            programs[ast] = to_program_cache[_key(ast, real)] = program
    calls = (
        call.replace(src=(programs.get(call.src[0], call.src[0]), *call.src[1:]))
        for call in linear.src
    )
    return linear.replace(src=tuple(calls))


def _to_program(ast: UOp, renderer: Renderer) -> UOp:
    """As tinygrad's `do_to_program`, which forbids all threads to use a device meanwhile."""
    program = ast
    if ast.op is Ops.SINK:
        sink = full_rewrite_to_sink(ast, renderer, optimize=ast.tag is None)
        device = UOp(Ops.DEVICE, arg=renderer.target.device)
        program = UOp(Ops.PROGRAM, src=(sink, device), arg=ProgramInfo.from_sink(sink))
    if not isinstance(program.arg, ProgramInfo):
        program = program.replace(arg=ProgramInfo.from_sink(program.src[0]))
    return graph_rewrite(program, pm_to_program, ctx=renderer)


def _key(ast: UOp, renderer: Renderer) -> tuple:
    """The key of tinygrad's `to_program`, which keeps what it has made."""
    settings = (
        NOOPT, EMULATED_DTYPES, NOLOCALS, USE_TC, IMAGE, DISABLE_FAST_IDIV, TRANSCENDENTAL,
        ALLOW_TF32,
    )  # fmt: skip
    return ast.key, type(renderer), renderer.target, *[x.value for x in settings]
