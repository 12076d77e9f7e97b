"""The parameters of a model as another form has them: for whoever writes a checkpoint."""

from __future__ import annotations

import numpy as np
from tinygrad.nn.state import get_state_dict

from tinygpt.checkpoints.quantization import DTYPES, dtype_of, matrices, widened
from tinygpt.checkpoints.tensor_names import ExpectedTensor
from tinygpt.model import GPT
from tinygpt.ops import widen


class ParametersAsStored:
    """A model's parameters under the names of another form, each made when it is asked for."""

    def __init__(self, model: GPT, expected: dict[str, ExpectedTensor], floats: bool) -> None:
        """
        Args:
            expected: the tensors of the other form, by their names there.
            floats: whether an int8 matrix comes as the numbers it stands for, or as it is held,
                for a form that has its scale in a tensor beside it.
        Raises:
            InputError: where the model's heads are split over devices.
        """
        model.placement.need_whole()
        self.expected, self.floats = expected, floats
        self.parameters, self.layers = get_state_dict(model), matrices(model)

    def held(self, name: str) -> str:
        """The dtype that the model holds a tensor in, one of `quantization.DTYPES`."""
        layer = self.layers.get(self.expected[name].ours[0].removesuffix(".weight"))
        return dtype_of(layer) if layer else "float32"

    def value(self, name: str) -> np.ndarray:
        """A tensor's values as the file has them; bfloat16 as float32, which holds it."""
        tensor = self.expected[name]
        if tensor.ours[0] not in self.parameters:
            # This model has no biases, but the form always does: zeros say the same.
            return np.zeros(tensor.shape, np.float32)
        return tensor.join([self._ours(name) for name in tensor.ours])

    def _ours(self, name: str) -> np.ndarray:
        layer = self.layers.get(name.removesuffix(".weight"))
        if layer and self.floats:
            return widened(layer)
        parameter = self.parameters[name]
        return (widen(parameter) if parameter.dtype == DTYPES["bfloat16"] else parameter).numpy()
