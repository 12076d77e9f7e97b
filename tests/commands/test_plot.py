from __future__ import annotations

import argparse
import json
import math
import sys

import pytest

from tinygpt import InputError
from tinygpt.commands import plot
from tinygpt.tokenizer.encoding import char_tokenizer, save_tokenizer


def draw(*argv) -> int:
    parser = argparse.ArgumentParser()
    plot.add_flags(parser)
    return plot.run(parser.parse_args([str(word) for word in argv]))


def write(run, entries) -> None:
    run.mkdir()
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    text += '{"step": 3, "lo'  # as a killed process leaves it
    (run / "log.jsonl").write_text(text, encoding="utf-8")


def test_a_log_gives_its_curves(tmp_path):
    entries = [
        {"step": 0, "val_loss": 4.0, "sample": "lines end at \u2028, \x85, \u2029 for some"},
        {"step": 1, "loss": 3.5, "learning_rate": 0.1},
        {"step": 2, "loss": None, "skipped": True, "learning_rate": 0.1},
    ]
    write(tmp_path / "run", entries)
    found = plot.read_log(tmp_path / "run")
    expected = {"val_loss": [(0, 4.0)], "loss": [(1, 3.5)], "learning_rate": [(1, 0.1), (2, 0.1)]}
    assert found == expected


def test_runs_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name in "ab":
        write(tmp_path / name, [{"step": i, "loss": 4 - i, "val_loss": 5 - i} for i in range(3)])
    assert draw(tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out.svg") == 0
    image = (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert image.count("<path") > 10
    with pytest.raises(InputError, match=r"cannot write .*out\.strange"):
        draw(tmp_path / "a", "-o", tmp_path / "out.strange")


def test_what_a_log_and_its_path_may_hold_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    numbers = [10**400, -(10**400), 1e308, math.inf, math.nan, 2, 3]
    for name in ("$x^{2$", "_a_$", "100%"):
        entries = [{"step": i, "loss": x, "learning_rate": 10**400} for i, x in enumerate(numbers)]
        write(tmp_path / name, [*entries, {"step": 10**400, "loss": 1}, {"step": 2**31, "loss": 1}])
        steps = [step for step, _ in plot.read_log(tmp_path / name)["loss"]]
        assert steps == [5, 6]
        assert draw(tmp_path / name, "-o", tmp_path / "out.png") == 0
    assert draw("_a_$", "-o", "bare") == 0
    assert (tmp_path / "bare.png").is_file()


def test_an_image_that_cannot_be_written_whole_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    write(tmp_path / "a", [{"step": 0, "loss": 4}])
    (tmp_path / "out.png").write_bytes(b"the one before")

    def cut(_, file, **__):
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", cut)
    with pytest.raises(InputError, match=r"cannot write .*out\.png: no space left"):
        draw(tmp_path / "a", "-o", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == b"the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out.png"]


def test_losses_of_other_tokens_are_said_not_to_compare(tmp_path, capsys):
    for name, letters in (("a", "xyz"), ("b", "xyz"), ("c", "xyzw")):
        save_tokenizer(char_tokenizer(letters), tmp_path / name)
    runs = [str(tmp_path / name) for name in ("a", "b", "nothing saved yet", "c")]
    plot.compare_tokenizers(runs[:3])
    assert not capsys.readouterr().err
    plot.compare_tokenizers(runs)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{runs[0]} and {runs[3]} have other tokens, so their losses do not compare" in line


def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"log\.jsonl: no such file"):
        plot.read_log(tmp_path / "empty")
    (tmp_path / "empty" / "log.jsonl").write_text("[]\n", encoding="utf-8")
    with pytest.raises(InputError, match="no steps of training"):
        plot.read_log(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"tinygpt\[plot\]"):
        draw(tmp_path / "empty")
