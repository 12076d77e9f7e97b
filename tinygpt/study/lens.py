"""When does the model decide: what it would write next if it ended after each sublayer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinygpt.model import GPT
from tinygpt.study.inside import Inside, at, log_softmax, unembedded


@dataclass(frozen=True)
class Lens:
    """The predictions of S places in the model for what follows each of T tokens.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """

    places: tuple[str, ...]  # S of them, as in `Inside`
    likeliest: np.ndarray  # int64 (S, T): the token that the place finds the likeliest
    probability: np.ndarray  # float64 (S, T): which it gives that token
    rank: np.ndarray  # int64 (S, T): where the model's own likeliest token stands, from 1
    divergence: np.ndarray  # float64 (S, T), in nats: KL(the model's distribution, the place's)
    loss: np.ndarray  # float64 (S, T - 1), in nats: of the token that does follow


def lens(model: GPT, inside: Inside) -> Lens:
    """Unembed each residual of a forward pass; the last gives the model's own logits."""
    own = log_softmax(inside.logits)
    chosen, following = own.argmax(-1), np.array(inside.ids[1:], int)
    found: dict[str, list[np.ndarray]] = {name: [] for name in Lens.__dataclass_fields__}
    for residual in inside.residuals:
        logs = log_softmax(unembedded(model, residual))
        likeliest = logs.argmax(-1)
        found["likeliest"].append(likeliest)
        found["probability"].append(np.exp(at(logs, likeliest)))
        found["rank"].append(1 + (logs > at(logs, chosen)[:, None]).sum(-1))
        found["divergence"].append((np.exp(own) * (own - logs)).sum(-1))
        found["loss"].append(-at(logs[:-1], following))
    del found["places"]
    return Lens(inside.places, **{name: np.stack(rows) for name, rows in found.items()})
