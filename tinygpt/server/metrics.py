"""What the server counts, in Prometheus' text form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tinygpt.server.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """How often something took how long."""

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self.counts, self.total_s, self.count = Counter[float](), 0.0, 0

    def add(self, seconds: float) -> None:
        """Count one time."""
        self.count += 1
        self.total_s += seconds
        for bound in _SECONDS:
            self.counts[bound] += seconds <= bound

    def lines(self) -> Iterator[str]:
        """In Prometheus' form."""
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} histogram"
        for bound in _SECONDS:
            yield f'{self.name}_bucket{{le="{bound:g}"}} {self.counts[bound]}'
        yield f'{self.name}_bucket{{le="+Inf"}} {self.count}'
        yield f"{self.name}_sum {self.total_s:.6f}"
        yield f"{self.name}_count {self.count}"


class Metrics:
    """All that is counted. It belongs to the thread of the event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.cancelled = 0  # requests whose client left
        self.prompt_tokens = self.completion_tokens = 0
        self.first_token_s = Histogram("tinygpt_time_to_first_token_seconds", "Until a token.")
        self.token_s = Histogram("tinygpt_time_per_token_seconds", "From a token to the next.")

    def text(self, engine: Engine) -> str:
        """What `/metrics` answers."""
        lines = ["# HELP tinygpt_requests_total Requests, by path and status."]
        lines.append("# TYPE tinygpt_requests_total counter")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'tinygpt_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, kind, value, help in (
            ("requests_cancelled_total", "counter", self.cancelled, "Requests that were left."),
            ("prompt_tokens_total", "counter", self.prompt_tokens, "Tokens read."),
            ("completion_tokens_total", "counter", self.completion_tokens, "Tokens written."),
            ("slots", "gauge", engine.slots.n, "Texts that may run side by side."),
            ("slots_busy", "gauge", len(engine.running), "Texts that run."),
            ("queue_length", "gauge", len(engine.waiting), "Texts that wait."),
            ("steps_total", "counter", engine.steps, "Steps of the model."),
        ):
            lines.append(f"# HELP tinygpt_{name} {help}")
            lines.append(f"# TYPE tinygpt_{name} {kind}")
            lines.append(f"tinygpt_{name} {value}")
        lines += [*self.first_token_s.lines(), *self.token_s.lines()]
        return "\n".join(lines) + "\n"
