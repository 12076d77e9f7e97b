"""The README's commands and code are run as written, and what it says of the code is held true."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CLANG, SMALL, needs_clang, randomize, save_with_bytes

from tinygpt import GPT
from tinygpt.checkpoints.hub import DEFAULT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line
]
# What the bare-machine check of .ci/run does, since a test cannot install what it runs in.
INSTALLS = {"pip install . && python run.py", "pip install '.[test]' && pytest"}
PYTHON = shlex.quote(sys.executable)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder like a user's: run.py, a model, and a Hugging Face cache that has `gpt2`."""
    room = tmp_path_factory.mktemp("room")
    (room / "run.py").symlink_to(ROOT / "run.py")
    (room / "my-text.txt").write_text(README, encoding="utf-8")
    model = randomize(GPT(SMALL.__class__(n_layer=1, n_head=2, n_embd=16, vocab_size=257)))
    cache = room / "hub" / "models--gpt2"
    for folder in (room / "my-gpt2", cache / "snapshots" / "main"):
        save_with_bytes(model, folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("main", encoding="utf-8")
    fetched = room / "cache" / "data" / "shakespeare.txt"
    fetched.parent.mkdir(parents=True)
    fetched.write_text(README, encoding="utf-8")
    return room


def _program(name: re.Match[str]) -> str:
    """The same program by another name, so that it runs where `pip install` has not been."""
    return PYTHON if name[0] == "python" else f"{PYTHON} -m tinygpt "


def test_the_commands_are_the_known_ones():
    assert set(COMMANDS) >= INSTALLS
    assert len(COMMANDS) > len(INSTALLS) + 4


def takes_long(command: str) -> bool:
    """Whether a test of it would: without clang, 37 passes of eight windows take minutes."""
    return "tinygpt train " in command or ("study heads" in command and not CLANG)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] if takes_long(command) else [])
        for command in COMMANDS
        if command not in INSTALLS
    ],
)
def test_a_command_works_as_written(command, room):
    if "--help" not in command:  # some steps do instead of the minutes that a reader gives it
        command = re.sub(r"tinygpt train [^&]*", r"\g<0>--steps 20 ", command)
    command = re.sub(r"\btinygpt (?=[a-z])|\bpython\b", _program, command)
    environment = {**os.environ, "HF_HUB_CACHE": str(room / "hub"), "PYTHONPATH": str(ROOT)}
    environment["TINYGPT_CACHE"] = str(room / "cache")
    environment["NOOPT"] = "0"  # kernels as a user has them
    run = subprocess.run(
        command, shell=True, cwd=room, env=environment, capture_output=True, timeout=600
    )
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.strip()
    assert b"Traceback" not in run.stderr


@needs_clang  # tinygrad's assembler without optimisations makes code that crashes
def test_the_python_code_works_as_written(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 50
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_limits_are_those_of_the_model_in_the_package():
    (limits,) = re.findall(r"^## Limits\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    config = json.loads((ROOT / "tinygpt" / DEFAULT / "config.json").read_text(encoding="utf-8"))
    for words in (f"`{DEFAULT}`", f"{config['vocab_size']:,} byte pairs"):
        assert words in limits


def test_serving_tells_of_a_client_and_of_chat():
    (told,) = re.findall(r"^## Serve\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    assert "--chat-template" in told
    (code,) = re.findall(r"```py\n(.*?)```", told, re.DOTALL)
    asked: dict[str, object] = {}
    choice = SimpleNamespace(choices=[SimpleNamespace(**{"text": ""})])
    completions = SimpleNamespace(create=lambda **fields: asked.update(fields) or choice)
    client = SimpleNamespace(OpenAI=lambda **_: SimpleNamespace(completions=completions))
    exec(code.replace("import openai\n", ""), {"openai": client})
    assert asked["model"] == DEFAULT


def test_the_map_has_every_file_and_no_other():
    """A line is indented by its depth; two spaces divide its names from what is said of them."""
    (tree,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    mapped, folder = set(), ""
    for line in tree.partition("\ntinygpt/\n")[2].splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith("    "):
            folder = names[0] if names[0].endswith("/") else ""
        mapped |= {folder + name for name in names if not name.endswith("/")}
    package = ROOT / "tinygpt"
    assert mapped == {
        path.relative_to(package).as_posix()
        for pattern in ("*.py", "*.c", "*.h", "*.md", "*.html")
        for path in package.rglob(pattern)
        if not path.stem.startswith("__")
    }


def test_ci_runs_the_documented_commands():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(command in script for command in INSTALLS)
