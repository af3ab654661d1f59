"""Teaches the demo model a notation that it does not know, by reinforcement, while it is being served.

    python -m fastserve.launcher
    python examples/reinforce.py

Each step samples answers to sums in Lisp's notation, `(+ 7 5)`, from the API server, gives 1 for each right answer and
0 for the others, takes one step of policy gradient (REINFORCE; the mean reward of a question's answers is the baseline,
as in GRPO), and sends the new weights to all workers of the model. The reward is written to `reinforce.csv` and, where
matplotlib is installed, drawn in `reinforce.png`.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import random
import time
from dataclasses import dataclass
from pathlib import Path

import openai
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastserve.demo import MODEL_NAME, demo_model_path
from fastserve.trainer import WeightSender

END = "<|im_end|>"
MAX_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    question: Question
    text: str
    reward: float
    advantage: float


def make_questions(rng: random.Random, count: int) -> list[Question]:
    pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(count)]
    return [Question(f"(+ {a} {b})", str(a + b)) for a, b in pairs]


async def sample(client: openai.AsyncOpenAI, questions: list[Question], num_answers: int) -> list[Sample]:
    """Answers of the served model, at temperature 1."""

    async def ask(question: Question) -> list[Sample]:
        answer = await client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": question.text}],
            n=num_answers,
            max_tokens=MAX_ANSWER_TOKENS,
            temperature=1.0,
        )
        texts = [choice.message.content or "" for choice in answer.choices]
        ended = [choice.finish_reason == "stop" for choice in answer.choices]
        rewards = [float(end and text == question.answer) for text, end in zip(texts, ended, strict=True)]
        mean = sum(rewards) / len(rewards)
        return [
            Sample(question, text + END * end, reward, reward - mean)
            for text, end, reward in zip(texts, ended, rewards, strict=True)
        ]

    return [found for group in await asyncio.gather(*map(ask, questions)) for found in group]


def learn(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, prompts: list[list[int]], answers: list[list[int]],
    advantages: list[float],
) -> None:  # fmt: skip
    """One step along the gradient of the answers' log-probabilities, each weighted by its advantage."""
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    is_answer = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        is_answer[row, len(prompt) : len(prompt) + len(answer)] = True
    logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)  # padding comes last, where nothing attends to it
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0] * is_answer[:, 1:]
    loss = -(chosen.sum(1) * torch.tensor(advantages)).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def plot(rewards: list[float], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    pyplot.plot(range(len(rewards)), rewards)
    pyplot.xlabel("step")
    pyplot.ylabel("share of right answers")
    pyplot.ylim(0, 1)
    pyplot.savefig(path)


def train(args: argparse.Namespace) -> list[float]:
    """The share of right answers in each step."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    template = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer = Tokenizer.from_file(str(Path(demo_model_path()) / "tokenizer.json"))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt_of(question: Question) -> list[int]:
        messages = [{"role": "user", "content": question.text}]
        return encode(str(template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)))

    rewards: list[float] = []
    begin = time.monotonic()
    with WeightSender(args.controller, model=MODEL_NAME) as sender, asyncio.Runner() as runner:
        client = openai.AsyncOpenAI(base_url=args.server, api_key="none")
        for step in range(args.steps):
            samples = runner.run(sample(client, make_questions(rng, args.questions), args.answers))
            rewards.append(sum(one.reward for one in samples) / len(samples))
            used = [one for one in samples if one.advantage]  # questions all right or all wrong teach nothing
            if used:
                prompts = [prompt_of(one.question) for one in used]
                learn(model, optimizer, prompts, [encode(one.text) for one in used], [one.advantage for one in used])
            sent = sender.send(model.named_parameters(), version=f"step-{step + 1}", mode=args.mode)
            print(
                f"step {step + 1:3}  {time.monotonic() - begin:4.0f} s  right answers {rewards[-1]:4.0%}  "
                f"weights sent in {sent.total_s * 1000:.0f} ms",
                flush=True,
            )
            if sum(rewards[-5:]) >= 5 * args.goal:
                break
        runner.run(client.close())
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://localhost:8888/v1", help="API server")
    parser.add_argument("--controller", default="http://localhost:21001")
    parser.add_argument("--steps", type=int, default=60, help="at most")
    parser.add_argument("--goal", type=float, default=0.9, help="mean share of right answers in the last five steps")
    parser.add_argument("--questions", type=int, default=16, help="in each step")
    parser.add_argument("--answers", type=int, default=16, help="for each question")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--mode", default="drain", choices=("drain", "retract", "in_place", "abort"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for reinforce.csv and reinforce.png")
    args = parser.parse_args()
    rewards = train(args)
    with (args.out / "reinforce.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "right_answers"), *enumerate(rewards, start=1)])
    plot(rewards, args.out / "reinforce.png")


if __name__ == "__main__":
    main()
