"""Draws the course's pictures: `python docs/course/pictures.py [NAME ...]`, all by default."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tinygrad import Tensor

from tinygpt import GPT, GPTConfig, ops
from tinygpt.checkpoints.quantization import matrices
from tinygpt.layers import Record
from tinygpt.ops.plain import attention_weights
from tinygpt.study.attention import entropies
from tinygpt.study.explain import similarity
from tinygpt.study.inside import at, log_softmax, look, unembedded
from tinygpt.study.lens import lens
from tinygpt.tokenizer.learn_bpe import bpe_tokenizer, train_bpe
from tinygpt.training.schedule import scheduled
from tinygpt.training.settings import RECIPES, TrainConfig

PICTURES: dict[str, Callable[[Figure], None]] = {}


def picture(name: str) -> Callable[[Callable[[Figure], None]], Callable[[Figure], None]]:
    """Names what a function draws: its file is pictures/NAME.png."""

    def kept(draw: Callable[[Figure], None]) -> Callable[[Figure], None]:
        PICTURES[name] = draw
        return draw

    return kept


def draw_map(axes: Axes, values: np.ndarray, rows: list[str], columns: list[str]) -> None:
    """A table of numbers from 0 to 1 as shades, each with its number where there is room."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 8 else 0)
    axes.set_yticks(range(len(rows)), rows)
    if values.size <= 64:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)


STORY = (
    "The king asked the cook, and the cook asked the baker. The baker baked the cake, the cook "
    "looked at the oven, and the king looked at the clock. They took the cake."
)


@picture("01-text-and-tokens")
def text_and_tokens(figure: Figure) -> None:
    merges, text = train_bpe([STORY], 1000), "The cook looked at the king."
    figure.set_size_inches(7, 3)
    axes, counts = figure.subplots(), [0, 4, 8, 16, len(merges)]
    for row, count in enumerate(counts):
        tokenizer, start = bpe_tokenizer(merges[:count]), 0
        tokens = [tokenizer.decode([number]) for number in tokenizer.encode(text)]
        for place, token in enumerate(tokens):
            color = ("#c6dbef", "#eff3ff")[place % 2]
            box = Rectangle((start, row - 0.35), len(token), 0.7, facecolor=color, edgecolor="gray")
            axes.add_patch(box)
            for offset, character in enumerate(token):
                shown = {" ": "\N{OPEN BOX}"}.get(character, character)
                axes.text(start + offset + 0.5, row, shown, ha="center", va="center")
            start += len(token)
        axes.text(len(text) + 0.5, row, f"{len(tokens)} tokens", va="center")
    axes.set(xlim=(0, len(text) + 4.5), ylim=(len(counts) - 0.5, -0.5), xlabel="characters")
    axes.set_ylabel("merges learnt")
    axes.set_yticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xticks(range(0, len(text) + 1, 7))


@picture("02-embeddings-and-positions")
def embeddings_and_positions(figure: Figure) -> None:
    figure.set_size_inches(8, 3.4)
    left, right = figure.subplots(1, 2)
    config = GPTConfig(n_embd=64, n_head=1, n_layer=1, vocab_size=32, position="sinusoidal")
    waves = GPT(config).encode_positions(Tensor.arange(50)).numpy()
    shown = left.imshow(waves, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    figure.colorbar(shown, ax=left)
    left.set(xlabel="channel", ylabel="position", title="sinusoidal: the numbers")
    rows = GPT.from_pretrained("shakespeare").encode_positions(Tensor.arange(50)).numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    shown = right.imshow(rows @ rows.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(shown, ax=right)
    right.set(xlabel="position", ylabel="position", title="learned: how alike, as a cosine")


@picture("03-one-head")
def one_head(figure: Figure) -> None:
    config = GPTConfig(
        n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=32, bias=False,
        initializer_range=0.5,
    )  # fmt: skip
    attn, record = GPT(config, seed=3).blocks[0].attn, Record()
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    attn(Tensor(x), record=record).realize()
    names = [f"token {i}" for i in range(5)]
    draw_map(axes := figure.subplots(), record.attention_weights[0].numpy()[0, 0], names, names)
    axes.set(xlabel="is read", ylabel="reads")


@picture("04-the-mask")
def the_mask(figure: Figure) -> None:
    figure.set_size_inches(7, 3.4)
    rng, T = np.random.default_rng(0), 4
    q, k = (Tensor(rng.normal(size=(1, 1, T, 8)).astype(np.float32)) for _ in "qk")
    mask, names = Tensor(np.tri(T, dtype=bool)), [f"token {i}" for i in range(T)]
    titles = {"without the mask": None, "with the mask": mask}
    for axes, (title, given) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        draw_map(axes, attention_weights(q, k, 8**-0.5, given).numpy()[0, 0], names, names)
        axes.set(xlabel="is read", ylabel="reads", title=title)


@picture("05-several-heads")
def several_heads(figure: Figure) -> None:
    figure.set_size_inches(8.5, 3.6)
    model = GPT.from_pretrained("tales")
    text = "The old king had a daughter, and the king loved his daughter more than all his gold."
    ids = model.tokenizer.encode(f"<|endoftext|>{text}")
    words = ["(end)", *(model.tokenizer.decode([number]) for number in ids[1:])]
    attention, i = look(model, ids).attention, np.arange(2, len(ids))
    scores = {
        "reads the token before": attention[:, :, i, i - 1].mean(-1),
        "reads the first token": attention[:, :, i, 0].mean(-1),
        "reads widely": entropies(attention),
    }
    several = figure.subplots(1, 3, sharey=True)
    for axes, (title, score) in zip(several, scores.items(), strict=True):
        block, head = np.unravel_index(score.argmax(), score.shape)
        draw_map(axes, attention[block, head], words, words)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{title}\nblock {block}, head {head}", fontsize=10)
        axes.set_xlabel("is read")
    several[0].set_ylabel("reads")


@picture("06-feed-forward-and-gelu")
def feed_forward_and_gelu(figure: Figure) -> None:
    figure.set_size_inches(8, 3.2)
    left, right = figure.subplots(1, 2)
    x = np.linspace(-4, 4, 401, dtype=np.float32)
    for kind, label in (("relu", "ReLU"), ("gelu", "GELU")):
        left.plot(x, ops.activation(Tensor(x), kind).numpy(), label=label)
    left.axhline(0, color="gray", linewidth=0.5)
    left.set(xlabel="inner number", ylabel="what is passed on")
    left.legend()
    model, record = GPT.from_pretrained("tales"), Record()
    text = "The old king had a daughter, and the king loved his daughter more than all his gold."
    model([model.tokenizer.start, *model.tokenizer.encode(text)], record=record)
    halves = zip(model.blocks, record.half_states, strict=True)
    inner = Tensor.stack(*[block.mlp.c_fc(block.ln_2(half)) for block, half in halves])
    right.hist(inner.numpy().ravel(), bins=np.linspace(-4, 4, 65), color="#6baed6")
    right.axvline(0, color="black", linewidth=1)
    right.set(xlabel="inner number", ylabel="how many of all blocks and tokens")


@picture("07-shortcuts")
def shortcuts(figure: Figure) -> None:
    figure.set_size_inches(8, 3.4)
    left, right = figure.subplots(1, 2)
    push = np.zeros((1, 16, 32), np.float32)
    push[0, -1] = np.random.default_rng(0).normal(size=32) / 32**0.5
    for shortcut, label in ((True, "with shortcuts"), (False, "without")):
        config = GPTConfig(
            n_layer=12, n_head=4, n_embd=32, block_size=16, vocab_size=256, bias=False,
            shortcut=shortcut, initializer_range=0.1,
        )  # fmt: skip
        model = GPT(config, seed=1)
        ids = model.ids([list(b"The sea was calm")])
        states = [model.wte(ids) + model.encode_positions(Tensor.arange(16))]
        for block in model.blocks:
            states.append(block(states[-1]))
        gradients = states[-1].gradient(*states[:-1], gradient=Tensor(push))
        Tensor.realize(*states, *gradients)
        left.plot([similarity(state.numpy()[0]) for state in states], marker=".", label=label)
        own = [np.linalg.norm(each.numpy()[0, -1]) for each in gradients]
        right.semilogy([*own, np.linalg.norm(push)], marker=".", label=label)
    left.set(xlabel="behind this many blocks", ylabel="mean cosine between tokens", ylim=(0, 1.05))
    right.set(xlabel="behind this many blocks", ylabel="gradient of the last token's vector")
    left.legend()


@picture("08-layer-norm")
def layer_norm(figure: Figure) -> None:
    figure.set_size_inches(8, 3.4)
    left, right = figure.subplots(1, 2)
    for norm in ("pre", "post", "deep"):
        config = GPTConfig(
            n_layer=12, n_head=4, n_embd=32, block_size=16, vocab_size=256, bias=False, norm=norm
        )
        record = Record()
        GPT(config, seed=1, init="xavier")([list(b"The sea was calm")], record=record)
        draw_sizes(left, record, {"pre": "pre-norm", "post": "post-norm", "deep": "DeepNorm"}[norm])
    model, record = GPT.from_pretrained("tales"), Record()
    text = "The old king had a daughter, and the king loved his daughter more than all his gold."
    model(model.tokenizer.encode(text), record=record)
    draw_sizes(right, record, "pre-norm")
    for axes, title in ((left, "three new models"), (right, "the built-in storyteller")):
        axes.set(xlabel="behind this many blocks", ylabel="RMS of the residual", title=title)
        axes.set_ylim(bottom=0)
        axes.legend()


def draw_sizes(axes: Axes, record: Record, label: str) -> None:
    """How large the residual is behind each block."""
    Tensor.realize(*record.hidden_states)
    sizes = [np.sqrt(np.square(state.numpy()).mean()) for state in record.hidden_states]
    axes.plot(sizes, marker=".", label=label, linestyle="--" if label == "DeepNorm" else "-")


@picture("09-a-block")
def a_block(figure: Figure) -> None:
    figure.set_size_inches(8.5, 2.6)
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=32, bias=False,
        initializer_range=0.5,
    )  # fmt: skip
    block, record = GPT(config, seed=3).blocks[0], Record()
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    out = block(Tensor(x), record=record).numpy()[0]
    half = record.half_states[0].numpy()[0]
    shown = {
        "what comes in": x[0],
        "+ attention": half - x[0],
        "+ feed-forward": out - half,
        "= what comes out": out,
    }
    largest, several = np.abs(out).max(), figure.subplots(1, 4, sharey=True)
    for axes, (title, values) in zip(several, shown.items(), strict=True):
        image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest)
        axes.set(xlabel="channel", title=title, xticks=range(8), yticks=range(5))
    several[0].set_ylabel("token")
    figure.colorbar(image, ax=several, shrink=0.6)


@picture("10-the-stack")
def the_stack(figure: Figure) -> None:
    figure.set_size_inches(8.5, 3.4)
    left, right = figure.subplots(1, 2)
    model = GPT.from_pretrained("tales")
    text = "Once upon a time there was a king who had three sons. "
    text += "The eldest of the three was called Jack."
    ids = [model.tokenizer.start, *model.tokenizer.encode(text)]
    states = look(model, ids).residuals
    logs = log_softmax(unembedded(model, states[::2, :-1]))
    losses = [-at(each, np.array(ids[1:])).mean() for each in logs]
    left.plot(losses, marker=".")
    left.axhline(np.log(model.config.vocab_size), color="gray", linestyle=":", label="guessing")
    left.set(xlabel="behind this many blocks", ylabel="loss of the text, in nats", ylim=(0, None))
    left.legend()
    size, blocks = np.sqrt(np.square(states).mean((1, 2))), np.arange(model.config.n_layer)
    added = np.sqrt(np.square(np.diff(states, axis=0)).mean((1, 2)))
    right.bar(blocks - 0.2, added[::2], 0.4, label="attention adds")
    right.bar(blocks + 0.2, added[1::2], 0.4, label="feed-forward adds")
    right.plot(blocks + 0.5, size[2::2], color="black", marker=".", label="the stream behind it")
    right.set(xlabel="block", ylabel="RMS", ylim=(0, size.max() * 1.4), xticks=blocks)
    right.legend(fontsize=8, loc="upper left")


@picture("11-the-whole-gpt")
def the_whole_gpt(figure: Figure) -> None:
    figure.set_size_inches(8.5, 3.4)
    model = GPT.from_pretrained("tales")
    texts = ("There was a king who had three", "The old king looked at the")
    for axes, text in zip(figure.subplots(1, 2), texts, strict=True):
        ids = [model.tokenizer.start, *model.tokenizer.encode(text)]
        p = np.exp(log_softmax(model(ids).numpy()[0, -1]))
        best = np.argsort(-p)[:10]
        axes.barh(range(10), p[best], color="#6baed6")
        names = [model.tokenizer.decode([int(i)]).replace(" ", "\N{OPEN BOX}") for i in best]
        axes.set_yticks(range(10), [repr(name)[1:-1] for name in names])
        axes.invert_yaxis()
        axes.set(xlabel="probability", ylabel="next token", title=f"{text} ...", xlim=(0, 1))
        axes.title.set_fontsize(10)


@picture("12-generating")
def generating(figure: Figure) -> None:
    model = GPT.from_pretrained("tales")
    ids = model.tokenizer.encode("Once upon a time there was a")
    prompt = [model.tokenizer.start, *ids]
    axes = figure.subplots()
    for name, asked, temperature in (
        ("untrained", GPT(model.config, seed=0), 1.0),
        ("trained, temperature 2", model, 2.0),
        ("trained", model, 1.0),
        ("trained, temperature 0.5", model, 0.5),
    ):
        chances = (asked(prompt)[0, -1] / temperature).softmax().numpy()
        axes.loglog(range(1, 1 + len(chances)), np.sort(chances)[::-1], label=name)
    axes.set(xlabel="rank of the token, the likeliest first", ylabel="probability", ylim=(1e-9, 1))
    axes.legend(loc="lower left")


def names_of(chapter: str) -> dict:
    """What the names of a chapter's own code stand for once it has run."""
    text, names = (Path(__file__).parent / f"{chapter}.md").read_text(encoding="utf-8"), {}
    with redirect_stdout(StringIO()):
        for block in re.findall(r"```python\n(.*?)```", text.split("## Exercise")[0], re.DOTALL):
            exec(block, names)
    return names


@picture("13-training")
def training(figure: Figure) -> None:
    names, recipe = names_of("13-training"), TrainConfig.of(RECIPES["tales"])
    left, right = figure.subplots(1, 2)
    steps, losses, unseen = zip(*names["curve"], strict=True)
    left.plot(steps, losses, label="on its own text")
    left.plot(steps, unseen, label="on the other text")
    for name, value in (("log V", np.log(names["V"])), ("unigram", names["unigram"])):
        left.axhline(value, color="grey", linestyle=":")
        left.text(50, value + 0.03, name, color="grey", fontsize=8)
    left.set(xlabel="step", ylabel="loss, nats a character", ylim=(0, 5.5))
    left.legend(loc="upper right")
    at_steps = range(0, recipe.steps, 10)
    about = (recipe.steps, recipe.warmup_steps, recipe.schedule)
    ends = (recipe.learning_rate, recipe.min_learning_rate)
    right.plot(at_steps, [scheduled(step, *about, *ends) for step in at_steps], color="tab:green")
    right.set(xlabel="step of the recipe", ylabel="learning rate", ylim=(0, None))
    right.ticklabel_format(axis="y", scilimits=(0, 0))


@picture("14-looking-inside")
def looking_inside(figure: Figure) -> None:
    model = GPT.from_pretrained("tales")
    ids = [model.tokenizer.start, *model.tokenizer.encode("Once upon a time there was a king")]
    found, tokens = lens(model, look(model, ids)), range(1, len(ids))
    axes = figure.subplots()
    image = axes.imshow(found.divergence[::2, 1:], cmap="Blues_r", vmin=0, vmax=6, aspect="auto")
    figure.colorbar(image, label="divergence from the end, in nats", extend="max")

    def shown(token: int) -> str:
        return model.tokenizer.decode([token]).replace(" ", "\N{OPEN BOX}").strip("\n")

    for (place, column), token in np.ndenumerate(found.likeliest[::2, 1:]):
        color = "white" if found.divergence[2 * place, 1 + column] < 3 else "black"
        axes.text(
            column, place, shown(int(token)), ha="center", va="center", color=color, fontsize=7
        )
    axes.set_xticks(range(len(tokens)), [shown(ids[i]) for i in tokens], fontsize=8)
    axes.set_yticks(range(len(found.places[::2])), found.places[::2], fontsize=8)
    axes.set(xlabel="token read", ylabel="what it would say behind")


@picture("15-making-it-fast")
def making_it_fast(figure: Figure) -> None:
    model, axes = GPT.from_pretrained("shakespeare"), figure.subplots()
    count = sum(layer.weight.numel() for layer in matrices(model).values())
    at_once, arithmetic = 2 ** np.linspace(0, 6, 100), 1e6 * 2 * count / 100e9
    for name, width in (("float32", 4), ("int8", 1)):
        memory = 1e6 * width * count / 20e9 / at_once
        axes.plot(at_once, np.maximum(memory, arithmetic), label=f"weights in {name}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(2 ** np.arange(7), 2 ** np.arange(7))
    axes.text(1.6, 400, "bound by memory", color="grey")
    axes.text(64, arithmetic + 8, "bound by arithmetic", ha="right", color="grey")
    axes.set_title("Counted, for 100 thousand million operations and 20 GB a second", fontsize=9)
    axes.set(xlabel="tokens read at once", ylabel="microseconds a token, at least", ylim=(0, None))
    axes.legend()


def main() -> None:
    for name in sys.argv[1:] or PICTURES:
        figure = Figure(figsize=(6, 4), layout="constrained", dpi=110)
        PICTURES[name](figure)
        figure.savefig(Path(__file__).parent / "pictures" / f"{name}.png")
        print(name)


if __name__ == "__main__":
    main()
