"""The study of layer norms: its measures, its rule, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_clang

from tinygpt.commands import norms as command
from tinygpt.runtime import device
from tinygpt.study import norms
from tinygpt.study.norms import Cell, Trained, cells, entropies_of, train_cells
from tinygpt.study.page import page
from tinygpt.study.shown import norms_report


def test_entropies_equal_a_second_count():
    text = np.random.default_rng(0).integers(0, 5, 400) ** 2 % 7
    alone = {a: text.tolist().count(a) / 400 for a in set(text.tolist())}
    pairs = list(zip(text[:-1].tolist(), text[1:].tolist(), strict=True))
    given = 0.0
    for a, b in set(pairs):
        both, first = pairs.count((a, b)), sum(pair[0] == a for pair in pairs)
        given -= both / len(pairs) * math.log(both / first)
    expected = -sum(share * math.log(share) for share in alone.values()), given
    np.testing.assert_allclose(entropies_of(text), expected)


def test_the_cells_are_the_whole_grid_and_the_known_ones_thrice():
    every = cells()
    assert len(every) == len(set(every)) == 4 * 2 * 3 * 2 * 2 + 2 * len(norms.KNOWN)
    assert {cell for cell in every if cell.seed == 0} >= set(cells(quick=True))
    shapes = [norms.shape_of(cell) for cell in every]
    assert sum(a != b for a, b in pairwise(shapes)) == 23  # each built once


@pytest.mark.parametrize(
    ("last", "expected"),
    [(3.3, "stuck"), (3.34, "stuck"), (3.1, "between"), (2.9, "learns"), (math.nan, "diverged")],
)
def test_the_verdict_is_by_rule(last, expected):
    trained = Trained(norms.KNOWN[0], [5.0] * 280 + [last] * 20, [], [], [], [])
    assert trained.verdict(3.31) == expected


@needs_clang  # some steps of twelve blocks
def test_a_cell_is_the_same_alone_and_after_another():
    """Nothing of one cell stays in the model and the optimiser that the next one uses."""
    ids = np.random.default_rng(1).integers(0, 9, 4000)
    one = Cell("post", "xavier", 2, 3e-3, 0)
    other = Cell("post", "gpt2", 2, 1e-3, 100, seed=1)
    [alone] = train_cells([one], ids, steps=25)
    after = [*train_cells([other, one], ids, steps=25)][1]
    assert alone == after
    assert len(alone.losses) == 25
    assert np.shape(alone.gradients) == (2, 2, 6)
    assert np.shape(alone.norms) == np.shape(alone.similarity) == np.shape(alone.rank) == (2, 3)
    np.testing.assert_allclose(alone.norms[0][1:], 8, rtol=1e-3)  # post-norm: the root of 64


@pytest.mark.slow  # 24 blocks and their gradients
@needs_clang
def test_the_start_is_as_theory_has_it():
    """Xiong et al. 2020 of gradients and lengths; Dong et al. 2021 of what shortcuts are for."""
    text = np.frombuffer((Path(__file__).parents[2] / "README.md").read_bytes(), np.uint8)
    ids = np.unique(text, return_inverse=True)[1]
    shapes = [("pre", 2), ("pre", 24), ("post", 2), ("post", 24), ("no shortcut", 12)]
    some = [Cell(kind, "xavier", depth, 1e-3, 0, seed) for kind, depth in shapes for seed in (0, 1)]
    found: dict[tuple[str, int], list[Trained]] = {}
    for each in train_cells(some, ids, steps=0):
        found.setdefault((each.cell.kind, each.cell.depth), []).append(each)
    # Of the last block's c_proj.
    length = {
        shape: np.mean([each.gradients[0][-1][-1] for each in both])
        for shape, both in found.items()
    }
    shallow, deep = (length["post", depth] / length["pre", depth] for depth in (2, 24))
    assert deep > 3 * shallow
    for each in found["pre", 24]:
        # Not in the first blocks: GELU gives less than the bounds' ReLU.
        for block in (12, 24):
            low, high = (math.sqrt(64 * (1 + part * block)) for part in (0.5, 1.5))
            assert low <= each.norms[0][block] <= high
        assert each.similarity[0][12] < 0.8
    for each in found["no shortcut", 12]:
        assert each.similarity[0][12] > 0.99


@needs_clang
def test_two_processes_train_what_one_does(cli, tmp_path, monkeypatch):
    some = [Cell("pre", "gpt2", 2, 1e-3, 0), Cell("post", "xavier", 2, 1e-3, 0)]
    monkeypatch.setattr(command, "STEPS", 3)
    monkeypatch.setattr(norms, "KNOWN", some)
    monkeypatch.setattr(device, "cpu_count", lambda: 2)
    (text := tmp_path / "text.txt").write_text("to be or not to be " * 200, encoding="utf-8")
    found = {}
    for processes in (1, 2):
        monkeypatch.setattr(command, "_MOST_PROCESSES", processes)
        kept = tmp_path / f"{processes}.jsonl"
        status, shown, said = cli("study", "norms", text, "--quick", "-o", kept, "--json")
        assert status == 0, said
        found[processes] = json.loads(shown)["trained"]
    for one, two in zip(found[1], found[2], strict=True):
        assert one["cell"] == two["cell"]
        np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-5)


def test_a_share_has_whole_shapes_and_about_as_much_as_another():
    first, second = command._shares(every := cells(), 2)
    assert sorted(first + second) == sorted(every)
    assert not {*map(norms.shape_of, first)} & {*map(norms.shape_of, second)}
    costs = [sum(cell.depth for cell in share) for share in (first, second)]
    assert max(costs) < 1.1 * min(costs)


def test_a_short_text_is_refused_in_a_line(cli, tmp_path):
    (text := tmp_path / "text.txt").write_text("to be or not to be", encoding="utf-8")
    status, _, said = cli("study", "norms", text, "-o", tmp_path / "norms.jsonl")
    assert status == 2
    assert "the text has 18 tokens, and `study norms` needs 65: give more text" in said
    assert said.count("\n") == 1


@needs_clang
def test_it_goes_on_with_what_is_missing(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "STEPS", 25)
    monkeypatch.setattr(norms, "KNOWN", norms.KNOWN[:2])
    (text := tmp_path / "text.txt").write_text("to be or not to be " * 200, encoding="utf-8")
    kept, page = tmp_path / "norms.jsonl", tmp_path / "norms.html"
    argv = ["study", "norms", text, "--quick", "-o", kept, "--json", "--html", page]
    status, whole, _ = cli(*argv)
    assert status == 0
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    kept.write_text(lines[0] + "\n" + lines[1][:100], encoding="utf-8")  # as a kill leaves it
    status, again, said = cli(*argv)
    assert status == 0
    assert "has 1 of 2 models: going on with the rest" in said
    assert json.loads(again) == json.loads(whole)
    assert "has 2 of 2 models" in cli(*argv)[2]
    assert "Loss of 12 blocks: gpt2, 0.001, warm-up 0" in page.read_text(encoding="utf-8")
    first = kept.read_text(encoding="utf-8")
    kept.write_text("my own notes\n" + first, encoding="utf-8")
    assert "holds more than what `study norms` keeps" in cli(*argv)[2]
    assert kept.read_text(encoding="utf-8") == "my own notes\n" + first
    kept.write_text(first, encoding="utf-8")
    text.write_text("another text, and another " * 100, encoding="utf-8")
    status, _, said = cli(*argv)
    assert status == 2
    assert "is of another text: name another file with --out" in said


def test_one_that_is_stopped_says_what_is_kept(cli, tmp_path, monkeypatch):
    some = norms.KNOWN[:3]

    def stopped(cells, *_):
        yield Trained(cells[0], [3.0] * 300, [[[1.0] * 6]], [[1.0]], [[1.0]], [[1.0]])
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train_cells", stopped)
    monkeypatch.setattr(command, "_MOST_PROCESSES", 1)
    monkeypatch.setattr(norms, "KNOWN", some)
    (text := tmp_path / "text.txt").write_text("to be or not to be " * 200, encoding="utf-8")
    kept = tmp_path / "norms.jsonl"
    status, out, said = cli("study", "norms", text, "--quick", "-o", kept)
    assert (status, out) == (130, "")
    assert f"{kept} has 1 of 3 models: the same command goes on with the rest" in said


def test_a_model_that_diverged_has_no_point_on_the_page():
    bad = Trained(norms.KNOWN[0], [3.0] * 30 + [math.nan], [[[1.0] * 6]], [[1.0]], [[1.0]], [[1.0]])
    for trained in ([bad], [bad, replace(bad, losses=[math.nan])]):
        text = page(norms_report(norms.Norms(3.3, 2.4, trained)))
        assert "diverged" in text
        assert "nan" not in text.split("<svg", 1)[1]
