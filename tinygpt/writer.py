"""From text to text: a model opened together with its tokenizer, which continues prompts.

It knows no command line and prints nothing: who asks, and how the text is shown, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from tinygpt.checkpoints.load_tokenizer import GENERATION, load_tokenizer
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.quantization import check_dtype, convert
from tinygpt.config import GPTConfig
from tinygpt.errors import InputError, say, show
from tinygpt.generator import Generator
from tinygpt.model import GPT
from tinygpt.options import check_names
from tinygpt.runtime import device
from tinygpt.sampling import Sampling
from tinygpt.tokenizer.text_stream import TextStream
from tinygpt.tokenizer.tokenizer import Tokenizer

# What stands for an empty prompt in a model that has read one long text, with no end tokens in it.
_STARTS = {"shakespeare": "\n"}
# What files may say of sampling.
_SAID = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LONGEST = 128  # tokens, where neither a caller nor the model's files say more


class Writer:
    """A model, its tokenizer, and the KV caches and captured graphs of their generation."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        # The text that stands for an empty prompt; "" is the token alone that a text begins with,
        # in GPT-2 the end token, which stands before each text in training.
        self.start = _STARTS.get(model.name or "", "")
        self.generator = Generator(model)

    @property
    def sampling(self) -> dict[str, Any]:
        """How the model's files have it sampled, as fields of `Sampling`; else greedily.

        Raises:
            InputError: when they say what cannot be.
        """
        says = self._says
        if says.get("do_sample") is not True:
            return {"temperature": 0.0}
        found = {name: says.get(name) for name in _SAID}
        if found["top_k"] == 0:  # which transformers takes for all of them
            found["top_k"] = None
        said = {name: value for name, value in found.items() if value is not None}
        try:
            Sampling.of(**said)
        except InputError as error:
            raise InputError(f"the model's {GENERATION}: {error}; correct it there") from error
        return {"temperature": 1.0} | said

    @property
    def max_new_tokens(self) -> int:
        """How many tokens the model's files have it write at most, where nothing else is asked."""
        return self._count("max_new_tokens") or _LONGEST

    @property
    def sentence_after(self) -> int | None:
        """After how many tokens the model's files have it end with a sentence, if they say so.

        It is a key of this package's own in generation_config.json, where `transformers` keeps it.
        """
        return self._count("sentence_after")

    def _count(self, name: str) -> int | None:
        """A positive number that the model's files say."""
        says = self._says.get(name)
        return says if type(says) is int and 0 < says < 2**31 else None

    @property
    def _says(self) -> dict[str, Any]:
        return dict(self.tokenizer.kept.get(GENERATION, {}))

    @classmethod
    def open(
        cls,
        name: str,
        dtype: str | None = None,
        tokenizer: str | None = None,
        ids: bool = False,
        advice: str = "",
        place: Callable[[GPT], None] | None = None,
    ) -> Writer:
        """A writer with a model that can be loaded.

        Args:
            name: of the model: a folder, a file, or a name to fetch.
            dtype: what to hold the weights in; None is as they are stored.
            tokenizer: another than the model's own.
            ids: where the tokenizer cannot be read, let the text be the ids as numbers.
            advice: what else can be done where the model's own cannot, for the error.
            place: what lays the model on several devices: see `devices`.
        Raises:
            InputError: when they cannot be had, or the backend does not work.
        """
        _check(dtype)
        found = open_checkpoint(name)
        try:
            words = found.tokenizer(tokenizer)
        except InputError as error:
            if not ids:
                raise type(error)(f"{error}{'' if tokenizer else advice}") from error
            say(f"{error}: the text below is ids")
            words = found.numbers()
        return cls(found.load(dtype, place), words)

    @classmethod
    def new(
        cls,
        config: GPTConfig,
        seed: int,
        dtype: str | None = None,
        tokenizer: str | None = None,
        fit_vocabulary: bool = False,
    ) -> Writer:
        """A writer with a new model of random weights.

        Args:
            tokenizer: None is GPT-2's for a vocabulary of its size, and else that of bytes.
            fit_vocabulary: give the model as many token ids as the tokenizer has.
        Raises:
            InputError: when there is no memory for it, the tokenizer cannot be had or does not fit,
                or the backend does not work.
        """
        _check(dtype)
        name = tokenizer or ("gpt2" if config.vocab_size == 50257 else "bytes")
        if fit_vocabulary:
            config = replace(config, vocab_size=load_tokenizer(name).n_vocab)
        words = load_tokenizer(name, config.vocab_size)
        return cls(convert(GPT(config, seed), dtype or "float32"), words)

    def encode(self, prompt: str, special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, at least one.

        Args:
            special_tokens: whether `<|endoftext|>` in it is that token, and not plain text.
        """
        if text := prompt or self.start:
            return self.tokenizer.encode(text, special_tokens)
        start = self.tokenizer.start
        return [start if start is not None and start < self.model.config.vocab_size else 0]

    def stream(
        self, prompt_ids: list[int], max_new_tokens: int, seeds: Sequence[int], **sampling: Any
    ) -> Iterator[list[int | None]]:
        """Continue a prompt once for each seed.

        Args:
            sampling: fields of `sampling.Sampling`.
        Yields:
            At each step the next id of each sample, None for one that its end token has ended.
        Raises:
            InputError: for an argument that cannot work, before anything is computed.
        """
        self.generator.require_memory(len(seeds))
        prompts, ends = [prompt_ids] * len(seeds), self.tokenizer.ends
        return self.generator.generate_batch(prompts, max_new_tokens, seeds, ends, **sampling)

    def text_stream(
        self, stop: str | Sequence[str] | None = (), sentence_after: int | None = None
    ) -> TextStream:
        """What makes text of the ids of one sample, up to where it is to end: see `TextStream`."""
        return TextStream(self.tokenizer, stop, sentence_after)


@overload
def generate(
    model: GPT,
    prompt: str,
    max_new_tokens: int = ...,
    *,
    stream: Literal[False] = ...,
    seed: int | None = ...,
    stop: str | Sequence[str] | None = ...,
    temperature: float = ...,
    **sampling: Any,
) -> str: ...


@overload
def generate(
    model: GPT,
    prompt: str,
    max_new_tokens: int = ...,
    *,
    stream: Literal[True],
    seed: int | None = ...,
    stop: str | Sequence[str] | None = ...,
    temperature: float = ...,
    **sampling: Any,
) -> Iterator[str]: ...


def generate(
    model: GPT,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    stream: bool = False,
    seed: int | None = None,
    stop: str | Sequence[str] | None = (),
    temperature: float = 0.8,
    **sampling: Any,
) -> str | Iterator[str]:
    """The text with which a model continues a prompt.

    Args:
        model: from `GPT.from_pretrained`, or another whose tokenizer has been set.
        prompt: a text; "" starts from nothing.
        max_new_tokens: how many tokens to write at most; an end token ends the text before.
        stream: give the text piece by piece as it comes.
        seed: gives the same text again on the same backend; None is another each time.
        stop: texts that end it, just before the first of them.
        temperature: how daring; 0 always takes the likeliest token.
        sampling: the other fields of `sampling.Sampling`, such as top_k and top_p.
    Returns:
        the text without the prompt, or with `stream` an iterator of its pieces.
    Raises:
        InputError: for an argument that cannot work, before anything is computed.
    """
    if not isinstance(model, GPT):
        raise InputError(f"model is {show(model)}: give one that GPT.from_pretrained has loaded")
    if not isinstance(prompt, str):
        raise InputError(
            f"the prompt is {show(prompt)}: give text; Generator(model).generate continues ids"
        )
    check_names(Sampling, sampling, "sampling setting")
    writer = Writer(model, model.tokenizer)
    ids, text = writer.encode(prompt), writer.text_stream(stop)
    steps = writer.generator.generate(
        ids, max_new_tokens, seed, writer.tokenizer.ends, temperature=temperature, **sampling
    )
    pieces = _pieces(steps, text)
    return pieces if stream else "".join(pieces)


def _pieces(steps: Iterator[int], text: TextStream) -> Iterator[str]:
    for token in steps:
        if piece := text.add(token):
            yield piece
        if text.stopped:
            return
    if piece := text.end():
        yield piece


def _check(dtype: str | None) -> None:
    device.check(kernel=False)  # the model itself runs as soon as a kernel to try would
    check_dtype(dtype or "float32")
