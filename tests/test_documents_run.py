"""Every command and every block of Python in the documents runs, in the order in which a reader would try them.

What cannot run here – for want of a network, a GPU or an end – is parsed by the command itself, and stands in `ONLY_PARSED`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from markdown_it import MarkdownIt
from served import Served
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.generation.text import Generator
from coreinfer_sim.serving.app import make_app
from coreinfer_sim.serving.backends import Backend

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "docs" / "python.md",
    *sorted(path for part in ("start", "guide", "explain") for path in (ROOT / "docs" / part).glob("*.md")),
]
ONLY_PARSED = {
    r"demo": "fetches a model of 98 MB; tests/cli/test_cli_demo.py runs it among the slow tests",
    r"serve\b": "does not end; its answers are asked for below",
    r"(push|pull)\b": "needs the hub; tests/reporting/test_shared_indexes.py looks at what is uploaded",
    r".*model\.device=cuda": "needs a GPU",
    r".*(--build-llamacpp|llamacpp:)": "needs a GGUF file that llama-bench reads; tests/cli/test_cli_bench.py runs it",
}
NOT_OURS = {
    r"hf |docker |hadolint ": "another program",
    r"serve run ": "Ray's; tests/serving/test_on_ray.py runs what it deploys",
    r"python -m coreinfer_sim\.evaluation\.harness": "needs data sets of the hub; tests/evaluation/test_harness.py runs it",
}
TOPICS = {
    "space": ["stars", "planets", "galaxies", "comets"],
    "food": ["bread", "cheese", "soup", "cake"],
    "law": ["contracts", "courts", "judges", "appeals"],
    "music": ["violins", "operas", "drums", "choirs"],
}
FEW = {
    "RUN_MAX_NEW_TOKENS": 4,
    "GENERATE_MAX_NEW_TOKENS": 4,
    "BUILD_INDEX_WORKERS": 1,
    "BUILD_INDEX_THREADS": 1,
    "EVALUATE_LIMIT": 3,
    "TUNE_LIMIT": 12,
    "BENCH_ROUNDS": 1,
    "BENCH_NEW_TOKENS": 2,
    "BENCH_PROMPT_TOKENS": 8,
    "COMPENSATE_TOKENS": 300,
    "ANALYZE_LIMIT": 70,
    "ANALYZE_LENGTH": 16,
}
"""Variables that make the commands of the documents quick, such as COREINFER_SIM_RUN_MAX_NEW_TOKENS."""


def blocks(document: Path) -> list[tuple[int, str, str]]:
    """Return the blocks of code of a document: line, language, and text."""
    tokens = MarkdownIt("commonmark").parse(document.read_text(encoding="utf-8"))
    found = []
    for token in tokens:
        if token.type == "code_block" or (token.type == "fence" and token.info in ("bash", "python")):
            found.append((token.map[0] + 1, "python" if token.info == "python" else "shell", token.content))
    return found


def commands(text: str) -> list[str]:
    """Return the commands of a block, each on one line and without its comment."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line for each in joined.splitlines() if (line := re.sub(r"\s{2,}# .*", "", each).strip())]


def rows(n: int) -> list[dict[str, str]]:
    """Return rows of which a third would do for a promise."""
    nouns = [(topic, noun) for topic, each in TOPICS.items() for noun in each]
    return [
        {
            "id": str(k),
            "prompt": f"What do {noun} tell us about {topic}, case {k}?",
            "completion": f"They tell us a lot about {topic}, and then some more of {noun}.",
        }
        for k in range(n)
        for topic, noun in [nouns[k % len(nouns)]]
    ]


def write(path: Path, lines: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")


def install(index: Path, name: str) -> None:
    """Put a copy of an index among the user's."""
    shutil.copytree(index, Path(os.environ["XDG_DATA_HOME"]) / "coreinfer_sim" / "indexes" / name)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint whose sizes any export takes."""
    folder = tmp_path_factory.mktemp("documents") / "my-model"
    save_tiny_checkpoint(folder, hidden_size=64, intermediate_size=192, max_position_embeddings=1024)
    return folder


@pytest.fixture(scope="module")
def built(model, tmp_path_factory) -> Path:
    """An index with a map, profiles and compensated sets."""
    folder = tmp_path_factory.mktemp("documents")
    write(folder / "chats.jsonl", rows(240))
    given = "--clusters 4 --compensate --keep-ratio 0.4 --workers 1 --threads 1 --set compensate.tokens=300"
    out = folder / "my-index"
    arguments = ["build-index", str(folder / "chats.jsonl"), "--model", str(model), "--out", str(out), *given.split()]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def desk(model, built, tmp_path, monkeypatch) -> Path:
    """A working directory with the files that the documents name, and a user's folders of its own."""
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in FEW.items():
        monkeypatch.setenv(f"COREINFER_SIM_{name}", str(value))
    desk = tmp_path / "desk"
    desk.mkdir()
    (desk / "my-model").symlink_to(model)
    for name in ("chats", "held-out", "gsm8k", "squad", "prompts"):
        write(desk / f"{name}.jsonl", rows(240))
    write(desk / "texts.jsonl", [row | {"topic": row["prompt"].partition(",")[0]} for row in rows(70)])
    write(
        desk / "rajpurkar" / "squad" / "train.jsonl",
        [{"question": r["prompt"], "context": r["completion"]} for r in rows(60)],
    )
    table = "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in rows(60))
    (desk / "questions.csv").write_text("question,answer\n" + table, encoding="utf-8")
    (desk / "prompts.txt").write_text("How do stars form?\nWhy does bread rise?\n", encoding="utf-8")
    bench = ROOT / "figures" / "results" / "bench-qwen2.5-coder-1.5b-int8.json"
    shutil.copy(bench, desk / "speed.json")  # which bench would write, were it not only parsed
    install(built, "demo")  # in place of the one that needs the large model
    monkeypatch.chdir(desk)
    return desk


@pytest.fixture
def server(built, model) -> Iterator[Served]:
    """What `serve` serves."""
    import coreinfer_sim

    with coreinfer_sim.load(built, model) as generator, Served(make_app(Backend(generator), "tiny")) as served:
        yield served


def reason(line: str, known: dict[str, str]) -> str | None:
    return next((why for pattern, why in known.items() if re.match(pattern, line)), None)


def run_ours(words: list[str], monkeypatch) -> None:
    """Run one of our commands, or let it read its arguments alone."""
    stdin = "y\n"
    if "<" in words:
        at = words.index("<")
        stdin = Path(words[at + 1]).read_text(encoding="utf-8")
        words = words[:at]
    if not words:
        stdin = "How do stars form?\n"  # on a terminal it would chat
    if "--memory-budget" in words:  # of which this process alone takes more
        command = [sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()", *words]
        alone = subprocess.run(command, capture_output=True, text=True)
        assert alone.returncode == 0, f"{shlex.join(words)}\n{alone.stderr}"
        return
    with monkeypatch.context() as patch:
        if reason(" ".join(words), ONLY_PARSED):
            patch.setattr(main.commands[words[0]], "callback", lambda **_: None)
        done = CliRunner().invoke(main, words, input=stdin)
    assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}\n{done.exception!r}"


def check_install(words: list[str]) -> None:
    """Check that the extras that pip is asked for are there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = {name for word in words for found in re.findall(r"\[([\w,]+)\]", word) for name in found.split(",")}
    assert asked and asked <= extras.keys()
    constraints = words[words.index("-c") + 1] if "-c" in words else "constraints.txt"
    assert (ROOT / constraints).is_file()


def run_line(line: str, monkeypatch) -> None:
    """Run a command of a document."""
    if found := re.search(r"_COREINFER_SIM_COMPLETE=(\w+)_source coreinfer-sim", line):
        done = CliRunner().invoke(
            main, prog_name="coreinfer-sim", env={"_COREINFER_SIM_COMPLETE": f"{found[1]}_source"}, args=[]
        )
        assert done.exit_code == 0 and "_coreinfer_sim_completion" in done.output
        return
    words = shlex.split(line)
    if words[0] == "coreinfer-sim":
        run_ours(words[1:], monkeypatch)
    elif words[0] == "pip" or words[:2] == ["uv", "pip"]:
        check_install(words)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif words[0] == "curl":
        if shutil.which("curl"):
            done = subprocess.run(
                ["curl", "--silent", "--fail", *words[1:]], capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0 and "choices" in json.loads(done.stdout), done.stdout + done.stderr
    else:
        assert reason(line, NOT_OURS), f"no test runs {line!r}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_shows_runs(document, desk, built, request, monkeypatch):
    found = blocks(document)
    text = document.read_text(encoding="utf-8")
    for name, command in (("my-index", "--out my-index"), ("chats", "build-index chats.jsonl")):
        is_named = re.search(rf"(index |show |[\"`=]){name}\b", text) is not None
        if is_named and command not in text:
            install(built, name)
    address = request.getfixturevalue("server").url if "localhost:8000/v1" in text else "http://localhost:8000"
    namespace: dict[str, object] = {}
    for line, language, content in found:
        content = content.replace("http://localhost:8000", address).replace(" localhost:8000", f" {address}")
        if language == "python":
            code = compile("\n" * line + content, str(document), "exec")
            exec(code, namespace)
        else:
            for each in commands(content):
                run_line(each, monkeypatch)
    for value in namespace.values():
        if isinstance(value, Generator):
            value.close()
