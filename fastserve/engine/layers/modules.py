"""Changing which modules a model consists of."""

from __future__ import annotations

import torch


def replace_module(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def set_untracked(owner: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Set an attribute of `owner` to a module without making that its child, so that the module's parameters do not get
    a second name below `owner`."""
    object.__setattr__(owner, name, module)
