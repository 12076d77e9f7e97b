"""The same model and training loop in plain PyTorch: what ours are held against.

Written as one would write it for PyTorch alone: fused query, key and value, its own attention, its
own AdamW. training.py runs it beside ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner, bias = config.n_embd, config.n_inner or 4 * config.n_embd, config.bias
        self.config = config
        self.ln_1 = nn.LayerNorm(C, eps=config.layer_norm_epsilon, bias=bias)
        self.qkv = nn.Linear(C, 3 * C, bias=bias)
        self.out_proj = nn.Linear(C, C, bias=bias)
        self.ln_2 = nn.LayerNorm(C, eps=config.layer_norm_epsilon, bias=bias)
        self.c_fc = nn.Linear(C, inner, bias=bias)
        self.c_proj = nn.Linear(inner, C, bias=bias)

    def attention(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q, k, v = (part.view(B, T, self.config.n_head, -1).transpose(1, 2) for part in (q, k, v))
        dropout = self.config.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.dropped(self.out_proj(y.transpose(1, 2).reshape(B, T, C)))

    def feed_forward(self, x):
        return self.dropped(self.c_proj(ACTIVATIONS[self.config.activation](self.c_fc(x))))

    def dropped(self, x):
        return F.dropout(x, self.config.resid_pdrop, self.training)

    def forward(self, x):
        if self.config.norm == "pre":
            x = x + self.attention(self.ln_1(x))
            return x + self.feed_forward(self.ln_2(x))
        x = self.ln_1(x + self.attention(x))
        return self.ln_2(x + self.feed_forward(x))


class TorchGPT(nn.Module):
    """A GPT with learned positions and tied embeddings, for any object with GPTConfig's fields."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        if config.norm == "pre":
            epsilon = config.layer_norm_epsilon
            self.ln_f = nn.LayerNorm(config.n_embd, eps=epsilon, bias=config.bias)

    def forward(self, tokens, targets):
        """The mean cross entropy of int64 (B, T) twice."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = F.dropout(x, self.config.embd_pdrop, self.training)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x) if self.config.norm == "pre" else x
        logits = x @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def load(self, weights):
        """Take on weights under tinygpt's names, as arrays."""
        with torch.no_grad():
            for name, value in self._views().items():
                value.copy_(torch.from_numpy(np.array(weights[name])))
        return self

    def gradients(self):
        """The parameters' gradients under tinygpt's names, as arrays."""
        return {name: value.numpy().copy() for name, value in self._views(gradient=True).items()}

    def _views(self, gradient=False):
        views = {}
        for name, parameter in self.named_parameters():
            value = parameter.grad if gradient else parameter.detach()
            if ".qkv." in name:
                for part, share in zip("qkv", value.chunk(3), strict=True):
                    views[name.replace("qkv", f"attn.{part}_proj")] = share
            else:
                parts = {".out_proj": ".attn.out_proj", ".c_fc": ".mlp.c_fc"}
                parts[".c_proj"] = ".mlp.c_proj"
                for old, new in parts.items():
                    name = name.replace(old, new)
                views[name] = value
        return views

    def adamw(self, learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.1):
        """PyTorch's AdamW with decay on matrices only."""
        matrices = [p for p in self.parameters() if p.ndim == 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}]
        groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def train_step(model, optimizer, tokens, targets, grad_clip=1.0):
    """One step; gives the loss as a number."""
    optimizer.zero_grad(set_to_none=True)
    loss = model(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.item()
