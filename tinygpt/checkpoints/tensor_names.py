"""How each form of checkpoint calls and shapes a GPT's tensors: a table for each form.

In all of them a block's tensors stand under a prefix with its number. They differ in the names, in
whether query, key and value are one matrix, and in which way round a matrix lies.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tinygrad.nn.state import get_state_dict

from tinygpt.config import GPTConfig
from tinygpt.layers import TransformerBlock

# Query, key and value, where a form has them as one matrix.
_QKV = "attn.q_proj attn.k_proj attn.v_proj"
_OUTSIDE_BLOCKS = ("wte", "wpe", "ln_f", "lm_head")


@dataclass(frozen=True)
class Dialect:
    """The names and shapes of one form."""

    form: str
    block: str  # what stands before the names of a block's parts; {} is its number
    names: dict[str, str]  # our part, or several that are one there -> theirs
    transposed: bool = False  # a block's matrices are (in, out), where ours are (out, in)
    biased: bool = True  # biases are there also where the model has none, as zeros
    norm: tuple[str, str] = ("weight", "bias")  # what a layer norm's two vectors are called
    ignored: str = "(?!)"  # matches what is no weight: the causal masks in files


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a file must hold: its shape there, and what it is to us."""

    shape: tuple[int, ...]
    ours: tuple[str, ...]  # the names of ours that it holds, in order along our first axis
    transposed: bool = False

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """What it holds of ours, in the order of `ours`, from its values in the file."""
        return np.split(array.T if self.transposed else array, len(self.ours))

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Its values in a file, from ours: what `split` takes apart."""
        array = np.concatenate(parts)
        return array.T if self.transposed else array


# GPT-2 as `transformers` has it. Source: its `modeling_gpt2.py`.
HUGGING_FACE = Dialect(
    form="Hugging Face",
    block="h.{}.",
    names={
        "wte": "wte",
        "wpe": "wpe",
        "ln_1": "ln_1",
        _QKV: "attn.c_attn",
        "attn.out_proj": "attn.c_proj",
        "ln_2": "ln_2",
        "mlp.c_fc": "mlp.c_fc",
        "mlp.c_proj": "mlp.c_proj",
        "ln_f": "ln_f",
        "lm_head": "lm_head",
    },
    transposed=True,
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)
# Source: https://github.com/karpathy/nanoGPT, `model.py`.
NANOGPT = replace(HUGGING_FACE, form="nanoGPT", transposed=False, biased=False)
# Source: GGUF's `MODEL_TENSORS` and `TENSOR_NAMES` for the architecture "gpt2".
GGUF = Dialect(
    form="GGUF",
    block="blk.{}.",
    names={
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_1": "attn_norm",
        _QKV: "attn_qkv",
        "attn.out_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
        "ln_f": "output_norm",
        "lm_head": "output",
    },
)
# Raschka, "Build a Large Language Model (From Scratch)". Source: its chapter 4, `GPTModel`.
BOOK = Dialect(
    form="book",
    block="trf_blocks.{}.",
    names={
        "wte": "tok_emb",
        "wpe": "pos_emb",
        "ln_1": "norm1",
        "attn.q_proj": "att.W_query",
        "attn.k_proj": "att.W_key",
        "attn.v_proj": "att.W_value",
        "attn.out_proj": "att.out_proj",
        "ln_2": "norm2",
        "mlp.c_fc": "ff.layers.0",
        "mlp.c_proj": "ff.layers.2",
        "ln_f": "final_norm",
        "lm_head": "out_head",
    },
    norm=("scale", "shift"),
    ignored=r"trf_blocks\.\d+\.att\.mask",
)
# minGPT's and nanoGPT's weights without what their programs save beside them: `config.json` says
# the rest, as it does for the form that they are named after.
LINEAR = replace(NANOGPT, form="linear")


def book_dialect(names: Collection[str]) -> Dialect:
    """The book's form as a file has it: its later chapters and extras call some parts otherwise."""
    parts = dict(BOOK.names)
    if any(name.endswith(".att.qkv.weight") for name in names):
        of = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
        parts = {_QKV: "att.qkv"} | {part: name for part, name in parts.items() if part not in of}
    if any(name.endswith(".att.proj.weight") for name in names):
        parts["attn.out_proj"] = "att.proj"
    norm = ("weight", "bias") if "final_norm.weight" in names else BOOK.norm
    return replace(BOOK, names=parts, norm=norm)


def expected_tensors(
    config: GPTConfig, dialect: Dialect, int8: bool = False
) -> dict[str, ExpectedTensor]:
    """Every tensor that a file of this form holds for a model of this shape, by its name there.

    Args:
        int8: whether each matrix has a scale for each output beside it, under `...scale`, which is
            an addition of our own to Hugging Face's form.
    """
    found: dict[str, ExpectedTensor] = {}
    for theirs, ours, shape in _parts(config, dialect):
        is_matrix, in_block = len(shape) == 2, ours[0].startswith("blocks.")
        weight, bias = ("weight", "bias") if is_matrix else dialect.norm
        transposed = dialect.transposed and is_matrix and in_block
        there = shape[::-1] if transposed else shape
        found[f"{theirs}.{weight}"] = ExpectedTensor(there, _each(ours, "weight"), transposed)
        if int8 and is_matrix and ours != ("wpe",):
            found[f"{theirs}.scale"] = ExpectedTensor(shape[:1], _each(ours, "scale"))
        if (in_block or not is_matrix) and (config.bias or dialect.biased):
            found[f"{theirs}.{bias}"] = ExpectedTensor(shape[:1], _each(ours, "bias"))
    return found


def _parts(
    config: GPTConfig, dialect: Dialect
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """The parts of a model: the name there, ours for what is in it, and its weight's shape here."""
    names, C = dialect.names, config.n_embd
    yield names["wte"], ("wte",), (config.vocab_size, C)
    if config.position == "learned":
        yield names["wpe"], ("wpe",), (config.block_size, C)
    shapes = _block_shapes(config)
    for i in range(config.n_layer):
        for key, theirs in names.items():
            if key in _OUTSIDE_BLOCKS:
                continue
            ours = key.split()
            rows = sum(shapes[part][0] for part in ours)
            shape = (rows, *shapes[ours[0]][1:])
            yield dialect.block.format(i) + theirs, tuple(f"blocks.{i}.{x}" for x in ours), shape
    if config.norm == "pre":
        yield names["ln_f"], ("ln_f",), (C,)
    if not config.tie_word_embeddings:
        yield names["lm_head"], ("lm_head",), (config.vocab_size, C)


def _block_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in one block, as the block itself has them, by the part's name."""
    parameters = get_state_dict(TransformerBlock(config, layer=0))  # without values, so no memory
    weights = {name: x.shape for name, x in parameters.items() if name.endswith(".weight")}
    return {name.removesuffix(".weight"): shape for name, shape in weights.items()}


def _each(parts: tuple[str, ...], what: str) -> tuple[str, ...]:
    return tuple(f"{part}.{what}" for part in parts)


# What programs that wrap a model, or a part of it, put before the names inside: torch's data
# parallelism, its compiler, its checkpointing of activations.
_WRAPPERS = re.compile(
    r"\b(module|_orig_mod|_fsdp_wrapped_module|_forward_module|_checkpoint_wrapped_module)\."
)
# What stands before a whole model's names, in any number.
_OWNERS = re.compile(r"^((base_model|model|transformer)\.)+")
# What a model of any form that goes by names of its own has, below whatever name.
_EMBEDDING = re.compile(r"(.+\.)(?:wte|tok_emb)\.weight")


def weight_name(name: str) -> str:
    """A tensor's name without what programs put before it, such as `module.transformer.`."""
    return _OWNERS.sub("", _WRAPPERS.sub("", name))


def owner(names: Collection[str]) -> str:
    """What else a program put before all names of its one language model, such as `net.`.

    Other names, of a head beside it, may do without. Where there are two models, or one without
    such a name, it is "".

    Args:
        names: as `weight_name` gives them.
    """
    if {"wte.weight", "tok_emb.weight"} & {*names}:
        return ""
    found = [match[1] for name in names if (match := _EMBEDDING.fullmatch(name))]
    blocks = tuple(before + block for before in found for block in ("h.0.", "trf_blocks.0."))
    if len(found) != 1 or not any(name.startswith(blocks) for name in names):
        return ""
    parts = found[0].split(".")[:-1]
    while parts[-1] in ("base_model", "model", "transformer"):  # the head does not have these
        parts.pop()
    return "".join(f"{part}." for part in parts)
