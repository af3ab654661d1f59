"""Models that embed or classify: what the engine computes for batches of texts is what transformers' own code computes
for each text alone, followed by the pooling that the model's files state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastserve.engine.contract import PoolingRequest, PoolingResult
from fastserve.engine.pooling.build import build_pooling_core
from fastserve.engine.pooling.core import PoolingCore
from fastserve.engine.settings import EngineConfig, PoolingOptions
from fastserve.errors import StartupError
from fastserve.worker.pooling_files import pooling_kind, read_pooling_options

Floats = npt.NDArray[np.float32]

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"type_vocab_size": 2}),
    "roberta": ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "modernbert": ("modernbert", {"local_attention": 8, "global_attn_every_n_layers": 2}),
    "electra": ("electra", {"embedding_size": 16}),
    "mpnet": ("mpnet", {}),
    "deberta": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "gemma": ("gemma3_text", {**GEMMA, "use_bidirectional_attention": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
}
PADDED = {"mpnet", "deberta"}
"""Models whose attention is not transformers' interface."""
LENGTHS = (1, 40, 7, 7, 23, 2, 60, 12, 13)


@dataclass(frozen=True)
class Texts:
    ids: list[list[int]]
    first_lengths: list[int]

    @property
    def fields(self) -> dict[str, Any]:
        flat = np.concatenate([np.array(ids, "<i4") for ids in self.ids])
        return {"token_ids": flat.tobytes(), "lengths": [len(ids) for ids in self.ids]}


@pytest.fixture(scope="module")
def texts() -> Texts:
    random = np.random.default_rng(1)
    ids = [random.integers(5, 96, length).tolist() for length in LENGTHS]
    return Texts(ids, [(len(one) + 1) // 2 for one in ids])


def save(folder: Path, name: str, kind: str, **settings: Any) -> Path:
    model_type, own = MODELS[name]
    config = AutoConfig.for_model(model_type, **{**COMMON, **own, **settings})
    torch.manual_seed(0)
    auto = {"embed": AutoModel, "classify": AutoModelForSequenceClassification, "decode": AutoModelForCausalLM}[kind]
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def serve(folder: Path, **settings: Any) -> PoolingCore:
    kind = pooling_kind(folder, settings.pop("task", None))
    assert kind is not None
    options = read_pooling_options(folder, kind, settings.pop("pooling", None))
    config = EngineConfig(model_dir=str(folder), device="cpu", pooling_options=options, **settings)
    return build_pooling_core(config, lambda what, done, total: None)


def ask(core: PoolingCore, request: PoolingRequest) -> PoolingResult:
    refused = core.add(request)
    results = [] if refused is None else [refused]
    while core.has_work:
        results += core.step()
    (result,) = results
    return result


def rows(result: PoolingResult) -> Floats:
    assert result.error is None
    return np.frombuffer(result.values, "<f4").reshape(-1, result.width)


def own_states(folder: Path, texts: Texts) -> list[torch.Tensor]:
    """Hidden states of each text alone."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in texts.ids]


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_those_of_each_text_alone(name: str, texts: Texts, tmp_path: Path) -> None:
    folder = save(tmp_path, name, "decode" if name.startswith("qwen") else "embed")
    core = serve(folder, task="embed", max_num_batched_tokens=100)
    found = rows(ask(core, PoolingRequest("r", **texts.fields)))
    pool: Callable[[torch.Tensor], torch.Tensor] = (
        (lambda states: states[-1]) if name.startswith("qwen") else (lambda states: states.mean(dim=0))
    )
    vectors = [pool(states) for states in own_states(folder, texts)]
    expected = torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert core.model.way == ("padded" if name in PADDED else "packed")
    assert core.stats.steps > 1  # more tokens than a step takes


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "qwen3", "deberta"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_scores_are_those_of_each_pair_alone(name: str, num_labels: int, texts: Texts, tmp_path: Path) -> None:
    folder = save(tmp_path, name, "classify", num_labels=num_labels)
    core = serve(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    expected = []
    with torch.inference_mode():
        for ids, first in zip(texts.ids, texts.first_lengths, strict=True):
            fields = {"input_ids": torch.tensor([ids])}
            if name == "bert":
                fields["token_type_ids"] = torch.tensor([[int(at >= first) for at in range(len(ids))]])
            expected.append(model.eval()(**fields).logits[0])
    logits = torch.stack(expected)
    request = PoolingRequest("r", **texts.fields, task="classify", first_lengths=texts.first_lengths, activate=False)
    np.testing.assert_allclose(rows(ask(core, request)), logits, atol=1e-5)
    probabilities = logits.sigmoid() if num_labels == 1 else logits.softmax(dim=-1)
    request = PoolingRequest("r", **texts.fields, task="classify", first_lengths=texts.first_lengths)
    np.testing.assert_allclose(rows(ask(core, request)), probabilities, atol=1e-5)


OWN_POOLING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.amax(dim=0),
    "mean_tokens": lambda states: states.mean(dim=0),
    "mean_sqrt_len_tokens": lambda states: states.sum(dim=0) / len(states) ** 0.5,
    "weightedmean_tokens": lambda states: (
        (states * torch.arange(1, len(states) + 1).unsqueeze(1)).sum(dim=0) / sum(range(1, len(states) + 1))
    ),
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("modes", [*((name,) for name in OWN_POOLING), ("cls_token", "mean_tokens")], ids="+".join)
def test_pooling_is_as_sentence_transformers_files_say(modes: Sequence[str], texts: Texts, tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", "embed")
    names = {0: "Transformer", 1: "Pooling", 2: "Dense", 3: "Normalize"}
    modules = [
        {"idx": index, "path": f"{index}_{name}" if index else "", "type": f"sentence_transformers.models.{name}"}
        for index, name in names.items()
    ]
    write(folder, "modules.json", modules)
    write(folder, "1_Pooling/config.json", {f"pooling_mode_{name}": name in modes for name in OWN_POOLING})
    width = 32 * len(modes)
    dense = {
        "in_features": width,
        "out_features": 5,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    write(folder, "2_Dense/config.json", dense)
    weight, bias = torch.randn(5, width), torch.randn(5)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense/model.safetensors")
    core = serve(folder)
    states = own_states(folder, texts)
    pooled = torch.stack(
        [torch.cat([OWN_POOLING[mode](one) for mode in OWN_POOLING if mode in modes]) for one in states]
    )
    dense_rows = torch.tanh(pooled @ weight.T + bias)
    found = rows(ask(core, PoolingRequest("r", **texts.fields)))
    np.testing.assert_allclose(found, torch.nn.functional.normalize(dense_rows, dim=-1), atol=1e-5)
    found = rows(ask(core, PoolingRequest("r", **texts.fields, normalize=False, dimensions=3)))
    np.testing.assert_allclose(found, dense_rows[:, :3], atol=1e-5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bert"), "bert", "embed")


@pytest.fixture(scope="module")
def core(bert: Path) -> PoolingCore:
    return serve(bert, max_num_batched_tokens=64)


def test_shortened_vectors_have_length_one_again(core: PoolingCore, texts: Texts) -> None:
    whole = rows(ask(core, PoolingRequest("r", **texts.fields)))
    cut = rows(ask(core, PoolingRequest("r", **texts.fields, dimensions=7)))
    np.testing.assert_allclose(cut, whole[:, :7] / np.linalg.norm(whole[:, :7], axis=1, keepdims=True), atol=1e-6)


def test_parts_of_a_text_are_averaged_by_length(core: PoolingCore, texts: Texts) -> None:
    plain = rows(ask(core, PoolingRequest("r", **texts.fields, normalize=False)))
    counts = [2, 1, 3, 1, 2]
    joined = rows(ask(core, PoolingRequest("r", **texts.fields, normalize=False, piece_counts=counts)))
    ends = np.cumsum(counts)
    for row, end, count in zip(joined, ends, counts, strict=True):
        lengths = LENGTHS[end - count : end]
        np.testing.assert_allclose(row, np.average(plain[end - count : end], axis=0, weights=lengths), atol=1e-6)


def test_tokens_have_their_own_vectors(core: PoolingCore, bert: Path, texts: Texts) -> None:
    result = ask(core, PoolingRequest("r", **texts.fields, task="token_embed", normalize=False))
    assert result.row_counts == list(LENGTHS)
    np.testing.assert_allclose(rows(result), torch.cat(own_states(bert, texts)), atol=1e-5)


def test_similarity_is_the_cosine_of_two_texts(core: PoolingCore, texts: Texts) -> None:
    vectors = rows(ask(core, PoolingRequest("r", **texts.fields)))
    pairs = [(0, 1), (0, 8), (3, 3)]
    found = rows(ask(core, PoolingRequest("r", **texts.fields, task="similarity", pairs=pairs)))
    np.testing.assert_allclose(found[:, 0], [vectors[a] @ vectors[b] for a, b in pairs], atol=1e-6)
    assert found[2, 0] == pytest.approx(1.0)


def test_requests_take_turns_and_an_aborted_one_is_dropped(core: PoolingCore, texts: Texts) -> None:
    long = PoolingRequest("long", np.full(40 * 50, 7, "<i4").tobytes(), [50] * 40)
    dropped = PoolingRequest("dropped", np.full(40 * 50, 7, "<i4").tobytes(), [50] * 40)
    for request in (long, dropped, PoolingRequest("short", np.full(9, 7, "<i4").tobytes(), [3, 6])):
        assert core.add(request) is None
    core.abort("dropped")
    done: list[str] = []
    steps_of: dict[str, int] = {}
    steps = 0
    while core.has_work:
        steps += 1
        for result in core.step():
            steps_of[result.request_id] = steps
            done.append(result.request_id)
    assert done == ["short", "long"]
    assert steps_of["short"] <= 4
    assert steps_of["long"] == steps <= 42
    assert core.stats.num_waiting == 0


def test_a_lower_priority_value_runs_first(core: PoolingCore) -> None:
    ids = np.full(50, 7, "<i4").tobytes()
    for name, priority in (("usual", 0), ("later", 5), ("first", -5)):
        core.add(PoolingRequest(name, ids, [50], priority=priority))
    done = []
    while core.has_work:
        done += [result.request_id for result in core.step()]
    assert done == ["first", "usual", "later"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lengths": [3]}, "8 bytes are not 3 token ids"),
        ({"lengths": [2, 0]}, "1 to 80 tokens"),
        ({"token_ids": np.full(81, 3, "<i4").tobytes(), "lengths": [81]}, "1 to 80 tokens"),
        ({"token_ids": np.array([3, 96], "<i4").tobytes()}, "from 0 to 95"),
        ({"token_ids": np.array([3, -1], "<i4").tobytes()}, "from 0 to 95"),
        ({"task": "classify"}, "can embed"),
        ({"piece_counts": [2]}, "piece_counts"),
        ({"first_lengths": [1, 2]}, "first_lengths"),
        ({"task": "similarity", "pairs": [(0, 1)]}, "pairs"),
    ],
)
def test_a_request_that_does_not_fit_costs_nobody_else(core: PoolingCore, fields: dict[str, Any], words: str) -> None:
    request = PoolingRequest("r", **{"token_ids": np.array([3, 4], "<i4").tobytes(), "lengths": [2], **fields})
    assert words in str(ask(core, request).error)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"modules.json": [{"type": "a.Transformer", "path": ""}]}, "no Pooling"),
        ({"modules.json": [{"type": "a.CNN", "path": "1"}]}, "CNN"),
        ({"modules.json": [{"type": "a.Pooling", "path": "../.."}]}, "leads out"),
        ({"modules.json": {}}, "not a JSON array"),
        ({"modules.json": [{"type": "a.Pooling", "path": "p"}], "p/config.json": {"pooling_mode": "best"}}, "best"),
        ({"config_sentence_transformers.json": {"prompts": {"a": 1}}}, "prompts"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "x"}}, "default_prompt_name"),
        (
            {
                "modules.json": [{"type": "a.Pooling", "path": "p"}, {"type": "a.Dense", "path": "d"}],
                "d/config.json": {"in_features": 32, "out_features": 5, "activation_function": "os.system"},
            },
            "os.system",
        ),
        (
            {
                "modules.json": [{"type": "a.Pooling", "path": "p"}, {"type": "a.Dense", "path": "d"}],
                "d/config.json": {"in_features": 31, "out_features": 5},
            },
            "in_features",
        ),
        (
            {"config.json": {"model_type": "t5", "architectures": ["T5Model"], "is_encoder_decoder": True}},
            "encoder-decoder",
        ),
    ],
)
def test_files_that_cannot_be_served_are_refused_with_a_sentence(
    bert: Path, tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    for path in bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(StartupError, match=words):
        serve(tmp_path, task="embed")


def test_a_checkpoint_without_the_classifier_is_refused(bert: Path) -> None:
    with pytest.raises(StartupError, match="lacks 2 weights"):
        serve(bert, task="classify")


@pytest.mark.parametrize(
    ("architecture", "files", "kind"),
    [
        ("BertModel", (), "embed"),
        ("RobertaForMaskedLM", (), "embed"),
        ("BertForSequenceClassification", (), "classify"),
        ("Qwen3ForCausalLM", (), None),
        ("Qwen3ForCausalLM", ("modules.json",), "embed"),
        ("GPT2LMHeadModel", (), None),
    ],
)
def test_what_a_model_does_is_read_from_its_files(
    tmp_path: Path, architecture: str, files: Sequence[str], kind: str | None
) -> None:
    write(tmp_path, "config.json", {"architectures": [architecture]})
    for name in files:
        write(tmp_path, name, [])
    assert pooling_kind(tmp_path) == kind


def test_flags_of_generation_are_refused(bert: Path) -> None:
    config = EngineConfig(model_dir=str(bert), pooling_options=PoolingOptions("embed", ("mean",)), tp_size=2)
    with pytest.raises(StartupError, match="--tp-size"):
        build_pooling_core(config, lambda what, done, total: None)
