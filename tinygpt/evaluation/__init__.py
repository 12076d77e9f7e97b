"""How well a model predicts: losses, and published tests."""
