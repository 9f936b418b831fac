"""`coreinfer-sim config`: option, variable, file, default, and what is completed."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from commands import call, parsed, refused, setting, succeeded
from coreinfer_sim_cli.main import main

from coreinfer_sim.index.names import DEMO


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch) -> Path:
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "XDG_CONFIG_HOME" / "coreinfer_sim" / "config.toml"


def shown() -> dict[str, tuple[object, str]]:
    return {row["name"]: (row["value"], row["from"]) for row in parsed("config", "show")["settings"]}


def completed(*words: str) -> list[str]:
    """Return what a shell is offered for the last word."""
    *before, incomplete = words
    return [each.value for each in ShellComplete(main, {}, "coreinfer-sim", "_C").get_completions(before, incomplete)]


def test_the_path_and_an_empty_file(file):
    assert succeeded("config", "path").stdout.strip() == str(file)
    found = shown()
    assert found["index"] == (None, "default") and found["sample.max_new_tokens"] == ("128", "default")
    assert {source for _, source in found.values()} == {"default"}
    assert f"# {file} (not there yet)\nindex = none\n" in succeeded("config", "show").stdout


def test_option_variable_file_default(index, monkeypatch):
    def tokens(*more: object) -> int:
        return int(parsed("generate", "stars", "--index", index, *more)["n_new_tokens"])

    succeeded("config", "set", "generate.max-new-tokens", 5)
    assert tokens() == 5
    monkeypatch.setenv("COREINFER_SIM_GENERATE_MAX_NEW_TOKENS", "4")
    assert tokens() == 4
    assert tokens("--max-new-tokens", 3) == tokens(*setting("sample.max_new_tokens", 3)) == 3
    assert shown()["generate.max-new-tokens"] == ("4", "variable")
    monkeypatch.delenv("COREINFER_SIM_GENERATE_MAX_NEW_TOKENS")
    succeeded("config", "unset", "generate.max_new_tokens")  # either spelling
    assert "generate.max-new-tokens" not in shown()
    # a setting that has an option in some commands
    succeeded("config", "set", "sample.max_new_tokens", 6)
    assert tokens() == 6
    monkeypatch.setenv("COREINFER_SIM_SAMPLE_MAX_NEW_TOKENS", "7")
    assert tokens() == 7
    assert tokens(*setting("sample.max_new_tokens", 2)) == tokens("--max-new-tokens", 2) == 2


def test_what_is_set_is_read_again(file):
    given = {
        "sample.top_p": (0.5, 0.5),
        "sample.stop": ("END, STOP", "END, STOP"),
        "decode.cache_bytes": ("2GiB", 2 << 30),
        "model.device": ("cpu", "cpu"),
        "corpus.deduplicate": ("no", False),
        "serve.port": ("8001", 8001),
        "serve.cors-origin": ("https://a.example, *", ["https://a.example", "*"]),
        "build-index.compensate": ("true", True),
        "generate.memory-budget": ("2GiB", "2GiB"),
    }
    for name, (text, _) in given.items():
        succeeded("config", "set", name, text)
    found = shown()
    assert {name: found[name] for name in given} == {name: (value, "file") for name, (_, value) in given.items()}
    assert "port = 8001" in file.read_text(encoding="utf-8")
    for name in given:
        succeeded("config", "unset", name)
    assert file.read_text(encoding="utf-8") == ""
    refused(call("config", "unset", "serve.port"), "serve.port is not set in .*, which holds nothing")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("serve.prt", "1", "there is no setting 'serve.prt'; nearest: serve.port"),
        ("top_k", "1", "nearest: sample.top_k"),
        ("zzzzzz", "1", "'coreinfer-sim config show' lists them"),
        ("serve.port", "100000", "100000"),
        ("sample.top_p", "7", "top_p is 7"),
        ("select.mode", "oracle", "expected one of similarity"),
        ("generate.memory-budget", "much", "is no size"),
    ],
)
def test_what_cannot_be_set(file, name, value, says):
    result = call("config", "set", name, value)
    refused(result, says, code=result.exit_code)
    assert result.exit_code in (1, 2) and not file.exists()


@pytest.mark.parametrize("content", ["[serve]\nprt = 1\n", "prt = 1\n"])
def test_a_wrong_name_in_the_file(file, content):
    file.parent.mkdir(parents=True)
    file.write_text(content)
    name = "serve.prt" if "serve" in content else "prt"
    refused(call("list"), f"holds {name}, which is no setting", f"'coreinfer-sim config unset {name}' removes it")
    succeeded("config", "show")
    succeeded("config", "unset", name)
    succeeded("list")


def test_a_wrong_value_and_no_toml(file, index, monkeypatch):
    file.parent.mkdir(parents=True)
    file.write_text('[sample]\ntop_k = "many"\n')
    refused(call("generate", "x", "--index", index), "config.toml: sample.top_k is 'many', expected a whole number")
    file.write_text("[sample\n")
    refused(call("list"), "is no TOML")
    file.unlink()
    monkeypatch.setenv("COREINFER_SIM_SAMPLE_TOP_K", "many")
    refused(call("generate", "x", "--index", index), "variable COREINFER_SIM_SAMPLE_TOP_K: .*expected a whole number")


def test_every_option_has_a_variable_of_its_own():
    found = []
    for command in main.commands.values():
        for param in command.params:
            if isinstance(param, click.Option) and param.name not in ("settings", "help") and not command.hidden:
                assert isinstance(param.envvar, list) and param.envvar[0].startswith("COREINFER_SIM_"), param.name
                found.append(param.envvar[0])
    assert len(set(found)) == len(found) > 50
    serve = {param.name: param.envvar for param in main.commands["serve"].params}
    assert serve["api_key"] == ["COREINFER_SIM_SERVE_API_KEY", "COREINFER_API_KEY"]


def test_completion():
    assert {"generate", "list", "config"} <= set(completed(""))
    assert completed("generate", "--index", "de") == completed("show", "de") == [DEMO]
    assert completed("generate", "--set", "sample.top") == ["sample.top_k=", "sample.top_p="]
    assert completed("config", "set", "serve.po") == ["serve.port"]
    assert "--max-new-tokens" in completed("generate", "--max")


def test_json_holds_all(file):
    succeeded("config", "set", "serve.port", 8001)
    found = json.loads(succeeded("config", "show", "--json").stdout)
    assert found["path"] == str(file) and {"name": "serve.port", "value": 8001, "from": "file"} in found["settings"]
