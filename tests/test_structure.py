"""The shape of the house: which way imports point, how large a room may grow, what it stands on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinygpt"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each path with the rows of the house, the highest first: a file imports from its own folder and
# from rows below its own. A folder stands for all that is in it; a longer path is meant first.
ROWS = [
    ("__init__", "__main__"),
    ("commands",),
    ("server",),
    ("study",),
    ("training",),
    ("evaluation",),
    ("data",),
    ("writer",),
    ("generator",),
    ("slots",),
    ("session", "logprobs"),
    ("choosing",),
    ("checkpoints",),
    ("devices",),
    ("model",),
    ("layers", "placement", "sampling"),
    ("ops",),
    ("tokenizer",),
    ("ids",),
    ("runtime",),
    ("storage",),
    ("config",),
    ("options",),
    ("environment",),
    ("errors",),
]
# Doors, each an import inside of a function: where a model is loaded and saved.
DOORS = {
    ("model", "checkpoints/open_checkpoint"),
    ("model", "checkpoints/save_huggingface"),
}


def path_of(file: Path) -> str:
    """`tinygpt/data/corpus.py` -> `data/corpus`."""
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


def row_of(path: str) -> int:
    """The number of the row in which a path stands, by its longest part that has one."""
    parts = path.split("/")
    for length in range(len(parts), 0, -1):
        name = "/".join(parts[:length])
        for number, names in enumerate(ROWS):
            if name in names:
                return number
    raise AssertionError(f"{path} has no row: give it one in ROWS")


def imports(path: Path, only_at_the_top: bool = False) -> set[str]:
    """Full names of what a file imports, wherever in it; `from a import b` gives a.b."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if only_at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_paths(file: Path) -> set[str]:
    """The package's own files that one file imports, as paths."""
    found, known = set(), {path_of(other) for other in FILES}
    for full in imports(file):
        package, *rest = full.split(".")
        if package != "tinygpt":
            continue
        for length in range(len(rest), 0, -1):
            if (path := "/".join(rest[:length])) in known:
                found.add(path)
                break
            if f"{path}/__init__" in known and length == len(rest):
                found.add(path)
    return found


@pytest.mark.parametrize("file", FILES, ids=path_of)
def test_imports_point_down(file):
    path = path_of(file)
    for other in imported_paths(file):
        same_folder = "/" in path and path.split("/")[0] == other.split("/")[0]
        if not same_folder and (path, other) not in DOORS:
            assert row_of(path) < row_of(other), f"{path} imports {other}"


@pytest.mark.parametrize("file", FILES, ids=path_of)
def test_a_module_is_one_concern(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 330


def test_the_package_stands_on_its_three_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {name.split("=")[0].split(">")[0] for name in project["dependencies"]}
    assert names == {"tinygrad", "tiktoken", "numpy"}
    allowed = names | {"tinygpt", "tiktoken_ext", "regex"} | set(sys.stdlib_module_names)
    extras = {
        "torch",
        "transformers",
        "llama_cpp",
        "gguf",
        "matplotlib",
        "starlette",
        "uvicorn",
        "h11",
        "jinja2",
        "mpi4py",
    }  # only where they are used
    for path in FILES:
        own = {"starlette", "uvicorn", "h11"} if path_of(path).startswith("server/") else set()
        top = {full.split(".")[0] for full in imports(path, only_at_the_top=True)}
        assert top <= allowed | own  # what serves is imported by its command alone
        assert {full.split(".")[0] for full in imports(path)} <= allowed | extras


# What may be used of tinygrad outside of `runtime`: all else of it moves between releases.
PUBLIC = {
    "Tensor", "UOp", "Variable", "dtypes", "nn.state.get_state_dict", "helpers.tqdm",
    "llm.gguf.ggml_data_to_tensor",
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=path_of)
def test_only_runtime_knows_the_inside_of_tinygrad(file):
    if path_of(file).startswith("runtime/"):
        return
    used = {full.removeprefix("tinygrad.") for full in imports(file) if full[:8] == "tinygrad"}
    assert used <= PUBLIC
    assert not re.search(r"\.uop\b|\bDevice\[", file.read_text(encoding="utf-8"))


def test_what_git_keeps_at_the_top():
    """What contributors make beside it (an environment, notes, builds) is theirs."""
    kept = {
        "tinygpt", "tests", "benchmarks", "docs", "run.py", "pyproject.toml", "README.md",
        "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", ".gitignore", ".ci", ".github",
        "CITATION.cff",
    }  # fmt: skip
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if run.returncode == 0:  # not in an archive of the sources
        assert {line.split("/")[0] for line in run.stdout.splitlines()} <= kept


def unnamed_encodings(tree: ast.AST) -> list[int]:
    """The lines in which a file or a pipe is read or written as text of the system's encoding.

    It is UTF-8 on some machines only: on Windows, and in the POSIX locale, it is not.
    """
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {argument.arg: argument.value for argument in call.keywords}
        name = ast.unparse(call.func)
        if name == "open":
            mode = given.get("mode") or (call.args[1] if len(call.args) > 1 else ast.Constant("r"))
            is_text = not isinstance(mode, ast.Constant) or "b" not in mode.value
        else:
            is_text = name.endswith((".read_text", ".write_text")) or "text" in given
        if is_text and not given.keys() & {"encoding", None}:
            lines.append(call.lineno)
    return lines


def python_files() -> list[Path]:
    places = (PACKAGE, ROOT / "tests", ROOT / "benchmarks")
    return [ROOT / "run.py", *(file for place in places for file in sorted(place.rglob("*.py")))]


def test_every_file_that_is_opened_as_text_names_its_encoding():
    slips = ["open(p)", "open(p, mode)", "p.read_text()", "p.write_text(t)", "run(p, text=True)"]
    assert all(unnamed_encodings(ast.parse(slip)) for slip in slips)
    found = {
        file.relative_to(ROOT).as_posix(): lines
        for file in python_files()
        if (lines := unnamed_encodings(ast.parse(file.read_text(encoding="utf-8"))))
    }
    assert not found
