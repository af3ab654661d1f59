"""All weights of a model by their Hugging Face names, however each is stored.

Whatever changes weights (live updates, quantised or sharded loading) reads and writes through this table, and knows
nothing of packing, ties or transposed layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.kernels.fused_steps import FusedSteps
from fastserve.engine.runner.fusion import fuse_gated_mlps
from fastserve.engine.runner.linear import Linear, WeightForm, form_of, is_mapped


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one copy of a weight lives."""

    get: Callable[[], torch.Tensor]
    set: Callable[[torch.Tensor], None]


class WeightTable:
    """Made by `install`, which replaces the model's linear layers by ours on the way."""

    def __init__(self) -> None:
        self._places: dict[str, list[_Place]] = {}
        self._shapes: dict[str, torch.Size] = {}

    @classmethod
    def install(cls, model: PreTrainedModel, kernels: FusedSteps | None) -> WeightTable:
        """Take over the weights of `model`, module by module, so that no second copy of all of them ever exists.
        With kernels, layers that take the same input become one."""
        table = cls()
        tied = _tied_names(model)
        found: dict[str, _Place] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            table._shapes[name] = parameter.shape
            found[name] = _parameter_place(parameter)
        if kernels is not None:
            for name, form in fuse_gated_mlps(model, kernels).items():
                found[name] = _form_place(form, transposed=False)
        for path, module in list(model.named_modules()):
            linear = _replacement(module)
            if linear is None:
                continue
            transposed = isinstance(module, Conv1D)
            found[f"{path}.weight"] = _form_place(linear.form, transposed=transposed)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
        for name in found:
            table._places[name] = [found[other] for other in tied[name]]
        return table

    def names(self) -> list[str]:
        return list(self._places)

    @property
    def num_parameters(self) -> int:
        """Tied weights count once."""
        first_of = {id(places[0]): name for name, places in reversed(self._places.items())}
        return sum(self._shapes[name].numel() for name in first_of.values())

    def get(self, name: str) -> torch.Tensor:
        """The weight in the checkpoint's shape. Raises KeyError for a name that the model does not have."""
        return self._find(name)[0].get()

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a weight, in all places where it is used. Raises KeyError, or ValueError for another shape."""
        places = self._find(name)
        if tensor.shape != self._shapes[name]:
            raise ValueError(f"{name} has the shape {tuple(self._shapes[name])}, not {tuple(tensor.shape)}")
        with torch.no_grad():
            for place in places:
                place.set(tensor)

    def _find(self, name: str) -> list[_Place]:
        try:
            return self._places[name]
        except KeyError:
            raise KeyError(f"the model has no weight {name!r}") from None


def _tied_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """For each name, all names of the same tensor, itself among them, in the same order for each."""
    groups: dict[int, list[str]] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        groups.setdefault(id(parameter), []).append(name)
    return {name: groups[id(parameter)] for name, parameter in parameters}


def _replacement(module: torch.nn.Module) -> Linear | None:
    # Subclasses may compute something else, so they are left alone.
    if type(module) is torch.nn.Linear:
        weight = module.weight.data
    elif type(module) is Conv1D:
        weight = module.weight.data.t()
        weight = weight if is_mapped(weight) else weight.contiguous()
    else:
        return None
    return Linear(form_of(weight), module.bias)


def _parameter_place(parameter: torch.nn.Parameter) -> _Place:
    def set_value(tensor: torch.Tensor) -> None:
        parameter.copy_(tensor)

    return _Place(lambda: parameter.data, set_value)


def _form_place(form: WeightForm, *, transposed: bool) -> _Place:
    if not transposed:
        return _Place(form.get, form.set)
    return _Place(lambda: form.get().t().contiguous(), lambda tensor: form.set(tensor.t().contiguous()))
