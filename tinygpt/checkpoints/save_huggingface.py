"""Writing a model as a folder in Hugging Face form, which is the form a model is kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinygpt.checkpoints import config_json, safetensors_file
from tinygpt.checkpoints.model_files import WEIGHTS
from tinygpt.checkpoints.parameters_as_stored import ParametersAsStored
from tinygpt.checkpoints.quantization import dtype_of
from tinygpt.checkpoints.tensor_names import HUGGING_FACE, expected_tensors
from tinygpt.errors import InputError, reason
from tinygpt.model import GPT
from tinygpt.storage import atomic_file, write_text
from tinygpt.tokenizer.encoding import save_tokenizer
from tinygpt.tokenizer.tokenizer import Tokenizer

_GENERATION = "generation_config.json"
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}


def save_pretrained(model: GPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write `config.json` and `model.safetensors`, each whole or not at all, weights as held.

    `transformers` loads the folder as a GPT-2 with equal logits. A model that GPT-2's form cannot
    express (post-norm, sinusoidal positions, no shortcuts, int8) is marked as model_type "tinygpt",
    which `transformers` refuses by name and `open_checkpoint` reads.

    Args:
        folder: made if need be.
        tokenizer: goes along, and what it knows of the ends of a text.
    Raises:
        InputError: when the folder cannot be written, the tokenizer is not of GPT-2's form, or the
            model's heads are split over devices.
    """
    dtype = dtype_of(model.wte)
    expected = {
        name if name.startswith("lm_head") else f"transformer.{name}": tensor
        for name, tensor in expected_tensors(model.config, HUGGING_FACE, dtype == "int8").items()
    }
    stored = ParametersAsStored(model, expected, floats=False)
    layout = {name: (_STORED[stored.held(name)], tensor.shape) for name, tensor in expected.items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {reason(error)}") from error
    # One inside the other, so that a failure in either leaves both old files as they were.
    with atomic_file(folder / "config.json") as file:
        content = config_json.to_json(model.config, dtype, _ids(model, tokenizer))
        file.write(json.dumps(content, indent=2).encode() + b"\n")
        safetensors_file.write(folder / WEIGHTS, layout, stored.value, {"format": "pt"})
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
        if (generation := tokenizer.kept.get(_GENERATION)) is not None:
            write_text(folder / _GENERATION, json.dumps(generation, indent=2) + "\n")


def _ids(model: GPT, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of a text's begin and end, as the model's files had them where it had any."""
    if tokenizer is None:
        end = 50256 if model.config.vocab_size > 50256 else None  # GPT-2's own
        return {"bos_token_id": end, "eos_token_id": end}
    ends = tokenizer.ends
    ids = {
        "bos_token_id": tokenizer.start,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    return ids | tokenizer.kept.get("config.json", {})
