"""A run whose batches several devices share is that of one device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prepared import prepared
from tinygrad.nn.state import get_state_dict
from together import log, losses, mpirun, needs_mpi

from tinygpt import GPT
from tinygpt.commands.main import main
from tinygpt.devices import copy_to_all
from tinygpt.evaluation.losses import Scorer
from tinygpt.training.settings import TrainConfig
from tinygpt.training.step import Trainer

SETTINGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 8, "steps": 100,
    "warmup_steps": 2,
}  # fmt: skip

RUNS = "whole", "parts"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "data")


def trained(count: int, **changes: object) -> tuple[GPT, list[float]]:
    """The model and its losses after all steps, on random tokens."""
    config = TrainConfig.of({**SETTINGS, **changes})
    model, rng = GPT(config.gpt_config(67), seed=1), np.random.default_rng(2)
    copy_to_all(model, count)
    trainer, found = Trainer(model, config), []
    for _ in range(config.steps):
        tokens = rng.integers(0, 67, (config.accumulate, 2, 8, 8)).astype(np.int32)
        found.append(trainer.step(tuple(pair) for pair in tokens).loss)
    return model, found


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("counts", "changes"),
    [
        ((2,), {"n_layer": 1, "dropout": 0.1, "grad_clip": 0.5}),
        slow((4,), {"dropout": 0.1, "grad_clip": 0.5}),
        slow((2, 4), {"accumulate": 3, "dropout": 0.1}),
        slow((2, 4), {"optimizer": "muon", "norm": "post"}),
        slow((2, 4), {"lora_rank": 4, "dropout": 0.1}),
    ],
)
def test_a_hundred_losses_are_those_of_one_device(counts, changes):
    one, expected = trained(1, **changes)
    batch = np.arange(128, dtype=np.int32).reshape(2, 8, 8) % 67
    for count in counts:
        model, found = trained(count, **changes)
        assert found == pytest.approx(expected, abs=1e-4)
        for name, weight in get_state_dict(model).items():  # on each device to the last bit
            first, *others = (buffer.numpy() for buffer in weight.uop.base.buffer.bufs)
            assert len(others) == count - 1
            for other in others:
                np.testing.assert_array_equal(other, first, err_msg=name)
        for rows in (8, 3):  # which do not divide
            theirs, ours = (Scorer(m).losses(*batch[:, :rows]) for m in (one, model))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_run_goes_on_with_any_number_of_devices(data, tmp_path, capsys):
    """With samples, in checkpoints that do not know how many there were."""
    settings = [
        "--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=4",
        "--eval-every=10", "--eval-batches=3", "--sample-tokens=8", "--dropout=0.1", "--dtype=int8",
    ]  # fmt: skip
    for run, devices in zip(RUNS, (1, 2), strict=True):
        argv = ["train", str(data), "-o", str(tmp_path / run), *settings, "--steps=20"]
        assert main([*argv, f"--devices={devices}"]) == 0
    assert "plain operations, 2 devices (which share the cores of one: it is slower than one)" in (
        capsys.readouterr().err
    )
    for run, devices in (("whole", 1), ("parts", 1), ("parts", 4)):
        steps = 40 if (run, devices) != ("parts", 1) else 30
        argv = ["train", str(data), "-o", str(tmp_path / run), "--resume", f"--steps={steps}"]
        assert main([*argv, f"--devices={devices}"]) == 0
    ours, theirs = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    assert ours.keys() == theirs.keys() == set(range(1, 41))
    for step, (loss, tokens) in theirs.items():
        assert ours[step] == (pytest.approx(loss, abs=1e-4), tokens)
    told = [
        [e["sample"] for e in log(tmp_path / run) if "sample" in e] for run in ("parts", "whole")
    ]
    assert told[0][:3] == told[1][:3]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--batch-size=7", "--devices=2"], "7, which 2 devices cannot share evenly: the next that "
         "they can are 6 and 8; or take as many devices as divide it"),
        (["--devices=0"], "--devices is 0: it must be a whole number, 1 or more"),
    ],
)  # fmt: skip
def test_what_devices_cannot_share_is_refused(more, words, data, tmp_path, capsys):
    assert main(["train", str(data), "-o", str(tmp_path / "run"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_several_processes_take_one_device_each(data, tmp_path):
    argv = ["train", data, "-o", tmp_path / "run", "--batch-size=8", "--devices=2"]
    status, out, (line,) = mpirun(2, *argv)
    assert (status, out) == (2, "")
    assert "--devices is for one process: under mpirun each takes one device" in line
