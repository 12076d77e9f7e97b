"""The shape of the house: which way imports point, how large a room may grow, what it stands on."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tinygpt").rglob("*.py"))
FOLDERS = {"formats"}
MODULES = {path.stem: path for path in FILES if path.stem != "__init__"}
# A module imports from rows below its own only.
ROWS = [
    {"__main__"},
    {"cli"},
    {"bench", "convert", "doctor", "plot", "sample", "train"},
    {"loop"},
    {"evaluate", "peers", "prepare", "trainer"},
    {"checkpoint", "data", "generate", "lora", "optim", "weights"},
    {"forms", "fused", "precision"},
    {"bpe", "hub", "model", "sampling", "tokenizer"},
    {
        "hfconfig",
        "layers",
        "layout",
        "reading",
        "recipes",
        "safetensors",
        "text",
        "torchfile",
        "vocabulary",
    },
    {"gguf", "kernels", "terminal", "unpickle"},
    {"tensors"},
    {"backend", "files"},
    {"config"},
]
# The two doors through which a model is loaded and saved, which open inside a method.
DOORS = {("model", "weights")}


def imports(path: Path, only_at_the_top: bool = False) -> set[str]:
    """Full names of what a file imports, wherever in it; `from a import b` gives a.b."""
    found, tree = set(), ast.parse(path.read_text())
    for node in tree.body if only_at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_row():
    assert set().union(*ROWS) == set(MODULES)
    assert sum(map(len, ROWS)) == len(MODULES) == len(FILES) - 1 - len(FOLDERS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    row = next(i for i, names in enumerate(ROWS) if name in names)
    below = set().union(*ROWS[row + 1 :])
    for full in imports(MODULES[name]):
        package, *rest = (part for part in full.split(".") if part not in FOLDERS)
        if package == "tinygpt" and rest and rest[0] in MODULES:
            assert rest[0] in below or (name, rest[0]) in DOORS, f"{name} imports {rest[0]}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_is_one_concern(name):
    assert len(MODULES[name].read_text().splitlines()) <= 320


def test_the_package_stands_on_its_three_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {name.split("=")[0].split(">")[0] for name in project["dependencies"]}
    assert names == {"tinygrad", "tiktoken", "numpy"}
    allowed = names | {"tinygpt", "tiktoken_ext", "regex"} | set(sys.stdlib_module_names)
    extras = {
        "torch",
        "transformers",
        "llama_cpp",
        "gguf",
        "matplotlib",
    }  # only where they are used
    for path in FILES:
        assert {full.split(".")[0] for full in imports(path, only_at_the_top=True)} <= allowed
        assert {full.split(".")[0] for full in imports(path)} <= allowed | extras


def test_nothing_else_at_the_top():
    kept = {
        "tinygpt", "tests", "run.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
        ".gitignore", ".ci", ".git",
    }  # fmt: skip
    made = {".pytest_cache", ".ruff_cache", "build", "tinygpt.egg-info", "__pycache__"}
    assert {path.name for path in ROOT.iterdir()} <= kept | made
