"""Opening a checkpoint: each header parsed once, and what is asked of it is the model's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import SMALL, randomize, weights_of

from tinygpt import GPT, InputError, load_tokenizer
from tinygpt.checkpoints import config_json, gguf_file, hub, model_files, safetensors_file
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.save_gguf import save_gguf
from tinygpt.checkpoints.stored_tensor import read_tensor
from tinygpt.commands.main import main
from tinygpt.tokenizer.encoding import char_tokenizer, encode, same_tokenizer, save_tokenizer
from tinygpt.tokenizer.vocabulary import from_merges

CHARACTERS = char_tokenizer("helo, wrd!")


def whole(folder: Path) -> Path:
    randomize(GPT(SMALL)).save_pretrained(folder)
    save_tokenizer(CHARACTERS, folder)
    return folder


def shards(folder: Path) -> Path:
    """The same in two files, with their index."""
    path = whole(folder) / model_files.WEIGHTS
    tensors, _ = safetensors_file.read_header(path)
    index = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        layout = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
        file = f"model-{number}.safetensors"
        safetensors_file.write(folder / file, layout, lambda name: read_tensor(path, tensors[name]))
        index |= dict.fromkeys(names, file)
    path.unlink()
    path.with_name(f"{path.name}.index.json").write_text(
        json.dumps({"weight_map": index}), encoding="utf-8"
    )
    return folder


def gguf(folder: Path) -> Path:
    folder.mkdir()
    model = randomize(GPT(SMALL))
    save_gguf(model, folder / "x.gguf", small_bpe())
    return folder / "x.gguf"


def small_bpe():
    """A vocabulary that GGUF can hold, of as few ids as the model knows."""
    tokens = [*"helowrd", "he", "ll"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return from_merges(vocab, ["h e", "l l"], "test")


READERS = {
    "name": (hub, "resolve"),
    "config.json": (config_json, "read_config"),
    "index": (model_files, "shards"),
    "safetensors": (safetensors_file, "read_header"),
    "GGUF": (gguf_file, "read_header"),
}
FORMS = {
    whole: {"name": 1, "config.json": 1, "safetensors": 1},
    shards: {"name": 1, "config.json": 1, "index": 1, "safetensors": 2},  # one of each file
    gguf: {"name": 1, "GGUF": 1},
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_command_parses_each_header_once(form, tmp_path, monkeypatch, capsys):
    path, counted = form(tmp_path / "model"), Counter()

    def counting(what, read):
        def wrapped(*arguments):
            counted[what] += 1
            return read(*arguments)

        return wrapped

    for what, (module, name) in READERS.items():
        monkeypatch.setattr(module, name, counting(what, getattr(module, name)))
    assert main(["generate", "hello", "--model", str(path), "--max-new-tokens", "1"]) == 0, (
        capsys.readouterr()
    )
    assert counted == FORMS[form]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_is_opened_is_what_is_loaded(form, tmp_path):
    path = form(tmp_path / "model")
    found = open_checkpoint(path)
    assert found.path == path
    again = GPT.from_pretrained(path)
    assert found.config == again.config
    for name, value in weights_of(found.load()).items():
        assert (value == weights_of(again)[name]).all(), name
    assert same_tokenizer(found.tokenizer(), load_tokenizer(path))
    assert encode(found.tokenizer(), "hello")
    with pytest.raises(InputError, match="outside the model's vocabulary of 67: pass --tokenizer"):
        found.tokenizer("bytes")


def test_a_folder_with_one_gguf_brings_that_files_vocabulary(tmp_path):
    path = gguf(tmp_path / "model")
    for tokenizer in (load_tokenizer(path.parent), open_checkpoint(path.parent).tokenizer()):
        assert same_tokenizer(tokenizer, small_bpe())
    save_tokenizer(CHARACTERS, path.parent)  # which was put there for a reason
    assert same_tokenizer(load_tokenizer(path.parent), CHARACTERS)
    assert same_tokenizer(open_checkpoint(path.parent).tokenizer(), CHARACTERS)
    assert same_tokenizer(load_tokenizer(path), small_bpe())


def test_a_gguf_without_a_vocabulary_takes_its_folders(tmp_path):
    path = tmp_path / "x.gguf"
    save_gguf(randomize(GPT(SMALL)), path)
    with pytest.raises(InputError, match=r"no tokenizer in folder"):
        open_checkpoint(path).tokenizer()
    save_tokenizer(CHARACTERS, tmp_path)
    assert same_tokenizer(open_checkpoint(path).tokenizer(), CHARACTERS)


def test_two_tokenizers_are_the_same_by_what_they_do():
    assert same_tokenizer(char_tokenizer("abc"), char_tokenizer("cba"))
    assert not same_tokenizer(char_tokenizer("abc"), char_tokenizer("abd"))
    assert not same_tokenizer(load_tokenizer("bytes"), small_bpe())
