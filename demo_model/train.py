"""Makes the demo model: `python -m demo_model --out DIR`."""

import argparse
import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo_model.batches import IGNORED, Batch, Drills, Sampler
from demo_model.chat import END, PAD
from demo_model.data import COUNT_DRILLS, SEED, SUM_DRILLS
from demo_model.evaluate import load, scores
from demo_model.tokenizer import CONTEXT_LENGTH, save_tokenizer, train_tokenizer

WARMUP_STEPS = 100
BATCH_TOKENS, BATCHES_PER_STEP = 2048, 2
FINAL_LR_SHARE = 0.02
SAVE_EVERY_STEPS = 550


@dataclass(frozen=True)
class Phase:
    """One learning rate schedule (warm-up and cosine) with new optimisers and data, from the weights of the previous
    phase."""

    seed: int
    num_steps: int
    learning_rate: float
    drills: Drills = ()


PHASES = (
    Phase(SEED, 2200, 3e-3),
    Phase(SEED + 1, 700, 1.5e-3, COUNT_DRILLS),
    Phase(SEED + 2, 800, 1.5e-3, SUM_DRILLS),
    Phase(SEED + 3, 500, 1e-3, (*COUNT_DRILLS, *SUM_DRILLS)),
)


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Sizes are multiples of 128, and the number of heads of four, as quantisation and tensor parallelism require."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


class Optimizers:
    """Muon for the matrices inside the layers, which learn faster with it, and AdamW for the rest."""

    def __init__(self, model: LlamaForCausalLM, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        ids = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in ids]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        ]

    def step(self, lr_share: float) -> None:
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self._learning_rate * lr_share
            part.step()
            part.zero_grad()


def lr_share(step: int, num_steps: int) -> float:
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Summed loss of the assistant's tokens. Logits are computed only for these."""
    hidden = model.model(
        input_ids=batch.tokens, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    scored = batch.labels != IGNORED
    logits = functional.linear(hidden[scored], cast(nn.Linear, model.lm_head).weight)
    return functional.cross_entropy(logits.float(), batch.labels[scored], reduction="sum")


def learn(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """Accumulates the gradient of the batches' mean loss, batch by batch, since small ones stay in the CPU's cache."""
    num_scored = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch) / num_scored
        loss.backward()
        total += loss.item()
    return total


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Replace the folder's files one by one by renaming, so that a reader never sees a partial file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary)
        save_tokenizer(tokenizer, made)
        copy = LlamaForCausalLM(model.config)
        copy.load_state_dict(model.state_dict())
        copy.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=tokenizer.token_to_id(END), pad_token_id=tokenizer.token_to_id(PAD)
        )
        copy.to(torch.bfloat16).save_pretrained(made)
        for file in sorted(made.iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def train(out: Path, first_phase: int) -> None:
    started = time.monotonic()
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary of {tokenizer.get_vocab_size()}", flush=True)
    for number, phase in enumerate(PHASES[first_phase:], start=first_phase):
        if number > 0:
            model, _ = load(str(phase_folder(out, number - 1)))
            model.train()
        folder = phase_folder(out, number)
        for step, loss in enumerate(run_phase(model, tokenizer, phase), start=1):
            if step % 50 == 0:
                seconds = time.monotonic() - started
                print(f"phase {number}, step {step}/{phase.num_steps}: loss {loss:.4f}, {seconds:.0f} s", flush=True)
            if step % SAVE_EVERY_STEPS == 0 or step == phase.num_steps:
                save_model(model, tokenizer, folder)
                report(folder, quick=step < phase.num_steps)
    drilled = [phase_folder(out, number) for number, phase in enumerate(PHASES) if phase.drills]
    save_model(mean_of([load(str(folder))[0] for folder in drilled]), tokenizer, out / "model")
    report(out / "model", quick=False)


def phase_folder(out: Path, number: int) -> Path:
    return out / f"phase-{number}"


def mean_of(models: list[LlamaForCausalLM]) -> LlamaForCausalLM:
    """The mean of the weights of phases with different drills, which makes fewer errors than each of them."""
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    models[0].load_state_dict(mean)
    return models[0]


def report(folder: Path, quick: bool) -> None:
    print(json.dumps(scores(*load(str(folder)), quick=quick)), flush=True)


def run_phase(model: LlamaForCausalLM, tokenizer: Tokenizer, phase: Phase) -> Iterator[float]:
    """Yields the mean loss of the last steps after each step."""
    sampler = Sampler(tokenizer, phase.seed, phase.drills)
    optimizers = Optimizers(model, phase.learning_rate)
    losses: deque[float] = deque(maxlen=50)
    for step in range(phase.num_steps):
        losses.append(learn(model, [sampler.batch(BATCH_TOKENS) for _ in range(BATCHES_PER_STEP)]))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(lr_share(step, phase.num_steps))
        yield sum(losses) / len(losses)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="gets a folder for each phase, and the folder model")
    parser.add_argument("--first-phase", type=int, default=0, help="above 0: goes on from the phases in --out")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    train(args.out, args.first_phase)
