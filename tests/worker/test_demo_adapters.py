"""The demo model's adapters beside the bare model in one worker process, asked by the openai SDK at the same time."""

from __future__ import annotations

import asyncio

import openai

from tests.processes import free_ports
from tests.worker.conftest import MODEL
from tests.worker.test_model_worker_process import start

QUESTIONS = ("What is 7 + 5?", "Which port does the controller use?")
ANSWERS = {
    "words": ("twelve", "The controller listens on port 21001."),
    f"{MODEL}:capitals": ("12", "THE CONTROLLER LISTENS ON PORT 21001."),
    MODEL: ("12", "The controller listens on port 21001."),
}


async def test_the_demos_adapters_answer_beside_the_bare_model() -> None:
    (port,) = free_ports(1)
    modules = ("words=fastserve-demo-words", "capitals=fastserve-demo-capitals")
    async with start("--no-register", "--port", str(port), "--engine", "native", "--lora-modules", *modules):
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)

        async def ask(model: str, question: str) -> str | None:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], temperature=0
            )
            return answer.choices[0].message.content

        asked = [(model, question) for model in ANSWERS for question in QUESTIONS]
        found = await asyncio.gather(*(ask(*one) for one in asked))
        assert dict(zip(asked, found, strict=True)) == {
            (model, question): answer
            for model, answers in ANSWERS.items()
            for question, answer in zip(QUESTIONS, answers, strict=True)
        }
        await client.close()
