"""Fine-tuning what other programs made, and the way back: nothing is lost on the way through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt import GPT, load_tokenizer
from tinygpt.checkpoints.hub import resolve
from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.commands.main import main
from tinygpt.tokenizer.encoding import save_tokenizer
from tinygpt.tokenizer.learn_bpe import bpe_tokenizer, train_bpe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "<|user|>How many are they?<|end|> There are three of them, and they are blue. " * 60
CASES = ["own bpe", "added tokens", "float16", "bfloat16", "shakespeare"]


def made_by_transformers(folder: Path, case: str) -> str:
    """A small GPT-2 as transformers saves it, with a tokenizer of its own."""
    save_tokenizer(bpe_tokenizer(train_bpe([TEXT], 300)), folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    if case == "added tokens":
        added = {"additional_special_tokens": ["<|user|>"], "eos_token": "<|end|>"}
        words.add_special_tokens(added)
    end = words.convert_tokens_to_ids("<|end|>" if case == "added tokens" else "<|endoftext|>")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": len(words)}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape, bos_token_id=end, eos_token_id=end)
    model = transformers.GPT2LMHeadModel(config)
    model.to(getattr(torch, case) if case.endswith("16") else torch.float32)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]])
def test_what_is_fine_tuned_is_loaded_by_transformers_with_the_same_end(case, lora, tmp_path):
    base = case if case == "shakespeare" else made_by_transformers(tmp_path / "base", case)
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT, encoding="utf-8")
    argv = ["train", text, "-o", run, "--model", base, "--steps", "12", "--eval-every", "6", *lora]
    argv += ["--context", "16", "--eval-batches", "4", "--sample-tokens", "0", "--batch-size", "4"]
    rate = "0.001" if case == "shakespeare" else "0.01"  # which has learnt more to be undone
    argv += ["--learning-rate", rate, "--warmup-steps", "0"]
    assert main([str(word) for word in argv]) == 0
    lines = (run / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    losses = [entry["val_loss"] for entry in map(json.loads, lines) if "val_loss" in entry]
    assert min(losses[1:]) < losses[0] - 0.02
    saved = checkpoint_in(run, "best")
    before, after = load_tokenizer(resolve(base)), load_tokenizer(saved)
    assert after.ends == before.ends
    sample = TEXT[:200]
    assert after.encode(sample) == before.encode(sample)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    words = transformers.AutoTokenizer.from_pretrained(saved)
    assert words(sample)["input_ids"] == after.encode(sample)
    ends = theirs.generation_config.eos_token_id
    assert tuple([ends] if isinstance(ends, int) else ends) == before.ends
    ids = after.encode(sample)[:16]
    ours = GPT.from_pretrained(saved)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours(Tensor([ids])).numpy()[0], expected, atol=1e-4)
    again = tmp_path / "again"  # and back
    theirs.save_pretrained(again)
    words.save_pretrained(again)
    assert load_tokenizer(again).ends == before.ends
    assert load_tokenizer(again).encode(sample) == before.encode(sample)
    np.testing.assert_allclose(
        GPT.from_pretrained(again)(Tensor([ids])).numpy()[0], expected, atol=1e-4
    )
