"""Text to token ids and back; vocabulary files; learning a byte-pair encoding."""
