"""How settings are declared, and the one check for numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import pytest

from tinygpt import GPTConfig, InputError
from tinygpt.commands import flags
from tinygpt.errors import check_float, check_int
from tinygpt.options import check_options, option, option_of
from tinygpt.sampling import Sampling
from tinygpt.training.settings import SHAPE, TrainConfig

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "limits", "words"),
    [
        (True, {}, "True: it must be a whole number"),
        (1.0, {}, "1.0: it must be a whole number"),
        ("1", {"low": 0}, "'1': it must be a whole number, 0 or more"),
        (None, {"low": 0}, "None: it must be a whole number, 0 or more"),
        (-1, {"low": 0}, "-1: it must be a whole number, 0 or more"),
        (2**31, {"low": 1, "below": 2**31}, f"{2**31}: it must be a whole number, 1 or more and "
         "below 2**31"),
    ],
)  # fmt: skip
def test_a_number_that_is_not_whole_or_out_of_its_limits(value, limits, words):
    with pytest.raises(InputError) as caught:
        check_int("--some-flag", value, **limits)
    assert str(caught.value) == f"--some-flag is {words}"


@pytest.mark.parametrize(
    ("value", "limits", "words"),
    [
        (False, {}, "False: it must be a finite number"),
        (NAN, {}, "nan: it must be a finite number"),
        (INF, {"low": 0}, "inf: it must be a finite number, 0 or more"),
        (NAN, {"low": 0, "below": 1}, "nan: it must be a number, 0 or more and below 1"),
        (1, {"low": 0, "below": 1.0}, "1: it must be a number, 0 or more and below 1"),
        (0.0, {"above": 0, "most": 1}, "0.0: it must be a number, above 0 and at most 1"),
        (1.5, {"above": 0, "most": 1}, "1.5: it must be a number, above 0 and at most 1"),
        ("a", {"above": 0}, "'a': it must be a finite number, above 0"),
    ],
)
def test_a_number_that_is_not_finite_or_out_of_its_limits(value, limits, words):
    with pytest.raises(InputError) as caught:
        check_float("some_field", value, **limits)
    assert str(caught.value) == f"some_field is {words}"


def test_numbers_within_their_limits_pass():
    check_int("n", 0, low=0)
    check_int("n", 2**31 - 1, low=1, below=2**31)
    check_int("n", -(10**400))
    check_float("x", 0, low=0, below=1)
    check_float("x", 1, above=0, most=1)
    check_float("x", 10**300)
    check_float("x", -1e300)


@dataclass
class Settings:
    count: int | None = option(None, "how many", short=("-c",), limits={"low": 1})
    kind: Literal["a", "b"] | None = option(None, "which")
    on: bool = option(True, "whether it is on", off=("--quiet",))
    n_layer: int = option_of(GPTConfig, "n_layer", 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 0}, "<count> is 0: it must be a whole number, 1 or more"),
        ({"kind": "c"}, "unknown <kind> 'c': allowed are a, b"),
        ({"on": None}, "<on> is None: it must be true or false"),
        ({"n_layer": None}, "<n_layer> is None: it must be a whole number, 1 or more"),
    ],
)
def test_a_declaration_is_the_check(values, words):
    good = {"count": None, "kind": None, "on": False, "n_layer": 1}
    check_options(Settings, good)
    with pytest.raises(InputError) as caught:
        check_options(Settings, good | values, lambda name: f"<{name}>")
    assert str(caught.value).startswith(words)


def parsed(*argv: str):
    parser = flags.Parser()
    flags.add_options(parser, Settings)
    return parser.parse_args(argv)


def test_a_declaration_is_the_flag():
    assert flags.given(parsed(), ["count", "kind", "on", "n_layer"]) == {}
    args = parsed("-c", "3", "--kind", "b", "--quiet", "--layers=4")
    expected = {"count": 3, "kind": "b", "on": False, "n_layer": 4}
    assert flags.given(args, expected) == expected
    assert [flags.spelled(args)(name) for name in expected] == [
        "-c",
        "--kind",
        "--quiet",
        "--layers",
    ]
    assert parsed("--no-on").on is False
    assert parsed("--no-on", "--on").on is True
    assert flags.spelled(parsed())("n_layer") == "--n-layer"
    assert flags.spelled(parsed(), elsewhere=["n_layer"])("n_layer") == "n_layer"


@pytest.mark.parametrize("owner", [GPTConfig, Sampling, TrainConfig])
def test_every_setting_says_what_it_means(owner):
    assert all(field.metadata["help"] for field in fields(owner))


def test_training_declares_no_part_of_the_shape_anew():
    ours, theirs = ({f.name: f for f in fields(kind)} for kind in (TrainConfig, GPTConfig))
    for name in SHAPE:
        for what in ("short", "off", "limits"):
            assert ours[name].metadata[what] == theirs[name].metadata[what]
        assert ours[name].type == theirs[name].type
