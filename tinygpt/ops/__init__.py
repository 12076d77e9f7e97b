"""The operations of a GPT: each in plain tensors, in C, and with its gradient."""
