"""The layers of a model that adapters may change, noted before the model is assembled, which replaces modules."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.loading.lora.names import Names


class AdapterTargets:
    def __init__(self, model: PreTrainedModel) -> None:
        """`model`: with the modules that transformers makes; weights may be on the meta device."""
        self.names = Names(model)
        head = model.get_output_embeddings()
        self.head = next((path for path, module in model.named_modules() if module is head), None)
        self.sizes: dict[str, tuple[int, int]] = {}
        """(inputs, outputs) of each linear layer by path, without the LM head."""
        for path, module in model.named_modules():
            if type(module) is torch.nn.Linear and module is not head:
                self.sizes[path] = (module.in_features, module.out_features)
            elif type(module) is Conv1D:
                self.sizes[path] = tuple(module.weight.shape)
