"""GPT-2, whole, built from scratch on tinygrad tensors."""

from tinygpt import backend

backend.forgive_cache()
backend.select()  # before the first tensor is made

from tinygpt.config import GPTConfig, InputError  # noqa: E402
from tinygpt.generate import Generator  # noqa: E402
from tinygpt.model import GPT  # noqa: E402
from tinygpt.tokenizer import load_tokenizer  # noqa: E402

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "Generator", "InputError", "load_tokenizer"]
