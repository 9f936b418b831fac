"""Requests of the OpenAI API, as far as they are understood; what is not understood is refused, not passed over."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

_MOST_TEXT = 1_000_000


class Override(BaseModel):
    """This package's own extra field: how this one request is answered."""

    model_config = ConfigDict(extra="forbid")

    mode: str | None = Field(None, max_length=32)


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class _Common(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(None, max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**31)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    coreinfer: Override | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > 4 or not all(0 < len(text) <= 200 for text in texts):
            raise ValueError("expected at most 4 texts of 1 to 200 characters")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str = Field(max_length=_MOST_TEXT)


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Common):
    """Of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0)


class CompletionRequest(_Common):
    """Of /v1/completions."""

    prompt: str | list[str] = Field(max_length=_MOST_TEXT)
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None
    best_of: int | None = Field(None, ge=1, le=1)
    suffix: Literal[""] | None = None

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, value: str | list[str]) -> str | list[str]:
        if not isinstance(value, str) and len(value) != 1:
            raise ValueError("expected one text; send several requests")
        return value

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class LookupRequest(BaseModel):
    """Of the page."""

    text: str = Field(min_length=1, max_length=_MOST_TEXT)
    k: int = Field(5, ge=1, le=100)
