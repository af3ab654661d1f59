"""The architectures of transformers in both dtypes, beyond every boundary of their configurations, as
`benchmarks/architectures.py` checks them; and the table that it makes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from benchmarks import architectures
from benchmarks.architectures import BEGIN, COMPOSITES, DOC, END, EXACT, REFUSED, VARIANTS, WRONG, all_names, check
from fastserve.engine.kernels.packed_linear import PackedLinearKernel
from fastserve.engine.layers.fused_attention import FusedAttention
from fastserve.engine.layers.layouts.packed import GroupedWeight
from fastserve.engine.loading.skeleton import auto_class

ROOT = Path(__file__).parents[2]
SERVED = (
    "beam",  # rotary positions in some kinds of layers only
    "bitnet",  # a norm before the output projection
    "gemma3n_text",  # looks token ids up in each layer
    "gemma4_text",
    "gemma4_unified",  # looks up in its mask which image a token is of
    "granitemoehybrid, attention only",  # with sizes of a state that no layer has
    "helium",
    "ministral3",  # scales queries by position
    "mistral3",  # a composite of images and text
    "nanochat",  # norms without a weight
)
NOT_SERVED = {
    "bart": "does not let the engine replace its attention",
    "deepseek_v32": "choose or compress the tokens",
    "lfm2": r"layers \(conv\) keep a state",
    "mamba": "keep a state",
    "musicgen": "encoder-decoder",
    "roberta": "its small twin computes something else",  # its positions begin at 2
}


def has(name: str) -> bool:
    """Whether the installed release of transformers has the architecture."""
    return VARIANTS.get(name, (name,))[0] in CONFIG_MAPPING


@pytest.fixture(autouse=True)
def few_threads_and_no_bars() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", [name for name in SERVED if has(name)])
def test_logprobs_beyond_every_boundary_equal_the_models_own_in_both_dtypes(name: str) -> None:
    row = check(name)
    assert (row.outcome, row.detail) == (EXACT, "")
    assert row.distances.keys() == {"float32", "bfloat16"}


@pytest.mark.skipif(not has("qwen3_vl"), reason="this release of transformers does not have it")
def test_a_language_model_that_has_no_class_of_its_own_has_no_twin(caplog: pytest.LogCaptureFixture) -> None:
    """Positions in three dimensions; the model itself is checked, and the log says in a sentence why no twin is."""
    row = check("qwen3_vl")
    assert (row.outcome, row.detail, row.forward_pass) == (EXACT, "", "modules")
    assert "only the model itself is checked: transformers has no model for Qwen3VLTextConfig alone\n" in caplog.text


@pytest.mark.parametrize("name", [name for name in NOT_SERVED if has(name)])
def test_what_cannot_be_served_is_refused_in_a_sentence(name: str) -> None:
    row = check(name)
    assert row.outcome == REFUSED
    assert re.search(NOT_SERVED[name], row.detail)
    assert "\n" not in row.detail


@pytest.mark.parametrize(
    ("name", "part", "field", "value"),
    [
        ("mistral", None, "sliding_window", architectures.WINDOW + 1),
        ("llama, YaRN", "rope_parameters", "original_max_position_embeddings", 2 * architectures.ORIGINAL_LENGTH),
    ],
)
def test_a_boundary_at_another_place_is_seen(
    name: str, part: str | None, field: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts reach each boundary: with its setting changed in the reference, no answer is exact."""
    own = architectures.own_logprobs

    def changed(folder: str, sequences: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text())
        (config if part is None else config[part])[field] = value
        file.write_text(json.dumps(config))
        return own(folder, sequences, dtype)

    monkeypatch.setattr(architectures, "own_logprobs", changed)
    assert check(name).outcome == WRONG


def test_attention_that_fails_on_test_input_keeps_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FusedAttention, *_: object, **__: object) -> None:
        raise AttributeError("no such attribute")

    monkeypatch.setattr(FusedAttention, "forward", fail)
    row = check("llama")
    assert (row.outcome, row.detail, row.forward_pass) == (EXACT, "", "modules")
    assert "attention" not in row.fused


def test_a_configuration_that_contradicts_the_models_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights must refuse inputs of another width, as torch does, and not read beyond them."""
    contradiction = {"helium of narrow heads": ("helium", {"head_dim": 8})}
    monkeypatch.setattr(architectures, "VARIANTS", contradiction)
    row = check("helium of narrow heads")
    assert row.outcome == REFUSED
    assert "its own code fails on plain tokens" in row.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_refuse_what_does_not_fit_them(dtype: torch.dtype) -> None:
    kernel = PackedLinearKernel.load(dtype, for_codes=True)
    if kernel is None:
        pytest.skip("there are no kernels for this CPU")
    weight = GroupedWeight(kernel.pack(torch.ones(32, 16, dtype=dtype)), 32, 16, kernel)
    assert weight.product(torch.ones(3, 16, dtype=dtype), None).shape == (3, 32)
    for wrong in (torch.ones(3, 8, dtype=dtype), torch.ones(3, 32, dtype=dtype), torch.ones(3, 16, dtype=torch.half)):
        with pytest.raises(RuntimeError, match="cannot be multiplied with a weight for 16"):
            weight.product(wrong, None)
    assert weight.rows(torch.tensor([0, 31])).shape == (2, 16)
    for ids in ([32], [0, -1], [10**12]):
        with pytest.raises(IndexError, match="in a weight of 32 rows"):
            weight.rows(torch.tensor(ids))


def test_parts_of_a_composite_that_cannot_be_built_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder as it is published: weights of all parts, under the composite's names."""
    config = architectures.small_config("gemma3n")
    with pytest.raises(ImportError):
        auto_class(config).from_config(config)
    architectures.save_model(config.get_text_config(decoder=True), tmp_path, 0)
    weights = load_file(tmp_path / "model.safetensors")
    published = {name.replace("model.", "model.language_model.", 1): weight for name, weight in weights.items()}
    save_file(published | {"model.vision_tower.norm.bias": torch.ones(4)}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    row = architectures.Row("gemma3n", EXACT)
    architectures.compare(row, str(tmp_path), "float32")
    assert (row.outcome, row.detail) == (EXACT, "")
    assert "gemma3n is served by its language model alone: TimmWrapperModel requires" in caplog.text


# ---- the table in docs/models.md --------------------------------------------------------------------------------


def rows_of_table() -> dict[str, str]:
    """Outcome of each architecture."""
    text = DOC.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if "|" in line]
    return {name.strip("`"): outcome for name, outcome, *_ in cells[2:]}


def test_the_table_has_every_causal_architecture_of_the_pinned_release() -> None:
    [pinned] = re.findall(
        r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert f"transformers {pinned}, " in DOC.read_text(encoding="utf-8")
    rows = rows_of_table()
    assert not [name for name, outcome in rows.items() if not outcome.startswith((EXACT, f"{REFUSED}: "))]
    if transformers.__version__ != pinned:
        pytest.skip(f"transformers {pinned} is not installed")
    assert sorted(rows) == sorted(all_names())
    assert set(COMPOSITES) < rows.keys()


@pytest.mark.parametrize("name", [name for name in (*SERVED, *NOT_SERVED) if has(name)])
def test_the_table_says_what_these_tests_say(name: str) -> None:
    assert rows_of_table()[name].startswith(EXACT if name in SERVED else REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in all_names() if has(name)])
def test_every_architecture_is_what_the_table_says(name: str) -> None:
    row = check(name)
    expected = rows_of_table()[name]
    assert row.outcome == (EXACT if expected == EXACT else REFUSED), row.detail
