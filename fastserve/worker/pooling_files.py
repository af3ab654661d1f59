"""How a model pools, from the files of its folder: config.json and those of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

import msgspec

from fastserve.engine.contract import PoolingKind
from fastserve.engine.settings import DenseOptions, PoolingMode, PoolingOptions
from fastserve.errors import StartupError
from fastserve.observability.text import printable
from fastserve.text.model_files import read_json, read_json_list

_MODES: Mapping[str, PoolingMode] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "lasttoken": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
}
"""sentence-transformers' names of modes."""
_OLD_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_MAX_PROMPTS = 1000
_MAX_SIZE = 10**6
"""A length above it stands for none, as in tokenizer_config.json."""


def pooling_kind(folder: Path, task: str | None = None) -> PoolingKind | None:
    """The kind of the pooling model in `folder`; None: the model generates. `task` (generate, embed or classify)
    overrides what config.json suggests. Raises StartupError for an unreadable file."""
    if task is not None:
        return None if task == "generate" else cast(PoolingKind, task)
    config = read_json(folder / "config.json")
    names = config.get("architectures")
    architecture = next((name for name in names if isinstance(name, str)), "") if isinstance(names, list) else ""
    if architecture.endswith("ForSequenceClassification"):
        return "classify"
    if (folder / "modules.json").is_file():
        return "embed"
    if architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining")) and not architecture.endswith("LMHeadModel"):
        return "embed"
    return None


def read_pooling_options(folder: Path, kind: PoolingKind, pooling: str | None = None) -> PoolingOptions:
    """`pooling`: the user's mode, in place of the model's own. Raises StartupError."""
    config = read_json(folder / "config.json")
    stated = read_json(folder / "config_sentence_transformers.json")
    transformer = _transformer_settings(folder)
    lengths = [
        transformer.get("max_seq_length"),
        read_json(folder / "tokenizer_config.json").get("model_max_length"),
    ]
    prompts = stated.get("prompts")
    if prompts is not None and not _is_text_map(prompts):
        raise StartupError(f"{folder / 'config_sentence_transformers.json'}: 'prompts' is not an object of strings.")
    default = stated.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in (prompts or {})):
        raise StartupError(
            f"{folder / 'config_sentence_transformers.json'}: 'default_prompt_name' is "
            f"{printable(repr(default), 80)}, which is none of its prompts."
        )
    modes: tuple[PoolingMode, ...] = () if pooling is None else (cast(PoolingMode, pooling),)
    settings = PoolingOptions(
        kind,
        modes or (_usual_mode(config),),
        normalize=True,
        max_length=min(filter(_is_size, lengths), default=None),
        lowercase=transformer.get("do_lower_case") is True,
        prompts=prompts or {},
        default_prompt=default,
    )
    if kind == "classify":
        return msgspec.structs.replace(settings, modes=(), normalize=False, activation=_activation(config))
    modules = _modules(folder)
    if modules:
        settings = _read_modules(folder, modules, settings)
    return msgspec.structs.replace(settings, modes=modes or settings.modes)


def _usual_mode(config: Mapping[str, Any]) -> PoolingMode:
    """The mode of a model that states none: the last token of a decoder has seen the whole text."""
    names = config.get("architectures")
    is_decoder = isinstance(names, list) and any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return "last" if is_decoder else "mean"


def _is_text_map(value: Any) -> bool:
    return (
        isinstance(value, dict) and len(value) <= _MAX_PROMPTS and all(isinstance(text, str) for text in value.values())
    )


def _transformer_settings(folder: Path) -> dict[str, Any]:
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"):
        found = read_json(folder / f"sentence_{name}_config.json")
        if found:
            return found
    return {}


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Name and folder of each module after the transformer."""
    found = []
    for item in read_json_list(folder / "modules.json"):
        if not isinstance(item, dict) or not isinstance(item.get("type"), str) or not isinstance(item.get("path"), str):
            raise StartupError(f"{folder / 'modules.json'}: each module needs 'type' and 'path', which are strings.")
        path = (folder / item["path"]).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise StartupError(
                f"{folder / 'modules.json'}: the path {printable(item['path'], 80)} leads out of the folder."
            )
        found.append((item["type"].rpartition(".")[2], path))
    return found


def _read_modules(folder: Path, modules: list[tuple[str, Path]], settings: PoolingOptions) -> PoolingOptions:
    modes: tuple[PoolingMode, ...] | None = None
    dense: list[DenseOptions] = []
    normalize, pools_prompt = False, True
    for name, path in modules:
        if name in ("Transformer", "Dropout"):
            continue
        if name == "Pooling" and modes is None:
            stated = read_json(path / "config.json")
            modes = _pooling_modes(stated, path)
            pools_prompt = stated.get("include_prompt") is not False
        elif name == "Dense" and modes is not None and not normalize:
            dense.append(_dense(path))
        elif name == "Normalize" and modes is not None:
            normalize = True
        else:
            raise StartupError(
                f"{folder / 'modules.json'}: the module {printable(name, 80)} cannot be served at this place; "
                "Transformer, Pooling, Dense and Normalize can, in this order."
            )
    if modes is None:
        raise StartupError(
            f"{folder / 'modules.json'} has no Pooling module, so the model yields no vector for a text."
        )
    return msgspec.structs.replace(
        settings, modes=modes, dense=tuple(dense), normalize=normalize, pools_prompt=pools_prompt
    )


def _pooling_modes(settings: Mapping[str, Any], path: Path) -> tuple[PoolingMode, ...]:
    stated = settings.get("pooling_mode")
    if stated is None:
        stated = [name for flag, name in _OLD_FLAGS.items() if settings.get(flag) is True] or "mean"
    names = [stated] if isinstance(stated, str) else stated
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name in _MODES for name in names):
        raise StartupError(
            f"{path / 'config.json'}: pooling_mode is {printable(repr(stated), 80)}; {', '.join(_MODES)} can be served."
        )
    return tuple(_MODES[name] for name in names)


def _dense(path: Path) -> DenseOptions:
    settings = read_json(path / "config.json")
    width, out = settings.get("in_features"), settings.get("out_features")
    if not _is_size(width) or not _is_size(out) or settings.get("use_residual"):
        raise StartupError(
            f"{path / 'config.json'}: a Dense module needs in_features and out_features, and no residual."
        )
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    return DenseOptions(str(path), width, out, settings.get("bias") is not False, _class(activation))


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < _MAX_SIZE


def _activation(config: Mapping[str, Any]) -> str | None:
    """The class in torch.nn that a cross-encoder's config.json states."""
    nested = config.get("sentence_transformers")
    stated = nested.get("activation_fn") if isinstance(nested, dict) else None
    stated = stated or config.get("sbert_ce_default_activation_function")
    if stated is None:
        return "Sigmoid" if config.get("problem_type") == "multi_label_classification" else None
    return _class(str(stated))


def _class(path: str) -> str:
    """The class of a path such as torch.nn.modules.linear.Identity: torch's own only, no code of others is run."""
    if not path.startswith("torch.nn."):
        raise StartupError(f"The activation function {printable(path, 80)} is none of torch.nn's, and is not run.")
    return path.rpartition(".")[2]
