"""LoRA adapters that cannot be merged as PEFT merges them are refused, by the name of the field or tensor."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .adapters import ATTENTION, Adapters, Lora, assert_merged, assert_refused, edit, edit_tensors
from .conftest import TinyModels
from .test_formats import load


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tiny_models, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def usual(adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with most parts, to be copied and damaged."""
    lora = {
        "target_modules": ATTENTION,
        "use_dora": True,
        "modules_to_save": ["norm"],
        "trainable_token_indices": [1, 3],
    }
    return adapters.make(adapters.base("tied"), tmp_path_factory.mktemp("usual") / "adapter", lora)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens = \[5\]: it is active only after certain tokens"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config .*: it chooses among several adapters"),
        ({"megatron_config": {"x": 1}}, "megatron_config .*: its layers are Megatron's"),
        ({"use_qalora": True}, "use_qalora = true: it is made for quantized weights .*merge_and_unload"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication .*: it repeats layers of its base model"),
        ({"enable_lora": [True, False, True]}, "enable_lora .*: it changes parts of joint layers"),
        ({"init_lora_weights": "corda"}, 'init_lora_weights = "corda": the base model was changed .*CorDA'),
        ({"init_lora_weights": "lora_ga"}, 'init_lora_weights = "lora_ga": the base model was changed .*LoRA-GA'),
        ({"init_lora_weights": "loftq"}, r'init_lora_weights = "loftq": .* rounded in training \(LoftQ\)'),
        ({"init_lora_weights": "pissa_niter_16"}, "changed by a random algorithm .*path_initial_model"),
        ({"init_lora_weights": "new"}, 'init_lora_weights = "new", which is not known here'),
        ({"sparsity": 0.5}, r"the adapter has sparsity = 0\.5, a field that is not known here"),
        ({"x\n" * 500: "y" * 500}, r'the adapter has (x\\n)+…? = "y{1,200}…, a field that is not known here'),
        ({"peft_type": "LOHA"}, r"of the kind LOHA \(peft_type\); only LoRA is merged"),
        ({"r": "four"}, r'r is "four" \(Expected `int`, got `str`'),
        ({"r": 0}, r"r is 0 \(Expected `int` >= 1"),
        ({"r": 8}, "has the shape .*, and the rank is 8 by its adapter_config.json"),
        ({"rank_pattern": {"v_proj": 3}}, "and the rank is 3 by its adapter_config.json"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf: give a finite number"),
        ({"alpha_pattern": {"q_proj": "2"}}, r'alpha_pattern is {"q_proj": "2"} \(Expected `float`'),
        ({"alpha_pattern": {"q_(proj": 2}}, r'alpha_pattern has "q_\(proj", which is no regular expression'),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r'alpha_pattern\["q_proj"\] is nan: give a finite number'),
        ({"alpha_pattern": {"q_proj": float("inf")}}, r'alpha_pattern\["q_proj"\] is inf: give a finite number'),
        ({"rank_pattern": {"(?i)q_proj": 4}}, r'rank_pattern has "\(\?i\)q_proj", which is no regular expression'),
        ({"modules_to_save": ["(?i)norm"]}, r'modules_to_save has "\(\?i\)norm", which is no regular expression'),
        ({"layers_pattern": ["(?i)layers"]}, r'layers_pattern has "\(\?i\)layers", which is no regular expression'),
        ({"layers_pattern": ["(layers)"]}, r'layers_pattern has "\(layers\)": write it without a group'),
        ({"target_modules": "(" * 5000 + ")" * 5000}, r"target_modules has .*…, which is no regular expression"),
        ({"use_bdlora": {"nblocks": 2, "new": 1}}, "use_bdlora is .*unknown field `new`"),
        ({"target_modules": "*_proj"}, r'target_modules has "\*_proj", which is no regular expression'),
        ({"modules_to_save": ["norm", "(x"]}, r'modules_to_save has "\(x", which is no regular expression'),
        ({"bias": "some"}, "bias is \"some\" .*Invalid enum value"),
        ({"use_dora": False}, "has a lora_magnitude_vector for .*, and use_dora of .* says otherwise"),
        ({"lora_bias": True}, "has no lora_B.bias for .*, and lora_bias of its adapter_config.json says otherwise"),
        ({"kasa_config": {}}, "use_dora and kasa_config exclude each other"),
        ({"target_modules": ["q_proj"]}, r"has \S+v_proj\S+, and by its .* is not for \S+v_proj \(target_modules, "),
        ({"exclude_modules": r".*\.0\..*"}, r"the adapter is not for model\.layers\.0\.\S+ \(target_modules, exclude_"),
        ({"layers_to_transform": [0, 1]}, r"the adapter is not for model\.layers\.2\.\S+ .*layers_to_transform"),
        ({"modules_to_save": ["norm", "embed_tokens"]}, r"has modules_to_save \(embed_tokens\) and trainable_token"),
        ({"trainable_token_indices": [1, 160]}, r"has the token 160, and model\.embed_tokens\.weight .* has 160 rows"),
        ({"trainable_token_indices": [1, -1]}, "has the token -1, and"),
        ({"trainable_token_indices": [1]}, r"has the shape \(2, 48\), and 1 rows of model\.embed_tokens\.weight have"),
        ({"trainable_token_indices": None}, "trainable_token_indices of .* does not say for which"),
        ({"trainable_token_indices": {"lm_head": [1, 3]}}, "trainable_token_indices .* does not say for which tokens"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused_by_name(
    adapters: Adapters, usual: Path, tmp_path: Path, fields: Lora, words: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(usual, folder)
    edit(folder, **fields)
    assert_refused(adapters.base("tied"), folder, words)


def test_settings_without_effect_or_that_are_off_are_no_hindrance(
    adapters: Adapters, usual: Path, tmp_path: Path
) -> None:
    folder, base = tmp_path / "adapter", adapters.base("tied")
    shutil.copytree(usual, folder)
    edit(
        folder, lora_dropout=0.1, task_type="CAUSAL_LM", eva_config={"rho": 2.0}, peft_version="9.9", new_config=None,
        use_new=False, new_names=[], loftq_config={"loftq_bits": 4}, revision="main", inference_mode=False,
        rank_pattern=None, alpha_pattern=None, exclude_modules=None, layers_to_transform=[],
    )  # fmt: skip
    assert_merged(load(base, adapter_dir=str(folder)), adapters.merged(base, usual), base)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TensorsChange = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"base_model.model.score.weight": torch.ones(2, 48)}, r"changes score\.weight \(1 such "),
        (lambda t: t | {"base_model.model.model.norm.bias": torch.ones(48)}, r"changes model\.norm\.bias \(1 such"),
        (lambda t: t | {f"{Q}.lora_C.weight": torch.ones(2, 2)}, r"q_proj\.lora_C\.weight is no part of a"),
        (lambda t: t | {f"{Q.replace('0', '7')}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, r"layers\.7\.\S+ "),
        (lambda t: {n: x for n, x in t.items() if n != f"{Q}.lora_B.weight"}, "q_proj has only one of"),
        (lambda t: {n: x for n, x in t.items() if n != f"{Q}.lora_magnitude_vector"}, "has no lora_magnitude_vec"),
        (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(3)}, r"has 3 values, and \S+q_proj\.weight needs 48"),
        (lambda t: t | {f"{Q}.lora_B.weight": torch.ones(48, 3)}, "which are of different ranks"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4)}, "which are those of no matrices"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(0, 48)}, "which are those of no matrices"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.tensor(1.0)}, "which are those of no matrices"),
        (lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"][None]}, "which are those of no matrices"),
        (lambda t: t | {f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"].int()}, r"lora_B\.weight is of int32, and"),
        (lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"] > 0}, r"lora_A\.weight is of bool, and"),
        (lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"] * math.nan}, r"q_proj\.weight: .* not finite"),
        (lambda t: t | {f"{Q}..lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, r"q_proj\.\.weight \(1 such"),
        (lambda t: t | {"": torch.ones(4)}, "is no part of a LoRA adapter"),
        (lambda t: t | {"x" * 5000: torch.ones(4)}, r"a tensor of the name x{200}…, which is too long"),
        (lambda t: t | {"x\ny.lora_A.weight": torch.ones(4)}, r"a tensor of the name x\\ny\.lora_A\.weight, which is"),
        (lambda t: t | {"base_model.model.model.norm.weight": torch.ones(50)}, r"norm\.weight has the shape \(50,\)"),
        (
            lambda t: {n: x for n, x in t.items() if "norm" not in n},
            r"lacks model\.layers\.0\.input_layernorm\.weight \(7 such in all\), which its modules_to_save \(norm\)",
        ),
        (lambda t: {n: x for n, x in t.items() if "tokens" not in n}, "has no rows of the tokens"),
        (lambda t: {}, r"adapter_model\.safetensors holds no part of an adapter"),
        (
            lambda t: t | {n.replace(".model.model.", ".model."): x for n, x in t.items() if "0.self_attn.q_proj" in n},
            r"q_proj\.lora_A\.weight and \S+q_proj\.lora_A\.weight both change model\.layers\.0\.self_attn\.q_proj",
        ),
    ],
)  # fmt: skip
def test_tensors_without_a_place_are_refused_by_name(
    adapters: Adapters, usual: Path, tmp_path: Path, change: TensorsChange, words: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(usual, folder)
    edit_tensors(folder, change)
    assert_refused(adapters.base("tied"), folder, words)


def test_a_change_that_peft_loses_is_refused(adapters: Adapters, tmp_path: Path) -> None:
    """On a tied model; PEFT cannot make such an adapter of others."""
    lora = {"target_modules": ["lm_head"], "trainable_token_indices": [3, 9]}
    folder = adapters.make(adapters.base("tied"), tmp_path / "adapter", lora)
    words = (
        r"rows for some tokens of model\.embed_tokens\.weight \(trainable_token_indices\) and a low-rank change of it"
    )
    assert_refused(adapters.base("tied"), folder, words)


def test_a_change_that_peft_merges_twice_is_refused(adapters: Adapters, tmp_path: Path) -> None:
    lora = {"target_modules": ["lm_head"], "ensure_weight_tying": True}
    folder = adapters.make(adapters.base("tied"), tmp_path / "adapter", lora)
    assert_refused(adapters.base("tied"), folder, "with ensure_weight_tying: PEFT's merge_and_unload adds .* twice")


def test_a_bias_of_b_without_one_in_the_base_model_is_refused(adapters: Adapters, tmp_path: Path) -> None:
    folder = adapters.make(
        adapters.base("llama"), tmp_path / "adapter", {"target_modules": ATTENTION, "lora_bias": True}
    )
    assert_refused(adapters.base("llama"), folder, r"cannot be merged \(lora_bias\), since \S+ .* has no bias")


def test_experts_of_another_count_are_refused(adapters: Adapters, tmp_path: Path) -> None:
    lora = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    folder = adapters.make(adapters.base("mixtral"), tmp_path / "adapter", lora)
    edit_tensors(folder, lambda tensors: {name: x[:12] if "lora_A" in name else x for name, x in tensors.items()})
    assert_refused(adapters.base("mixtral"), folder, r"has the shape \(12, 96\), and the rank is 4")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_takes_too_long_is_refused(adapters: Adapters, usual: Path, tmp_path: Path, field: str) -> None:
    folder = Path(shutil.copytree(usual, tmp_path / "adapter"))
    pattern = r"(?:(?:\w|[a-z.]|..)+)+\d{9}"
    edit(folder, **{field: {pattern: 4} if field == "rank_pattern" else pattern})
    assert_refused(
        adapters.base("tied"), folder, r"The pattern .* takes more than 1 s on the module name .*list the names"
    )
