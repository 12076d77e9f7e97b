"""Text of ids as they come, up to where it is to end: at a stop text or with a sentence."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence

from tinygpt.errors import InputError, show
from tinygpt.tokenizer.tokenizer import Tokenizer

# Where a sentence ends: after its mark and what closes quotes and brackets, before white space that
# no small letter follows. A line feed ends it whatever follows.
_SENTENCE_END = re.compile(
    r"""(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?]["')\]]*(?=\n|\s+[^\sa-z])"""
)


class TextStream:
    """The text of ids that are added one by one, in pieces that never split a character.

    Attributes:
        stopped: whether a stop text was complete, or a sentence at which the text is to end. The
            text ends just before the one, and just behind the other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | Sequence[str] | None = (),
        sentence_after: int | None = None,
    ) -> None:
        """
        Args:
            stop: texts of which the first to be complete ends the text.
            sentence_after: after so many ids, the first end of a sentence ends the text: one that
                leaves no quotation marks of its paragraph open, or that ends a paragraph.
        Raises:
            InputError: for an empty stop text, or what is no text.
        """
        self.tokenizer = tokenizer
        several = isinstance(stop, Iterable) and not isinstance(stop, str)
        self.stops = tuple(stop) if several else () if stop is None else (stop,)
        for wrong in (each for each in self.stops if not (isinstance(each, str) and each)):
            fact = f"stop text {show(wrong)} is {'empty' if isinstance(wrong, str) else 'no text'}"
            raise InputError(f"{fact}: give at least one character, or leave it out")
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # what may yet become a stop text
        self._left = sentence_after  # ids until a sentence's end is looked for
        self._line, self._space = "", ""  # the text since the last line feed; white space held back

    def add(self, token: int) -> str:
        """What the next id adds to the text, perhaps nothing yet.

        Args:
            token: one the tokenizer lacks (a padded vocabulary) gives U+FFFD.
        """
        text = self._until_stop(self._decoder.decode(self.tokenizer.token_bytes(token)))
        if self._left is None:
            return text
        self._left -= 1
        return self._until_sentence(text)

    def end(self) -> str:
        """What was held back, when no more ids come."""
        text = self._until_stop(self._decoder.decode(b"", final=True)) + self._held
        text = self._space + text
        self._held = self._space = ""
        return text

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.index(stop) + len(stop), text.index(stop))
                 for stop in self.stops if stop in text]  # fmt: skip
        if found:  # the first to end decides, however the ids divide the text
            self.stopped = True
            return text[: min(found)[1]]
        # A stop text may be far longer than what there is of the text.
        starts = (s[:n] for s in self.stops for n in range(1, min(len(s), len(text) + 1)))
        keep = len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)
        self._held = text[keep:]
        return text[:keep]

    def _until_sentence(self, text: str) -> str:
        shown, line = len(self._line), self._line + self._space + text
        looked_for = self._left is not None and self._left < 0
        for found in _SENTENCE_END.finditer(line) if looked_for else ():
            end, begin = found.end(), line.rfind("\n", 0, found.end()) + 1
            if end >= shown and (line[end] == "\n" or line.count('"', begin, end) % 2 == 0):
                self.stopped, self._space = True, ""
                return line[shown:end]
        # White space behind what may be the end is shown once something follows.
        kept = max(shown, len(line.rstrip())) if looked_for and not self.stopped else len(line)
        self._line, self._space = line[line.rfind("\n", 0, kept) + 1 : kept], line[kept:]
        return line[shown:kept]
