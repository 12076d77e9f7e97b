from tinygpt.config import GPTConfig
from tinygpt.generate import Generator
from tinygpt.model import GPT
