from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinygpt import InputError, sampling
from tinygpt.commands import flags
from tinygpt.options import option
from tinygpt.sampling import Sampling, Step, pick, steps_of
from tinygpt.sampling import apply as apply_steps

LOGITS = np.random.default_rng(0).normal(0, 2, (2, 67)).astype(np.float32)
LOGITS[1, 10] = LOGITS[1, 20] = LOGITS[1].max() + 1  # a tie at the top
COUNTS = np.random.default_rng(1).integers(0, 3, (2, 2, 67)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(function, value):
    return np.isfinite(function(Tensor(LOGITS), Tensor([value])).numpy())


@pytest.mark.backend
@pytest.mark.parametrize("k", [1, 2, 5, 66, 67, 1000])
def test_top_k(k):
    rank = (LOGITS[:, None, :] > LOGITS[:, :, None]).sum(-1)  # how many are likelier
    np.testing.assert_array_equal(kept(sampling.top_k, k), rank < k)


@pytest.mark.backend
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p(p):
    expected = np.zeros_like(LOGITS, bool)
    for row, probabilities in enumerate(softmax(LOGITS.astype(np.float64))):
        order = np.argsort(-probabilities)
        count = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
        expected[row] = probabilities >= probabilities[order[count - 1]]
    np.testing.assert_array_equal(kept(sampling.top_p, p), expected)


@pytest.mark.backend
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(p):
    probabilities = softmax(LOGITS)
    expected = probabilities >= p * probabilities.max(-1, keepdims=True)
    np.testing.assert_array_equal(kept(sampling.min_p, p), expected)


def test_zeros_of_both_signs_are_alike():
    zeros = Tensor([[-0.0, 1.0, 0.0, -1.0]])
    out = sampling.top_k(zeros, Tensor([2])).numpy()
    np.testing.assert_array_equal(np.isfinite(out), [[True, True, True, False]])


def test_filters_keep_the_logits_of_what_they_keep():
    for function, value in ((sampling.top_k, 5), (sampling.top_p, 0.5), (sampling.min_p, 0.1)):
        out = function(Tensor(LOGITS), Tensor([value])).numpy()
        np.testing.assert_array_equal(out[np.isfinite(out)], LOGITS[np.isfinite(out)])
        assert (out[~np.isfinite(out)] == -np.inf).all()


def test_penalties():
    logits, counts = Tensor(LOGITS), Tensor(COUNTS)
    expected = LOGITS.copy()
    for row, column in np.argwhere(COUNTS[0] > 0):
        expected[row, column] *= 1 / 1.5 if expected[row, column] > 0 else 1.5
    out = sampling.repetition_penalty(logits, Tensor([1.5]), counts).numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    out = sampling.frequency_penalty(logits, Tensor([0.3]), counts).numpy()
    np.testing.assert_allclose(out, LOGITS - 0.3 * COUNTS[1], rtol=1e-5, atol=1e-6)
    out = sampling.presence_penalty(logits, Tensor([0.3]), counts).numpy()
    np.testing.assert_allclose(out, LOGITS - 0.3 * (COUNTS[1] > 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_warpers_equal_transformers(seed):
    """Composed in transformers' order, on logits of GPT-2's vocabulary size."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (2, 50257)).astype(np.float32)
    seen = rng.integers(0, 50257, (2, 30))
    counts = np.zeros((2, 2, 50257), np.float32)
    for row in range(2):
        counts[0, row] = np.bincount(seen[row], minlength=50257)
    theirs = torch.tensor(logits)
    for warper in (
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(200),
        transformers.TopPLogitsWarper(0.8),
        transformers.MinPLogitsWarper(0.02),
    ):
        theirs = warper(torch.tensor(seen), theirs)
    settings = {"temperature": 0.7, "top_k": 200, "top_p": 0.8, "min_p": 0.02}
    ours = apply(Tensor(logits), Sampling(repetition_penalty=1.3, **settings), Tensor(counts))
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5)


def choose(logits, steps, seeds=None, draw=None, counts=None) -> Tensor:
    """The next token of each row, all at the same draw of their streams."""
    if draw is not None:
        draw = Tensor(np.full(logits.shape[0], draw, np.int32))
    return pick(logits, apply_steps(logits, steps, counts), seeds, draw)


def tensors_of(*rows: Sampling) -> list[Step]:
    return [step._replace(bound=Tensor(step.bound)) for step in steps_of(rows)]


def apply(logits: Tensor, settings: Sampling, counts: Tensor | None = None) -> Tensor:
    for step in tensors_of(settings):
        logits = step.function(logits, step.bound, *([counts] if step.counted else []))
    return logits


def draws(settings: Sampling, count: int) -> np.ndarray:
    """How often each token is drawn, at one step each from `count` seeds."""
    seeds = Tensor(np.arange(count, dtype=np.uint64))
    logits = Tensor(LOGITS[:1]).expand(count, -1).contiguous()
    tokens = choose(logits, tensors_of(settings), seeds).numpy()
    return np.bincount(tokens, minlength=LOGITS.shape[1])


@pytest.mark.backend
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 10}, {"top_p": 0.8}, {"min_p": 0.05}],
    ids=["plain", "cold", "hot top-k", "top-p", "min-p"],
)
def test_draws_follow_the_distribution(settings):
    """20,000 draws against exact probabilities, by a chi-squared test at 6 sigma."""
    settings = Sampling(**settings)
    logits = apply(Tensor(LOGITS[:1]), settings)
    expected = softmax(logits.numpy().astype(np.float64))[0] * 20_000
    seen = draws(settings, 20_000)
    assert seen.sum() == 20_000
    assert (seen[expected == 0] == 0).all()
    rare = expected < 10
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        seen, expected = seen[:-1], expected[:-1]
    statistic, freedom = ((seen - expected) ** 2 / expected).sum(), len(seen) - 1
    assert statistic < freedom + 6 * np.sqrt(2 * freedom)


def threefry(counter: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 of 20 rounds. Source: Salmon et al. 2011, "Parallel Random Numbers"."""
    x, y = counter.astype(np.uint32), (counter >> np.uint64(32)).astype(np.uint32)
    keys = [np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)]
    keys.append(keys[0] ^ keys[1] ^ np.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for group in range(1, 6):
        for turn in ((17, 29, 16, 24), (13, 15, 26, 6))[group % 2]:
            x = x + y
            y = (y << np.uint32(turn) | y >> np.uint32(32 - turn)) ^ x
        x, y = x + keys[group % 3], y + keys[(group + 1) % 3] + np.uint32(group)
    return x, y


def noise(seed: int, draw: int, size: int) -> np.ndarray:
    """Gumbel's, from the upper 23 bits of each word, those of the lower words first."""
    counter = np.arange((size + 1) // 2, dtype=np.uint64) + np.uint64(draw << 32)
    bits = np.concatenate(threefry(counter, seed))[:size]
    return -np.log(-np.log(((bits >> np.uint32(9)) + 0.5) / 2**23))


@pytest.mark.backend
@pytest.mark.parametrize("draw", [0, 1, 2**20 + 3])
@pytest.mark.parametrize("size", [1, 68, 50257])
def test_noise_equals_that_of_numpy(size, draw):
    """Finite wherever it is drawn: the largest that there is, at one place of seed 35."""
    words = threefry(np.zeros(1, np.uint64), 0)
    assert [int(word[0]) for word in words] == [0x6B200159, 0x99BA4EFE]  # as they publish it
    seeds = [35, 2**40 + 5, 2**64 - 1]
    draws = Tensor(np.full(len(seeds), draw, np.int32))
    found = sampling.gumbel(Tensor(np.array(seeds, np.uint64)), draws, size).numpy()
    assert np.isfinite(found).all()
    for row, seed in zip(found, seeds, strict=True):
        np.testing.assert_allclose(row, noise(seed, draw, size), atol=1e-5, rtol=0)
    if (draw, size) == (0, 50257):
        assert found[0].max() == pytest.approx(24 * np.log(2), abs=1e-5)


def test_a_choice_is_the_largest_sum_of_logit_and_noise():
    seeds = np.array([3, 4], np.uint64)
    for given in ((), (0,), (7,)):  # the first draw, unless another is asked for
        rows = [noise(int(seed), *(given or (0,)), LOGITS.shape[1]) for seed in seeds]
        found = choose(Tensor(LOGITS), [], Tensor(seeds), *given)
        assert found.tolist() == (LOGITS + rows).argmax(-1).tolist()


@pytest.mark.slow
def test_steps_of_one_stream_follow_the_distribution_too():
    """As above along the other axis, and neighbouring steps are independent."""
    logits, seeds = Tensor(LOGITS[:1]), Tensor([5], dtype=dtypes.uint64)
    tokens = np.array([choose(logits, [], seeds, i).item() for i in range(300)])
    expected = softmax(LOGITS[0].astype(np.float64))
    top = int(expected.argmax())
    share = (tokens == top).mean()
    assert abs(share - expected[top]) < 5 * np.sqrt(expected[top] * (1 - expected[top]) / 300)
    again = (tokens[1:] == tokens[:-1]).mean()
    chance = (expected**2).sum()
    assert abs(again - chance) < 5 * np.sqrt(chance * (1 - chance) / 299)


def test_greedy_takes_the_likeliest_and_of_a_tie_the_first():
    settings = Sampling(temperature=0, top_k=3)
    assert settings.greedy
    assert steps_of([settings]) == []
    assert choose(Tensor(LOGITS), []).tolist() == LOGITS.argmax(-1).tolist()


def test_each_setting_has_its_limits_and_a_value_that_changes_nothing():
    defaults = {}
    for name, neutral, allowed, refused in (
        ("repetition_penalty", 1.0, (0.01, 2.0, 9.0), (0, -1)),
        ("frequency_penalty", 0.0, (-2.0, 1.0), ()),
        ("presence_penalty", 0.0, (-2.0, 1.0), ()),
        ("temperature", 1.0, (0.01, 2.0, 9.0), (-0.1,)),
        ("top_k", None, (1, 2, 10**9), (0, -1, 1.5)),
        ("top_p", 1.0, (0.01, 0.99), (0, -0.1, 1.01)),
        ("min_p", 0.0, (0.01, 0.99, 1.0), (-0.1, 1.01)),
    ):
        assert steps_of([Sampling(**{name: neutral})]) == []
        for value in allowed:
            (step,) = steps_of([Sampling(**{name: value})])
            assert step.name == name
            assert step.bound.tolist() == [[pytest.approx(value)]]
        for value in (*refused, np.nan, "1"):
            with pytest.raises(InputError, match=f"{name} is "):
                Sampling(**{name: value})
        defaults[name] = None if name in ("top_p", "min_p") else neutral
    assert vars(Sampling()) == defaults
    with pytest.raises(AttributeError):
        Sampling().temperature = 2.0
    with pytest.raises(TypeError):
        Sampling(1.0)


EACH = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(repetition_penalty=1.3, top_p=0.7),
    Sampling(frequency_penalty=0.4, temperature=1.3, top_k=7),
    Sampling(presence_penalty=-0.6, min_p=0.05),
    Sampling(temperature=0, presence_penalty=0.5),
]


@pytest.mark.backend
@pytest.mark.parametrize("every", [False, True])
def test_each_row_has_settings_of_its_own(every):
    """And one that a setting is not for keeps just the logits that it has."""
    logits, counts = np.repeat(LOGITS[:1], len(EACH), 0), np.repeat(COUNTS[:, :1], len(EACH), 1)
    steps = steps_of(EACH, every)
    assert [step.name for step in steps] == [field.name for field in fields(Sampling)]
    steps = [step._replace(bound=Tensor(step.bound)) for step in steps]
    left = sampling.apply(Tensor(logits), steps, Tensor(counts))
    seeds = np.arange(7, 7 + len(EACH), dtype=np.uint64)
    draws = np.arange(len(EACH), dtype=np.int32) * 5
    drawn = np.array([[not each.greedy] for each in EACH], np.float32)
    found = sampling.pick(Tensor(logits), left, Tensor(seeds), Tensor(draws), Tensor(drawn)).numpy()
    for row, settings in enumerate(EACH):
        alone = apply(Tensor(LOGITS[:1]), settings, Tensor(COUNTS[:, :1]))
        np.testing.assert_array_equal(left.numpy()[row], alone.numpy()[0])
        seed = None if settings.greedy else Tensor(seeds[row : row + 1])
        one = choose(Tensor(LOGITS[:1]), tensors_of(settings), seed, int(draws[row]),
                     Tensor(COUNTS[:, :1]))  # fmt: skip
        assert one.item() == found[row]


def test_neutral_settings_cost_nothing():
    assert steps_of([Sampling(top_p=1.0)]) == []
    assert [step.name for step in steps_of([Sampling(top_k=3, temperature=0.5)])] == [
        "temperature",
        "top_k",
    ]


def test_steps_apply_in_the_order_of_the_fields():
    every = {"top_p": 0.5, "min_p": 0.1, "top_k": 3, "temperature": 0.5}
    every |= {"presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1}
    steps = steps_of([Sampling(**every)])
    assert [step.name for step in steps] == [field.name for field in fields(Sampling)]
    assert [step.name for step in steps if step.counted] == [
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
    ]
    assert [step.bound.dtype for step in steps if step.name == "top_k"] == [np.int32]
    greedy = steps_of([Sampling(**every | {"temperature": 0})])
    assert [step.name for step in greedy] == [step.name for step in steps if step.counted]


def banned(logits: Tensor, token: Tensor) -> Tensor:
    """A filter that a test has added."""
    places = Tensor.arange(logits.shape[-1]).reshape(1, -1)
    return (places == token).where(-np.inf, logits)


@dataclass(frozen=True, kw_only=True)
class WithBanned(Sampling):
    banned: int | None = option(
        None, "never this token", function=banned, counted=False, idle=-1, limits={"low": 0}
    )


def test_a_filter_is_one_function_and_one_field():
    """From which come the check, the flag with its help, and the place among the steps."""
    likeliest = int(LOGITS[0].argmax())
    steps = tensors_of(WithBanned(banned=likeliest, temperature=0.5))
    assert [step.name for step in steps] == ["temperature", "banned"]
    assert choose(Tensor(LOGITS[:1]), steps).item() == int(np.argsort(LOGITS[0])[-2])
    with pytest.raises(InputError, match="banned is -1: it must be a whole number, 0 or more"):
        WithBanned(banned=-1)
    parser = flags.Parser()
    flags.add_options(parser, WithBanned)
    assert parser.parse_args(["--banned", "7"]).banned == 7
    assert "never this token" in parser.format_help()


@pytest.mark.backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.uint32(0xFFFFFFFF).view(np.float32)])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 3, "top_p": 0.9}])
def test_a_logit_that_is_no_number_chooses_no_id(settings, bad):
    """One among many, where filters would hide it, and a maximum might not see it."""
    logits = np.repeat(LOGITS[:1], 3, 0)
    logits[1, 5] = logits[2] = bad
    settings = Sampling(**settings)
    seeds = None if settings.greedy else Tensor(np.arange(3, dtype=np.uint64))
    tokens = choose(Tensor(logits), tensors_of(settings), seeds).numpy()
    assert 0 <= tokens[0] < 67
    assert np.isin(tokens[1:], (-1, 67)).all()


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"temperature": 1e-38}, {"temperature": 0}),
        ({"temperature": 5e-324}, {"temperature": 0}),
        ({"temperature": 1e39, "top_k": 1}, {"temperature": 0}),
        ({"temperature": 1e300, "top_k": 1}, {"temperature": 0}),
        ({"top_k": 2**31}, {}),
        ({"top_k": 10**30}, {}),
        ({"top_p": 1e-46}, {"temperature": 0}),
        ({"min_p": 1e-46}, {}),
        ({"min_p": 0}, {}),
        ({"repetition_penalty": 1e39}, {"repetition_penalty": 1e6}),
        ({"repetition_penalty": 1e-46}, {"repetition_penalty": 1e-6}),
        ({"frequency_penalty": 1e39}, {"frequency_penalty": 1e6}),
        ({"presence_penalty": -1e-46}, {}),
    ],
    ids=str,
)
def test_a_setting_beyond_float32_or_int32_chooses_as_its_limit_does(settings, same):
    logits = np.repeat(LOGITS[:1], 50, 0)
    counts = Tensor(np.repeat(COUNTS[:, :1], 50, 1))
    seeds = Tensor(np.arange(50, dtype=np.uint64))
    chosen = []
    for each in (Sampling(**settings), Sampling(**same)):
        draw = None if each.greedy else seeds
        chosen.append(choose(Tensor(logits), tensors_of(each), draw, 0, counts).numpy())
    np.testing.assert_array_equal(*chosen)
