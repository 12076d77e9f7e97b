"""Writing a model as a GGUF file, for llama.cpp."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from tinygpt.checkpoints import gguf_file
from tinygpt.checkpoints.gguf_vocabulary import metadata_of_tokenizer
from tinygpt.checkpoints.parameters_as_stored import ParametersAsStored
from tinygpt.checkpoints.quantization import dtype_of
from tinygpt.checkpoints.tensor_names import GGUF, ExpectedTensor, expected_tensors
from tinygpt.config import GPTConfig
from tinygpt.errors import InputError, unknown
from tinygpt.model import GPT
from tinygpt.tokenizer.tokenizer import Tokenizer

# GGUF's type for a matrix of each of ours: int8 there has a scale for each 32 numbers.
GGUF_TYPES = {"float32": "F32", "float16": "F16", "int8": "Q8_0"}
# Fields that GGUF's gpt2 has, or that say nothing of a trained model. Others must be as llama.cpp
# always has it, which is as GPT-2 is.
_GGUF_SAYS = (
    "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_inner", "bias",
    "tie_word_embeddings", "layer_norm_epsilon", "embd_pdrop", "attn_pdrop", "resid_pdrop",
    "initializer_range",
)  # fmt: skip


def save_gguf(
    model: GPT, path: str | Path, tokenizer: Tokenizer | None = None, dtype: str | None = None
) -> None:
    """Write a GGUF file, whole or not at all, with which llama.cpp continues as the model does.

    Args:
        tokenizer: whose tokens and merges go along; None: ids in, ids out.
        dtype: of the matrices, one of GGUF_TYPES; by default as the model holds them, bfloat16 as
            float32. The rest stays float32, as in llama.cpp's own `convert_hf_to_gguf.py`, and so
            does in Q8_0 what does not divide into blocks.
    Raises:
        InputError: for a model that llama.cpp's GPT-2 is not, a tokenizer that its vocabulary
            cannot hold, or a file that cannot be written.
    """
    check_gguf(model.config, dtype)
    held = dtype_of(model.wte)
    kind = GGUF_TYPES[dtype or (held if held in GGUF_TYPES else "float32")]
    metadata = _metadata(model.config) | metadata_of_tokenizer(tokenizer, model.config.vocab_size)
    expected = expected_tensors(model.config, GGUF)
    stored = ParametersAsStored(model, expected, floats=True)
    layout = {name: (_type_of(tensor, kind), tensor.shape) for name, tensor in expected.items()}
    gguf_file.write(path, metadata, layout, stored.value)


def check_gguf(config: GPTConfig, dtype: str | None) -> None:
    """Refuse, by the name of what it cannot say, a model or type that GGUF's gpt2 is not.

    Raises:
        InputError: for such a one.
    """
    if dtype not in (None, *GGUF_TYPES):
        raise unknown("dtype of GGUF", dtype, GGUF_TYPES)
    for name in (field.name for field in fields(config) if field.name not in _GGUF_SAYS):
        if (value := getattr(config, name)) != getattr(GPTConfig, name):
            raise InputError(f"{name} is {value!r}, which GGUF's gpt2 cannot say: use another form")


def _metadata(config: GPTConfig) -> dict[str, Any]:
    """The configuration as GGUF's metadata have it."""
    return {
        "general.architecture": "gpt2",
        "gpt2.context_length": config.block_size,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": config.inner_dim,
        "gpt2.block_count": config.n_layer,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "gpt2.vocab_size": config.vocab_size,
    }


def _type_of(tensor: ExpectedTensor, kind: str) -> str:
    """The type that a tensor is written in, where matrices are written in `kind`."""
    if len(tensor.shape) == 1 or tensor.ours == ("wpe.weight",):
        return "F32"
    return "F32" if kind == "Q8_0" and tensor.shape[1] % 32 else kind
