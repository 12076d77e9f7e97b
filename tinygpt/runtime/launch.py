"""Calls of C functions as kernels in a graph of tensors, checked against their C signatures.

A C file holds `static void name(...)` functions: pointers to what they read (`const`) and write,
then numbers. tinygrad's own clang compiles the text, and its own runtime (or `graph`) starts it
like any kernel. Sizes are passed in memory, so that one compiled text serves them all.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

from tinygpt.runtime import buffers

# How C names the types of numbers in memory. A matrix of weights may have any of WEIGHTS; C calls
# its type WEIGHT. bfloat16, the upper half of a float32, is held as uint16.
_TYPES = {
    "float": dtypes.float32, "int": dtypes.int32, "unsigned": dtypes.uint32, "u64": dtypes.uint64,
}  # fmt: skip
WEIGHTS: dict[DType, dict[str, object]] = {
    dtypes.float32: {"WEIGHT": "float"},
    dtypes.float16: {"WEIGHT": "__fp16"},
    dtypes.uint16: {"WEIGHT": "unsigned short", "BFLOAT16": 1},
    dtypes.int8: {"WEIGHT": "signed char"},
}
# The gradient at a call's first tensor, and its tensors by name -> the gradients of some of them.
Tensors = Mapping[str, Tensor]
Gradient = Callable[[Tensor, Tensors], Tensors]
_INCLUDE = re.compile(r'^#include "(.*)"$', re.M)
_COMMENT = re.compile(r"//[^\n]*")
_PARAMETER = re.compile(r"(const )?(\w+) (\*?)(\w+)")


class Parameter(NamedTuple):
    """One parameter of a C function."""

    name: str
    type: str  # "float", "int", "unsigned" or "WEIGHT"
    pointer: bool
    const: bool


@functools.cache
def constants(values: tuple[int, ...], device: str) -> Tensor:
    """Whole numbers in the memory of a device, int32, made once for all calls that pass them.

    As variables, tinygrad would want their values anew at every start of a captured step.
    """
    made = buffers.tensor(np.array(values, np.int64).astype(np.int32), device)
    CONSTANTS[made.uop.base] = values
    return made


# What each buffer of `constants` holds.
CONSTANTS: dict[UOp, tuple[int, ...]] = {}
_CONSTANTS = "constants "


def constant_names() -> dict[UOp, str]:
    """A name for each buffer of `constants`, by which a captured step is kept."""
    return {uop: _CONSTANTS + ",".join(map(str, values)) for uop, values in CONSTANTS.items()}


def constant_of(name: str, device: str | tuple[str, ...]) -> UOp | None:
    """The buffer of such a name, made if need be; None where it is another name."""
    if not name.startswith(_CONSTANTS) or not isinstance(device, str):
        return None
    values = name.removeprefix(_CONSTANTS).split(",")
    return constants(tuple(map(int, values)), device).uop.base


@functools.cache
def source(file: Path) -> str:
    """The text of a C file, with the files that it includes by `#include "..."` put in."""
    text = file.read_text(encoding="utf-8")
    while include := _INCLUDE.search(text):
        included = file.with_name(include[1]).read_text(encoding="utf-8")
        text = text[: include.start()] + included + text[include.end() :]
    return text


@functools.cache
def signature(file: Path, function: str) -> tuple[Parameter, ...]:
    """The parameters of a C function, as its file declares them."""
    found = re.search(rf"^(?:\w+ )?static void {function}\((.*?)\) {{$", source(file), re.M | re.S)
    assert found, f"{file.name} defines no function {function}"
    parameters = []
    for text in _COMMENT.sub("", found[1]).split(","):
        match = _PARAMETER.fullmatch(" ".join(text.split()))
        assert match, f"{function}: {text!r} is no parameter"
        const, kind, pointer, name = match.groups()
        parameters.append(Parameter(name, kind, bool(pointer), bool(const)))
    return tuple(parameters)


def call(
    file: Path,
    function: str,
    tensors: Mapping[str, Tensor | None],
    numbers: Mapping[str, int | float | UOp],
    threads: int,
    flops: int,
    macros: Mapping[str, object] | None = None,
    fixed: Collection[str] = (),
    gradient: Gradient | None = None,
) -> dict[str, Tensor]:
    """Call a C function on tensors of the CPU, once the results are realised.

    Args:
        file: where `function` is defined.
        tensors: for each pointer by its name; None is a null pointer. Those that are not `const` in
            C are written. The first is the result that gradients come from.
        numbers: for each other parameter but core_id and threads. A float is compiled in. A UOp is
            a bound Variable.
        threads: how many call the function at once, each with a core_id of its own.
        flops: how many floating-point operations it does, for profiles.
        macros: names that the text needs to know beforehand. WEIGHT is known from the tensors.
        fixed: names of whole numbers to compile in, where the text is faster for knowing them.
        gradient: from the gradient at the first tensor, and all tensors by their names as they are
            behind the call, to the gradients of some by name. None: there is none.
    Returns:
        the tensors that are written, as they are behind the call.
    """
    parameters = signature(file, function)
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    macros = {**_check(function, parameters, tensors, numbers), **(macros or {})}
    written = [p.name for p in parameters if p.pointer and not p.const and p.name in present]
    variables = {name: n for name, n in numbers.items() if isinstance(n, UOp)}
    passed = {"threads": threads} | {
        name: number
        for name, number in numbers.items()
        if isinstance(number, int) and name not in fixed
    }
    # Whether a pointer is null is a number too, so that the text is the same with and without.
    flags = {f"has_{name}": int(tensor is not None) for name, tensor in tensors.items()}
    text = program_text(file, function, tuple(variables), (*passed, *flags),
                 tuple((n, v) for n, v in numbers.items() if n not in passed | variables),
                 tuple(macros.items()))  # fmt: skip
    device = next(iter(present.values())).device
    given = constants((*passed.values(), *flags.values()), device)
    everything = {n: given if tensor is None else tensor for n, tensor in tensors.items()}
    everything["constants"] = given
    order = list(everything)
    outs = tuple(order.index(name) for name in written)
    ins = tuple(i for i in range(len(order)) if i not in outs)
    size_bytes = sum(tensor.nbytes() for tensor in present.values())
    core_id = UOp.variable("core_id", 0, threads - 1, dtypes.int)
    integers = (core_id, *(variable.unbind()[0] for variable in variables.values()))
    places = tuple(range(len(order)))
    arg = ProgramInfo(function, (threads, 1, 1), None, integers, places, outs, ins)
    known = KernelInfo(function, estimates=Estimates(flops, size_bytes, size_bytes))

    uops = [tensor.uop for tensor in everything.values()]
    uops = [uop if uop.op is Ops.AFTER else uop.contiguous() for uop in uops]
    slots = [UOp.placeholder_like(uop, slot=i) for i, uop in enumerate(uops)]
    program = UOp(
        Ops.PROGRAM,
        src=(
            UOp.sink(*slots, *integers, arg=known),
            UOp(Ops.DEVICE, arg=device),
            UOp(Ops.LINEAR, src=(*slots, *integers)),
            UOp(Ops.SOURCE, arg=text),
        ),
        arg=arg,
    )

    def grad_fxn(upstream: UOp, kernel: UOp) -> tuple[UOp | None, ...]:
        assert gradient is not None, f"{function} has no gradient"
        known = dict(zip(order, kernel.src[1:], strict=False))
        known = {
            n: u.after(kernel) if n in written else u for n, u in known.items() if n in present
        }
        found = gradient(Tensor(upstream), {n: Tensor(u) for n, u in known.items()})
        grads = [found[name].uop if name in found else None for name in order]
        return (*grads, *(None for _ in variables))

    kernel = program.call(*uops, *variables.values(), grad_fxn=grad_fxn)
    return {name: Tensor(uops[order.index(name)].after(kernel)) for name in written}


def _need(fits: bool, words: str) -> None:
    """Refuse a call that does not fit the C signature, also where Python runs without asserts."""
    if not fits:
        raise TypeError(words)


def _check(
    function: str,
    parameters: tuple[Parameter, ...],
    tensors: Mapping[str, Tensor | None],
    numbers: Mapping[str, int | float | UOp],
) -> dict[str, object]:
    """Hold what is passed against the C signature; what WEIGHT stands for, if it does."""
    macros: dict[str, object] = {}
    pointers = [p.name for p in parameters if p.pointer]
    _need(pointers == list(tensors), f"{function} takes {pointers}, not {list(tensors)}")
    others = {p.name for p in parameters if not p.pointer}
    given = {"core_id", "threads", *numbers}
    _need(others == given, f"{function} takes {sorted(others)}, not {sorted(given)}")
    for parameter in parameters:
        if not parameter.pointer:
            number = numbers.get(parameter.name, 0)
            whole = isinstance(number, int | UOp)
            _need(whole == (parameter.type != "float"), f"{function}: {parameter.name}, {number}")
            continue
        tensor = tensors[parameter.name]
        if tensor is None:
            continue
        if parameter.type == "WEIGHT":
            _need(tensor.dtype in WEIGHTS, f"{function}: {parameter.name} is {tensor.dtype}")
            macros |= WEIGHTS[tensor.dtype]
        else:
            expected = _TYPES[parameter.type]
            _need(tensor.dtype == expected, f"{function}: {parameter.name} is {tensor.dtype}")
    return macros


@functools.cache
def program_text(
    file: Path,
    function: str,
    variables: tuple[str, ...],
    passed: tuple[str, ...],
    fixed: tuple[tuple[str, float], ...],
    macros: tuple[tuple[str, object], ...],
) -> str:
    """What is compiled: macros, the file, and a function that tinygrad can call.

    That one has the file's only name that is not static, so that clang puts it at the front.

    Args:
        variables: parameters that are passed as variables.
        passed: parameters that stand in `constants`, and for each pointer P has_P.
        fixed: parameters with values that are compiled in.
        macros: with their values.
    """
    parameters, known = signature(file, function), dict(fixed)
    takes = [f"{'const ' * p.const}{p.type} *{p.name}" for p in parameters if p.pointer]
    takes += ["const int *constants", *(f"int {name}" for name in ("core_id", *variables))]
    numbered, gives = {name: f"constants[{i}]" for i, name in enumerate(passed)}, []
    for parameter in parameters:
        if parameter.name in known:
            value = known[parameter.name]
            gives.append(f"{value!r}f" if parameter.type == "float" else str(value))
        elif parameter.pointer:
            gives.append(f"{numbered[f'has_{parameter.name}']} ? {parameter.name} : 0")
        elif parameter.name in numbered:
            gives.append(numbered[parameter.name])
        else:
            gives.append(parameter.name)
    lines = [f"#define {name} {value}" for name, value in macros]
    lines.append(source(file))
    entry = f"void {function}_({', '.join(takes)}) {{ {function}({', '.join(gives)}); }}"
    return "\n".join([*lines, entry, ""])
