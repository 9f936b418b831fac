"""Requests of the OpenAI API, as far as they are understood; what is not understood is refused, not passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

_MOST_TEXT = 1_000_000
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "top_k": (0, -1),
    "min_p": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that are not supported, and their values that change nothing."""
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
}
"""What says nothing about the answer."""


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no text, expected whole characters") from error
    return text


Text = Annotated[str, AfterValidator(_sound)]
Whole = Annotated[int, Field(strict=True)]


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
    max_tokens: Whole | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, strict=True)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, strict=True)
    seed: Whole | None = Field(None, ge=0, lt=2**31)
    stop: Text | list[Text] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    coreinfer: Override | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_else(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            known = name in cls.model_fields or name in _WITHOUT_EFFECT
            if not known and value is not None and value not in _NEUTRAL.get(name, ()):
                raise PydanticCustomError("unsupported", "this server does not do that; leave it out", {"field": name})
        return data

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
    text: Text = Field(max_length=_MOST_TEXT)


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Common):
    """Of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: Whole | None = Field(None, ge=1)


class CompletionRequest(_Common):
    """Of /v1/completions."""

    prompt: Text | list[Text] = Field(max_length=_MOST_TEXT)

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

    text: Text = Field(min_length=1, max_length=_MOST_TEXT)
    k: int = Field(5, ge=1, le=100)
