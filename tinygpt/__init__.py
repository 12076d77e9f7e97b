"""GPT-2, whole, built from scratch on tinygrad tensors.

Importing this package changes nothing in the process. The first `GPT` that is made or loaded
chooses a backend where the environment variable DEV names none and tinygrad's own choice would not
work here: see `tinygpt.runtime.device.select`.
"""

from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.config import GPTConfig
from tinygpt.errors import InputError
from tinygpt.generate import Generator
from tinygpt.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "Generator", "InputError", "load_tokenizer"]
