"""The model in the package: that it is there by default, small, and writes words, not noise."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import SHARED
from tinygrad.helpers import Context

from tinygpt import GPT, Generator, load_tokenizer
from tinygpt.checkpoints import hub
from tinygpt.commands.main import main
from tinygpt.evaluation.losses import Scorer, mean_loss, spread

FOLDER = hub.resolve(hub.DEFAULT)
CORPUS = SHARED / "data" / "tinyshakespeare.txt"
# The 60 most frequent words of what it was trained on: of that text they are 45%.
COMMON = """
    the and to i of my you a that in is not for with it me your be his he this but have as thou him
    so what thy will king by no we all shall our if do her are lord thee now on good from come which
    more or then at would o they was sir well
"""


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def common_share(text: str) -> float:
    return np.mean([word in COMMON.split() for word in words_of(text)])


@pytest.fixture(autouse=True, scope="module")
def _kernels_are_a_users():
    """With NOOPT, see conftest.py, what tinygrad's assembler makes of this model crashes."""
    with Context(NOOPT=0):
        yield


@pytest.fixture(scope="module")
def text() -> str:
    """What it writes at the temperature of the command."""
    tokenizer = load_tokenizer(FOLDER)
    steps = Generator(GPT.from_pretrained(FOLDER)).generate(
        tokenizer.encode("\n"), max_new_tokens=500, temperature=0.8, seed=1
    )
    return tokenizer.decode(list(steps))


def test_it_is_the_default_and_says_so(capsys):
    assert main(["ROMEO:", "--max-new-tokens", "20", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ROMEO:")
    assert len(out) == len("ROMEO:") + 20 + 1
    assert "tinygpt: shakespeare, " in err
    assert "untrained" not in err


def test_a_folder_of_its_name_does_not_take_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / hub.DEFAULT).mkdir()
    assert hub.resolve(hub.DEFAULT) == FOLDER
    assert hub.resolve(f"./{hub.DEFAULT}").resolve() == tmp_path / hub.DEFAULT


@pytest.mark.parametrize("flags", [["--untrained"], ["--preset", "nano"], ["--layers", "4"]])
def test_a_new_model_is_had_by_asking(flags, capsys):
    assert main(["Hi", "--max-new-tokens", "0", *flags]) == 0
    assert "untrained: its weights are random" in capsys.readouterr().err


def test_its_text_is_made_of_words(text):
    assert len(words_of(text)) > 60
    assert common_share(text) > 0.3
    assert common_share("".join(np.random.default_rng(0).permutation(list(text)))) < 0.15


@pytest.mark.skipif(not CORPUS.is_file(), reason="needs the text it was trained on")
def test_its_words_are_those_of_what_it_read(text):
    known = set(words_of(CORPUS.read_text(encoding="utf-8")))
    assert np.mean([word in known for word in words_of(text)]) > 0.85


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.is_file(), reason="needs the text it was trained on")
def test_its_loss_on_what_it_has_not_read():
    """At most 1.55 nats per character, over a fifth of the last 10%, in windows side by side."""
    content = np.frombuffer(CORPUS.read_bytes(), np.uint8)
    unread = content[len(content) * 9 // 10 :].astype(np.uint16)
    places = spread(len(unread), 256, 80)
    losses = Scorer(GPT.from_pretrained(FOLDER)).losses
    assert mean_loss(losses, unread, places, 256, 8) <= 1.55


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6
