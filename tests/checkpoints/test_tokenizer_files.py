"""Folders as people have them: the ids, the greedy text and its end that transformers gives."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prepared import state

from tinygpt import GPT, InputError, load_tokenizer
from tinygpt.checkpoints.save_gguf import save_gguf
from tinygpt.tokenizer.encoding import save_tokenizer
from tinygpt.training import run_files
from tinygpt.writer import Writer

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
with warnings.catch_warnings():  # of its import only, which depends on what else is installed
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    transformers = pytest.importorskip("transformers")

END = "<|endoftext|>"
ROWS = 320
TEXT = "the cat and the dog, the sea and the ship; over there they are with them. " * 20
PIECES = (
    "the", " cat", "  ", " ", "\n", "\t ", "a", "é", "中", "_", "<pad>", "<|im_end|>", "<a>",
    "<a>>", "<a", "two words", "Łódź", END, "<s>", "<x>", "<y>", "<unk>", "\u3000", "\x1c",
)  # fmt: skip


def random_texts(seed: int, count: int = 60) -> Iterator[str]:
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choices(PIECES, k=draw.randrange(1, 9)))


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a small model, a vocabulary and its merges, and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=ROWS, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    trained = tokenizers.ByteLevelBPETokenizer()
    text = Path(__file__).read_text(encoding="utf-8")
    trained.train_from_iterator([TEXT, text], 300, 2, show_progress=False, special_tokens=[END])
    trained.save_model(str(folder))
    return folder


# Layouts: each changes a folder that has a vocabulary and its merges alone.


def saved(*added: object, **settings: object) -> Callable[[Path], None]:
    """As transformers saves it."""

    def change(folder: Path) -> None:
        theirs = transformers.GPT2TokenizerFast.from_pretrained(str(folder), **settings)
        theirs.add_tokens([*added])
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        theirs.save_pretrained(folder)

    return change


def files(**contents: object) -> Callable[[Path], None]:
    """Beside the vocabulary and its merges, as other programs and older versions leave them."""

    def change(folder: Path) -> None:
        for name, content in contents.items():
            write(folder / f"{name}.json", content)

    return change


def token(content: str, **flags: bool) -> dict[str, object]:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return {"content": content, **dict.fromkeys(names, False), **flags}


def flagged(content: str, **flags: bool) -> object:
    return tokenizers.AddedToken(content, **flags)


def whole_file(**changes: object) -> Callable[[Path], None]:
    """A tokenizer.json that is read as it stands, since its class is not GPT-2's own."""

    def change(folder: Path) -> None:
        saved("<a>")(folder)
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, value in changes.items():
            content[name] = content[name] | value if isinstance(content[name], dict) else value
        write(path, content)
        names = {"bos_token": END, "eos_token": END}
        write(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **names},
        )

    return change


def with_crlf(folder: Path) -> None:
    path = folder / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def of_version_4(folder: Path) -> None:
    """All the files at once, of which some say less than others."""
    saved("two words", pad_token="<pad>")(folder)
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write(folder / "vocab.json", whole["model"]["vocab"])
    merges = [" ".join(merge) for merge in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    listed = {str(each.pop("id")): each for each in whole["added_tokens"]}
    config = {"added_tokens_decoder": listed, "pad_token": "<pad>", "model_max_length": 64}
    write(folder / "tokenizer_config.json", config | {"tokenizer_class": "GPT2Tokenizer"})
    write(folder / "special_tokens_map.json", {"pad_token": "<pad>", "eos_token": token(END)})
    write(folder / "added_tokens.json", {"two words": 301, "<pad>": 300})


def unlisted(folder: Path) -> None:
    """A token that stands in the vocabulary and that no text gives."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    write(folder / "vocab.json", vocab | {"<s>": len(vocab), "<x>": len(vocab) + 1})


def change_file(path: Path, **changes: object) -> None:
    write(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def template(*parts: str) -> dict[str, object]:
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "A" else
        {"SpecialToken": {"id": part, "type_id": 0}} for part in parts
    ]  # fmt: skip
    special = {END: {"id": END, "ids": [0], "tokens": [END]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "vocabulary and merges alone": lambda folder: None,
    "saved by transformers": saved(),
    "saved with a pad token": saved(pad_token="<pad>"),
    "saved with normal added tokens": saved("two words", "<a>", "Łódź"),
    "saved with special added tokens": saved(
        flagged("<|im_end|>", special=True), flagged("<x>", special=True), eos_token="<|im_end|>"
    ),
    "saved with tokens that take white space": saved(
        flagged("<a>", lstrip=True),
        flagged("<x>", rstrip=True),
        flagged("_", single_word=True),
        flagged("<y>", lstrip=True, rstrip=True, special=True),
    ),
    "saved with tokens of which one begins another": saved(
        flagged("<a", normalized=False), flagged("<a>>", normalized=True), "<a>", "<|im_end|>"
    ),
    "saved with an added token that is an ordinary one": saved("the", "a"),
    "saved with a prefix space": saved("<a>", add_prefix_space=True),
    "the one file alone, of another class": whole_file(),
    "the one file with a prefix space, of another class": whole_file(
        pre_tokenizer={"add_prefix_space": True}
    ),
    "the one file with a template": whole_file(post_processor=template(END, "A")),
    "the one file with a template of both sides": whole_file(
        post_processor=template(END, "A", END)
    ),
    "the one file with the class's own prefix space": lambda folder: (
        whole_file(pre_tokenizer={"add_prefix_space": True})(folder),
        write(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2TokenizerFast"}),
    ),
    "added_tokens.json and a map of names": files(
        added_tokens={"<pad>": 300, "<|im_end|>": 301, "two words": 302},
        special_tokens_map={"eos_token": "<|im_end|>", "pad_token": "<pad>"},
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64},
    ),
    "a named token with which a listed one begins": files(
        added_tokens={"<a>>": 300}, special_tokens_map={"pad_token": "<a>"}
    ),
    "a map of objects": files(
        special_tokens_map={
            "eos_token": token(END, normalized=True),
            "mask_token": token("<x>", lstrip=True),
            "additional_special_tokens": ["<a>", "<y>"],
        }
    ),
    "a list of tokens by id": files(
        tokenizer_config={
            "added_tokens_decoder": {
                "0": token(END, special=True),
                "300": token("<a>", lstrip=True),
                "301": token("<|im_end|>", special=True, rstrip=True),
            },
            "eos_token": "<|im_end|>",
        }
    ),
    "names that are listed nowhere": files(
        tokenizer_config={"pad_token": "<pad>", "extra_special_tokens": ["<x>", "<y>"]}
    ),
    "a begin and an end around each text": files(
        tokenizer_config={"add_bos_token": True, "add_eos_token": True}
    ),
    "a prefix space and a begin": files(
        tokenizer_config={"add_prefix_space": True, "add_bos_token": True, "pad_token": "<pad>"}
    ),
    "merges whose lines end in CRLF": with_crlf,
    "the files of version 4 together": of_version_4,
    "tokens that nothing lists": unlisted,
    "special tokens that are text": files(
        tokenizer_config={"split_special_tokens": True, "pad_token": "<pad>"},
        added_tokens={"<pad>": 300, "<a>": 301},
    ),
    "the one file whose class the model's file names": lambda folder: (
        whole_file(pre_tokenizer={"add_prefix_space": True})(folder),
        write(folder / "tokenizer_config.json", {"bos_token": END, "eos_token": END}),
        change_file(folder / "config.json", tokenizer_class="PreTrainedTokenizerFast"),
    ),
    "a class that both name": lambda folder: (
        whole_file(pre_tokenizer={"add_prefix_space": True})(folder),
        change_file(folder / "config.json", tokenizer_class="GPT2Tokenizer"),
    ),
    "no end at all": files(tokenizer_config={"eos_token": None, "unk_token": "<unk>"}),
}


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def folder(request, base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layout")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    LAYOUTS[request.param](folder)
    return folder


def theirs_of(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def test_a_prompt_gets_the_ids_of_transformers_and_back_its_text(folder):
    ours, theirs = load_tokenizer(folder, ROWS), theirs_of(folder)
    for text in random_texts(1):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        if (
            "Ł" not in text
        ):  # transformers reads the letters of an added token as if they were bytes
            assert ours.decode(ids) == theirs.decode(ids)


def test_a_begin_and_an_end_are_those_of_transformers(folder):
    ours, theirs = load_tokenizer(folder), theirs_of(folder)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)


def test_what_was_read_is_written_back_for_transformers_and_for_us(folder, tmp_path):
    ours = load_tokenizer(folder)
    GPT.from_pretrained(folder).save_pretrained(tmp_path, ours)
    again, theirs = load_tokenizer(tmp_path), theirs_of(tmp_path)
    assert (again.bos, again.eos, again.ends) == (ours.bos, ours.eos, ours.ends)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    assert theirs.special_tokens_map == theirs_of(folder).special_tokens_map
    for text in random_texts(2):
        ids = ours.encode(text)
        assert again.encode(text) == theirs(text).input_ids == ids
        assert again.encode(text, special=False) == ours.encode(text, special=False)
    config = theirs.init_kwargs
    assert config.get("model_max_length") == theirs_of(folder).init_kwargs.get("model_max_length")


def test_what_was_read_is_written_back_in_gguf(folder, tmp_path):
    ours = load_tokenizer(folder)
    save_gguf(GPT.from_pretrained(folder), tmp_path / "x.gguf", ours)
    again = load_tokenizer(tmp_path / "x.gguf")
    assert (again.bos, again.eos, again.ends) == (ours.bos, ours.eos, ours.ends)
    for text in random_texts(3):
        assert again.encode(text) == ours.encode(text)
        assert again.encode(text, special=False) == ours.encode(text, special=False)
    save_tokenizer(again, tmp_path / "hf")
    for text in random_texts(4):
        assert load_tokenizer(tmp_path / "hf").encode(text) == ours.encode(text)


def test_training_writes_back_what_was_read(folder, tmp_path):
    ours = load_tokenizer(folder)
    model = GPT.from_pretrained(folder)
    path = run_files.save(tmp_path, model, ours, {}, state(1))
    again, theirs = load_tokenizer(path), theirs_of(path)
    assert (again.ends, again.eos, again.bos) == (ours.ends, ours.eos, ours.bos)
    ends = transformers.AutoModelForCausalLM.from_pretrained(path).generation_config.eos_token_id
    assert ends == transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    for text in random_texts(6, 20):
        assert again.encode(text) == theirs(text).input_ids == ours.encode(text)


# Where a text ends.

ENDS = {  # what config.json and generation_config.json say of it; None is no such file
    "one in both": (7, {"eos_token_id": 7}),
    "the generation's goes before the model's": (8, {"eos_token_id": 7}),
    "several": (None, {"eos_token_id": [8, 7]}),
    "several in config.json": ([8, 7], None),
    "in config.json alone": (7, None),
    "a generation without": (7, {"temperature": 0.5}),
    "a generation that says there is none": (7, {"eos_token_id": None}),
}


@pytest.mark.parametrize("said", ENDS.values(), ids=ENDS)
def test_greedy_text_ends_where_transformers_ends_it(said, base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    prompt = "the cat and"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = theirs_of(tmp_path)(prompt, return_tensors="pt").input_ids
    length = ids.shape[1]
    whole = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, length:]
    before = next(at for at in range(2, 11) if whole[at] not in whole[:at])
    last, absent = int(whole[before]), next(n for n in range(9, ROWS) if n not in whole)
    stand_ins = {7: last, 8: absent}

    def real(value):
        if isinstance(value, list):
            return [stand_ins[each] for each in value]
        return stand_ins.get(value, value)

    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    write(tmp_path / "config.json", config | {"eos_token_id": real(said[0])})
    (tmp_path / "generation_config.json").unlink()
    if said[1] is not None:
        content = {key: real(value) for key, value in said[1].items()}
        write(tmp_path / "generation_config.json", content)
    for form in ("in", "out", "gguf"):
        path = tmp_path / form
        if form == "in":
            path = tmp_path
        elif form == "out":
            load = GPT.from_pretrained(tmp_path)
            load.save_pretrained(path, load_tokenizer(tmp_path))
        else:
            save_gguf(GPT.from_pretrained(tmp_path), path, load_tokenizer(tmp_path))
        if form != "gguf":
            theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
            expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
            expected = expected[0, length:].tolist()
            assert len(expected) in (before + 1, 12)
        writer = Writer.open(str(path))
        steps = writer.stream(writer.encode(prompt), 12, [0], temperature=0)
        found = [number for (number,) in steps]
        assert found == [number for number in expected if len(expected) == 12 or number != last]


def test_without_a_word_of_the_models_files_the_tokenizers_end_is_the_end(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    write(tmp_path / "config.json", config | {"eos_token_id": None})
    files(tokenizer_config={"eos_token": "<x>", "pad_token": "<pad>"})(tmp_path)
    assert load_tokenizer(tmp_path).ends == (300,)


@pytest.mark.parametrize(("value", "ends"), [(-7, ()), ([-1, 7], (7,))])
def test_an_end_below_zero_ends_nothing_which_is_said(value, ends, base, tmp_path, capsys):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    change_file(tmp_path / "generation_config.json", eos_token_id=value, bos_token_id=-1)
    change_file(tmp_path / "config.json", bos_token_id=-1)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.ends == ends
    assert tokenizer.start == 0  # the tokenizer's own
    (line,) = capsys.readouterr().err.splitlines()
    assert "eos_token_id -" in line
    assert line.endswith("is no token, and ends no text")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["7", [7, "8"], 7.0, True, {"a": 1}], ids=repr)
def test_an_end_that_is_no_id_is_one_line(name, value, base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    write(
        tmp_path / name,
        json.loads((tmp_path / name).read_text(encoding="utf-8")) | {"eos_token_id": value},
    )
    with pytest.raises(ValueError, match=r"eos_token_id is .*: it must be an id") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


# Files as other programs leave them.


def test_a_byte_order_mark_is_no_part_of_any_file(base, tmp_path):
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    for folder in (plain, marked):
        shutil.copytree(base, folder)
        files(added_tokens={"<pad>": 300}, special_tokens_map={"eos_token": "<pad>"})(folder)
    for path in (*marked.glob("*.json"), marked / "merges.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert GPT.from_pretrained(marked).config == GPT.from_pretrained(plain).config
    one, other = load_tokenizer(marked), load_tokenizer(plain)
    assert (one.eos, one.ends) == (other.eos, other.ends) == (300, (0,))
    for text in random_texts(5):
        assert one.encode(text) == other.encode(text)


@pytest.mark.parametrize("form", ["tokenizer.json", "vocabulary and merges"])
def test_a_tokenizer_under_a_name_of_ones_own_is_taken_or_named(form, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    if form == "tokenizer.json":
        saved("<a>")(folder)
        (folder / "tokenizer.json").rename(folder / "aitextgen.tokenizer.json")
        (folder / "tokenizer_config.json").unlink()
        given = folder / "aitextgen.tokenizer.json"
    else:
        for name in ("vocab.json", "merges.txt"):
            (folder / name).rename(folder / f"my-{name}")
        given = folder / "my-vocab.json"
    expected = load_tokenizer(base).encode("the cat")
    assert load_tokenizer(folder, ROWS).encode("the cat") == expected
    assert load_tokenizer(str(given)).encode("the cat") == expected
    shutil.copyfile(base / "vocab.json", folder / "other-vocab.json")
    shutil.copyfile(base / "merges.txt", folder / "other-merges.txt")
    with pytest.raises(ValueError, match=f"several tokenizers: .*{given.name}, other-vocab"):
        load_tokenizer(folder)
    assert load_tokenizer(given).encode("the cat") == expected


def test_only_an_id_beyond_the_models_rows_that_occurs_is_refused(base, tmp_path, cli):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    files(added_tokens={"<pad>": ROWS + 5}, special_tokens_map={"pad_token": "<pad>"})(tmp_path)
    run = ["--model", tmp_path, "--max-new-tokens", 1]
    assert cli("the cat", *run)[0] == 0
    status, out, err = cli("the <pad>", *run)
    assert (status, out) == (2, "")
    assert err == "tinygpt: error: token 325 is outside the vocabulary: ids run from 0 to 319\n"
    assert cli("the <pad>", *run, "--no-special-tokens")[0] == 0
    status, _, err = cli("convert", tmp_path, tmp_path / "x.gguf", "--to", "gguf")
    assert (status, err.count("\n")) == (0, 1)
    assert "'<pad>' (325) is left out" in err


# Ids in place of a text.


def test_ids_go_in_and_text_comes_out(base, cli):
    tokenizer = load_tokenizer(base)
    ids = tokenizer.encode("the cat")
    run = ["--model", base, "--max-new-tokens", 5, "--json"]
    text = json.loads(cli("the cat", *run)[1])
    for given in (", ".join(map(str, ids)), " ".join(map(str, ids)), ",".join(map(str, ids))):
        found = json.loads(cli("--ids", given, *run)[1])
        assert found["samples"] == text["samples"]
        assert (found["prompt"], found["prompt_tokens"]) == ("the cat", ids)


@pytest.mark.parametrize("kind", ["WordPiece", "Metaspace"])
def test_ids_come_out_where_the_tokenizer_cannot_be_read(kind, base, tmp_path, cli):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    if kind == "WordPiece":
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    else:
        other = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
        other.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        other.save(str(tmp_path / "tokenizer.json"))
    run = ["--model", tmp_path, "--max-new-tokens", 3]
    status, out, err = cli("the cat", *run)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert kind in err
    assert "--ids" in err
    status, out, err = cli("--ids", "5,6 7", *run)
    assert status == 0, err
    assert kind in err
    numbers = [int(word) for word in out.split()]
    assert numbers[:3] == [5, 6, 7]
    assert (
        json.loads(cli("--ids", "5,6 7", *run, "--json")[1])["samples"][0]["tokens"] == numbers[3:]
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ids", ""], "--ids is empty"), (["--ids", "a"], "--ids is 'a'"),
        (["--ids", "1;2"], "like 15496,995"), (["--ids", "-1"], "like 15496,995"),
        (["--ids", "320"], "token 320 is outside"), (["--ids", "9" * 99], "is outside"),
        (["--ids", "1", "text"], "give one of them"), (["--ids", "٣"], "like 15496,995"),
    ],
)  # fmt: skip
def test_ids_that_are_none_are_one_line(argv, words, base, cli):
    status, out, err = cli("generate", *argv, "--model", base)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.parametrize("vocab_size", [None, 257])
def test_a_file_that_is_no_tokenizer_is_refused_by_its_name(vocab_size, tmp_path):
    (tmp_path / "notes.md").write_text("words", encoding="utf-8")
    with pytest.raises(InputError, match=r"notes\.md is no tokenizer"):
        load_tokenizer(str(tmp_path / "notes.md"), vocab_size)
