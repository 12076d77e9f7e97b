"""A model whose blocks lie on several devices computes what it does on one."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SMALL, randomize, save_with_bytes
from tinygrad import Device
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, GPTConfig
from tinygpt.checkpoints.quantization import convert
from tinygpt.commands.main import main
from tinygpt.devices import share_blocks
from tinygpt.errors import InputError
from tinygpt.generator import Generator
from tinygpt.runtime import device
from tinygpt.runtime.buffers import moved

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7], [1, 8, 2, 8]]
DEEP = GPTConfig(n_layer=4, n_head=5, n_embd=25, block_size=16, vocab_size=67)


def two(config: GPTConfig, count: int, dtype: str = "float32") -> tuple[GPT, GPT]:
    """One model twice, the second over so many devices."""
    one, other = (convert(randomize(GPT(config)), dtype) for _ in range(2))
    share_blocks(other, count)
    return one, other


def test_blocks_lie_in_their_order_and_the_rest_on_the_first():
    _, model = two(DEEP, 3)
    first = Device.DEFAULT
    lie = [{w.device for w in get_state_dict(block).values()} for block in model.blocks]
    assert lie == [{first}, {first}, {f"{first}:1"}, {f"{first}:2"}]
    assert model.wte.weight.device == model.ln_f.weight.device == first
    share_blocks(model, 1)
    assert {weight.device for weight in get_state_dict(model).values()} == {first}


@pytest.mark.parametrize(("norm", "count"), [("pre", 2), ("pre", 3), ("post", 4)])
def test_logits_are_equal_to_the_last_bit(norm, count):
    one, other = two(GPTConfig(**{**vars(DEEP), "norm": norm}), count)
    np.testing.assert_array_equal(other([PROMPTS[0]]).numpy(), one([PROMPTS[0]]).numpy())


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float32", {"temperature": 0.0}), ("int8", {"top_k": 9, "repetition_penalty": 1.2})],
)
def test_texts_are_equal_past_the_window_too(dtype, settings):
    one, other = (Generator(model) for model in two(DEEP, 3, dtype))
    texts = [list(g.generate(PROMPTS[0], 40, seed=3, **settings)) for g in (one, other)]
    assert len(texts[0]) == 40
    assert texts[0] == texts[1]
    texts = [list(g.generate_batch(PROMPTS, 20, seed=3, **settings)) for g in (one, other)]
    assert texts[0] == texts[1]


def test_what_is_moved_is_there_and_what_is_no_tensor_stays():
    model = randomize(GPT(SMALL))
    assert moved(model.wte.weight, Device.DEFAULT) is model.wte.weight
    assert moved(None, "CPU:1") is None
    assert moved(3, "CPU:1") == 3


@pytest.mark.parametrize("count", [0, 5])
def test_more_devices_than_blocks_are_refused(count):
    with pytest.raises(InputError, match="the model has 4 blocks to share out: give 1 to 4"):
        share_blocks(GPT(DEEP), count)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    """As by a backend that has two of the three."""

    class Two(dict):
        def __missing__(self, name):
            if name.endswith(":2"):
                raise RuntimeError("no such device\nat all")
            return Device[name]

        DEFAULT, canonicalize = Device.DEFAULT, staticmethod(Device.canonicalize)

    monkeypatch.setattr(device, "Device", Two())
    with pytest.raises(InputError, match=r":2 does not open \(no such device at all\): give 2"):
        share_blocks(GPT(DEEP), 3)


def test_the_command_says_how_many_and_writes_the_same(tmp_path, capsys):
    save_with_bytes(randomize(GPT(GPTConfig(**{**vars(DEEP), "vocab_size": 257}))), tmp_path)
    argv = ["generate", "ab", "--model", str(tmp_path), "-n", "20", "--seed", "1", "-t", "1"]
    assert main(argv) == 0
    one = capsys.readouterr()
    assert main([*argv, "--devices", "4"]) == 0
    four = capsys.readouterr()
    assert four.out == one.out
    assert "its blocks on 4 devices" in four.err
    assert main([*argv, "--devices", "5"]) == 2
    assert "give 1 to 4" in capsys.readouterr().err
