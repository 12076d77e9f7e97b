from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prepared import prepared
from together import log, losses, mpirun, needs_mpi

from tinygpt.commands.main import main
from tinygpt.training.ranks import Alone, fingerprint

SETTINGS = [
    "--n-layer=2", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=12",
    "--steps=100", "--warmup-steps=5", "--learning-rate=0.01", "--eval-every=50",
    "--eval-batches=3", "--sample-tokens=0", "--dropout=0.2", "--grad-clip=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "data")


def trained(ranks: int, data: Path, folder: Path, *more: object) -> Path:
    """A run of so many processes; of one, in this one."""
    argv = ["train", data, "-o", folder, *more]
    if ranks == 1:
        assert main([str(word) for word in argv]) == 0
    else:
        status, _, said = mpirun(ranks, *argv)
        assert status == 0, said
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The run of one process."""
    return trained(1, data, tmp_path_factory.mktemp("whole") / "run", *SETTINGS)


def hold_equal(run: Path, whole: Path, count: int = 100) -> None:
    ours, theirs = losses(run), losses(whole)
    assert ours.keys() == theirs.keys() == set(range(1, count + 1))
    for step, (loss, tokens) in ours.items():
        assert loss == pytest.approx(theirs[step][0], abs=1e-4), step
        assert tokens == theirs[step][1], step
    ours, theirs = (
        [(e["step"], e["val_loss"]) for e in log(each) if "val_loss" in e] for each in (run, whole)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_hundred_losses_are_those_of_one_process(ranks, data, whole, tmp_path):
    hold_equal(trained(ranks, data, tmp_path / "run", *SETTINGS), whole)


@needs_mpi
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ["--accumulate=3", "--order=epoch"]),
        (3, ["--optimizer=muon"]),
        (4, ["--lora-rank=2", "--accumulate=2", "--learning-rate=0.002"]),
    ],
)
def test_they_are_with_other_settings_too(ranks, more, data, tmp_path):
    runs = [trained(n, data, tmp_path / str(n), *SETTINGS, *more) for n in (1, ranks)]
    hold_equal(*runs)


@needs_mpi
def test_a_run_goes_on_with_any_number_of_ranks(data, whole, tmp_path):
    run = trained(4, data, tmp_path / "run", *SETTINGS, "--steps=25", "--schedule=constant")
    for steps, ranks in ((50, 2), (75, 1), (100, 3)):
        trained(ranks, data, run, "--resume", f"--steps={steps}")
    settings = [*SETTINGS, "--schedule=constant", "--eval-every=25"]
    hold_equal_steps(run, trained(1, data, tmp_path / "whole", *settings))


def hold_equal_steps(run: Path, whole: Path) -> None:
    ours, theirs = losses(run), losses(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[step][1] == theirs[step][1] for step in ours)
    np.testing.assert_allclose(
        [loss for loss, _ in ours.values()], [loss for loss, _ in theirs.values()], atol=1e-4
    )


def test_one_process_alone_sums_nothing():
    alone, numbers = Alone(), np.array([1.0, 2.0])
    assert alone.rows(numbers) is alone.reduce(numbers) is alone.part(numbers) is numbers
    assert alone.total(1.5, 2) == [1.5, 2]
    assert alone.of_first(3) == 3
    assert not alone.stopping
    alone.asked = 15
    assert alone.stopping


def test_a_fingerprint_is_of_the_whole_batch_however_it_is_shared():
    tokens = np.random.default_rng(0).integers(0, 60, (12, 8)).astype(np.int32)
    whole = fingerprint(tokens, 0, 1)
    for size in (2, 3, 4):
        parts = [fingerprint(tokens[rank::size], rank, size) for rank in range(size)]
        np.testing.assert_array_equal(sum(parts), whole)
    assert (fingerprint(tokens[::-1], 0, 1) != whole).any()
    other = tokens.copy()
    other[3, 2] += 1
    assert (fingerprint(other, 0, 1) != whole).any()
