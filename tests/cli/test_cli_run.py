"""`coreinfer-sim run`, also where no command is named, and the chat."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from commands import PROCESS, call, parsed, refused, succeeded
from coreinfer_sim_cli.chat import Chat
from coreinfer_sim_cli.main import main

import coreinfer_sim
from coreinfer_sim.base.decode_settings import SamplingConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Profile
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.generation.text import Generator
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import ProfileInfo

ASKED = "How do stars form?"
SHORT = "--max-new-tokens", 8


@pytest.fixture(scope="module")
def generator(index) -> Iterator[Generator]:
    with coreinfer_sim.load(index) as opened:
        yield opened


@pytest.fixture
def tuned(index, tmp_path, monkeypatch) -> Path:
    """A copy of the index with profiles by token, which are faster here."""
    copied = shutil.copytree(index, tmp_path / "tuned")
    balanced = ProfileInfo(1.0, False, 0.03, 1.01, 1.0, 1.02, 60, 12, 0.5, "stored", "float32", 80, 100)
    fast = replace(balanced, max_increase=0.1, ratio=1.06, high=1.09, read_ratio=0.2, total_bytes=50)
    SemanticIndex.load(copied).write_profiles({"balanced": balanced, "fast": fast})
    monkeypatch.setattr(LeanEngine, "is_faster_by_token", lambda layout: layout == "float32")
    return copied


@pytest.fixture
def said(generator, capsys):
    """Give lines to a chat, and return what it wrote to stdout and stderr."""

    def talk(*lines: str, system: str | None = None, raw: bool = False, most: int = 8) -> tuple[list[str], str]:
        sampling = SamplingConfig(max_new_tokens=most)
        Chat(generator, sampling, system, raw=raw, reopen=lambda profile: generator).talk(lines)
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return talk


def test_an_answer(index):
    answer = succeeded("run", ASKED, "--index", index, *SHORT)
    of_chat, raw = (parsed("generate", ASKED, "--index", index, *SHORT, *more)["text"] for more in (["--chat"], []))
    assert answer.stdout == f"{of_chat}\n" and " · 8 tokens at " in answer.stderr
    assert succeeded("run", ASKED, "--index", index, *SHORT, "--raw").stdout == f"{raw}\n" != answer.stdout
    assert parsed("run", ASKED, "--index", index, *SHORT)["text"] == of_chat


def test_it_is_meant_where_no_command_is_named(index):
    given = ASKED, "--index", index, *SHORT
    assert succeeded(*given).stdout == succeeded("run", *given).stdout
    assert succeeded("--index", index, *SHORT, ASKED).stdout == succeeded("run", *given).stdout
    assert succeeded("--index", index, *SHORT, stdin=ASKED).stdout == succeeded("run", *given[1:], stdin=ASKED).stdout
    refused(call("--index", index), "no prompt was given")


def test_one_word_is_a_command(index):
    refused(call("lst"), "no command 'lst'; nearest: list", "coreinfer-sim run lst", code=2)
    refused(call("xyzzy"), "no command 'xyzzy'. A prompt of one word is asked by: coreinfer-sim run xyzzy", code=2)
    assert succeeded("run", "stars", "--index", index, *SHORT).stdout


def test_a_chats_command_that_is_piped_is_a_prompt_and_a_line_says_so(index):
    done = succeeded("run", "--index", index, *SHORT, stdin=f"{ASKED}\n/why\n")
    assert done.stdout.count("> ") == 2
    assert "Note: '/why' is a prompt like any other; commands are of a chat on a terminal.\n" in done.stderr


def test_lines_are_answered_one_by_one(index):
    done = succeeded("run", "--index", index, *SHORT, stdin=f"{ASKED}\n\nWhy does bread rise?\n")
    shown = done.stdout.splitlines()
    assert [line for line in shown if line.startswith("> ")] == [f"> {ASKED}", "> Why does bread rise?"]
    rows = parsed("run", "--index", index, *SHORT, stdin=f"{ASKED}\nbread\n")
    assert [row["prompt"] for row in rows] == [ASKED, "bread"]


def test_a_base_model_continues_texts(index, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "plain")
    (copy / "chat_template.jinja").unlink()
    given = ASKED, "--index", index, "--model", copy, *SHORT
    assert succeeded("run", *given).stdout == succeeded("run", *given, "--raw").stdout
    refused(call("run", *given, "--system", "Be brief."), "has no chat template")


def test_what_does_not_go_together(index):
    refused(call("run", "x", "--raw", "--system", "y"), "--system needs the chat template", code=2)
    refused(call("run", "x", "--set", "corpus.split=test"), "corpus.split is of files", code=2)


@pytest.mark.parametrize(("command", "most"), [("run", 15), ("generate", 15), ("build-index", 12)])
def test_options_are_few(command, most):
    """Those that every command has are not counted, nor what --help does not list."""
    shown = [param for param in main.commands[command].params if isinstance(param, click.Option) and not param.hidden]
    names = {param.name for param in shown}
    assert len(names - {"settings", "as_json"}) <= most


def test_a_chat_has_a_history(said, generator):
    first, second = said(ASKED, "Why?")[0]
    messages = [{"role": "user", "content": ASKED}]
    sampling = SamplingConfig(max_new_tokens=8)
    assert generator.generate(messages, sampling).text == first
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert generator.generate(messages, sampling).text == second
    assert said(ASKED, system="Be brief.")[0] != [first]
    assert said(ASKED, raw=True)[0] == [generator.generate(ASKED, sampling).text] != [first]


def test_commands_of_a_chat(said, generator):
    lines, _ = said(ASKED, "/why", "/dense", "/stats", "/help", "/exit", "never asked")
    topics = generator.lookup(ASKED, k=3)
    assert lines[1].startswith(f"  similarity {topics[0].similarity:.3f}  {topics[0].label}")
    assert len(topics) == 3 and "cluster" in lines[4]
    assert lines[5] == lines[0] and lines[6].startswith("  dense · ")  # this index promises nothing: both are dense
    n_prompt = generator.generate(ASKED, chat=True, max_new_tokens=1).n_prompt_tokens
    assert lines[7].startswith("  last: dense · ")
    assert lines[8] == f"  its prompt: {n_prompt} tokens, of which {n_prompt - 1} had been read for an earlier one"
    assert lines[9].startswith("  all: 2 answers, 16 tokens in ")
    assert [line.split()[0] for line in lines[10:]] == ["/why", "/dense", "/profile", "/stats", "/help", "/exit"]


def test_a_chat_goes_on_by_another_profile(tuned, capsys):
    """Topics are familiar, so that tokens choose; the conversation is the one that went before."""
    question = "What do stars tell us about space, case 0?"
    opened = []

    def reopen(profile: Profile | None) -> Generator:
        opened.append(profile)
        return coreinfer_sim.load(tuned, profile=profile)

    sampling = SamplingConfig(max_new_tokens=8)
    with Chat(reopen(None), sampling, None, raw=False, reopen=reopen) as chat:
        chat.talk(["/profile", question, "/profile fast", "Why?", "/stats", "/profile fast", "/profile exact"])
        chat.talk(["/profile fsat", "/dense"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["exact", "dense"], ["*", "balanced"], ["fast", "tokens"]]
    assert [line.split(":")[0] for line in lines if line.startswith("  * ")] == [
        "  * balanced  tokens choose, read ratio 0.5",
        *["  * fast      tokens choose, read ratio 0.2"] * 2,  # the second time it is there already
        "  * exact     dense decode",
    ]
    assert opened == [None, Profile.FAST, Profile.EXACT]
    assert captured.err.count("The model was opened again in ") == 2 and "keeps the conversation" in captured.err
    assert "Error: profile is 'fsat', expected one of exact, balanced, fast; nearest: fast." in captured.err
    with coreinfer_sim.load(tuned) as balanced:
        messages = [{"role": "user", "content": question}]
        first = balanced.generate(messages, sampling).text
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    with coreinfer_sim.load(tuned, profile="fast") as fast:
        second = fast.generate(messages, sampling).text
        assert fast.generate(question, max_new_tokens=8).read_ratio < 0.3
    assert f"{first}\n" in captured.out
    assert f"{second}\n  last: " in captured.out


def test_a_chat_that_cannot_switch_goes_on_as_before(index, generator, capsys, monkeypatch):
    monkeypatch.setattr(generator, "profile", Profile.BALANCED)
    opened = []

    def reopen(profile: Profile | None) -> Generator:
        opened.append(profile)
        if len(opened) == 1 or "/why" in lines:
            raise ConfigError("there is no room.")
        return generator

    lines = ["/profile fast", "/profile exact", ASKED]
    given = generator, SamplingConfig(max_new_tokens=4), None
    Chat(*given, raw=False, reopen=reopen).talk(lines)
    captured = capsys.readouterr()
    assert f"Error: {index} has no profile fast, expected one of exact; 'coreinfer-sim tune'" in captured.err
    assert "Error: there is no room." in captured.err and "opened again" not in captured.err
    assert opened == [Profile.EXACT, Profile.BALANCED] and captured.out.strip()
    lines.append("/why")  # there is no room for what was open either
    with pytest.raises(ConfigError, match="no room"):
        Chat(*given, raw=False, reopen=reopen).talk(lines)


def test_dense_leaves_the_history_alone(said):
    assert said(ASKED, "/dense", "Why?")[0][-1] == said(ASKED, "Why?")[0][-1]


def test_what_a_chat_does_not_know(said):
    lines, notes = said("/whi", "/why", "  ", "/usr/bin is what?")
    assert "no command /whi; nearest: /why" in notes and "Nothing has been asked yet." in notes
    assert len(lines) == 1


def test_a_long_chat_leaves_its_oldest_turn_out(said, generator):
    long = "stars " * (generator.language_model.context_length // 12)
    lines, notes = said(long, long, long, long, most=2)
    assert len(lines) == 4 and "its oldest turn is left out" in notes
    lines, notes = said(long * 15, ASKED, most=2)
    assert "Error: the prompt has " in notes and len(lines) == 1


def test_a_terminal(index, tmp_path):
    """The command on a real terminal: a question, a command, the end of the input."""
    terminal, other = pty.openpty()
    command = [*PROCESS, "--index", str(index), "--max-new-tokens", "4"]
    environment = {**os.environ, "TERM": "dumb", "HOME": str(tmp_path)}
    with subprocess.Popen(
        command, stdin=other, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as run:
        os.write(terminal, f"{ASKED}\n/why\n".encode())
        os.write(terminal, b"\x04")
        assert run.stdout is not None
        text = run.stdout.read().decode()
    os.close(terminal)
    os.close(other)
    assert run.returncode == 0, text
    assert "/help lists the commands" in text and "similarity 0." in text
