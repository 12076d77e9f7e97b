from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, randomize, weights_of
from prepared import state
from tinygrad import Tensor

from tinygpt import GPT, InputError, load_tokenizer
from tinygpt.checkpoints import hub
from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.tokenizer.encoding import char_tokenizer
from tinygpt.training import run_files
from tinygpt.training.lock import locked

TOKENIZER = char_tokenizer("".join(map(chr, range(32, 99))))


def tensors(seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    shapes = {"a.mean": (3, 5), "b": (7,)}
    return {n: Tensor(rng.random(s, dtype=np.float32)).realize() for n, s in shapes.items()}


def save(run: Path, step: int, seed: int = 0) -> tuple[GPT, dict[str, Tensor]]:
    model, kept = randomize(GPT(SMALL), seed), tensors(seed)
    run_files.save(run, model, TOKENIZER, kept, state(step))
    return model, kept


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    model, kept = save(tmp_path / "new" / "run", 12)
    last = checkpoint_in(tmp_path / "new" / "run", "last")
    found, arrays, of = run_files.load(last)
    assert found.config == model.config
    for name, value in weights_of(found).items():
        np.testing.assert_array_equal(value, weights_of(model)[name])
    fresh = tensors(1)
    run_files.restore(fresh, arrays, last)
    for name, tensor in fresh.items():
        np.testing.assert_array_equal(tensor.numpy(), kept[name].numpy())
    assert of == state(12)
    assert load_tokenizer(last).encode("HI") == TOKENIZER.encode("HI")
    named = tmp_path / "new" / "run" / "last"
    assert (
        named.read_bytes() == b"step-00000012 d94d3452\n"
    )  # so that the run's folder can be moved


def test_the_links_lead_to_the_newest_and_the_best_and_the_rest_goes(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
        if step == 2:
            run_files.point(tmp_path, "best", tmp_path / "step-00000002")
        (tmp_path / ".abc.tmp").mkdir()  # as a killed process leaves it
        run_files.prune(tmp_path, keep=2)
    kept = ["step-00000002", "step-00000004", "step-00000005"]
    assert names(tmp_path) == ["best", "last", *kept]
    assert checkpoint_in(tmp_path, "best").name == kept[0]
    assert checkpoint_in(tmp_path, "last").name == kept[2]


def test_checkpoints_of_each_so_many_steps_stay(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step)
        (tmp_path / "step-by-step").mkdir(exist_ok=True)  # no checkpoint, and not ours to remove
        run_files.prune(tmp_path, keep=1, every=3)
    kept = [f"step-{step:08}" for step in (3, 6, 7)]
    assert names(tmp_path) == ["last", *kept, "step-by-step"]


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, seed=0)
    model, _ = save(tmp_path, 1, seed=1)
    run_files.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["last", "step-00000001"]
    found = weights_of(run_files.load(checkpoint_in(tmp_path, "last"))[0])
    np.testing.assert_array_equal(found["wte.weight"], weights_of(model)["wte.weight"])


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "rename"])
def test_a_full_disk_at_any_moment_leaves_the_last_checkpoint(call, tmp_path, monkeypatch):
    before, _ = save(tmp_path, 1)
    owner = builtins if call == "open" else os
    usual, count = getattr(owner, call), 0
    failures = 0
    for at in range(40):
        count = 0

        def failing(*args, at=at, **options):
            nonlocal count
            writes = call != "open" or (len(args) > 1 and "x" in args[1])
            count += writes
            if writes and count == at + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return usual(*args, **options)

        monkeypatch.setattr(owner, call, failing)
        try:
            save(tmp_path, 2, seed=1)
        except InputError as error:
            failures += 1
            message = str(error)
        else:
            break
        finally:
            monkeypatch.setattr(owner, call, usual)
        assert "no space left" in message
        assert "\n" not in message
        run_files.newest(tmp_path)
        loaded, _, of = run_files.load(checkpoint_in(tmp_path, "last"))
        assert of.counters.step == 1 or call in ("open", "fsync", "replace")
        if of.counters.step == 1:
            ours, theirs = weights_of(loaded), weights_of(before)
            np.testing.assert_array_equal(ours["wte.weight"], theirs["wte.weight"])
    assert failures >= 1
    run_files.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["last", "step-00000002"]


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path):
    save(tmp_path, 1)
    arrays = run_files.load(checkpoint_in(tmp_path, "last"))[1]
    wider = tensors() | {"b": Tensor.zeros(8).contiguous()}
    with pytest.raises(InputError, match=r"training.safetensors: b is float32 \(7,\), .* \(8,\)"):
        run_files.restore(wider, arrays, tmp_path)
    with pytest.raises(InputError, match="lacks 'c'"):
        run_files.restore(tensors() | {"c": Tensor.zeros(8)}, arrays, tmp_path)
    with pytest.raises(InputError, match="has, but this run does not, 'b'"):
        run_files.restore({"a.mean": tensors()["a.mean"]}, arrays, tmp_path)


def test_damage_and_strangers_are_refused_in_one_line(tmp_path):
    save(tmp_path, 1)
    last = checkpoint_in(tmp_path, "last")
    (last / "training.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"training.safetensors: .*"):
        run_files.load(last)
    (last / "state.json").write_text(json.dumps({"format": "other"}), encoding="utf-8")
    with pytest.raises(InputError, match=r"its format is 'other', not .* pass it as --model"):
        run_files.load(last)
    (last / "state.json").unlink()
    with pytest.raises(InputError, match=r"state.json: no such file"):
        run_files.load(last)


def test_a_model_of_any_form_survives(tmp_path):
    config = replace(SMALL, norm="post", position="sinusoidal", tie_word_embeddings=False)
    model = randomize(GPT(config))
    run_files.save(tmp_path, model, TOKENIZER, {}, state(0))
    found = run_files.load(checkpoint_in(tmp_path, "last"))[0]
    assert found.config == config
    for name, value in weights_of(found).items():
        np.testing.assert_array_equal(value, weights_of(model)[name])


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_run_of_links_or_of_copies_of_what_they_led_to_is_read_and_gone_on_with(name, tmp_path):
    """Older runs have links, and a copy of one that follows them has whole folders."""
    for step in (1, 2):
        save(tmp_path / "old", step)
    run_files.point(tmp_path / "old", "best", tmp_path / "old" / "step-00000002")
    for each in ("last", "best"):
        os.remove(tmp_path / "old" / each)
        os.symlink("step-00000002", tmp_path / "old" / each)
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    for run in (tmp_path / "old", tmp_path / "copy"):
        assert run_files.load(checkpoint_in(run, name))[2].counters.step == 2
        save(run, 3)
        run_files.point(run, name, run / "step-00000003")
        run_files.prune(run, keep=1)
        assert (run / name).is_file()
        assert checkpoint_in(run, name).name == "step-00000003"
        assert checkpoint_in(run, "last").name == "step-00000003"
        if name == "last":  # what the other name leads to is kept
            assert run_files.load(checkpoint_in(run, "best"))[2].counters.step == 2


def test_a_run_whose_last_was_lost_has_its_newest_whole_step(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-00000003").mkdir()  # as a copy that was cut short has it
    (tmp_path / "last").unlink()
    assert checkpoint_in(tmp_path, "last").name == "step-00000002"
    assert checkpoint_in(tmp_path, "best") is None


def test_a_name_of_a_step_that_is_not_there_is_refused_in_one_line(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "best").write_bytes(b"step-00000009\n")
    with pytest.raises(InputError, match="names step-00000009, which is not there"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "best").write_bytes(b"../../etc\n")
    with pytest.raises(InputError, match=r"best is damaged, it holds '../../etc.*: remove it or"):
        checkpoint_in(tmp_path, "best")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "best").write_bytes(b"../../etc\n")  # no run is there: it is no name
    assert checkpoint_in(tmp_path / "other", "best") is None


def test_a_run_is_its_best_checkpoint_wherever_a_model_is_taken(tmp_path):
    run = tmp_path / "run"
    first, _ = save(run, 1, seed=1)
    second, _ = save(run, 2, seed=2)
    assert hub.resolve(run) == hub.resolve(run / "last") == run / "step-00000002"
    run_files.point(run, "best", run / "step-00000001")
    for path in (run, run / "best", str(run), run / "step-00000001"):
        found = weights_of(GPT.from_pretrained(path))
        np.testing.assert_array_equal(found["wte.weight"], weights_of(first)["wte.weight"])
        assert load_tokenizer(path).encode("HI") == TOKENIZER.encode("HI")
    found = weights_of(GPT.from_pretrained(run / "last"))
    np.testing.assert_array_equal(found["wte.weight"], weights_of(second)["wte.weight"])


def test_nothing_needs_a_symbolic_link(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(os, "link", refused)
    with locked(tmp_path / "run"):
        save(tmp_path / "run", 1)
        run_files.point(tmp_path / "run", "best", tmp_path / "run" / "step-00000001")
    assert names(tmp_path / "run") == ["best", "last", "step-00000001"]
