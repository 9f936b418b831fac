"""A conversation is routed by its topic, however it comes, and a question whatever examples stand before it."""

from __future__ import annotations

import pytest
from chat_formats import FOLDED, FORMATS, assistant, rendered, system, user
from tiny_index import PROMPTS

from coreinfer_sim.base.errors import PromptError
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.generation.routing import last_question, routing_text
from coreinfer_sim.models.chat_templates import chat_format
from coreinfer_sim.models.loading import load_model


def test_a_conversation_moves_with_its_topic(wide_index):
    def said(*texts):
        return routing_text(wide_index, [{"role": "user", "content": text} for text in texts])

    assert said(PROMPTS[0] + " 1", "zzz qqq 17") == PROMPTS[0] + " 1"
    assert said(PROMPTS[0] + " 1", PROMPTS[1] + " 2") == PROMPTS[1] + " 2"
    assert said("zzz qqq 17") == "zzz qqq 17" and routing_text(wide_index, "text") == "text"


@pytest.mark.parametrize("name", FORMATS)
def test_a_rendered_conversation_is_routed_as_its_messages(wide_index, name):
    chat = chat_format(*FORMATS[name])

    def agree(*messages):
        wanted = routing_text(wide_index, list(messages))
        assert routing_text(wide_index, rendered(name, *messages), chat) == wanted
        return wanted

    assert agree(user(PROMPTS[0])) == PROMPTS[0]
    assert agree(user(PROMPTS[0]), assistant("Yes."), user("zzz qqq 17")) == PROMPTS[0]
    assert agree(user(PROMPTS[0]), assistant("Yes."), user(PROMPTS[1])) == PROMPTS[1]
    assert agree(user("zzz qqq 17")) == "zzz qqq 17"


def test_a_system_prompt_without_marks_is_passed_over_where_it_is_unfamiliar(wide_index):
    chat = chat_format(*FORMATS[FOLDED])
    text = rendered(FOLDED, system("Zzz qqq 17.\n\nXxx 18!"), user(PROMPTS[1]))
    assert routing_text(wide_index, text, chat) == PROMPTS[1]
    unfamiliar = "Zzz qqq 17.\n\nXxx 18!"
    assert routing_text(wide_index, rendered(FOLDED, user(unfamiliar)), chat) == unfamiliar


def test_a_text_alone_routes_by_itself(wide_index):
    chat = chat_format(*FORMATS["chatml"])
    for text in (f"One.\n\n{PROMPTS[0]}", f"What is this: {rendered('chatml', user(PROMPTS[0]))}?", " spaces "):
        assert routing_text(wide_index, text, chat) == text
    with pytest.raises(PromptError, match="the prompt is empty"):
        routing_text(wide_index, " \n", chat)


SHOT = "Question: Where do owls sleep?\nAnswer: In trees.\n\n"
ASKED = "How do stars form in the sky?"
PASSAGE = "A cloud of gas falls together.\n\nIt grows hot and dense, and lights up."


@pytest.mark.parametrize(
    ("context", "document", "question"),
    [
        (f"Question: {ASKED}\nAnswer:", {"question": ASKED}, ASKED),
        (f"{SHOT}{SHOT}Question: {ASKED}\nAnswer:", {"id": "7", "question": f" {ASKED}\n", "answer": "By gas."}, ASKED),
        (f"{SHOT}Question: {ASKED}\nAnswer:", {"question": ASKED, "label": "In trees."}, ASKED),
        (
            f"{SHOT}Passage: {PASSAGE}\nQuestion: {ASKED}\nAnswer:",
            {"passage": PASSAGE, "question": ASKED},
            f"{PASSAGE}\nQuestion: {ASKED}",
        ),
        (
            f"{SHOT}Question: {ASKED}\nPassage: {PASSAGE}\nAnswer:",
            {"passage": PASSAGE, "question": ASKED},
            f"{ASKED}\nPassage: {PASSAGE}",
        ),
        (f"{SHOT}{ASKED}", ASKED, ASKED),
        (f"{SHOT}Question: {ASKED}\nAnswer:", None, f"Question: {ASKED}\nAnswer:"),
        (
            f"{SHOT}Question: {ASKED}\nAnswer:",
            {"label": "In trees.", "n": 3, "choices": ["Owls"]},
            f"Question: {ASKED}\nAnswer:",
        ),
        (f"{SHOT} \n\n{ASKED}\n\n", {}, ASKED),
        (ASKED, {}, ASKED),
        ("", {"text": ASKED}, ""),
    ],
)
def test_the_question_behind_examples_is_the_documents_or_the_last_paragraph(context, document, question):
    assert last_question(context, document) == question


@pytest.mark.parametrize("name", ["chatml", "llama 3", FOLDED])
def test_the_question_behind_examples_in_a_chat_is_in_the_last_turn(name):
    chat = chat_format(*FORMATS[name])
    in_turns = rendered(name, user("Where do owls sleep?"), assistant("In trees."), user(f"Question: {ASKED}"))
    in_one = rendered(name, user(f"{SHOT}Question: {ASKED}"))
    for context in (in_turns, in_one, in_one + "Answer:"):
        assert last_question(context, {"question": ASKED}, chat) == ASKED
        assert last_question(context, {}, chat) == f"Question: {ASKED}"


@pytest.fixture(scope="module")
def generator(wide_checkpoint, wide_index):
    return TextGenerator(load_model(wide_checkpoint, "float32"), wide_index)


def test_the_same_question_routes_the_same_way_however_it_comes(generator):
    question, tokenizer = f"{PROMPTS[1]} 1", generator.language_model.tokenizer
    messages = [{"role": "system", "content": "Be terse."}, user(question)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    runs = [
        generator.generate(question, max_new_tokens=2),
        generator.generate(question, max_new_tokens=2, chat=True),
        generator.generate(messages, max_new_tokens=2),
        generator.generate(text, max_new_tokens=2),
    ]
    assert {run.prompt for run in runs} == {question}
    assert runs[3].token_ids == runs[2].token_ids
    sparse = generator.sparse_model()
    ids = tokenizer([text, "Tell me more.", question], return_tensors="pt", padding=True)
    alone = generator.generate("Tell me more.", max_new_tokens=2).selection
    sparse.generate(**ids, max_new_tokens=2)
    found = [(each.cluster, each.similarity) for each in sparse.latest.selections]
    bare = runs[0].selection
    assert found[0] == pytest.approx((bare.cluster, bare.similarity), abs=1e-5)
    assert found[1] == pytest.approx((alone.cluster, alone.similarity), abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)
