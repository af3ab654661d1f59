"""Has a model's layers add the products of a step's adapters to their own."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from fastserve.engine.adapters.batch import AdapterBatch
from fastserve.engine.adapters.memory import AdapterMemory
from fastserve.engine.adapters.routers import set_router_delta
from fastserve.engine.adapters.sites import Site
from fastserve.engine.kernels.lora import RecordedRows
from fastserve.engine.layers.experts import Experts, ExpertsBesideAdapters
from fastserve.engine.layers.linear import Linear
from fastserve.engine.layers.modules import replace_module

logger = logging.getLogger(__name__)


def attach(model: PreTrainedModel, memory: AdapterMemory) -> None:
    """`memory`: of the model's sites."""
    by_layer: dict[int, list[Site]] = {}
    for site in memory.sites:
        by_layer.setdefault(id(site.layer), []).append(site)
    for sites in by_layer.values():
        first = sites[0]
        if isinstance(first.layer, Linear):
            first.layer.delta = _LinearDelta(memory, sites)
        elif first.kind == "router":
            set_router_delta(first.layer, _LinearDelta(memory, sites))
        elif first.kind == "experts":
            _attach_to_experts(model, memory, sites)
        else:
            first.layer.register_forward_hook(_EmbeddingDelta(memory, first))
    if any(site.kind == "experts" for site in memory.sites):
        logger.info("Steps whose adapters change experts are computed by the model's modules.")


def _attach_to_experts(model: PreTrainedModel, memory: AdapterMemory, sites: list[Site]) -> None:
    experts = sites[0].layer
    if not isinstance(experts, Experts):
        experts = ExpertsBesideAdapters(experts)
        replace_module(model, sites[0].path.rpartition(".")[0], experts)
    experts.delta = _DeltaOfExperts(memory, sites)


class _Products:
    """The products of a batch's adapters for sites of one layer that have no output in common."""

    def __init__(self, memory: AdapterMemory, sites: list[Site]) -> None:
        self.sites = sites
        self._memory = memory
        self._tables = [memory.tables(site) for site in sites]

    def add(self, x: torch.Tensor, out: torch.Tensor, batch: AdapterBatch | RecordedRows) -> None:
        """`x` (rows, in), `out` (rows, outputs of the layer)"""
        kernel = self._memory.kernel
        if kernel is not None:
            kernel.add(x, out, self._tables, batch)
        elif isinstance(batch, AdapterBatch):
            for site in self.sites:
                self._memory.add(site, x, out, batch)


class _LinearDelta:
    """A `Linear.delta`: adds the LoRA products of the batch's adapters to one layer's output."""

    def __init__(self, memory: AdapterMemory, sites: list[Site]) -> None:
        self._memory = memory
        self._products = _Products(memory, sites)
        self._is_head = sites[0].kind == "head"

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        batch = self._memory.head_batch if self._is_head else self._memory.batch
        if batch is not None:
            self._products.add(x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]), batch)


class _EmbeddingDelta:
    """A forward hook of an embedding, which does the same."""

    def __init__(self, memory: AdapterMemory, site: Site) -> None:
        self._memory = memory
        self._site = site
        self._tables = memory.tables(site)

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        memory, batch = self._memory, self._memory.batch
        if batch is None:
            return
        ids, rows = args[0].reshape(-1), out.view(-1, out.shape[-1])
        if memory.kernel is not None:
            memory.kernel.add_embedding(ids, rows, self._tables, batch)
        elif isinstance(batch, AdapterBatch):
            memory.add_embedding(self._site, ids, rows, batch)


class _DeltaOfExperts:
    """An `ExpertsDelta`: rows are pairs of token and expert, sorted by expert and adapter for one product of all."""

    def __init__(self, memory: AdapterMemory, sites: list[Site]) -> None:
        self._memory = memory
        self._sites = sites
        named = {site.path.rpartition(".")[2]: site for site in sites}
        self._products = {name: [_Products(memory, [site])] for name, site in named.items()}
        if "gate_proj" in named:  # parts of gate_up_proj, which adapters may change as one too
            self._products["gate_up_proj"].append(_Products(memory, [named["gate_proj"], named["up_proj"]]))
        self._pairs: AdapterBatch | None = None

    @property
    def is_needed(self) -> bool:
        batch = self._memory.batch
        return isinstance(batch, AdapterBatch) and self._memory.changes_experts(batch, self._sites)

    def start(self, tokens: torch.Tensor, experts: torch.Tensor) -> None:
        batch = self._memory.batch
        assert isinstance(batch, AdapterBatch)
        slots = batch.slots(tokens.cpu().numpy())
        self._pairs = AdapterBatch.of(self._memory.slots_of_experts(slots, experts.cpu().numpy()))

    def add(self, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        batch = self._memory.batch
        if self._pairs is None or not isinstance(batch, AdapterBatch):
            return
        for products in self._products[name]:
            if self._memory.changes_experts(batch, products.sites):
                products.add(x, out, self._pairs)
