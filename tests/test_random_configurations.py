"""The script that draws configurations runs, and what it compares is equal."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_the_first_configurations_equal_numpy_and_torch(capsys, monkeypatch):
    pytest.importorskip("torch")
    import random_configurations

    monkeypatch.setenv("TINYGPT_KERNELS", "1")  # the script changes it
    assert random_configurations.main(["--count", "2", "--shapes", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["greedy tokens equal to NumPy's"] > 0
    assert found["training steps equal to PyTorch's in float64"] > 0
    assert found["faults"] == []
