"""What names, arguments, files and variables say is printed escaped and short, on both streams."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import randomize, save_with_bytes
from program import CONFIG

from tinygpt import GPT
from tinygpt.checkpoints import safetensors_file
from tinygpt.checkpoints.hub import cache_folder
from tinygpt.errors import InputError, reason
from tinygpt.storage import byte_bar

# It sets a terminal's title, empties it, colours it by one byte, and turns the order of letters.
BAD = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\udc9b\r\n"
LONG = "x" * 50_000 + BAD + "y" * 50_000


def is_harmless(text: str) -> bool:
    """Whether each line moves no cursor and fills no screen."""
    lines = text.split("\n")
    return all(line.isprintable() and len(line) < 1400 for line in lines) and len(lines) < 60


ARGUMENTS = [
    "{}", "--{}", "-{}", "generate|{}|{}", "-m|{}", "-m|./{}", "-m|org/{}", "--tokenizer|{}",
    "--dtype|{}", "--ids|{}", "--stop|{}\\ud800", "--preset|{}", "--num-samples|{}",
    "--temperature|{}", "--seed|{}", "--json={}", "--prompt-file|{}", "--untrained|--norm|{}",
    "train|{}|-o|run", "train|{}/x|-o|run", "train|a*{}|-o|run", "train|x|-o|run|--config|{}",
    "train|x|-o|run|--recipe|{}", "train|x|-o|run|--model|{}", "train|x|-o|{}/run|--resume",
    "prepare|{}", "prepare|x|--tokenizer|{}", "prepare|x|--field|{}|-o|{}", "evaluate|{}|x",
    "evaluate|shakespeare|{}", "evaluate|shakespeare|lambada|{}",
    "evaluate|shakespeare|x|--split|{}",
    "convert|{}|out|--to|hf", "convert|x|out|--to|{}",
    "models|--remove|{}", "models|{}", "completion|{}", "bench|--model|{}", "doctor|{}",
]  # fmt: skip


@pytest.mark.parametrize("given", [BAD, LONG], ids=["escapes", "long"])
@pytest.mark.parametrize("argv", ARGUMENTS)
def test_an_argument_is_printed_escaped_and_short(
    argv, given, tmp_path, cli, no_network, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("To be. " * 99, encoding="utf-8")
    status, out, err = cli(*[word.format(given) for word in argv.split("|")])
    assert (status, out) == (2, "")
    assert is_harmless(err)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_with_bytes(randomize(GPT(CONFIG)), folder)
    return folder


def _config(**changes: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    return change


def _file(name: str, content: object):
    def change(folder: Path) -> None:
        (folder / "tinygpt_tokenizer.json").unlink()
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return change


def _tensors(*names: str):
    def change(folder: Path) -> None:
        layout = dict.fromkeys(names, ("F32", (1,)))
        safetensors_file.write(
            folder / "model.safetensors", layout, lambda _: np.zeros(1, np.float32)
        )

    return change


def _gguf(folder: Path) -> None:
    def text(value: str) -> bytes:
        data = value.encode("utf-8", "replace")
        return struct.pack("<Q", len(data)) + data

    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
    head += text("general.architecture") + struct.pack("<I", 8) + text(LONG)
    head += text(LONG) + struct.pack("<I", 8) + text(BAD)
    for path in folder.iterdir():
        path.unlink()
    (folder / "model.gguf").write_bytes(head + bytes(-len(head) % 32))


def _name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / f"{BAD[:-6]}.safetensors")
    (folder / f"{BAD[:-6]}.bin").write_bytes(b"")


CONTENTS = {
    "type": _config(model_type=LONG),
    "activation": _config(activation_function=BAD),
    "number": _config(n_layer=LONG),
    "a key twice": lambda folder: (folder / "config.json").write_text(
        '{"%s": 1, "%s": 1}' % (("\\u001b[2J" * 9999,) * 2), encoding="utf-8"
    ),
    "end": _config(eos_token_id=BAD),
    "tensors": _tensors(LONG, BAD[:-3]),
    "classifier": _tensors("score." + "x" * 99, BAD[:-3]),
    "tokenizer": _file("tokenizer.json", {"model": {"type": LONG}, BAD: 1}),
    "tokenizer's kind": _file("tinygpt_tokenizer.json", {"kind": LONG}),
    "added": _file("tokenizer_config.json", {"added_tokens_decoder": {LONG: BAD}}),
    "merges": lambda folder: (folder / "merges.txt").write_bytes(b"\x1b]0;owned\x07 " * 9999),
    "index": lambda folder: (
        (folder / "model.safetensors").unlink(),
        _file("model.safetensors.index.json", {"weight_map": {"a": LONG}})(folder),
    ),
    "GGUF": _gguf,
    "names of files": _name,
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_a_models_files_say_is_printed_escaped_and_short(kind, model, tmp_path, cli):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    CONTENTS[kind](folder)
    status, out, err = cli("generate", "Hi", "-n", 1, "-m", folder)
    assert is_harmless(err)
    assert "owned" not in out
    if kind != "merges":
        assert status == 2


def test_stdout_of_convert_and_models_is_escaped(model, tmp_path, cli, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = BAD.replace("\udc9b", "")
    status, out, err = cli("convert", model, name, "--to", "hf")
    assert (status, err.count("\n")) == (0, err.count("tinygpt: "))
    assert is_harmless(out)
    assert out.startswith(r"\x1b]0;owned\x07")
    shutil.copytree(model, cache_folder() / "models" / name)
    status, out, err = cli("models")
    assert (status, err) == (0, "")
    assert "owned" in out
    assert is_harmless(out)


def test_stdout_of_doctor_is_escaped(tmp_path, cli, monkeypatch):
    name = BAD.replace("\udc9b", "")
    for variable in ("CC", "TINYGPT_CACHE", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / name))
    status, out, _ = cli("doctor")
    assert status == 0
    assert out.count("owned") >= 2
    assert is_harmless(out)


def test_a_title_of_a_progress_bar_is_escaped_and_short():
    with byte_bar(LONG, 1) as bar:
        assert is_harmless(bar.desc)
        assert len(bar.desc) < 200


def test_an_error_is_one_harmless_line_for_who_catches_it_too():
    assert is_harmless(str(InputError(LONG)))
    assert "\n" not in str(InputError(BAD))
    assert is_harmless(reason(OSError(LONG)))
