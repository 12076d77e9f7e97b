"""An independent GPT-2 in NumPy: no tinygrad, no code of the package, float64 throughout.

Written from the papers and GPT-2's published `config.json`, to be compared with. It takes the
weights as a dictionary of arrays under the model's own names.
"""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def relu(x):
    return np.maximum(x, 0)


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": gelu, "relu": relu}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sinusoids(length, width):
    """Vaswani et al. 2017, section 3.5: even channels sine, odd ones cosine."""
    table = np.zeros((length, width))
    for position in range(length):
        for pair in range(width // 2):
            angle = position / 10000 ** (2 * pair / width)
            table[position, 2 * pair] = math.sin(angle)
            table[position, 2 * pair + 1] = math.cos(angle)
    return table


class Reference:
    """The forward pass for a configuration (any object with GPTConfig's fields) and its weights."""

    def __init__(self, config, weights):
        self.config = config
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.hidden, self.weights = [], []  # of the last row: (T, C), and of each block (H, T, T)

    def linear(self, x, name):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        y = (x - mean) / np.sqrt(variance + self.config.layer_norm_epsilon)
        y = y * self.w[f"{name}.weight"]
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def attention(self, x, layer):
        """x: (T, C). One head at a time, one query at a time."""
        c, name = self.config, f"blocks.{layer}.attn"
        q, k, v = (self.linear(x, f"{name}.{p}_proj") for p in "qkv")
        size = c.n_embd // c.n_head
        y, weights = np.zeros_like(x), np.zeros((c.n_head, len(x), len(x)))
        for head in range(c.n_head):
            part = slice(head * size, (head + 1) * size)
            for t in range(len(x)):
                scores = k[: t + 1, part] @ q[t, part]
                if c.scale_attn_weights:
                    scores = scores / math.sqrt(size)
                if c.scale_attn_by_inverse_layer_idx:
                    scores = scores / (layer + 1)
                weights[head, t, : t + 1] = softmax(scores)
                y[t, part] = weights[head, t, : t + 1] @ v[: t + 1, part]
        self.weights.append(weights)
        return self.linear(y, f"{name}.out_proj")

    def feed_forward(self, x, layer):
        name = f"blocks.{layer}.mlp"
        activate = ACTIVATIONS[self.config.activation]
        return self.linear(activate(self.linear(x, f"{name}.c_fc")), f"{name}.c_proj")

    def block(self, x, layer):
        sublayers = (("ln_1", self.attention), ("ln_2", self.feed_forward))
        for norm_name, sublayer in sublayers:
            norm_name = f"blocks.{layer}.{norm_name}"
            residual = x if self.config.shortcut else 0
            if self.config.norm == "deep":  # Wang et al. 2022: alpha of a decoder
                residual = residual * (2 * self.config.n_layer) ** 0.25
            if self.config.norm == "pre":
                x = residual + sublayer(self.norm(x, norm_name), layer)
            else:
                x = self.norm(residual + sublayer(x, layer), norm_name)
        return x

    def __call__(self, tokens):
        """int (B, T) -> float64 logits (B, T, V)."""
        return np.stack([self.row(np.asarray(row)) for row in tokens])

    def row(self, tokens):
        c = self.config
        learned = c.position == "learned"
        places = self.w["wpe.weight"] if learned else sinusoids(len(tokens), c.n_embd)
        x = self.w["wte.weight"][tokens] + places[: len(tokens)]
        self.hidden, self.weights = [x], []
        for layer in range(c.n_layer):
            x = self.block(x, layer)
            self.hidden.append(x)
        if c.norm == "pre":
            x = self.norm(x, "ln_f")
        head = "wte.weight" if c.tie_word_embeddings else "lm_head.weight"
        return x @ self.w[head].T
