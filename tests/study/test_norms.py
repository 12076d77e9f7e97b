"""The study of layer norms: its measures, its rule, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import needs_clang

from tinygpt.commands import norms as command
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


def test_a_model_that_diverged_has_no_point_on_the_page():
    bad = Trained(norms.KNOWN[0], [3.0] * 30 + [math.nan], [[[1.0] * 6]], [[1.0]], [[1.0]], [[1.0]])
    for trained in ([bad], [bad, replace(bad, losses=[math.nan])]):
        text = page(norms_report(norms.Norms(3.3, 2.4, trained)))
        assert "diverged" in text
        assert "nan" not in text.split("<svg", 1)[1]
