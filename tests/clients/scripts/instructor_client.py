"""instructor: tools, JSON and JSON schema modes, partial and iterable answers."""

from __future__ import annotations

import os

import instructor
import openai
from pydantic import BaseModel

MODEL = "fastserve-demo"


class Person(BaseModel):
    name: str
    age: int


ASKED = [{"role": "user", "content": "Give me a JSON object with name Anna and age 30."}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON):
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{os.environ['FASTSERVE_URL']}/v1", api_key="none", max_retries=0), mode=mode
    )
    settings = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 200}
    made = client.chat.completions.create(response_model=Person, max_retries=0, **settings)
    assert isinstance(made, Person), made
    *_, last = client.chat.completions.create_partial(response_model=Person, **settings)
    assert (last.name, last.age) == (made.name, made.age), mode
