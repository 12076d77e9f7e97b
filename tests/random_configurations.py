"""Models of random configurations, held against others that share no code with them, and the C
operations at random sizes under clang's sanitizers.

    python tests/random_configurations.py --count 100 --seed 1

Each model continues random prompts greedily, past its window, as the NumPy reference does, and
every second one is trained for some steps as PyTorch in float64 does it; half of them in plain
tensors. Then each operation runs at `--shapes` sizes under each sanitizer. Prints a JSON object;
exit status 1 if anything differed or was seen.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import sanitized
import torch
from conftest import randomize, reference_of, weights_of
from operations import operations
from tinygrad import Tensor
from torch.nn import functional as F

from tinygpt import GPT, Generator, GPTConfig
from tinygpt.config import Activation, Norm, Position
from tinygpt.runtime import launch
from tinygpt.training.settings import TrainConfig
from tinygpt.training.step import Trainer

TOKENS, STEPS = 22, 4


def random_config(draw: random.Random) -> GPTConfig:
    heads = draw.randint(1, 5)
    position = draw.choice(get_args(Position))
    share = draw.randint(1, 20) * (2 if position == "sinusoidal" else 1)
    flags = ("bias", "shortcut", "tie_word_embeddings", "scale_attn_weights")
    return GPTConfig(
        n_layer=draw.randint(1, 4),
        n_head=heads,
        n_embd=heads * share,
        block_size=draw.randint(2, 40),
        vocab_size=draw.randint(2, 300),
        n_inner=draw.choice([None, draw.randint(1, 90)]),
        norm=draw.choice(get_args(Norm)),
        position=position,
        activation=draw.choice(get_args(Activation)),
        layer_norm_epsilon=draw.choice([1e-5, 1e-2]),
        scale_attn_by_inverse_layer_idx=draw.random() < 0.3,
        **{name: draw.random() < 0.7 for name in flags},
    )


def generate(model: GPT, draw: random.Random) -> tuple[int, list[str]]:
    """How many tokens were compared, and what was wrong."""
    config, reference = model.config, reference_of(model)
    rows = [
        [draw.randrange(config.vocab_size) for _ in range(draw.randint(1, config.block_size + 9))]
        for _ in range(draw.randint(1, 3))
    ]
    generator = Generator(model, chunk_size=draw.randint(1, 20))
    count, faults = 0, []
    for row, ids in zip(
        rows, zip(*generator.generate_batch(rows, TOKENS, temperature=0), strict=True), strict=True
    ):
        window = list(row)
        for token in ids:
            if len(window) > config.block_size:
                window = window[-max(1, config.block_size // 2) :]
            logits = reference.row(window)[-1]
            # float32 may choose another where two are as good as equal
            if logits.max() - logits[token] > 1e-4 * max(1, np.ptp(logits)):
                faults.append(f"token {count} is {token}, not {logits.argmax()}")
                break
            count += 1
            window.append(token)
    return count, faults


class Torch:
    """The model in PyTorch, float64, as a function of its weights."""

    def __init__(self, model: GPT) -> None:
        self.config = model.config
        self.w = {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in weights_of(model).items()
        }

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.layer_norm_epsilon)

    def attention(self, x, layer):
        name, config, (B, T, C) = f"blocks.{layer}.attn", self.config, x.shape
        q, k, v = (
            self.linear(x, f"{name}.{p}_proj").view(B, T, config.n_head, -1).transpose(1, 2)
            for p in "qkv"
        )
        scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
        scale /= layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.linear(y.transpose(1, 2).reshape(B, T, C), f"{name}.out_proj")

    def feed_forward(self, x, layer):
        x, kind = self.linear(x, f"blocks.{layer}.mlp.c_fc"), self.config.activation
        form = "tanh" if kind == "gelu_tanh" else "none"
        x = F.relu(x) if kind == "relu" else F.gelu(x, approximate=form)
        return self.linear(x, f"blocks.{layer}.mlp.c_proj")

    def loss(self, tokens, targets):
        config, T = self.config, tokens.shape[1]
        if config.position == "learned":
            places = self.w["wpe.weight"][:T]
        else:
            pairs = 10000 ** (-torch.arange(0, config.n_embd, 2).double() / config.n_embd)
            angles = torch.arange(T).double().outer(pairs)
            places = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
        x = self.w["wte.weight"][tokens] + places
        for layer in range(config.n_layer):
            for number, part in ((1, self.attention), (2, self.feed_forward)):
                name, rest = f"blocks.{layer}.ln_{number}", x if config.shortcut else 0
                if config.norm == "deep":  # Wang et al. 2022: alpha of a decoder
                    rest = rest * (2 * config.n_layer) ** 0.25
                if config.norm == "pre":
                    x = rest + part(self.norm(x, name), layer)
                else:
                    x = self.norm(rest + part(x, layer), name)
        x = self.norm(x, "ln_f") if config.norm == "pre" else x
        head = "wte" if config.tie_word_embeddings else "lm_head"
        logits = self.linear(x, head)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(model: GPT, draw: random.Random) -> tuple[int, list[str]]:
    """How many steps were compared, and what was wrong."""
    config = TrainConfig(
        batch_size=draw.randint(1, 4), accumulate=draw.randint(1, 2), steps=STEPS, warmup_steps=0,
        schedule="constant", learning_rate=1e-3, sample_tokens=0,
    )  # fmt: skip
    theirs, trainer, faults = Torch(model), Trainer(model, config), []
    weights = list(theirs.w.values())
    groups = [
        {"params": [w for w in weights if w.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2))
    rng = np.random.default_rng(draw.getrandbits(32))
    shape = (config.accumulate, 2, config.batch_size, draw.randint(1, model.config.block_size))
    for step in range(STEPS):
        batches = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
        optimizer.zero_grad()
        losses = [theirs.loss(*torch.from_numpy(b).long()) / len(batches) for b in batches]
        expected = sum(losses)
        expected.backward()
        if step == 0:
            _, gradients = trainer.gradients(*map(Tensor, np.concatenate(batches, axis=1)))
            for name, gradient in gradients.items():
                true = theirs.w[name].grad.numpy()
                # A key's bias moves all scores of a query alike: its gradient is but rounding.
                size = max(1.0 if name.endswith("k_proj.bias") else 0.1, np.abs(true).max())
                if np.abs(gradient.numpy() - true).max() > 3e-4 * size:
                    faults.append(f"the gradient at {name}")
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        loss = trainer.step([tuple(batch) for batch in batches]).loss
        if abs(loss - expected.item()) > 1e-3 * max(1.0, expected.item()):
            faults.append(f"step {step} has loss {loss}, not {expected.item()}")
            break
    return step + 1, faults


def sanitize(draw: random.Random, shapes: int) -> dict:
    """Each operation, with each type of weights that it takes, under each sanitizer."""
    counts, faults = dict.fromkeys(filter(sanitized.works, sanitized.SANITIZERS), 0), []
    with tempfile.TemporaryDirectory() as place:
        program = Path(place, "program")
        for sanitizer in counts:
            for file, function in operations():
                parameters = launch.signature(file, function)
                macros = [{}]
                if function in ("activation", "activation_backward"):
                    macros = [{"ACTIVATION": kind} for kind in get_args(Activation)]
                elif any(p.type == "WEIGHT" for p in parameters):
                    macros = list(launch.WEIGHTS.values())
                for held in macros:
                    sanitized.build(file, function, sanitizer, program, held)
                    for number in range(shapes):
                        sizes = sanitized.random_sizes(draw, few=number % 2 == 0)
                        said = sanitized.run(program, file, function, sizes, number)
                        if said:
                            faults.append(f"{sanitizer} {function} {held} {sizes}: {said[:400]}")
                        counts[sanitizer] += 1
    return {"programs run": counts, "faults": faults}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="models")
    parser.add_argument("--shapes", type=int, default=6, help="sizes for each operation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    gc.disable()  # as in conftest.py
    tokens = steps = 0
    faults = []
    for number in range(args.count):
        draw = random.Random(f"{args.seed} {number}")
        config = random_config(draw)
        os.environ["TINYGPT_KERNELS"] = "0" if number % 4 > 1 else "1"
        for part in (generate, train)[: 1 + number % 2]:
            model = randomize(GPT(config), number)
            count, wrong = part(model, draw)
            tokens, steps = tokens + count * (part is generate), steps + count * (part is train)
            faults += [f"{number} {config}: {words}" for words in wrong]
        gc.collect()
    found = {
        "configurations": args.count,
        "greedy tokens equal to NumPy's": tokens,
        "training steps equal to PyTorch's in float64": steps,
        "faults": faults,
        "sanitizers": sanitize(random.Random(args.seed), args.shapes) if args.shapes else {},
    }
    print(json.dumps(found, indent=1))
    return int(bool(faults or found["sanitizers"].get("faults")))


if __name__ == "__main__":
    sys.exit(main())
