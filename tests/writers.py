"""Small checkpoints of every form, each written by the program that the form comes from.

`WRITERS` maps a form's name to a function that writes one into a folder and gives its path and the
logits that the other program computes for `TOKENS`. What a form's program cannot be installed from
a package, nanoGPT and the book, is here in torch, by its published names and arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinygpt.study.reference import Reference

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 300}
TOKENS = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], (2, 9))
Writer = Callable[[Path], tuple[Path, np.ndarray]]


def randomize(model) -> None:
    """Weights of a torch module all drawn, and large, so that each part counts."""
    torch = pytest.importorskip("torch")

    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            mean = float(parameter.ndim == 1 and not name.endswith(("bias", "shift")))
            value = rng.normal(mean, 0.2, tuple(parameter.shape)).astype(np.float32)
            parameter.copy_(torch.from_numpy(value))


def logits_of(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        out = model.eval()(torch.from_numpy(tokens))
    return getattr(out, "logits", out).numpy()


# transformers.


def hf_model(**options):
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**{**SHAPE, **ends, **options})
    model = transformers.GPT2LMHeadModel(config)
    randomize(model)
    return model


def hf_safetensors(folder: Path) -> tuple[Path, np.ndarray]:
    model = hf_model()
    model.save_pretrained(folder)
    return folder, logits_of(model)


def hf_bin(folder: Path, new: bool = True) -> tuple[Path, np.ndarray]:
    """As transformers 4 wrote it: `torch.save` of the state dict, the tied head included."""
    torch = pytest.importorskip("torch")

    model = hf_model()
    model.config.save_pretrained(folder)
    path = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=new)
    return folder, logits_of(model)


def hf_with_heads(folder: Path, prefix: str = "") -> tuple[Path, np.ndarray]:
    """With the heads of trl's value models and of GPT2DoubleHeadsModel."""
    torch = pytest.importorskip("torch")

    model = hf_model()
    model.config.save_pretrained(folder)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    for head, rows in (("v_head", 1), ("multiple_choice_head", 1)):
        state[f"{prefix}{head}.summary.weight"] = torch.ones(rows, SHAPE["n_embd"])
        state[f"{prefix}{head}.summary.bias"] = torch.ones(rows)
    torch.save(state, folder / "pytorch_model.bin")
    return folder, logits_of(model)


def hf_bin_shards(folder: Path) -> tuple[Path, np.ndarray]:
    torch = pytest.importorskip("torch")

    model = hf_model(tie_word_embeddings=False)
    model.config.save_pretrained(folder)
    state, files = model.state_dict(), {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name].clone() for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder, logits_of(model)


# nanoGPT. Source: https://github.com/karpathy/nanoGPT, `model.py` and `train.py`.


def nanogpt_model(bias: bool, gelu: str = "none", tied: bool = True):
    torch = pytest.importorskip("torch")
    nn, F = torch.nn, torch.nn.functional
    C, H, T, V = (SHAPE[n] for n in ("n_embd", "n_head", "n_positions", "vocab_size"))

    class LayerNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(C))
            self.bias = nn.Parameter(torch.zeros(C)) if bias else None

        def forward(self, x):
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = nn.Linear(C, 3 * C, bias=bias)
            self.c_proj = nn.Linear(C, C, bias=bias)

        def forward(self, x):
            q, k, v = (
                part.view(*x.shape[:2], H, C // H).transpose(1, 2)
                for part in self.c_attn(x).split(C, dim=2)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(x.shape))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc = nn.Linear(C, 4 * C, bias=bias)
            self.c_proj = nn.Linear(4 * C, C, bias=bias)

        def forward(self, x):
            return self.c_proj(F.gelu(self.c_fc(x), approximate=gelu))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn, self.ln_2, self.mlp = LayerNorm(), Attention(), LayerNorm(), MLP()

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            blocks = nn.ModuleList(Block() for _ in range(SHAPE["n_layer"]))
            parts = {"wte": nn.Embedding(V, C), "wpe": nn.Embedding(T, C), "h": blocks}
            self.transformer = nn.ModuleDict({**parts, "ln_f": LayerNorm()})
            self.lm_head = nn.Linear(C, V, bias=False)
            if tied:
                self.transformer.wte.weight = self.lm_head.weight

        def forward(self, ids):
            parts = self.transformer
            x = parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1]))
            for block in parts.h:
                x = block(x)
            return self.lm_head(parts.ln_f(x))

    model = GPT()
    randomize(model)
    return model


def nanogpt(folder: Path, bias: bool = True, prefix: str = "") -> tuple[Path, np.ndarray]:
    torch = pytest.importorskip("torch")

    model = nanogpt_model(bias)
    args = {name: SHAPE[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.from_numpy(TOKENS)).square().mean().backward()
    state = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    expected = logits_of(model)
    optimizer.step()
    checkpoint = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": {**args, "block_size": SHAPE["n_positions"], "bias": bias, "dropout": 0.0},
        "iter_num": 1,
        "best_val_loss": torch.tensor(1e9),
        "config": {"out_dir": "out", "compile": True, "learning_rate": 6e-4},
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    return folder / "ckpt.pt", expected


def early_nanogpt(folder: Path) -> tuple[Path, np.ndarray]:
    """As of January 2023, which had no option of biases yet, and GPT-2's GELU."""
    torch = pytest.importorskip("torch")

    model = nanogpt_model(True, "tanh")
    args = {name: SHAPE[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    args |= {"block_size": SHAPE["n_positions"], "dropout": 0.0}
    torch.save({"model": model.state_dict(), "model_args": args}, folder / "ckpt.pt")
    return folder / "ckpt.pt", logits_of(model)


# build-nanogpt. Source: https://github.com/karpathy/build-nanogpt, `train_gpt2.py`.


@dataclass
class GPTConfig:
    """The object that it pickles beside the weights."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int


def build_nanogpt(folder: Path, prefix: str = "") -> tuple[Path, np.ndarray]:
    torch = pytest.importorskip("torch")

    model = nanogpt_model(True, "tanh")
    state = {prefix + name: value for name, value in model.state_dict().items()}
    rest = {name: SHAPE[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    config = GPTConfig(SHAPE["n_positions"], **rest)
    saved = {"model": state, "config": config, "step": 5, "val_loss": 3.2}
    torch.save(saved, folder / "model_00005.pt")
    return folder / "model_00005.pt", logits_of(model)


# minGPT, whose file holds the weights alone. Source: https://github.com/karpathy/minGPT.


def mingpt(folder: Path, config: bool = True) -> tuple[Path, np.ndarray]:
    torch = pytest.importorskip("torch")

    model = nanogpt_model(True, "tanh", tied=False)
    state = model.state_dict()
    for i in range(SHAPE["n_layer"]):
        state[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, 16, 16))
    torch.save(state, folder / "model.pt")
    if config:
        (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    return folder / "model.pt", logits_of(model)


# "Build a Large Language Model (From Scratch)". Source: its chapters 3 and 4.


def book_model(qkv_bias: bool):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    C, H, T, V = (SHAPE[n] for n in ("n_embd", "n_head", "n_positions", "vocab_size"))

    class LayerNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(C))
            self.shift = nn.Parameter(torch.zeros(C))

        def forward(self, x):
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            return self.scale * (x - mean) / torch.sqrt(var + 1e-5) + self.shift

    class GELU(nn.Module):
        def forward(self, x):
            inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
            return 0.5 * x * (1 + torch.tanh(inner))

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(C, 4 * C), GELU(), nn.Linear(4 * C, C))

        def forward(self, x):
            return self.layers(x)

    class MultiHeadAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.W_query, self.W_key, self.W_value = (
                nn.Linear(C, C, bias=qkv_bias) for _ in range(3)
            )
            self.out_proj = nn.Linear(C, C)
            self.register_buffer("mask", torch.triu(torch.ones(T, T), diagonal=1))

        def forward(self, x):
            B, t, _ = x.shape
            q, k, v = (
                part(x).view(B, t, H, C // H).transpose(1, 2)
                for part in (self.W_query, self.W_key, self.W_value)
            )
            scores = q @ k.transpose(2, 3)
            scores = scores.masked_fill(self.mask.bool()[:t, :t], -torch.inf)
            weights = torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1)
            return self.out_proj((weights @ v).transpose(1, 2).reshape(B, t, C))

    class TransformerBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.att, self.ff = MultiHeadAttention(), FeedForward()
            self.norm1, self.norm2 = LayerNorm(), LayerNorm()

        def forward(self, x):
            x = self.att(self.norm1(x)) + x
            return self.ff(self.norm2(x)) + x

    class GPTModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok_emb, self.pos_emb = nn.Embedding(V, C), nn.Embedding(T, C)
            blocks = [TransformerBlock() for _ in range(SHAPE["n_layer"])]
            self.trf_blocks, self.final_norm = nn.Sequential(*blocks), LayerNorm()
            self.out_head = nn.Linear(C, V, bias=False)

        def forward(self, ids):
            x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
            return self.out_head(self.final_norm(self.trf_blocks(x)))

    model = GPTModel()
    randomize(model)
    return model


def fused(state: Mapping) -> dict:
    """As its bonus material has it: one matrix for query, key and value, and torch's layer norm."""
    torch = pytest.importorskip("torch")

    found, parts = {}, ("W_query", "W_key", "W_value")
    for name, value in state.items():
        if parts[0] in name:
            rows = [state[name.replace(parts[0], part)] for part in parts]
            found[name.replace(parts[0], "qkv")] = torch.cat(rows)
        elif not any(part in name for part in parts):
            name = name.replace("out_proj", "proj").replace(".scale", ".weight")
            found[name.replace(".shift", ".bias")] = value
    return found


def book(
    folder: Path,
    qkv_bias: bool = False,
    nested: bool = False,
    change: Callable[[Mapping], dict] = dict,
) -> tuple[Path, np.ndarray]:
    torch = pytest.importorskip("torch")

    model = book_model(qkv_bias)
    # at width 32 it is not as in GPT-2
    (folder / "config.json").write_text('{"n_head": 2}', encoding="utf-8")
    state = change(model.state_dict())
    saved = {"model_state_dict": state, "optimizer_state_dict": {}} if nested else state
    torch.save(saved, folder / "model.pth")
    return folder / "model.pth", logits_of(model)


def book_safetensors(folder: Path) -> tuple[Path, np.ndarray]:
    save_file = pytest.importorskip("safetensors.torch").save_file

    model = book_model(True)
    (folder / "config.json").write_text('{"n_head": 2}', encoding="utf-8")
    save_file(model.state_dict(), folder / "gpt2-small.safetensors")
    return folder / "gpt2-small.safetensors", logits_of(model)


# GGUF, by llama.cpp's Python package `gguf`.

# Bytes, a few merges, and the end token, padded as llama.cpp's converter does it.
MERGES = [["h", "e"], ["Ġ", "t"], ["Ġt", "he"], ["l", "l"], ["o", "Ġ"]]
K_SHAPE = {**SHAPE, "n_embd": 256, "n_layer": 1}  # blocks of K types have 256 numbers


def byte_vocabulary() -> list[str]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    spelt = {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}
    return [*(spelt[b] for b in range(256)), *map("".join, MERGES), "<|endoftext|>"]


def gguf_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' state dict under GGUF's names, matrices as (out, in)."""
    names = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    names |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    found = {}
    for name, value in weights.items():
        part, _, last = name.removeprefix("transformer.").rpartition(".")
        if part in top:
            found[f"{top[part]}.{last}"] = value
        elif part.startswith("h."):
            _, number, rest = part.split(".", 2)
            turned = value.T if value.ndim == 2 else value
            found[f"blk.{number}.{names[rest]}.{last}"] = np.ascontiguousarray(turned)
    return found


def write_gguf(
    path: Path, weights: Mapping[str, np.ndarray], kind: str, shape: Mapping[str, int] = SHAPE
) -> None:
    """By the package `gguf`; matrices as `kind`, which it must be able to quantize to."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(shape["n_positions"])
    writer.add_embedding_length(shape["n_embd"])
    writer.add_feed_forward_length(4 * shape["n_embd"])
    writer.add_block_count(shape["n_layer"])
    writer.add_head_count(shape["n_head"])
    writer.add_layer_norm_eps(1e-5)
    tokens = byte_vocabulary()
    pads = [f"[PAD{i}]" for i in range(len(tokens), shape["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + pads)
    kinds = [1] * (len(tokens) - 1) + [3] + [5] * len(pads)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    for which in ("bos", "eos", "unk"):
        getattr(writer, f"add_{which}_token_id")(len(tokens) - 1)
    for name, value in gguf_tensors(weights).items():
        full = value.ndim == 1 or name.startswith("position_embd")
        number = gguf.GGMLQuantizationType["F32" if full else kind]
        writer.add_tensor(name, gguf.quantize(value, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def requantize(source: Path, target: Path, kind: str) -> None:
    """From float32 to a K type, which the Python package cannot, by llama.cpp itself."""
    llama = pytest.importorskip("llama_cpp")
    params = llama.llama_model_quantize_default_params()
    # of the file (LLAMA_FTYPE_MOSTLY_Q4_K_M, LLAMA_FTYPE_MOSTLY_Q6_K), of a tensor
    params.ftype, number = {"Q4_K": (15, 12), "Q6_K": (18, 14)}[kind]
    params.pure, params.output_tensor_type, params.token_embedding_type = True, number, number
    status = llama.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    assert status == 0


def gguf_file(kind: str) -> Writer:
    def write(folder: Path) -> tuple[Path, np.ndarray]:
        gguf = pytest.importorskip("gguf")

        shape = K_SHAPE if kind.endswith("_K") else SHAPE
        model = hf_model(**shape)
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        path = folder / f"{kind}.gguf"
        if kind.endswith("_K"):
            write_gguf(folder / "F32.gguf", weights, "F32", shape)
            requantize(folder / "F32.gguf", path, kind)
            (folder / "F32.gguf").unlink()
        else:
            write_gguf(path, weights, kind, shape)
        return path, reference_logits(gguf.GGUFReader(path), shape)

    return write


def reference_logits(reader, shape: Mapping[str, int]) -> np.ndarray:
    """What the weights that the package `gguf` finds in its file give, in NumPy and float64."""
    gguf = pytest.importorskip("gguf")

    found = {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(int(n) for n in t.shape[::-1]))
        for t in reader.tensors
    }
    names = {"attn_norm": "ln_1", "attn_output": "attn.out_proj", "ffn_norm": "ln_2"}
    names |= {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    top = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}
    ours = {}
    for name, value in found.items():
        part, _, last = name.rpartition(".")
        if part in top:
            ours[f"{top[part]}.{last}"] = value
        elif part.endswith("attn_qkv"):
            for letter, piece in zip("qkv", np.split(value, 3), strict=True):
                ours[f"blocks.{part.split('.')[1]}.attn.{letter}_proj.{last}"] = piece
        else:
            _, number, rest = part.split(".")
            ours[f"blocks.{number}.{names[rest]}.{last}"] = value
    config = SimpleNamespace(
        n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"], norm="pre",
        position="learned", activation="gelu_tanh", shortcut=True, tie_word_embeddings=True,
        layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
    )  # fmt: skip
    return Reference(config, ours)(TOKENS)


# What each is compared with, and how it is written.
WRITERS: dict[str, tuple[str, Writer]] = {
    "Hugging Face, safetensors": ("transformers", hf_safetensors),
    "Hugging Face, pytorch_model.bin": ("transformers", hf_bin),
    "Hugging Face, .bin in shards": ("transformers", hf_bin_shards),
    "Hugging Face, .bin before 1.6": ("transformers", lambda folder: hf_bin(folder, new=False)),
    "Hugging Face, more heads": ("transformers", hf_with_heads),
    "Hugging Face, more heads, wrapped": ("transformers", lambda x: hf_with_heads(x, "module.")),
    "nanoGPT": ("torch", nanogpt),
    "nanoGPT, early": ("torch", early_nanogpt),
    **{
        f"nanoGPT, {prefix}": ("torch", lambda folder, prefix=prefix: nanogpt(folder, True, prefix))
        for prefix in ("_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.model.")
    },
    "nanoGPT, no bias": ("torch", lambda folder: nanogpt(folder, bias=False)),
    "build-nanogpt": ("torch", build_nanogpt),
    "build-nanogpt, wrapped": ("torch", lambda folder: build_nanogpt(folder, "module.")),
    "minGPT": ("torch", mingpt),
    "the book, .pth": ("torch", book),
    "the book, wrapped": (
        "torch",
        lambda folder: book(folder, change=lambda x: {f"module.{n}": v for n, v in x.items()}),
    ),
    "the book, fused": ("torch", lambda folder: book(folder, change=fused)),
    "the book, fused, biases": ("torch", lambda folder: book(folder, True, change=fused)),
    "the book, checkpoint": ("torch", lambda folder: book(folder, True, nested=True)),
    "the book, safetensors": ("torch", book_safetensors),
    **{
        f"GGUF {kind}": ("gguf", gguf_file(kind))
        for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
    },
}
