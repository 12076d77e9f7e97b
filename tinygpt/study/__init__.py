"""Looking inside a model: what each part of its own forward pass gives, as arrays."""
