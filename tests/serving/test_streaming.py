"""A streamed text ends before its first stop."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from coreinfer_sim.serving.backends import Completion
from coreinfer_sim.serving.streaming import cut_at_stops


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_text_is_cut_before_the_first_stop(pieces, stops):
    async def events():
        for piece in pieces:
            yield piece
        yield Completion("", 1, 1, True)

    async def run():
        return [event async for event in cut_at_stops(events(), tuple(stops))]

    *texts, last = asyncio.run(run())
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(texts) == whole[: min(places, default=len(whole))] and isinstance(last, Completion)
