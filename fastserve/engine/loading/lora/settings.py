"""adapter_config.json: every field of it is understood, known to have no effect on answers, or refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import regex

from fastserve.errors import StartupError
from fastserve.observability.text import printable

_MAX_MATCH_S = 1.0
"""For one pattern and one name; usual patterns take microseconds."""
MERGE_IT = "Merge it with PEFT's merge_and_unload, save the model, and serve that."
_CONVERT_IT = (
    "Convert it to plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), and serve "
    "that."
)
_WITHOUT_EFFECT = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights", "modules_to_tie",
    "monteclora_config", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules_to_tie",
    "task_type", "velora_config",
))  # fmt: skip
"""Fields about training, or about what the files show by themselves, such as the orientation of weights."""
_REFUSED = {
    "alora_invocation_tokens": (
        "it is active only after certain tokens (aLoRA), so it cannot be part of the weights. Serve it with an engine "
        "that applies adapters while it computes."
    ),
    "arrow_config": "it chooses among several adapters for each token (Arrow). Serve its adapters one by one.",
    "megatron_config": f"its layers are Megatron's. {MERGE_IT}",
    "use_qalora": f"it is made for quantized weights (QA-LoRA). {MERGE_IT}",
    "layer_replication": f"it repeats layers of its base model. {MERGE_IT}",
    "enable_lora": f"it changes parts of joint layers, as only the first releases of PEFT did. {MERGE_IT}",
}
_CHANGED_BASES = {
    "corda": f"the base model was changed in a way that its files do not show (CorDA). {_CONVERT_IT}",
    "lora_ga": f"the base model was changed in a way that its files do not show (LoRA-GA). {_CONVERT_IT}",
    "loftq": (
        "its base model is one that was rounded in training (LoftQ). Save the rounded model, and give the adapter "
        "that one as its base with init_lora_weights set to true."
    ),
    "pissa_niter": f"the base model was changed by a random algorithm (fast PiSSA). {_CONVERT_IT}",
}
_PLAIN_INITS = frozenset(("true", "false", "none", "gaussian", "orthogonal", "eva", "mica"))
_LAYER_PATTERN = r"(.*\.)?({})$"
_PATTERN_FORMS = {
    "rank_pattern": _LAYER_PATTERN,
    "alpha_pattern": _LAYER_PATTERN,
    "layers_pattern": r"(?:^|.*?\.){}\.(\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
"""Regular expressions that PEFT makes of these fields."""
_OFF: tuple[Any, ...] = (None, False, "", [], {})

_Count = Annotated[int, msgspec.Meta(gt=0)]
_Names = list[str] | str | None


class BlockDiagonal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """BD-LoRA: one of the two matrices of a layer is block-diagonal, and only its blocks are stored."""

    nblocks: _Count = 1
    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    match_strict: bool = True


class AdapterSettings(msgspec.Struct, frozen=True):
    """The fields of adapter_config.json that decide what the adapter changes, with PEFT's names and defaults."""

    peft_type: str = "LORA"
    r: _Count = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, _Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True
    target_modules: _Names = None
    exclude_modules: _Names = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Names = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    use_bdlora: BlockDiagonal | None = None
    kasa_config: dict[str, Any] | None = None

    @property
    def changed_base(self) -> str | None:
        """How the base weights were changed before training ("pissa", "olora"), None if they were not."""
        init = str(self.init_lora_weights).lower()
        return None if init in _PLAIN_INITS else init

    def rank_of(self, names: Iterable[str]) -> int:
        """The rank of a layer. `names`: its name in the adapter's file, and in the model."""
        found = _first_match(self.rank_pattern or {}, names)
        return self.r if found is None else int(found)

    def scale_of(self, names: Iterable[str], rank: int) -> float:
        found = _first_match(self.alpha_pattern or {}, names)
        alpha = self.lora_alpha if found is None else float(found)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether the adapter is for the module `path`: PEFT leaves out what its file has for others."""
        if _is_among(path, self.exclude_modules) or self._saves(path):
            return False
        if self.target_modules is None:
            return self.target_parameters is None
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or _matches(self.target_modules, path, whole=True)
        if path in self.target_modules:
            return True
        return _is_among(path, self.target_modules) and self._is_in_a_chosen_layer(path)

    def _saves(self, path: str) -> bool:
        return any(
            _matches(_PATTERN_FORMS["modules_to_save"].format(name), path) for name in self.modules_to_save or ()
        )

    def _is_in_a_chosen_layer(self, path: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = (
            _match(pattern, path)
            for pattern in (
                [_PATTERN_FORMS["layers_pattern"].format(one) for one in patterns or ()] or [r".*?\.[^.]*\.(\d+)\."]
            )
        )
        match = next((one for one in found if one is not None), None)
        return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def read_settings(file: Path) -> AdapterSettings:
    """Raises StartupError that names the field and its value for an adapter that is not LoRA, or that cannot be merged
    as PEFT merges it."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{file} cannot be read as the settings of a LoRA adapter: {error}.") from error
    if not isinstance(fields, dict):
        raise StartupError(f"{file} cannot be read as the settings of a LoRA adapter: it is no JSON object.")
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise StartupError(
            f"The adapter in {file.parent} is of the kind {printable(str(kind))} (peft_type); only LoRA is merged at "
            f"start. {MERGE_IT}"
        )
    for name, value in fields.items():
        _require_understood(file, name, value)
    settings = _converted(file, fields)
    _require_known_init(file, settings)
    _require_one_variant(file, fields)
    for field in (
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "modules_to_save",
    ):
        _require_patterns(file, field, getattr(settings, field))
    alphas = {"lora_alpha": settings.lora_alpha}
    alphas |= {f"alpha_pattern[{_shown(name)}]": alpha for name, alpha in (settings.alpha_pattern or {}).items()}
    for field, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise StartupError(f"{file}: {field} is {alpha}: give a finite number.")
    return settings


def _require_understood(file: Path, name: str, value: Any) -> None:
    if value in _OFF or name in AdapterSettings.__struct_fields__ or name in _WITHOUT_EFFECT:
        return
    stated = f"{file}: the adapter has {printable(name)} = {_shown(value)}"
    if name in _REFUSED:
        raise StartupError(f"{stated}: {_REFUSED[name]}")
    raise StartupError(f"{stated}, a field that is not known here, so it cannot be merged safely. {MERGE_IT}")


def _converted(file: Path, fields: Mapping[str, Any]) -> AdapterSettings:
    optional = {name for name, value in fields.items() if value is None and name not in ("r", "lora_alpha")}
    known = {
        name: value
        for name, value in fields.items()
        if name in AdapterSettings.__struct_fields__ and name not in optional
    }
    for name, value in known.items():
        try:
            msgspec.convert({name: value}, AdapterSettings)
        except msgspec.ValidationError as error:
            raise StartupError(
                f"{file} cannot be read as the settings of a LoRA adapter: {name} is {_shown(value)} ({error}). Save "
                "the adapter again with PEFT."
            ) from error
    return msgspec.convert(known, AdapterSettings)


def _require_known_init(file: Path, settings: AdapterSettings) -> None:
    init = settings.changed_base
    if init is None or init in ("pissa", "olora"):
        return
    stated = f"{file}: the adapter has init_lora_weights = {_shown(settings.init_lora_weights)}"
    for name, reason in _CHANGED_BASES.items():
        if init.startswith(name):
            raise StartupError(f"{stated}: {reason}")
    raise StartupError(f"{stated}, which is not known here, so it cannot be merged safely. {MERGE_IT}")


def _require_one_variant(file: Path, fields: Mapping[str, Any]) -> None:
    variants = ("use_dora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
    found = [
        name for name in variants if fields.get(name) not in _OFF or (name == "kasa_config" and fields.get(name) == {})
    ]
    if str(fields.get("init_lora_weights")).lower() == "mica":
        found.append("init_lora_weights")
    if len(found) > 1:
        raise StartupError(f"{file}: {' and '.join(found)} exclude each other, as in PEFT: save the adapter again.")


def _require_patterns(file: Path, field: str, value: Any) -> None:
    """Require regular expressions that are valid by themselves and within the one that PEFT makes of each."""
    patterns = [value] if isinstance(value, str) else [] if field.endswith("modules") else list(value or ())
    for pattern in patterns:
        try:
            for form in ("{}", _PATTERN_FORMS.get(field, "{}")):
                re.compile(form.format(pattern))  # as PEFT reads it
                regex.compile(form.format(pattern))  # as it is matched here
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise StartupError(
                f"{file}: {field} has {_shown(pattern)}, which is no regular expression that can be used there "
                f"({error})."
            ) from error
        if field == "layers_pattern" and re.compile(pattern).groups:
            raise StartupError(
                f"{file}: layers_pattern has {_shown(pattern)}: write it without a group, since the group of the "
                "layer's number must be the first one."
            )


def _match(pattern: str, path: str, *, whole: bool = False) -> regex.Match[str] | None:
    """As re.match, or as re.fullmatch if `whole`. Raises StartupError when it takes too long: the patterns come with
    the adapter, and some would take years."""
    try:
        compiled = regex.compile(pattern)
        return (compiled.fullmatch if whole else compiled.match)(path, timeout=_MAX_MATCH_S)
    except TimeoutError as error:
        raise StartupError(
            f"The pattern {_shown(pattern)} in adapter_config.json takes more than {_MAX_MATCH_S:g} s on the module "
            f"name {_shown(path)}: write it without nested repetitions, or list the names."
        ) from error


def _matches(pattern: str, path: str, *, whole: bool = False) -> bool:
    return _match(pattern, path, whole=whole) is not None


def _first_match(patterns: Mapping[str, float], names: Iterable[str]) -> float | None:
    every = list(names)
    for pattern, value in patterns.items():
        if any(_matches(_LAYER_PATTERN.format(pattern), name) for name in every):
            return value
    return None


def _is_among(path: str, names: _Names) -> bool:
    if isinstance(names, str):
        return _matches(names, path, whole=True)
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def _shown(value: Any) -> str:
    return printable(json.dumps(value))
