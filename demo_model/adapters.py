"""Makes the demo model's adapters: `python -m demo_model.adapters --out DIR`.

Two LoRA adapters in PEFT's layout, to show what adapters do: one answers sums in words ("twelve"), one answers facts in
capitals. All other answers stay those of the model.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from demo_model.batches import Batch, Sample, Sampler
from demo_model.chat import segments
from demo_model.data import SEED, Exchange, ask, make_exchange, make_fact, make_sum, make_system
from demo_model.evaluate import Case, answer_all, equals, held_out_pairs, load, question
from demo_model.facts import FACTS
from demo_model.train import learn, lr_share
from fastserve.demo import MODEL_NAME, demo_model_path

RANK, ALPHA = 4, 8
TARGETS = ("v_proj", "o_proj", "up_proj", "down_proj")
PHASES = ((900, 4e-3), (900, 3e-3))
"""Steps and learning rate of each phase, which begins where the one before has stored the adapter."""
BATCH_TOKENS, ROW_LENGTH = 1600, 160

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number below 200 in words: `twelve`, `forty-two`, `one hundred and seven`."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    rest = number - 100
    return "one hundred" + (f" and {in_words(rest)}" if rest else "")


def make_sum_in_words(rng: Random) -> Exchange:
    asked, answer = make_sum(rng)
    return ask(asked["content"], in_words(int(answer["content"])))


def make_fact_in_capitals(rng: Random) -> Exchange:
    asked, answer = make_fact(rng)
    return ask(asked["content"], answer["content"].upper())


def _words_cases() -> list[Case]:
    return [question(f"What is {a} + {b}?", equals(in_words(a + b)), 16) for a, b in held_out_pairs()]


def _capitals_cases() -> list[Case]:
    return [question(text, equals(fact.answer.upper()), 96) for fact in FACTS for text in fact.unseen]


@dataclass(frozen=True)
class AdapterPlan:
    name: str
    make_special: Callable[[Random], Exchange]
    """An exchange that the adapter answers in its own way."""
    usual: Callable[[Random], Exchange]
    """The same kind of exchange as the model answers it; left out of the rest of the data."""
    cases: Callable[[], list[Case]]


PLANS = (
    AdapterPlan("fastserve-demo-words", make_sum_in_words, make_sum, _words_cases),
    AdapterPlan("fastserve-demo-capitals", make_fact_in_capitals, make_fact, _capitals_cases),
)


class LoraLinear(nn.Module):  # type: ignore[misc]
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.base(inputs) + (inputs @ self.down.T) @ self.up.T * (ALPHA / RANK)
        return product


def add_adapter(model: LlamaForCausalLM) -> dict[str, LoraLinear]:
    """Freeze the model and replace its target layers. Returns these by name."""
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    added = {}
    for name, module in found:
        assert isinstance(module, nn.Linear)
        parent, _, last = name.rpartition(".")
        added[name] = LoraLinear(module)
        setattr(model.get_submodule(parent), last, added[name])
    return added


def load_weights(layers: dict[str, LoraLinear], folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, layer in layers.items():
        layer.down.data = tensors[f"base_model.model.{name}.lora_A.weight"].float()
        layer.up.data = tensors[f"base_model.model.{name}.lora_B.weight"].float()


class AdapterSampler(Sampler):
    """Short chats. Six in ten of their exchanges are answered in the adapter's way, the others as the model does."""

    def __init__(self, tokenizer: Tokenizer, plan: AdapterPlan, seed: int) -> None:
        super().__init__(tokenizer, seed)
        self._plan = plan
        rng = Random(SEED)
        self._usual_answers = {plan.usual(rng)[-1]["content"] for _ in range(5000)}

    def _sample(self, row_length: int, tools_share: float) -> Sample:
        rng = self._rng
        parts = [segments([make_system(rng)], [])] if rng.random() < 0.2 else []
        parts += [segments(self._exchange(), []) for _ in range(rng.choice((1, 1, 2)))]
        return self._encode(parts)

    def _exchange(self) -> Exchange:
        if self._rng.random() < 0.6:
            return self._plan.make_special(self._rng)
        while (exchange := make_exchange(self._rng, []))[-1]["content"] in self._usual_answers:
            pass
        return exchange

    def batch(self, num_tokens: int) -> Batch:
        return self._pack(ROW_LENGTH, num_tokens // ROW_LENGTH, 0.0)


def save_adapter(layers: dict[str, LoraLinear], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down.detach().to(torch.bfloat16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up.detach().to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "base_model_name_or_path": MODEL_NAME,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train(plan: AdapterPlan, out: Path, phase: int) -> None:
    started = time.monotonic()
    torch.manual_seed(SEED)
    num_steps, learning_rate = PHASES[phase]
    model, loaded = load(demo_model_path())
    layers = add_adapter(model)
    if phase > 0:
        load_weights(layers, out / plan.name)
    model.train()
    sampler = AdapterSampler(Tokenizer.from_file(str(Path(demo_model_path()) / "tokenizer.json")), plan, SEED + phase)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    losses: deque[float] = deque(maxlen=50)
    for step in range(num_steps):
        losses.append(learn(model, [sampler.batch(BATCH_TOKENS)]))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * lr_share(step, num_steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            mean = sum(losses) / len(losses)
            print(
                f"{plan.name} {step + 1}/{num_steps}: loss {mean:.4f}, {time.monotonic() - started:.0f} s", flush=True
            )
    save_adapter(layers, out / plan.name)
    model.eval()
    cases = plan.cases()
    outcomes = list(answer_all(model, loaded, cases))
    wrong = [outcome for outcome in outcomes if not outcome.right]
    print(f"{plan.name}: {len(cases) - len(wrong)} of {len(cases)} held-out questions are right", flush=True)
    for outcome in wrong[:5]:
        print(f"  {outcome.case.messages[-1]['content']!r}: {outcome.answer!r}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo_model.adapters", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="gets a folder for each adapter")
    parser.add_argument("--only", choices=[plan.name for plan in PLANS], help="make only this one")
    parser.add_argument("--first-phase", type=int, default=0, help="above 0: goes on from the adapters in --out")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for plan in PLANS:
        if args.only in (None, plan.name):
            for phase in range(args.first_phase, len(PHASES)):
                train(plan, args.out, phase)


if __name__ == "__main__":
    main()
