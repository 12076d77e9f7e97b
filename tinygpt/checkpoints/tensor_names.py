"""How each form of checkpoint calls and shapes a GPT's tensors: a table for each form.

In all of them a block's tensors stand under a prefix with its number. They differ in the names, in
whether query, key and value are one matrix, and in which way round a matrix lies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from tinygpt.config import GPTConfig


@dataclass(frozen=True)
class Dialect:
    """The names and shapes of one form."""

    block: str  # what stands before the names of a block's parts; {} is its number
    names: dict[str, str]  # our part -> theirs; "attn" is query, key and value in one
    transposed: bool = False  # a block's matrices are (in, out), where ours are (out, in)
    biased: bool = True  # biases are there also where the model has none, as zeros
    norm: tuple[str, str] = ("weight", "bias")  # what a layer norm's two vectors are called
    ignored: str = "(?!)"  # a pattern for what is no weight: causal masks, which files carry along


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: its shape in the file, and what it is to us."""

    shape: tuple[int, ...]
    ours: tuple[str, ...]  # the names of ours that it holds, in order along our first axis
    transposed: bool = False


# GPT-2 as `transformers` has it. Source: its `modeling_gpt2.py`.
HF = Dialect(
    block="h.{}.",
    names={
        "wte": "wte",
        "wpe": "wpe",
        "ln_1": "ln_1",
        "attn": "attn.c_attn",
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
NANOGPT = replace(HF, transposed=False, biased=False)
# Source: GGUF's `MODEL_TENSORS` and `TENSOR_NAMES` for the architecture "gpt2".
GGUF = Dialect(
    block="blk.{}.",
    names={
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_1": "attn_norm",
        "attn": "attn_qkv",
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


def layout(config: GPTConfig, dialect: Dialect, int8: bool = False) -> dict[str, Entry]:
    """Every tensor that a file of this form holds for a model of this shape, by its name there.

    Args:
        int8: whether each matrix has a scale for each output beside it, under `...scale`, which is
            an addition of our own to Hugging Face's form.
    """
    C, inner = config.n_embd, config.inner_dim
    found: dict[str, Entry] = {}

    def add(name: str, ours: tuple[str, ...], *shape: int, turned: bool = False) -> None:
        weight, bias = dialect.norm if len(shape) == 1 else ("weight", "bias")
        turned = turned and dialect.transposed
        at = shape[::-1] if turned else shape
        found[f"{name}.{weight}"] = Entry(at, tuple(f"{x}.weight" for x in ours), turned)
        if int8 and len(shape) == 2 and ours != ("wpe",):
            found[f"{name}.scale"] = Entry(shape[:1], tuple(f"{x}.scale" for x in ours))
        if ours[0] not in ("wte", "wpe", "lm_head") and (config.bias or dialect.biased):
            found[f"{name}.{bias}"] = Entry(shape[:1], tuple(f"{x}.bias" for x in ours))

    names = dialect.names
    add(names["wte"], ("wte",), config.vocab_size, C)
    if config.position == "learned":
        add(names["wpe"], ("wpe",), config.block_size, C)
    for i in range(config.n_layer):
        us, them = f"blocks.{i}.", dialect.block.format(i)
        add(them + names["ln_1"], (f"{us}ln_1",), C)
        if "attn" in names:
            ours = tuple(f"{us}attn.{x}_proj" for x in "qkv")
            add(them + names["attn"], ours, 3 * C, C, turned=True)
        else:
            for x in "qkv":
                part = f"attn.{x}_proj"
                add(them + names[part], (us + part,), C, C, turned=True)
        add(them + names["attn.out_proj"], (f"{us}attn.out_proj",), C, C, turned=True)
        add(them + names["ln_2"], (f"{us}ln_2",), C)
        add(them + names["mlp.c_fc"], (f"{us}mlp.c_fc",), inner, C, turned=True)
        add(them + names["mlp.c_proj"], (f"{us}mlp.c_proj",), C, inner, turned=True)
    if config.norm == "pre":
        add(names["ln_f"], ("ln_f",), C)
    if not config.tie_word_embeddings:
        add(names["lm_head"], ("lm_head",), config.vocab_size, C)
    return found


def weight_name(name: str) -> str:
    """A tensor's name without what programs put before it: `transformer.`, `_orig_mod.`."""
    return re.sub(r"^(_orig_mod\.)?(transformer\.)?", "", name)
