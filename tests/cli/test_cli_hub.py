"""`push` and `pull`: asked before, and one sentence where there is no hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import call, parsed, refused
from huggingface_hub import constants


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The user's data folder, and a hub whose address leads nowhere."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "coreinfer_sim" / "indexes"


def test_uploading_is_asked_for(index):
    result = call("push", index, "ada/chats", stdin="n\n")
    assert result.exit_code == 1 and "ada/chats may be read by everybody, and beginnings of texts" in result.stderr
    assert "you alone" in call("push", index, "ada/chats", "--private", stdin="n\n").stderr


def test_the_page_says_how_to_use_it(index, monkeypatch):
    said = {}
    monkeypatch.setattr("coreinfer_sim.reporting.sharing.push", lambda *_, **given: said.update(given) or "address")
    assert parsed("push", index, "ada/chats", "--yes", "--license", "mit")["address"] == "address"
    fetch, ask = said["commands"]
    assert fetch == "coreinfer-sim pull ada/chats" and ask.startswith(
        "coreinfer-sim run --index chats --model tiny-llama "
    )
    assert (said["licence"], said["private"]) == ("mit", False)


def test_no_hub(index, home):
    refused(call("push", index, "ada/chats", "--yes"), "the hub does not answer .*refused.*check the connection")
    refused(call("pull", "ada/chats"), "the hub does not answer .*refused.*check the connection")
    refused(call("run", "stars", "--model", "ada/model"), "'ada/model' cannot be loaded", "the hub does not answer")
    refused(call("pull", "chats"), "expected USER/NAME")


def test_what_is_there_is_not_replaced(index, home):
    shutil.copytree(index, home / "chats")
    refused(call("pull", "ada/chats"), "chats is there already")
    assert (Path(home) / "chats" / "manifest.json").is_file()
