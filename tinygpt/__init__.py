"""GPT-2, whole, built from scratch on tinygrad tensors."""

from tinygpt.runtime import device

device.forgive_cache()
device.select()  # before the first tensor is made

from tinygpt.checkpoints.load_tokenizer import load_tokenizer  # noqa: E402
from tinygpt.config import GPTConfig  # noqa: E402
from tinygpt.errors import InputError  # noqa: E402
from tinygpt.generate import Generator  # noqa: E402
from tinygpt.model import GPT  # noqa: E402

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "Generator", "InputError", "load_tokenizer"]
