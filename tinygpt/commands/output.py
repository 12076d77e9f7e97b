"""What `tinygpt generate` shows: text as it comes, samples at the end, or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tinygpt.commands.interrupts import Interrupts
from tinygpt.errors import say, visible
from tinygpt.runtime import device
from tinygpt.tokenizer.text_stream import TextStream
from tinygpt.writer import Writer

if TYPE_CHECKING:
    from tinygpt.commands.generate import Request


class Sample:
    """One text that is being written."""

    def __init__(self, stream: TextStream) -> None:
        self.stream, self.tokens, self.text = stream, list[int](), ""

    def add(self, token: int) -> str:
        """What one more token adds to the text."""
        self.tokens.append(token)
        piece = self.stream.add(token)
        self.text += piece
        return piece

    def end(self) -> str:
        """What was held back."""
        piece = self.stream.end()
        self.text += piece
        return piece


class Output:
    """What one call shows: its text as it comes, or all its samples at the end, or JSON."""

    def __init__(
        self, request: Request, writer: Writer, prompt_ids: list[int], interrupts: Interrupts
    ) -> None:
        self.request, self.prompt_ids, self.interrupts = request, prompt_ids, interrupts
        ends = request.stop, request.sentence_after
        self.samples = [Sample(writer.text_stream(*ends)) for _ in request.seeds]
        self.at_once = len(self.samples) == 1 and not request.json
        self.times: list[float] = []  # seconds after the start, for each token
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        self.terminal = sys.stdout.isatty()
        self.held = ""  # a carriage return, until what follows tells whether it ends a line

    def follow(self, steps: Iterator[list[int | None]]) -> None:
        """Take all steps, showing the text at once where there is one sample to show."""
        start = time.perf_counter()
        if self.at_once:
            self._show(self.request.prompt)
        try:
            for row in steps:
                self._add(row, time.perf_counter() - start)
                if self.interrupts.came or all(each.stream.stopped for each in self.samples):
                    break
        except Exception:
            if self.at_once:  # the message is to have a line of its own
                self._show("\n")
            raise
        for sample in self.samples:
            piece = sample.end()
            if self.at_once:
                self._show(piece)

    def _add(self, row: list[int | None], time_s: float) -> None:
        for sample, token in zip(self.samples, row, strict=True):
            if token is None or sample.stream.stopped:
                continue
            self.times.append(time_s)
            self.interrupts.has_text = True
            piece = sample.add(token)
            if self.at_once:
                self._show(piece)

    def _show(self, text: str) -> None:
        if text:
            if self.terminal:
                text, self.held = self.held + text, ""
                if text.endswith("\r"):
                    text, self.held = text[:-1], "\r"
                text = visible(text)
            sys.stdout.write(text)
            sys.stdout.flush()

    def finish(self) -> None:
        """Show what `follow` has not shown, and say how long it took."""
        request = self.request
        first = last = rate = None
        if self.times:
            first, last = self.times[0], self.times[-1]
            if later := sum(moment > first for moment in self.times):
                rate = later / (last - first)
        if request.json:
            facts = {
                "model": request.model,
                "seed": request.seeds[0],
                "device": device.describe(),
                "prompt": request.prompt,
                "prompt_tokens": self.prompt_ids,
                "samples": [{"tokens": each.tokens, "text": each.text} for each in self.samples],
                "timings": {"first_token_s": first, "total_s": last, "tokens_per_s": rate},
            }
            self._show(json.dumps(facts, ensure_ascii=False))
        elif not self.at_once:
            self._show("\n---\n".join(request.prompt + each.text for each in self.samples))
        self._show("\n")
        if first is not None:
            speed = f", then {rate:.1f} tokens/s" if rate else ""
            say(f"{len(self.times)} tokens, the first after {first:.2f} s{speed}")
