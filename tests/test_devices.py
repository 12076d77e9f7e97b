"""A model that lies on several devices computes what it does on one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from conftest import SMALL, randomize, save_with_bytes
from tinygrad import Device
from tinygrad.device import Buffer
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, GPTConfig
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.quantization import convert
from tinygpt.commands.main import main
from tinygpt.devices import copy_to_all, share_blocks, split_heads
from tinygpt.errors import InputError
from tinygpt.evaluation.losses import Scorer
from tinygpt.generator import Generator
from tinygpt.placement import Placement
from tinygpt.runtime import device, memory
from tinygpt.runtime.buffers import moved
from tinygpt.training.settings import TrainConfig
from tinygpt.training.step import Trainer

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7], [1, 8, 2, 8]]
DEEP = GPTConfig(n_layer=4, n_head=5, n_embd=25, block_size=16, vocab_size=67)
# Of the width of 24 none divides by the 32 rows that a product likes; 67 tokens divide by nothing.
WIDE = GPTConfig(n_layer=2, n_head=4, n_embd=24, block_size=16, vocab_size=67)


def two(
    config: GPTConfig, count: int, dtype: str = "float32", split: Callable = share_blocks
) -> tuple[GPT, GPT]:
    """One model twice, the second over so many devices."""
    one, other = (convert(randomize(GPT(config)), dtype) for _ in range(2))
    split(other, count)
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


@pytest.mark.parametrize(
    ("count", "dtype", "changes"),
    [
        (2, "float32", {}),
        (4, "int8", {}),
        (2, "bfloat16", {"norm": "post", "position": "sinusoidal", "tie_word_embeddings": False}),
        (4, "float32", {"bias": False, "n_inner": 20, "tie_word_embeddings": False}),
    ],
)
def test_heads_on_several_devices_give_the_same_numbers(count, dtype, changes):
    one, other = two(GPTConfig(**{**vars(WIDE), **changes}), count, dtype, split_heads)
    names = tuple(device.several(count))
    assert {weight.device for weight in get_state_dict(other).values()} == {names}
    logits = [model([PROMPTS[0]]).numpy() for model in (one, other)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    losses = [model.losses(*[[PROMPTS[0]]] * 2).numpy() for model in (one, other)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 9, "frequency_penalty": 0.5}])
def test_texts_of_heads_are_equal_past_the_window_too(count, settings):
    one, other = (Generator(model) for model in two(WIDE, count, split=split_heads))
    texts = [list(g.generate(PROMPTS[0], 40, seed=3, **settings)) for g in (one, other)]
    assert len(texts[0]) == 40
    assert texts[0] == texts[1]
    texts = [list(g.generate_batch(PROMPTS, 20, seed=3, **settings)) for g in (one, other)]
    assert texts[0] == texts[1]


def test_each_device_has_a_part_of_what_heads_are_made_of():
    _, model = two(WIDE, 4, split=split_heads)
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    cut = [attention.q_proj, attention.out_proj, mlp.c_fc, mlp.c_proj, model.wte]
    shapes = [layer.weight.uop.shard_shape for layer in cut]
    assert shapes == [(6, 24), (24, 6), (24, 24), (24, 24), (32, 24)]
    assert model.empty_cache(3, 16)[1][0].uop.shard_shape == (3, 1, 16, 6)


def test_25_heads_lie_on_4_devices_by_layers_alone():
    config = GPTConfig(n_layer=4, n_head=25, n_embd=50, block_size=16, vocab_size=67)
    with pytest.raises(InputError, match=r"25 heads and 200 hidden .* give 5 or 25 \(--dev"):
        split_heads(GPT(config), 4)
    one, other = two(config, 4)
    np.testing.assert_array_equal(other([PROMPTS[0]]).numpy(), one([PROMPTS[0]]).numpy())
    texts = [list(Generator(m).generate(PROMPTS[0], 30, temperature=0.0)) for m in (one, other)]
    assert texts[0] == texts[1]


def test_one_device_is_where_a_model_is_already():
    model = GPT(WIDE)
    for split in (share_blocks, split_heads, copy_to_all):
        copy_to_all(model, 2)
        split(model, 1)
        assert {weight.device for weight in get_state_dict(model).values()} == {Device.DEFAULT}
        assert model.placement.count == 1


def test_a_model_on_several_devices_is_saved_as_it_was_and_split_heads_are_not(tmp_path):
    one, other = two(WIDE, 2)
    for name, model in (("one", one), ("two", other)):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    split_heads(other, 2)
    for again in (share_blocks, split_heads, copy_to_all):
        with pytest.raises(InputError, match="heads are split over devices: load it again"):
            again(other, 2)
    with pytest.raises(InputError, match="heads are split over devices: load it again"):
        other.init_weights(0)
    with pytest.raises(InputError, match="heads are split over devices: load it again"):
        other.save_pretrained(tmp_path / "three")
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("split", [share_blocks, split_heads])
def test_no_device_has_room_for_more_than_its_part_while_a_model_is_loaded(
    split, tmp_path, monkeypatch
):
    config = GPTConfig(**{**vars(DEEP), "n_head": 4, "n_embd": 32, "vocab_size": 5})
    whole = randomize(GPT(config))
    whole.save_pretrained(tmp_path)
    taken, usual = Counter(), Buffer.allocate

    def allocate(self, *args, **kwargs):
        taken[self.device] += self.nbytes
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(Buffer, "allocate", allocate)
    model = open_checkpoint(tmp_path).load(place=partial(split, count=4))
    most = 4 * config.parameter_count / 4 * 1.4  # each has the norms too, or the embeddings
    assert len(taken) == 4
    assert max(taken.values()) < most
    monkeypatch.undo()
    logits = [each([PROMPTS[0][:3]]).numpy() for each in (whole, model)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)


def test_each_of_several_gpus_needs_room_for_its_part_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "require_memory", lambda needed, what: asked.append(needed))
    for name in ("CPU", "CUDA"):
        monkeypatch.setattr(device, "default", lambda name=name: name)
        for devices in ((), ("a", "b", "c")):
            Placement(WIDE, "layers", devices).require_memory(300, "a model")
        Placement(WIDE, "batch", ("a", "b")).require_memory(300, "a cache, which both have")
    assert asked == [300, 300, 300, 300, 100, 300]


def test_scores_are_equal_too():
    one, other = two(WIDE, 2, split=split_heads)
    inputs, targets = np.arange(16, dtype=np.int32).reshape(2, 2, 4)
    for theirs, ours in zip(
        *(Scorer(model)(inputs, targets) for model in (one, other)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_what_shares_blocks_or_heads_is_not_trained():
    for split in (share_blocks, split_heads):
        split(model := GPT(WIDE), 2)
        with pytest.raises(InputError, match="give each device all of it"):
            Trainer(model, TrainConfig())
    share_blocks(model := GPT(WIDE), 2)
    copy_to_all(model, 1)
    assert {weight.device for weight in get_state_dict(model).values()} == {Device.DEFAULT}
    Trainer(model, TrainConfig())


def test_what_is_moved_is_there_and_what_is_no_tensor_stays():
    model = randomize(GPT(SMALL))
    assert moved(model.wte.weight, Device.DEFAULT) is model.wte.weight
    assert moved(None, "CPU:1") is None
    assert moved(3, "CPU:1") == 3


@pytest.mark.parametrize("split", [share_blocks, split_heads, copy_to_all])
def test_no_devices_are_refused(split):
    for count in (0, -1):
        with pytest.raises(InputError, match=f"^{count} devices"):
            split(GPT(DEEP), count)


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
    assert main([*argv, "--devices", "5", "--split", "heads"]) == 0
    five = capsys.readouterr()
    assert five.out == one.out
    assert "plain operations, its heads on 5 devices" in five.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--devices", "5"], "the model has 4 blocks to share out: give 1 to 4 (--devices)"),
        (
            ["--devices", "2", "--split", "heads"],
            "share evenly: give 5 (--devices), or",
        ),
        (["--split", "heads"], "--split is for several devices: give --devices N too"),
    ],
)
def test_the_command_says_what_devices_cannot_share(more, words, tmp_path, capsys):
    save_with_bytes(randomize(GPT(GPTConfig(**{**vars(DEEP), "vocab_size": 257}))), tmp_path)
    assert main(["generate", "ab", "--model", str(tmp_path), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
