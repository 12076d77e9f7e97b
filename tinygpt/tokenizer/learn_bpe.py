"""Learns a byte-level BPE from text: GPT-2's split pattern, the most frequent pair joined first."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import pairwise

from tinygpt.errors import InputError, show
from tinygpt.tokenizer.tokenizer import END, Tokenizer
from tinygpt.tokenizer.vocabulary import from_merges, spell

_BYTES = sorted(map(spell, (bytes([byte]) for byte in range(256))))  # in the order of GPT-2's ids
_EDGE = -1  # stands between words; no symbol


def train_bpe(text_pieces: Iterable[str], vocab_size: int) -> list[list[str]]:
    """Learn the merges of a byte-level BPE.

    Of equally frequent pairs the one of lower ids is joined first, so the same text always gives
    the same merges. A pair that occurs once is never joined: a short text gives fewer merges.

    Args:
        text_pieces: text, cut anywhere that GPT-2's pattern would cut too.
        vocab_size: the 256 bytes, the merges and `<|endoftext|>` together, at most.
    Returns:
        the merges in order, each as two tokens in GPT-2's spelling: the lines of `merges.txt`.
    Raises:
        InputError: when vocab_size leaves no room for the bytes and the end token.
    Source: Sennrich et al. 2016, section 3.2; on bytes, Radford et al. 2019, section 2.2.
    """
    import regex
    from tiktoken_ext.openai_public import r50k_pat_str
    from tinygrad.helpers import tqdm

    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 257:
        raise InputError(
            f"a vocabulary of {show(vocab_size)}: a byte-level BPE needs 257 ids or more, for 256 "
            f"bytes and {END}"
        )
    split, words = regex.compile(r50k_pat_str), Counter()
    for piece in text_pieces:
        words.update(split.findall(piece))
    learner, names, merges = _Learner(words), list(_BYTES), []
    with tqdm(total=vocab_size - 257, desc="merges", unit="", disable=None) as bar:
        while len(names) < vocab_size - 1 and (pair := learner.most_frequent()):
            learner.join(pair, len(names))
            merges.append([names[number] for number in pair])
            names.append("".join(merges[-1]))
            bar.update(1)
    return merges


def bpe_tokenizer(merges: list[list[str]]) -> Tokenizer:
    """The tokenizer of some merges; ids are GPT-2's for bytes, then the merges', then the end's."""
    tokens = [*_BYTES, *map("".join, merges), END]
    return from_merges({token: number for number, token in enumerate(tokens)}, merges, "bpe")


class _Learner:
    """All words as one chain of symbols, and for each pair of neighbours how often and where.

    A join touches only the places where its pair stands, and each place takes a symbol out of the
    chain: all joins together cost no more than the distinct words are long.
    """

    def __init__(self, words: dict[str, int]) -> None:
        """
        Args:
            words: how often each occurs.
        """
        number = {name: number for number, name in enumerate(_BYTES)}
        ids = [number[spell(bytes([byte]))] for byte in range(256)]
        self.symbols, self.weights = array("i", [_EDGE]), array("q", [0])
        for word, count in words.items():
            data = word.encode()
            self.symbols.extend([*map(ids.__getitem__, data), _EDGE])
            self.weights.extend([count] * (len(data) + 1))
        size = len(self.symbols)
        self.before, self.after = array("i", range(-1, size - 1)), array("i", range(1, size + 1))
        self.counts: dict[tuple[int, int], int] = defaultdict(int)
        self.places: dict[tuple[int, int], array] = defaultdict(lambda: array("i"))
        for place, pair in enumerate(pairwise(self.symbols)):
            if _EDGE not in pair:
                self._add(pair, place)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapify(self.heap)

    def _add(self, pair: tuple[int, int], place: int) -> None:
        self.counts[pair] += self.weights[place]
        self.places[pair].append(place)

    def most_frequent(self) -> tuple[int, int] | None:
        """The pair that occurs most often, None when none occurs twice."""
        while self.heap:
            claimed, pair = heappop(self.heap)
            count = self.counts[pair]  # it may have become rarer since, never more frequent
            if count == -claimed and count > 1:
                return pair
            if count > 1:
                heappush(self.heap, (-count, pair))
        return None

    def join(self, pair: tuple[int, int], new: int) -> None:
        """Put the symbol `new` wherever the pair stands, from the left."""
        symbols, before, after, made = self.symbols, self.before, self.after, set()
        left, right = pair
        for place in self.places.pop(pair):
            second = after[place]
            if symbols[place] != left or symbols[second] != right:
                continue  # another join took one of the two
            previous, following = before[place], after[second]
            symbols[place], symbols[second] = new, _EDGE
            after[place], before[following] = following, place
            if (other := symbols[previous]) != _EDGE:
                self.counts[other, left] -= self.weights[place]
                self._add((other, new), previous)
                made.add((other, new))
            if (other := symbols[following]) != _EDGE:
                self.counts[right, other] -= self.weights[place]
                self._add((new, other), place)
                made.add((new, other))
        del self.counts[pair]
        for one in made:
            heappush(self.heap, (-self.counts[one], one))
