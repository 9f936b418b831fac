"""What a prompt is routed by."""

from __future__ import annotations

from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.prompts import Message, last_user_message


def routing_text(index: SemanticIndex | None, prompt: str | list[Message]) -> str:
    """Return what a prompt is routed by: a text itself, of a conversation the user's last message that is familiar.

    A new topic is familiar to some cluster, and moves the conversation there. "And why?" is familiar to none, and leaves
    it where it was. Where nothing is familiar, the last message counts.

    Raises:
        PromptError: the prompt is empty, or no message is the user's.
    """
    if isinstance(prompt, str):
        return last_user_message([{"role": "user", "content": prompt}])
    said = [m["content"] for m in prompt if m["role"] == "user" and m["content"].strip()]
    if index is not None and len(said) > 1:  # else there is nothing to choose among, and nothing is embedded twice
        for text in reversed(said):
            if index.lookup(text)[0].confident:
                return text
    return last_user_message(prompt)
