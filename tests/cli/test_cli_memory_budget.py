"""`coreinfer-sim generate` under a memory budget, and sparse prefill."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from commands import call, generated, parsed, refused, setting, succeeded

MORE_OR_LESS = ("lookup_seconds", "prepare_seconds", "prefill_seconds", "decode_seconds", "tokens_per_second")


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "similarity", "--keep-ratio", 0.5],
        ["--mode", "similarity", *setting("decode.prefill", "sparse")],
        ["--mode", "hybrid"],
        ["--mode", "global", *setting("select.sparse_layers", "1:")],
        ["--mode", "random", *setting("decode.prefill", "sparse"), "--chat", *setting("sample.num_beams", 2)],
        ["--mode", "dense", *setting("decode.prefill", "sparse")],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_generate_gives_the_same_under_a_memory_budget(index, stores, options):
    plain = generated(index, *options)
    budgeted = generated(index, *options, "--memory-budget", "64GiB")
    (_,) = stores.glob("*.neurons")
    for name in MORE_OR_LESS:
        del plain[name], budgeted[name]
    assert budgeted == plain


def test_a_memory_budget_says_what_it_plans(index, stores):
    done = succeeded(
        *("generate", "How do stars form?", "--index", index, "--max-new-tokens", 8, "--compare"),
        *("--memory-budget", "64GiB"),
    )
    assert re.search(r"^Memory budget 64.0 GiB, planned .*held neurons [\d.]+ KiB", done.stderr, re.MULTILINE)
    assert re.search(r"^Writing the model's MLPs neuron by neuron to .*: [\d.]+ KiB, once", done.stderr, re.MULTILINE)
    assert len(done.stdout.splitlines()) == 7 or "[dense]" in done.stdout


def test_an_impossible_memory_budget_is_refused_before_loading(index, stores):
    line = refused(
        call("generate", "stars", "--index", index, "--memory-budget", "10MiB"), r"budget is 10\.0 MiB, but this needs"
    )
    assert not stores.exists()
    assert int(re.search(r"give at least .*?(\d+)MiB", line)[1]) > 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--memory-budget", "64GiB", *setting("model.dtype", "bfloat16")], "leave .*dtype"),
        (["--memory-budget", "64GiB", "--weights", "int8"], "for which a memory budget has no plan"),
        pytest.param(
            ["--memory-budget", "64GiB", *setting("model.device", "cuda")],
            "no GPU that this torch can use",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--memory-budget", "much"], "is no size"),
        ([*setting("decode.prefill", "sparse"), "--mode", "stability"], "sparse prefill needs the set before"),
        (
            [*setting("decode.prefill", "sparse"), *setting("select.fallback", "hybrid")],
            "sparse prefill needs the set before",
        ),
    ],
    ids=str,
)
def test_budgets_and_prefills_that_cannot_be_met(index, stores, options, says):
    refused(call("generate", "stars", "--index", index, *options), says)


BY_TOKEN = ("--read-ratio", 0.5)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' asynchronous reads")


@on_linux
@pytest.mark.parametrize(
    "mode", [[], ["--mode", "similarity", *setting("select.fallback", "none")]], ids=["all", "index"]
)
def test_tokens_choose_the_same_under_a_memory_budget(index, tiny_checkpoint, stores, mode):
    source = ("--index", index) if mode else ("--model", tiny_checkpoint)
    command = ("generate", "How do stars form?", *source, "--max-new-tokens", 8, *BY_TOKEN, *mode)
    plain, budgeted = parsed(*command), parsed(*command, "--memory-budget", "64GiB")
    assert plain.pop("disk_bytes_per_token") is None and plain.pop("found_ratio") is None
    assert budgeted.pop("disk_bytes_per_token") > 0 and 0 < budgeted.pop("found_ratio") < 1
    for name in MORE_OR_LESS:
        del plain[name], budgeted[name]
    assert budgeted == plain
    done = succeeded(*command, "--memory-budget", "64GiB")
    assert re.search(r"^Memory budget 64.0 GiB, planned .*estimates .*100% of all neurons", done.stderr, re.MULTILINE)
    assert re.search(r"from the disk a token, \d+% of the chosen neurons in memory$", done.stderr, re.MULTILINE)


@on_linux
def test_a_budget_too_small_for_tokens_that_choose_is_refused_before_anything_is_laid_out(tiny_checkpoint, stores):
    command = ("generate", "stars", "--model", tiny_checkpoint, *BY_TOKEN, "--max-new-tokens", 2, "--memory-budget")
    line = refused(call(*command, "10MiB"), r"budget is 10\.0 MiB, but this needs .*estimates")
    assert not list((stores.parent / "layouts").glob("*-*-*"))
    least = int(re.search(r"give at least .*?(\d+)MiB", line)[1])
    succeeded(*command, f"{least + 16}MiB")  # this process holds a little more by now


@on_linux
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--keep-ratio", 0.4], "a keep ratio was asked for, but where tokens choose"),
        (setting("decode.prefill", "sparse"), "sparse prefill was asked for"),
        (setting("model.dtype", "float32"), "the dtype float32 was asked for"),
        (["--engine", "transformers"], "the engine transformers lets choose"),
    ],
    ids=str,
)
def test_what_goes_with_no_budget_where_tokens_choose(index, stores, options, says):
    refused(call("generate", "stars", "--index", index, *BY_TOKEN, "--memory-budget", "64GiB", *options), says)


def test_a_budget_for_llama_cpp(index):
    result = call("generate", "stars", "--index", index, "--engine", "llamacpp", "--memory-budget", "2GiB")
    refused(result, "memory_budget does not apply to the engine llamacpp")


def test_a_damaged_store_is_one_line(index, stores):
    command = ["generate", "stars", "--index", index, "--max-new-tokens", 2, "--memory-budget", "64GiB"]
    succeeded(*command)
    (store,) = stores.glob("*.neurons")
    store.write_bytes(store.read_bytes()[:-9])
    refused(call(*command), r"bytes, expected .*; delete it")
    store.unlink()
    succeeded(*command)
