"""What tries each row of the table of cases; the first line of a function says what is expected."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from figures.inputs import QUESTION, Found, Trial, python_of_ours, trial

ARROW = "{prompt} -> {completion}"


def rendered(case: Trial, *turns: tuple[str, str]) -> str:
    """Return a conversation in the model's chat template."""
    from coreinfer_sim.models.loading import load_tokenizer

    messages = [{"role": role, "content": content} for role, content in turns]
    return str(load_tokenizer(str(case.model)).apply_chat_template(messages, tokenize=False))


# A corpus


@trial("05_numbers.csv")
def numbers(case: Trial) -> Found:
    """Numbers stay their characters."""
    rows = [
        ("Which number stands on the door?", "007"),
        ("How many legs has a chair?", "4"),
        ("How many doors has a tent?", ""),
    ]
    built = case.build(case.cases / "05_numbers.csv", "--template", ARROW)
    return built.read(*((p, f"{p} -> {c}".strip()) for p, c in rows))


@trial("05_numbers.csv")
def words(case: Trial) -> Found:
    """NA and null are words."""
    rows = [
        ("Which letters stand for sodium?", "Na"),
        ("Which letters mean not available?", "NA"),
        ("null", "A word for nothing."),
    ]
    return case.build(case.cases / "05_words.csv", "--template", ARROW).read(*((p, f"{p} -> {c}") for p, c in rows))


@trial("05_numbers.csv")
def booleans(case: Trial) -> Found:
    """True stays true."""
    rows = [("Is ice cold?", "true"), ("Is fire cold?", "false")]
    return case.build(case.cases / "05_booleans.csv", "--template", ARROW).read(*((p, f"{p} -> {c}") for p, c in rows))


@trial("06_semicolon.csv")
def semicolon(case: Trial) -> Found:
    """The separator is recognised."""
    texts = ["Why is the sky blue?", "Why is grass green?"]
    return case.build(case.cases / "06_semicolon.csv").read(*((text, text) for text in texts))


@trial("06_semicolon.csv")
def semicolon_answers(case: Trial) -> Found:
    """The separator is recognised where fields hold commas."""
    texts = [
        "Why is the sky blue?\nShort waves, which are blue, scatter most.",
        "Why is grass green?\nIt holds chlorophyll, a pigment, in its cells.",
    ]
    built = case.build(case.cases / "06_semicolon_answers.csv", "--template", r"{Question}\n{Answer}")
    return built.read(*((text, text) for text in texts))


@trial("06_spaces_in_headers.csv")
def headers(case: Trial) -> Found:
    """A column of any name stands in a template."""
    rows = [("Why is the sky blue?", "Blue light scatters."), ("Why is grass green?", "Chlorophyll.")]
    named = ["--prompt-column", "The question", "--template", r"{The question}\n{The answer}"]
    return case.build(case.cases / "06_spaces_in_headers.csv", *named).read(*((p, f"{p}\n{c}") for p, c in rows))


@trial("06_unquoted_comma.csv")
def unquoted(case: Trial) -> Found:
    """One sentence with the line number."""
    return case.build(case.cases / "06_unquoted_comma.csv").refused("line 2")


CHATS = [("Why is the sky blue?", "Blue light scatters."), ("Why is grass green?", "Chlorophyll.")]


def _chat(case: Trial, name: str, *more: str) -> Found:
    texts = [(p, rendered(case, ("user", p), ("assistant", c))) for p, c in CHATS]
    return case.build(case.cases / name, *more).read(*texts)


@trial("07_sharegpt.jsonl")
def sharegpt(case: Trial) -> Found:
    """ShareGPT's conversations are recognised and read in the model's template."""
    return _chat(case, "07_sharegpt.jsonl")


@trial("07_sharegpt.jsonl")
def messages(case: Trial) -> Found:
    """Messages are recognised, with and without being named."""
    (plain, _), named = (
        _chat(case, "07_messages.jsonl"),
        _chat(case, "07_messages.jsonl", "--prompt-column", "messages"),
    )
    return plain and named[0], named[1]


@trial("07_trace_columns.jsonl")
def trace(case: Trial) -> Found:
    """A file with columns of a trace is read."""
    built = case.build(case.cases / "07_trace_columns.jsonl", "--template", "{prompt}")
    return built.read(*((p, p) for p, _ in CHATS))


@trial("08_late_column.py")
def late_column(case: Trial) -> Found:
    """A column that nobody asks for may change its type."""
    path = case.scratch / "late.jsonl"
    subprocess.run([sys.executable, str(case.cases / "08_late_column.py"), str(path)], check=True)
    return case.build(path).read(*((f"Prompt {n}", f"Prompt {n}") for n in range(13)))


@trial("09_half_emoji.jsonl")
def half_emoji(case: Trial) -> Found:
    """A build reads half a character as U+FFFD, counts the row and names its line."""
    texts = ["Why is the sky blue?", "A text that was cut \ufffd"]
    built = case.build(case.cases / "09_half_emoji.jsonl")
    reached, line = built.read(*((text, text) for text in texts))
    return reached and "U+FFFD" in line and "line 2" in line, line


@trial("09_half_emoji.jsonl")
def half_emoji_evaluated(case: Trial) -> Found:
    """Evaluation reads it as well."""
    path = case.cases / "09_half_emoji_eval.jsonl"
    done = case.run("evaluate", path, "--index", case.index, "--model", case.model, "--contender", "dense", "--json")
    line = next((each for each in done.stderr.splitlines() if "U+FFFD" in each), done.stderr[-300:])
    return done.returncode == 0 and json.loads(done.stdout)[0]["n_rows"] == 2 and "line 1" in line, line


@trial("10_paths/")
def path(case: Trial) -> Found:
    """The file that was named is read."""
    texts = ["Row of the file that was named.", "Second row of the file that was named."]
    return case.build(case.cases / "10_paths" / "rows[1].jsonl").read(*((text, text) for text in texts))


@trial("11_eval_bom.jsonl")
def mark_evaluated(case: Trial) -> Found:
    """A byte order mark changes no score."""
    found = []
    for name in ("11_eval_bom.jsonl", "11_eval_control.jsonl"):
        more = ["--index", case.index, "--model", case.model, "--contender", "dense", "--json"]
        done = case.run("evaluate", case.cases / name, *more)
        found.append(json.loads(done.stdout)[0]["sets"].popitem()[1] if done.returncode == 0 else done.stderr)
    return found[0] == found[1] and not isinstance(found[0], str), str(found[0])


@trial("11_eval_bom.jsonl")
def mark_generated(case: Trial) -> Found:
    """A byte order mark changes no answer."""
    texts = []
    for name in ("11_prompts_bom.txt", "11_prompts_control.txt"):
        more = ["--index", case.index, "--model", case.model, "--max-new-tokens", 12, "--json"]
        (row,) = json.loads(case.run("generate", "--file", case.cases / name, *more).stdout)
        texts.append((row["prompt"], row["text"]))
    return texts[0] == texts[1] and texts[0][0] == QUESTION, repr(texts[0])


# A server


@trial("12_no_spaces.json")
def no_spaces(case: Trial) -> Found:
    """Pieces come with the tokens, and a client that hangs up frees the worker within a second."""
    body = case.body("12_no_spaces.json")
    with case.served() as client:
        client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})  # what is compiled is compiled
        begin, pieces = time.perf_counter(), 0
        with client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                pieces += line.startswith("data:")
                if time.perf_counter() - begin > 4:
                    break
        left = time.perf_counter()
        while client.get("/health").json()["open_requests"]:
            time.sleep(0.02)
        client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1, "coreinfer": {"mode": "dense"}})
        freed = time.perf_counter() - left
    return (
        pieces > 10 and freed < 1.5,
        f"{pieces} pieces in 4 s; another answer {freed:.2f} s after the client had left",
    )


@trial("12_no_spaces.json")
def deadline(case: Trial) -> Found:
    """A deadline frees the worker within a second."""
    body = {**case.body("12_no_spaces.json"), "stream": False}
    with case.served("--timeout", 5) as client:
        begin = time.perf_counter()
        status = client.post("/v1/completions", json=body).status_code
        ended = time.perf_counter()
        client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1, "coreinfer": {"mode": "dense"}})
        freed = time.perf_counter() - ended
    return (
        status == 504 and ended - begin < 6.5 and freed < 1.5,
        f"{status} after {ended - begin:.2f} s; another answer {freed:.2f} s later",
    )


@trial("13_large_max_tokens.json")
def large_limit(case: Trial) -> Found:
    """A limit above the server's is cut to it."""
    body = {
        **case.body("13_large_max_tokens.json"),
        "temperature": 0,
        "messages": [{"role": "user", "content": "Count from one to a thousand."}],
    }
    with case.served("--max-new-tokens", 16) as client:
        answer = client.post("/v1/chat/completions", json=body).json()
    found = answer.get("choices", [{}])[0].get("finish_reason"), answer.get("usage", {}).get("completion_tokens")
    return found == ("length", 16), f"finish_reason, completion_tokens: {found}"


@trial("13_large_max_tokens.json")
def hint(case: Trial) -> Found:
    """A hint that makes no answer wrong is ignored and listed."""
    with case.served() as client:
        answer = client.post("/v1/chat/completions", json=case.body("13_unknown_hint.json"))
    return answer.status_code == 200 and answer.json()["coreinfer"]["ignored"] == ["reasoning_effort"], answer.text[
        -300:
    ]


@trial("a page of another origin")
def origin(case: Trial) -> Found:
    """A preflight is answered, with a key or without, where the origin is allowed, and refused by default."""
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization,content-type"}
    found = []
    for more in (["--cors-origin", "https://example.org", "--api-key", "k"], []):
        with case.served(*more) as client:
            answer = client.options("/v1/chat/completions", headers=asked)
            found.append((answer.status_code, answer.headers.get("access-control-allow-origin")))
    return found[0] == (200, "https://example.org") and found[1][1] is None, str(found)


@trial("15_stop_at_limit_completions.json")
def stop_at_limit(case: Trial) -> Found:
    """A stop text that comes with the last token ends the answer."""
    with case.served() as client:
        answer = client.post("/v1/completions", json=case.body("15_stop_at_limit_completions.json")).json()
        whole = client.post(
            "/v1/completions", json={**case.body("15_stop_at_limit_completions.json"), "stop": None}
        ).json()
    reason, text = (answer["choices"][0][name] for name in ("finish_reason", "text"))
    stopped = " The" in whole["choices"][0]["text"]
    return (
        reason == "stop"
    ) == stopped and " The" not in text, f"{reason}: {text!r}; without a stop {whole['choices'][0]['text']!r}"


@trial("15_stop_at_limit_completions.json")
def stops_cost_nothing(case: Trial) -> Found:
    """Stop texts cost no time."""
    body = {"prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    stops, seconds = [f"<stop {n}>" for n in range(16)], []
    with case.served() as client:
        for more in ({}, {}, {"stop": stops}):
            begin = time.perf_counter()
            client.post("/v1/completions", json={**body, **more}).raise_for_status()
            seconds.append(time.perf_counter() - begin)
    return seconds[2] - seconds[1] < 0.3, f"{seconds[1]:.2f} s without, {seconds[2]:.2f} s with 16 stop texts"


@trial("16_templated_completions.json")
def templated(case: Trial) -> Found:
    """The same question routes the same way, bare, in messages and in a rendered template."""
    with case.served() as client:
        bare = client.post("/v1/completions", json={"prompt": QUESTION, "max_tokens": 2, "temperature": 0}).json()
        rendered = client.post("/v1/completions", json=case.body("16_templated_completions.json")).json()
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
        chat = client.post("/v1/chat/completions", json=body).json()
    found = [(a["coreinfer"]["cluster"], a["coreinfer"]["similarity"]) for a in (bare, rendered, chat)]
    return len(set(found)) == 1, f"cluster and similarity: {found}"


@trial("16_templated_completions.json")
def templated_ids(case: Trial) -> Found:
    """Ids of a chat in its template route as the question."""
    code = (
        "import coreinfer_sim, torch\n"
        "with coreinfer_sim.load(sys.argv[1], sys.argv[2]) as g:\n"
        "    t, s = g.language_model.tokenizer, g.sparse_model()\n"
        "    ids = t.apply_chat_template([{'role': 'user', 'content': sys.argv[3]}], add_generation_prompt=True,\n"
        "                                return_tensors='pt', return_dict=True)['input_ids']\n"
        "    s.generate(ids, max_new_tokens=2, do_sample=False)\n"
        "    print(s.latest.selections[0].cluster, g.lookup(sys.argv[3])[0].cluster)"
    )
    done = python_of_ours(code, case.index, case.model, QUESTION)
    found = done.stdout.split()[-2:]
    return len(found) == 2 and found[0] == found[1], f"cluster of ids and of the question: {found} {done.stderr[-200:]}"


@trial("16_templated_completions.json")
def few_shot(case: Trial) -> Found:
    """Behind few-shot examples in lm-eval the last question routes."""
    code = (
        "from coreinfer_sim.index.index import SemanticIndex\n"
        "from coreinfer_sim.evaluation.harness import CoreInferLM\n"
        "from lm_eval.api.instance import Instance\n"
        "q = sys.argv[3]\n"
        "shots = 'Q: How long is bread baked?\\nA: An hour.\\n\\nQ: Who won the match?\\nA: Nobody.\\n\\n'\n"
        "class Watched(CoreInferLM):\n"
        "    def score_context(self, context, continuations, routed_by=None):\n"
        "        self.routed = routed_by\n"
        "        return super().score_context(context, continuations, routed_by)\n"
        "lm = Watched(model=sys.argv[2], index=sys.argv[1])\n"
        "lm.loglikelihood([Instance('loglikelihood', {'question': q}, (shots + f'Q: {q}\\nA:', ' Gas.'), 0)])\n"
        "i = SemanticIndex.load(sys.argv[1])\n"
        "print(i.lookup(lm.routed)[0].cluster, i.lookup(q)[0].cluster)"
    )
    done = python_of_ours(code, case.index, case.model, QUESTION)
    found = done.stdout.split()[-2:]
    return len(found) == 2 and found[0] == found[
        1
    ], f"cluster of the context and of the question: {found} {done.stderr[-300:]}"


@trial("a base model")
def base_model(case: Trial) -> Found:
    """A base model is served as what it is: said at the start, /v1/completions named, the page completes."""
    model = case.tiny("base", chat=False)
    built = case.build(case.cases / "06_semicolon.csv", model=model)
    with case.served(index=case.scratch / "index", model=model) as client:
        chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        text = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
        models = client.get("/v1/models").json()
        said = client.said()
    line = next((each for each in said.splitlines() if "/v1/completions" in each), built.line)
    right = chat.status_code == 400 and "/v1/completions" in chat.text and "--chat" not in chat.text
    return right and text.status_code == 200 and models["data"][0]["coreinfer"][
        "chat"
    ] is False and line != built.line, line
