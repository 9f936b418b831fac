"""`coreinfer-sim serve` in a process of its own."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys

import httpx
import openai
import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from served import NAME, chat


def test_the_command_serves_exported_clusters(wide_index, exported):
    command = [sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()", "serve"]
    given = [
        "--index",
        wide_index.name,
        "--engine",
        "llamacpp",
        "--set",
        f"decode.exported={exported}",
        "--port",
        "0",
        "--name",
        NAME,
    ]
    with subprocess.Popen(
        [*command, *given, "--set", "decode.prefill=sparse"], stderr=subprocess.PIPE, text=True
    ) as process:
        line = next(line for line in process.stderr if "Serving" in line)
        url = re.search(r"http://[\d.:]+", line)[0]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            answer = chat(client)
        assert answer.usage.completion_tokens == 8 and answer.model_extra["coreinfer"]["engine"] == "llamacpp"
        assert (exported / answer.model_extra["coreinfer"]["file"]).is_file()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert "Traceback" not in rest, rest


def test_the_command_says_that_a_base_model_continues_texts(wide_index, wide_checkpoint, tmp_path):
    base = shutil.copytree(wide_checkpoint, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    command = [sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()", "serve"]
    given = ["--index", wide_index.name, "--model", str(base), "--port", "0", "--keep-ratio", "0.4", "--name", NAME]
    given += ["--cors-origin", "https://example.org", "--cors-origin", "http://localhost:3000"]
    with subprocess.Popen([*command, *given], stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if "Serving" in line:
                break
        url = re.search(r"http://[\d.:]+", said[-1])[0]
        assert f"Note: {NAME} has no chat template, so it continues texts: /v1/completions alone answers.\n" in said
        asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{url}/v1/completions", headers=asked, timeout=30).status_code == 200
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]
        process.send_signal(signal.SIGINT)
        process.stderr.read()


@pytest.mark.parametrize(
    "origin", ["example.org", "https://example.org/", "https://example.org/app", "HTTPS://A.B", ""]
)
def test_an_origin_that_no_browser_sends_is_refused(wide_index, origin):
    result = CliRunner().invoke(main, ["serve", "--index", wide_index.name, "--cors-origin", origin])
    assert result.exit_code == 1 and "expected what a browser sends" in result.output


def test_the_command_asks_for_a_key_where_others_can_reach_it(wide_index):
    result = CliRunner().invoke(main, ["serve", "--index", wide_index.name, "--host", "0.0.0.0"])
    assert result.exit_code == 1 and "give --api-key" in result.output


def test_the_command_refuses_what_is_planned_for_one_text(wide_index):
    result = CliRunner().invoke(main, ["serve", "--index", wide_index.name, "--set", "decode.memory_budget=2GiB"])
    assert result.exit_code == 1 and "a memory budget is planned for one text" in result.output
    result = CliRunner().invoke(main, ["serve", "--index", wide_index.name, "--engine", "best"])
    assert result.exit_code == 2 and "no engine 'best'" in result.output


def test_the_command_serves_until_it_is_interrupted(wide_index, wide_checkpoint):
    command = [sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()", "serve"]
    given = [
        "--index",
        wide_index.name,
        "--model",
        wide_checkpoint,
        "--port",
        "0",
        "--keep-ratio",
        "0.4",
        "--name",
        NAME,
    ]
    with subprocess.Popen([*command, *given], stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "Serving" in line)
        url = re.search(r"http://[\d.:]+", line)[0]
        assert httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"] == NAME
        port = url.rsplit(":", 1)[1]
        busy = subprocess.run([*command, *given, "--port", port], capture_output=True, text=True)
        assert busy.returncode == 1 and "expected a free port" in busy.stderr and "Traceback" not in busy.stderr
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 0 and "Error" not in rest and "Traceback" not in rest
