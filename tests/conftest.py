"""What the tests share: one small model, and weights that a test can tell apart."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import started
from prepared import TEXT
from serving import Running, model_to_serve, serving
from tinygrad import Device, Tensor
from tinygrad.helpers import NOOPT, Context
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, Generator, GPTConfig, load_tokenizer
from tinygpt.checkpoints.quantization import DTYPES, supported
from tinygpt.commands.main import main
from tinygpt.runtime import device
from tinygpt.study.reference import Reference
from tinygpt.tokenizer.encoding import char_tokenizer, save_tokenizer
from tinygpt.training import run_files

if hasattr(signal, "SIGHUP"):
    # Under nohup it is ignored, also by what a test starts and then ends by it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# As users have it: what Python keeps for stderr is written at exit, where it can fail once more.
os.environ.pop("PYTHONUNBUFFERED", None)

device.forgive_cache()  # as the command line does when it starts
device.select()

SHARED = Path(__file__).parents[2] / "shared"
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))

# Elsewhere there is nothing to compare: the plain forms are all there is.
RENDERER = type(Device["CPU"].renderer).__name__
CLANG = RENDERER == "ClangJITRenderer"
needs_clang = pytest.mark.skipif(not CLANG, reason="no fast forms without clang on the CPU")

# What else than float32 this backend can hold.
NARROW = [name for name in DTYPES if name != "float32" and supported(name)]

if RENDERER == "X86Renderer":
    # tinygrad's own assembler is written in Python: tests take half the time where kernels are not
    # unrolled. NOOPT=0 has them as a user has them, as `.ci/run` does for the backends' numerics.
    os.environ.setdefault("NOOPT", "1")
    NOOPT.value = int(os.environ["NOOPT"])

# The window is small so that tests reach its end; 67 = 64 + 3 also tries the cut of awkward rows.
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=67)


@pytest.fixture
def kernels_of_a_user() -> Iterator[None]:
    """With NOOPT, see above, what tinygrad's assembler makes of the built-in models crashes."""
    with Context(NOOPT=0):
        yield


def randomize(model: GPT, seed: int = 0) -> GPT:
    """Weights and biases all drawn, and large: a fresh model's are so small, and its biases so
    zero, that a forward pass without half of its parts would hardly differ."""
    rng = np.random.default_rng(seed)
    for name, parameter in get_state_dict(model).items():
        value = rng.normal(
            1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0, 0.3, parameter.shape
        )
        parameter.assign(Tensor(value.astype(np.float32)).to(parameter.device)).realize()
    return model


def save_with_bytes(model: GPT, folder: Path) -> None:
    """A folder of the model and the tokenizer of bytes, as `--model` takes it."""
    model.save_pretrained(folder)
    save_tokenizer(load_tokenizer("bytes"), folder)


def weights_of(model: GPT) -> dict[str, np.ndarray]:
    return {name: parameter.numpy() for name, parameter in get_state_dict(model).items()}


def reference_of(model: GPT) -> Reference:
    return Reference(model.config, weights_of(model))


@pytest.fixture(autouse=True, scope="module")
def _garbage_is_collected_in_this_thread():
    """tinygrad 0.13.0 waits for its own worker thread, for ever, when that thread happens to be
    the one in which Python collects a captured graph (HCQGraph.__del__ synchronizes)."""
    gc.disable()
    yield
    gc.collect()
    gc.freeze()  # what is left stays, for the most part: the next collection need not look at it


@pytest.fixture(scope="session")
def model() -> GPT:
    # with a projection of its own: a tied one tends to repeat its input under greedy decoding
    return randomize(GPT(replace(SMALL, tie_word_embeddings=False)))


@pytest.fixture(scope="session")
def generator(model: GPT) -> Generator:
    return Generator(model, chunk_size=4)


@pytest.fixture(scope="session")
def served_model() -> GPT:
    return model_to_serve()


@pytest.fixture(scope="package")
def running(served_model) -> Iterator[Running]:
    """A server of a small model."""
    with serving(served_model) as found:
        yield found


@pytest.fixture
def cli(capsys):
    """Runs the program in this process: arguments -> (exit status, stdout, stderr)."""
    return lambda *argv: (main([str(word) for word in argv]), *capsys.readouterr())


@pytest.fixture(scope="module")
def browser():
    """Chromium, for `browser.opened`."""
    with started() as chromium:
        yield chromium


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Nowhere to fetch a model from, and no cache that might have it."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for name in ("TINYGPT_CACHE", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def endless(tmp_path) -> list[str]:
    """Arguments of a run that goes on: characters have no end token to be drawn."""
    save_tokenizer(char_tokenizer("Hi!"), tmp_path)
    shape = ["--layers", "1", "--heads", "1", "--dim", "16", "--context", "16"]
    return ["Hi", *shape, "--tokenizer", str(tmp_path), "--max-new-tokens", "1000000"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A text and a run of two checkpoints, the first of which is said to be the best."""
    folder = tmp_path_factory.mktemp("trained")
    text, run = folder / "text.txt", folder / "run"
    text.write_text(TEXT, encoding="utf-8")
    settings = (
        "--n-layer=1 --n-head=1 --n-embd=8 --block-size=8 --batch-size=2 --steps=4 --eval-every=2 "
        "--eval-batches=1 --sample-tokens=0 --keep=3 --dtype=float16 --tokenizer=bpe:300"
    )
    assert main(["train", str(text), "-o", str(run), *settings.split()]) == 0
    run_files.point(run, "best", run / "step-00000002")
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "copy")) / "run"


@pytest.fixture
def resume(cli, run):
    """Goes on with that copy: more arguments -> (exit status, stdout, stderr)."""
    return lambda *more: cli("train", run.parent / "text.txt", "-o", run, "--resume", *more)
