"""All that knows tinygrad's inside: devices, memory, captured steps, threads."""
