"""Requests of the OpenAI API: what is honoured, what is refused by name, and what is passed over and listed."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from coreinfer_sim.models.prompts import Message
from coreinfer_sim.serving.errors import InvalidRequestError
from coreinfer_sim.serving.wording import refusal, shown

_MOST_STOPS = 1000
_NO_TOOLS, _NO_FORMAT = "this server calls no tools", "this server writes plain text"
_NO_LOGPROBS, _NO_PENALTY = "this server gives no log-probabilities", "of the penalties there is repetition_penalty"
_ONE_CHOICE = "this server gives one choice"
_REFUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "n": ((1,), "1", _ONE_CHOICE),
    "best_of": ((1,), "1", _ONE_CHOICE),
    "presence_penalty": ((0,), "0", _NO_PENALTY),
    "frequency_penalty": ((0,), "0", _NO_PENALTY),
    "logit_bias": (({}, []), "none", "this server leaves the tokens' chances as they are"),
    "logprobs": ((False,), "false", _NO_LOGPROBS),
    "top_logprobs": ((0,), "0", _NO_LOGPROBS),
    "tools": (([],), "none", _NO_TOOLS),
    "tool_choice": (("none", "auto"), "none or auto", _NO_TOOLS),
    "functions": (([],), "none", _NO_TOOLS),
    "function_call": (("none", "auto"), "none or auto", _NO_TOOLS),
    "response_format": (({"type": "text"},), '{"type": "text"}', _NO_FORMAT),
    "modalities": ((["text"], []), '["text"]', _NO_FORMAT),
    "audio": ((), "none", _NO_FORMAT),
    "echo": ((False,), "false", "this server gives the new text alone"),
    "suffix": (("",), "none", "this server continues a text at its end"),
    "web_search_options": ((), "none", "this server looks nothing up"),
    "continue_final_message": ((False,), "false", "this server begins a new message"),
    "add_generation_prompt": ((True,), "true", "this server begins a new message"),
    "structured_outputs": (({},), "none", _NO_FORMAT),
    **{name: (("", []), "none", _NO_FORMAT) for name in ("grammar", "json_schema")},
    **{f"guided_{name}": (("", []), "none", _NO_FORMAT) for name in ("json", "regex", "choice", "grammar")},
}
"""Fields that would change the answer and are not supported: their values that change nothing, and what is said of others."""
_NOT_READ = {"image": "images", "input_audio": "sound", "audio": "sound", "video": "video", "file": "files"}
"""Beginnings of types of a message's parts, and what they would be read as."""


def _sound(text: Any) -> Any:
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise refusal("half of a surrogate pair is no text, expected whole characters") from error
    return text


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, BeforeValidator(_sound), Field(strict=True)]
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Override(BaseModel):
    """This package's own extra field: how this one request is answered."""

    model_config = ConfigDict(extra="forbid")

    mode: str | None = Field(None, max_length=32)
    neurons: bool | None = Field(None, strict=True)
    """Whether /api/neurons shall know which neurons each token reads."""


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = Field(None, strict=True)


class _Common(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: Text | None = None
    max_tokens: Whole | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, ge=0, le=1)
    top_k: Whole | None = Field(None, ge=-1)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=100)
    seed: Whole | None = None
    stop: list[Text] | None = None
    stream: bool | None = Field(None, strict=True)
    stream_options: StreamOptions | None = None
    coreinfer: Override | None = None
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if name in _REFUSED and name not in cls.model_fields and value is not None:
                neutral, expected, reason = _REFUSED[name]
                if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
                    raise refusal(f"{name} is {shown(value)}, expected {expected}: {reason}", name)
        return data

    @model_validator(mode="wrap")
    @classmethod
    def _list_ignored(cls, data: Any, handler: Any) -> Any:
        request = handler(data)
        request._ignored = [*_unknown(data, cls, (*_REFUSED, "stream_options")), *request.ignored_parts(data)]
        return request

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, value: Any) -> Any:
        if value == "":
            return None
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list):
            if len(texts) > _MOST_STOPS:
                raise refusal(f"stop has {len(texts)} texts, expected at most {_MOST_STOPS}", "stop")
            if "" in texts:
                raise refusal("stop has an empty text, expected texts of a character or more", "stop")
        return texts

    def ignored_parts(self, data: Any) -> list[str]:
        """Return which parts of fields are passed over."""
        options = data.get("stream_options") if isinstance(data, dict) else None
        if options is None or self.stream:
            return _unknown(options, StreamOptions, prefix="stream_options.")
        return ["stream_options"]

    @property
    def ignored(self) -> list[str]:
        """Fields that were passed over, as they say nothing about the tokens or are unknown."""
        return self._ignored

    @property
    def limit(self) -> int | None:
        """The most new tokens that were asked for."""
        return self.max_tokens


def _unknown(data: Any, kind: type[BaseModel], known: tuple[str, ...] = (), prefix: str = "") -> list[str]:
    """Return the names of fields with a value that a kind of object does not have."""
    if not isinstance(data, dict):
        return []
    names = [name for name, value in data.items() if value is not None and name not in kind.model_fields]
    return [prefix + name.encode(errors="replace").decode() for name in names if name not in known]


class ChatMessage(BaseModel):
    """One message of a conversation; its content is a text, or parts that join to one."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text
    name: Text | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_content(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "assistant" and data.get("content") is None:
            return {**data, "content": ""}  # a turn that called a tool
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return "".join(_text_of(part) for part in value)

    @property
    def turn(self) -> Message:
        """The message as a chat template reads it."""
        turn: Message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_calls:
            turn["tool_calls"] = self.tool_calls
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


def _text_of(part: Any) -> str:
    """Return the text of a part of a message's content."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(_sound(part["text"]))
    if kind == "text":
        raise refusal(f"a part's text is {shown(part.get('text'))}, expected a text")
    if isinstance(kind, str):
        unread = next((what for begin, what in _NOT_READ.items() if kind.startswith(begin)), None)
        reason = "" if unread is None else f": this server reads no {unread}"
        raise refusal(f"a part of the content is of type {shown(kind)}, expected text{reason}")
    raise refusal(f'a part of the content is {shown(part)}, expected {{"type": "text", "text": …}}')


class ChatRequest(_Common):
    """Of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """The most new tokens that were asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def subject(self) -> list[Message]:
        """The conversation as a chat template reads it."""
        return [message.turn for message in self.messages]

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Further variables of the chat template."""
        return self.chat_template_kwargs or {}

    def ignored_parts(self, data: Any) -> list[str]:
        """Return which parts of fields are passed over."""
        messages = data["messages"] if isinstance(data, dict) else []
        unknown = [name for each in messages for name in _unknown(each, ChatMessage, prefix="messages.")]
        return [*super().ignored_parts(data), *dict.fromkeys(unknown)]


class CompletionRequest(_Common):
    """Of /v1/completions."""

    prompt: Text
    template_kwargs: ClassVar[dict[str, Any]] = {}

    @property
    def subject(self) -> str:
        """The text to continue."""
        return self.prompt

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            if len(value) != 1:
                raise refusal(f"prompt has {len(value)} texts, expected one: {_ONE_CHOICE}", "prompt")
            return value[0]
        return value


class LookupRequest(BaseModel):
    """Of /api/lookup: a text, or a conversation, of which what routes it is looked up."""

    text: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    k: Whole = Field(5, ge=1, le=100)

    @property
    def subject(self) -> str | list[Message]:
        """The text, or the conversation as a chat template reads it.

        Raises:
            InvalidRequestError: there is none, or both.
        """
        if self.text is not None and self.messages is None:
            return self.text
        if self.messages is not None and self.text is None:
            return [message.turn for message in self.messages]
        raise InvalidRequestError(
            "text is missing, expected it or messages."
            if self.text is None
            else "text is there beside messages, expected one of them."
        )
