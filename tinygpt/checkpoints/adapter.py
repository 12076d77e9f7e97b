"""LoRA adapters as PEFT writes them: what they change in the tensors of the model below them.

A module's weight W becomes W + scale * B @ A, with A (r, in) and B (out, r) from the adapter's
file. Other tensors in it take the place of the model's. Source: Hu et al. 2021, section 4.1; peft's
`tuners/lora/layer.py`, which applies the two matrices by themselves where this adds them up.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.checkpoints import hub
from tinygpt.checkpoints.detect_form import Tensors, read_headers
from tinygpt.checkpoints.model_files import ADAPTER_CONFIG as CONFIG
from tinygpt.checkpoints.model_files import ADAPTER_FILES as FILES
from tinygpt.checkpoints.stored_tensor import read_tensor
from tinygpt.checkpoints.tensor_names import HUGGING_FACE, Dialect, ExpectedTensor
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, InputError, check_float, check_int, show
from tinygpt.storage import read_json

_MERGE = "merge it with peft: model.merge_and_unload().save_pretrained(OUT)"
# What changes the arithmetic in ways that are not computed here.
_UNSUPPORTED = (
    "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "ensure_weight_tying",
)  # fmt: skip
# The starts of training that leave the model below as it is.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "default")
_LORA = re.compile(r"(.*)\.lora_([AB])(\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings and where its tensors lie."""

    folder: Path
    settings: Mapping[str, Any]
    low_rank: dict[str, Tensors]  # of each changed module: its A and its B
    replaced: Tensors

    def base(self) -> Path:
        """The model below it, fetched first if it has to be.

        Raises:
            InputError: when it is not named, or cannot be found or fetched.
        """
        name = self.settings.get("base_model_name_or_path")
        place = self.folder / CONFIG
        if not isinstance(name, str) or not 0 < len(name) < 4096:
            raise CheckpointError(
                f"{place}: base_model_name_or_path is {show(name)}: write there the folder or "
                "name of the model that was trained"
            )
        beside = os.path.normpath(self.folder / name)
        if name.startswith(".") and os.path.exists(beside):
            return hub.resolve(Path(beside))
        try:
            return hub.resolve(name)
        except InputError as error:
            raise InputError(f"{place}: its base_model_name_or_path: {error}") from error

    def onto(
        self, dialect: Dialect, config: GPTConfig, tensors: Tensors
    ) -> tuple[GPTConfig, Tensors]:
        """The configuration and tensors of the model with what is replaced.

        Raises:
            CheckpointError: for a model of a form that peft does not know.
        """
        if dialect is not HUGGING_FACE or any(i.dtype == "I8" for _, i in tensors.values()):
            raise CheckpointError(
                f"{self.folder}: the model below an adapter must be of Hugging Face's form, and "
                f"not in int8; this one is of {dialect.form}'s"
            )
        changed = {*self.replaced, *(f"{module}.weight" for module in self.low_rank)}
        parted = changed & {"wte.weight", "lm_head.weight"} and "wte.weight" in tensors
        if config.tie_word_embeddings and parted:
            # peft changes one of the two, and the other stays what it was.
            config = replace(config, tie_word_embeddings=False)
            tensors = tensors | {"lm_head.weight": tensors["wte.weight"]}
        return config, tensors | self.replaced

    def check(self, expected: Mapping[str, ExpectedTensor]) -> None:
        """Refuse matrices that do not fit the model, and settings that do not fit them.

        Raises:
            CheckpointError: which.
        """
        for name in self.replaced:
            if name not in expected:
                raise self._error(f"has {show(name)}, which is no part of the model: {_MERGE}")
        for module, pair in self.low_rank.items():
            tensor = expected.get(f"{module}.weight")
            if tensor is None or len(tensor.shape) != 2 or module in ("wte", "wpe"):
                raise self._error(f"changes {show(module)}, which is no linear layer of the model")
            rows, columns = tensor.shape[::-1] if tensor.transposed else tensor.shape
            if {*pair} != {"A", "B"}:
                raise self._error(f"has only one matrix for {module}")
            a, b = (pair[part][1].shape for part in "AB")
            if len(a) != 2 or (a[1], b) != (columns, (rows, a[0])):
                fact = f"A is {show(a)} and B {show(b)}: they must be (r, {columns}), ({rows}, r)"
                raise self._error(f"does not fit {module}: {fact}")
            self._scale(module, a[0])

    def merged(self, name: str, parts: list[np.ndarray]) -> list[np.ndarray]:
        """What a tensor of the model holds of ours, with what the adapter adds to it.

        Raises:
            CheckpointError: when the sum is beyond float32, or the adapter's file is damaged.
        """
        module = name.removesuffix(".weight")
        if module not in self.low_rank or module == name:
            return parts
        a, b = (read_tensor(*self.low_rank[module][part]).astype(np.float32) for part in "AB")
        with np.errstate(all="ignore"):
            added = np.split(b * np.float32(self._scale(module, len(a))), len(parts))
            parts = [part + rows @ a for part, rows in zip(parts, added, strict=True)]
        if not all(np.isfinite(part).all() for part in parts):
            raise self._error(f"makes values of {name} that are infinite or not a number")
        return parts

    def _scale(self, module: str, rank: int) -> float:
        """What B @ A is multiplied with."""
        found = self.settings
        ranks = {found.get("r"), *_pattern(found, "rank_pattern").values()}
        if rank not in ranks:
            raise self._error(f"has a rank of {rank} for {module}, where {CONFIG} says {ranks}")
        full, alpha = f"transformer.{module}", found.get("lora_alpha")
        for key, value in _pattern(found, "alpha_pattern").items():
            if f".{full}".endswith(f".{key}"):
                alpha = value
                break
        check_float("lora_alpha", alpha)
        return float(alpha) / (math.sqrt(rank) if found.get("use_rslora") else rank)

    def _error(self, fact: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: the adapter {fact}")


def read_adapter(path: Path) -> Adapter | None:
    """The adapter in a folder, or whose file is given; None where there is none.

    Raises:
        CheckpointError: when it is damaged, or not a LoRA that can be merged here.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file() or not (path.is_dir() or path.name in FILES):
        return None
    settings = read_json(folder / CONFIG)
    try:
        _check(settings)
    except InputError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{folder}: it has {CONFIG}, but neither {' nor '.join(FILES)}")
    low_rank: dict[str, Tensors] = {}
    replaced: Tensors = {}
    for name, place in read_headers(files[:1]).tensors.items():
        name = name.replace(".base_layer.", ".")
        if match := _LORA.fullmatch(name):
            low_rank.setdefault(match[1], {})[match[2]] = place
        elif not re.fullmatch(HUGGING_FACE.ignored, name):
            replaced[name] = place
    for name, (_, info) in [*replaced.items(), *(x for p in low_rank.values() for x in p.items())]:
        if info.dtype not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(f"{files[0]}: {show(name)} is {info.dtype}, no type of floats")
    return Adapter(folder, settings, low_rank, replaced)


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse settings of another kind of adapter, or that cannot be."""
    if (kind := settings.get("peft_type")) != "LORA":
        raise InputError(f"peft_type is {show(kind)}: only LORA can be loaded; {_MERGE}")
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise InputError(f"{name} is set, which is not computed here: {_MERGE}")
    if (start := settings.get("init_lora_weights")) not in _STARTS:
        fact = f"init_lora_weights is {show(start)}, which changes the model below"
        raise InputError(f"{fact}: {_MERGE}")
    check_int("r", settings.get("r"), low=1)
    check_float("lora_alpha", settings.get("lora_alpha"))
    for rank in _pattern(settings, "rank_pattern").values():
        check_int("rank_pattern", rank, low=1)
    for alpha in _pattern(settings, "alpha_pattern").values():
        check_float("alpha_pattern", alpha)


def _pattern(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Numbers for modules of their own, by the ends of their names."""
    found = settings.get(name) or {}
    # To peft the names are regular expressions, and one from a file could take for ever.
    if not isinstance(found, dict) or not all(re.fullmatch(r"[\w.]+", key) for key in found):
        raise InputError(f"{name} is {show(found)}: only plain names can be read; {_MERGE}")
    return found
