"""The few operations that tinygrad compiles badly as written, in a form it compiles well."""

from __future__ import annotations

from tinygrad import Tensor

# tinygrad vectorises and threads a kernel along an axis whose length its factors divide. GPT-2's
# 50257 rows are 29 * 1733: as they stand, that product runs several times slower.
_ROWS = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, with an awkward number of weight rows cut into an even part and a rest.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
    Returns:
        (..., out_features).
    """
    rows = weight.shape[0]
    even = rows - rows % _ROWS
    if even in (0, rows):
        y = x @ weight.transpose()
    else:
        parts = (weight[:even], weight[even:])
        y = Tensor.cat(*[(x @ part.transpose()).contiguous() for part in parts], dim=-1)
    return y if bias is None else y + bias
