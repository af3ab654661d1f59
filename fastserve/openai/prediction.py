"""`prediction`: text that a chat's answer is expected to contain, such as a file that it changes in a few places."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from fastserve.openai.body import invalid
from fastserve.openai.content_parts import texts_of_parts


class Prediction(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    type: Literal["content"]
    """The only kind."""
    content: Any
    """The text, or an array of text parts."""

    def text(self, model: str) -> str:
        """Raises InvalidRequestError, or UnsupportedParameterError for parts that are no text."""
        if isinstance(self.content, str):
            return self.content
        if not isinstance(self.content, list):
            raise invalid("prediction.content", self.content, "Give a string, or an array of text parts.")
        return "".join(texts_of_parts(self.content, "prediction.content", model, kinds=("text",)))
