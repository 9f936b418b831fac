"""Speed is drawn: a bar a contender, and lines over what grows."""

from __future__ import annotations

from itertools import count

from coreinfer_sim.bench.plot import plot, plot_growth

RESULT = {
    "model": "tiny",
    "prompt_tokens": 16,
    "new_tokens": 8,
    "bandwidth_gb_per_s": {"highest": 10.0},
    "contenders": [
        {
            "contender": "sparse:0.4",
            "tokens_per_second": 20.0,
            "tokens_per_second_lowest": 18.0,
            "tokens_per_second_highest": 21.0,
            "bytes_per_token": 4e8,
        },
        {"contender": "offload", "error": "there was no room."},
    ],
}


def test_speed_is_drawn_without_what_failed(tmp_path):
    plot(RESULT, tmp_path / "speed.svg")
    text = (tmp_path / "speed.svg").read_text()
    assert "sparse:0.4, 400 MB a token" in text and "tiny, 16 + 8 tokens" in text and "offload" not in text


def test_growth_is_drawn(tmp_path):
    numbers = count(1)
    lines = {name: [(2**n, float(next(numbers))) for n in range(3)] for name in ("ours", "dense")}
    plot_growth({"prompt tokens": lines, "rows": lines}, "a title", tmp_path / "growth.svg")
    text = (tmp_path / "growth.svg").read_text()
    assert text.startswith("<svg") and all(shown in text for shown in ("prompt tokens", "rows", "ours", "a title"))
