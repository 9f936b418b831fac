"""A conversation is routed by its topic."""

from __future__ import annotations

from tiny_index import PROMPTS

from coreinfer_sim.generation.routing import routing_text


def test_a_conversation_moves_with_its_topic(wide_index):
    def said(*texts):
        return routing_text(wide_index, [{"role": "user", "content": text} for text in texts])

    assert said(PROMPTS[0] + " 1", "zzz qqq 17") == PROMPTS[0] + " 1"
    assert said(PROMPTS[0] + " 1", PROMPTS[1] + " 2") == PROMPTS[1] + " 2"
    assert said("zzz qqq 17") == "zzz qqq 17" and routing_text(wide_index, "text") == "text"
