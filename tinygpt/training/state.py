"""What a run is to go on with, besides tensors: written to `state.json`, and checked when read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from tinygpt.errors import InputError, check_float, check_int, show, unknown
from tinygpt.options import kinds
from tinygpt.training.settings import MINUTES, TrainConfig
from tinygpt.training.step import Counters

_DATA = ("seed", "step", "order", "tokens", "batch_size", "block_size")


@dataclass(frozen=True)
class State:
    """One moment of a run."""

    counters: Counters
    best: dict[str, Any] | None  # the step of the lowest validation loss, and it
    data: dict[str, Any]  # where in the data it is: `Batches.state`
    source: str  # the SHA-256 of the text
    minutes: float | None  # that it is to take, as long as no number of steps is fitted to them
    config: TrainConfig

    def to_json(self) -> dict[str, Any]:
        """What `of` reads."""
        return {"step": self.counters.step} | asdict(self)

    @classmethod
    def of(cls, content: dict[str, Any]) -> State:
        """The state that a file holds, which may hold anything.

        Raises:
            InputError: for the first value to which no run can have come.
        """
        given = _object("the state", content, ("step", *cls.__annotations__))
        settings, best, minutes = given["config"], given["best"], given["minutes"]
        if not isinstance(settings, dict):
            raise InputError(f"config is {show(settings)}: it must be an object")
        config = TrainConfig.of(settings, spelled="config.{}".format)
        counters = _counters(given["counters"])
        _same("step", given["step"], counters.step)
        if best is not None:
            _object("best", best, ("step", "val_loss"))
            check_int("best.step", best["step"], 1, counters.step + 1)
            check_float("best.val_loss", best["val_loss"], 0)
        data = _object("data", given["data"], _DATA)
        check_int("data.tokens", data["tokens"], 1)
        expected = asdict(config) | {"step": counters.step * config.accumulate}
        for name in data.keys() - {"tokens"}:
            _same(f"data.{name}", data[name], expected[name])
        if not isinstance(given["source"], str):
            raise InputError(f"source is {show(given['source'])}: it must be text")
        if minutes is None:
            check_int("step", counters.step, 0, config.steps + 1)
        else:
            check_float("minutes", minutes, **MINUTES)
        return cls(counters, best, data, given["source"], minutes, config)


def _counters(value: Any) -> Counters:
    """Counters that fit together."""
    given = _object("counters", value, kinds(Counters))
    wholes = {"skipped_in_a_row": "skipped", "updates_at_scale": "updates"}
    for name, number in given.items():
        if name != "loss_scale":
            check_int(f"counters.{name}", number, 0, 2**31)
    for name, whole in wholes.items():
        check_int(f"counters.{name}", given[name], 0, given[whole] + 1)
    check_float("counters.loss_scale", given["loss_scale"], 1, most=2.0**128)
    _same("counters.step", given["step"], given["updates"] + given["skipped"])
    return Counters(**given)


def _object(name: str, value: Any, keys: Collection[str]) -> dict[str, Any]:
    """The value, if it is a JSON object that has these keys and no other."""
    if not isinstance(value, dict):
        raise InputError(f"{name} is {show(value)}: it must be an object")
    for key in value:
        if key not in keys:
            raise unknown(f"key of {name}", key, keys)
    for key in keys:
        if key not in value:
            raise InputError(f"{name} has no {key}")
    return value


def _same(name: str, value: Any, expected: Any) -> None:
    if type(value) is not type(expected) or value != expected:
        raise InputError(f"{name} is {show(value)}: by the rest of the state it is {expected!r}")
