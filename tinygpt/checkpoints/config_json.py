"""`config.json`, as GPT-2's Hugging Face form has it, to GPTConfig and back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from tinygpt.config import Activation, GPTConfig
from tinygpt.errors import CheckpointError, InputError, show, unknown
from tinygpt.storage import read_json

# Their names for what is called otherwise here, older spellings first.
_FIELDS = {
    "n_ctx": "block_size",
    "n_positions": "block_size",
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "activation_function": "activation",
}
# Their names for activations, the first spelling of each being the one that is written. Those that
# are not here have the same name there.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
}
_ACTIVATIONS |= {name: name for name in get_args(Activation) if name not in _ACTIVATIONS.values()}
# Fields of ours that it has, under the same name or one of `_FIELDS`. Any other is our own.
_GPT2_SAYS = (
    "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_inner", "activation",
    "tie_word_embeddings", "layer_norm_epsilon", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "embd_pdrop", "attn_pdrop", "resid_pdrop",
    "initializer_range",
)  # fmt: skip
# Fields that change the forward pass in ways the model has no part for.
_UNSUPPORTED = ("add_cross_attention", "is_encoder_decoder", "quantization_config", "pruned_heads")


def read_config(path: Path) -> GPTConfig:
    """The configuration that a `config.json` describes.

    Raises:
        CheckpointError: when it is missing or unreadable, holds values that cannot work, or names
            a part that the model does not have.
    """
    theirs = read_json(path)
    try:
        if theirs.get("model_type", "gpt2") not in ("gpt2", "tinygpt"):
            raise InputError(f"model_type is {show(theirs['model_type'])}: only gpt2 can be loaded")
        for name in _UNSUPPORTED:
            if theirs.get(name):
                raise InputError(f"{name} is set, which this model has no part for")
        known = {field.name for field in fields(GPTConfig)}
        ours = {name: value for name, value in theirs.items() if name in known}
        ours |= {ours: theirs[name] for name, ours in _FIELDS.items() if name in theirs}
        if "activation_function" in theirs:
            name = theirs["activation_function"]
            if not isinstance(name, str) or name not in _ACTIVATIONS:
                raise unknown("activation_function", name, _ACTIVATIONS)
            ours["activation"] = _ACTIVATIONS[name]
        return GPTConfig(**ours)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def beyond_gpt2(config: GPTConfig) -> dict[str, Any]:
    """What of a configuration the `config.json` of a GPT-2 cannot say: names and values."""
    ours = {field.name: getattr(config, field.name) for field in fields(config)}
    known = (*_GPT2_SAYS, "bias")  # without biases, they are written as zeros
    return {k: v for k, v in ours.items() if k not in known and v != getattr(GPTConfig, k)}


def to_json(config: GPTConfig, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` is to hold; a model that GPT-2's form cannot say has a type of our own."""
    ours = {field.name: getattr(config, field.name) for field in fields(config)}
    names = {v: k for k, v in reversed(_ACTIVATIONS.items())}  # the first spelling of each
    own = {name: ours.pop(name) for name in list(ours) if name not in _GPT2_SAYS}
    changed = {k: v for k, v in own.items() if v != getattr(GPTConfig, k)}
    is_gpt2 = not beyond_gpt2(config) and dtype != "int8"
    return {
        "model_type": "gpt2" if is_gpt2 else "tinygpt",
        "architectures": ["GPT2LMHeadModel"] if is_gpt2 else ["GPT"],
        "n_positions": ours.pop("block_size"),
        "activation_function": names[ours.pop("activation")],
        **token_ids,
        "dtype": dtype,
        **ours,
        **changed,
    }
