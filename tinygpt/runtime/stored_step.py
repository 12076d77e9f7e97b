"""Where a captured step is kept on disk, and whether one that is found fits what is at hand."""

from __future__ import annotations

from collections.abc import Mapping

from tinygrad import Tensor, UOp
from tinygrad.uop.ops import Ops

from tinygpt.runtime import launch, step_store
from tinygpt.runtime.plan import Inputs, Plan, Storage, as_tensors, whole
from tinygpt.runtime.replay import Replay


class StoredStep:
    """Where a step is kept on disk, and the tensors that it names."""

    def __init__(self, digest: str, named: dict[str, UOp]) -> None:
        self.digest, self.named = digest, named
        self.names: dict[UOp, str] = {}
        for name, uop in named.items():
            self.names.setdefault(uop, name)

    @classmethod
    def of(cls, key: object, named: Mapping[str, Tensor], inputs: Inputs) -> StoredStep | None:
        """None where a tensor is no view of just one buffer, an argument is no plain value, or the
        key is nothing that a later process would know again."""
        if not inputs.plain:
            return None
        bases: dict[str, UOp] = {}
        first: dict[UOp, str] = {}
        signature = []
        for name in sorted(named):
            uop = named[name].uop
            found = [u for u in uop.toposort() if u.op is Ops.BUFFER]
            if len(found) != 1 or not uop.is_realized:
                return None
            base = bases[name] = found[0]
            view: object = uop.shape
            if whole(uop) is None:
                view = uop.substitute({base: UOp(Ops.NOOP)}).key.hex()
            same = first.setdefault(base, name)  # tied weights are one buffer
            signature.append((name, same, view, base.device, base.arg, base.dtype))
        views = [(v.key.hex(), [x.arg for x in bound], d, e) for v, bound, d, e in inputs.info]
        what = (
            signature, views, inputs.names, inputs.bound, inputs.constants, inputs.shapes,
            inputs.storages,
        )  # fmt: skip
        try:
            return cls(step_store.digest((step_store.identity(key), what)), bases)
        except step_store.NotKept:
            return None

    def load(self, inputs: Inputs) -> Replay | None:
        """The step, if it is there and fits what is at hand in every part."""
        plan = step_store.load(self.digest)
        if not isinstance(plan, Plan) or plan.inputs != inputs.storages:
            return None
        uops = []
        for storage in plan.storages:
            if storage.name is None:
                uops.append(UOp.new_buffer(storage.device, storage.size, storage.dtype))
                continue
            uop = self.named.get(storage.name)
            uop = launch.constant_of(storage.name, storage.device) if uop is None else uop
            if uop is None or Storage(uop.device, uop.arg, uop.dtype, storage.name) != storage:
                return None
            uops.append(uop)
        result = as_tensors(plan.result, [*inputs.uops, *uops])
        return Replay(plan, inputs, uops, result)

    def save(self, plan: Plan) -> None:
        step_store.save(self.digest, plan)
