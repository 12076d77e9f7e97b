"""Checkpoints of every form as files: which form it is, its names, its bytes, each checked."""
