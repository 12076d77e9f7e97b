"""Looking inside a model: what each part of its own forward pass gives, as arrays.

Each function returns a dataclass of NumPy arrays, whose shapes its docstring gives. All but the
trained ones begin with `look(model, ids)`, which is one forward pass.
"""

from tinygpt.study.attention import entropies, head_scores, rollout
from tinygpt.study.attribution import attribute
from tinygpt.study.explain import explain
from tinygpt.study.heads import leave_out, with_heads
from tinygpt.study.induction import learn_induction
from tinygpt.study.inside import look
from tinygpt.study.lens import lens
from tinygpt.study.predictions import predictions
from tinygpt.study.proofs import prove

__all__ = [
    "attribute",
    "entropies",
    "explain",
    "head_scores",
    "learn_induction",
    "leave_out",
    "lens",
    "look",
    "predictions",
    "prove",
    "rollout",
    "with_heads",
]
