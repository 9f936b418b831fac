"""Models as people have them: every command refuses what is not whole, and says what it passed over."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints import rewritten, saved, with_json, with_tensors
from commands import ONE_PROCESS, call, refused, succeeded
from encoders import static
from safetensors.torch import load_file
from transformers import AutoTokenizer


def without_head(folder):
    return with_tensors(saved(folder), lambda tensors: tensors.pop("lm_head.weight"))


def adapter(folder):
    return with_json(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="some/base")


def made_adapter(folder):
    folder.mkdir()
    return adapter(folder)


def quantised(folder):
    return with_json(saved(folder), quantization_config={"quant_method": "gptq", "bits": 4})


def zero_bytes(folder):
    saved(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


BROKEN = {
    "no head": (without_head, ("lacks 1 of the 30", "lm_head.weight")),
    "adapter": (made_adapter, ("is an adapter", "some/base", "merge_and_unload")),
    "GPTQ": (quantised, ("quantised", "GPTQ")),
    "zero bytes": (zero_bytes, ("model.safetensors", "fetch it again")),
}
COMMANDS = {
    "generate": lambda path, index, rows: ["generate", "stars", "--index", index],
    "generate in a budget": lambda path, index, rows: [
        "generate", "stars", "--index", index, "--memory-budget", "8GiB",
    ],
    "build-index": lambda path, index, rows: ["build-index", rows, "--out", path / "new", *ONE_PROCESS],
    "serve": lambda path, index, rows: ["serve", "--index", index],
    "evaluate": lambda path, index, rows: ["evaluate", rows],
    "tune": lambda path, index, rows: ["tune", rows, "--index", index, "--part", "0:100"],
    "export": lambda path, index, rows: ["export", index, "--cluster", "dense", "--out", path / "new"],
    "check": lambda path, index, rows: ["check", index],
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    prompts = [f"how do {noun} form , case {n} ?" for n in range(20) for noun in ("stars", "bread")]
    texts = [{"id": str(n), "prompt": prompt, "completion": "They do."} for n, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(("make", "says"), BROKEN.values(), ids=BROKEN)
def test_every_command_refuses_a_model_that_is_not_whole(command, make, says, index, rows, tmp_path):
    folder = make(tmp_path / "model")
    refused(call(*command(tmp_path, index, rows), "--model", folder), *says)
    assert not (tmp_path / "new").exists()


def test_a_part_of_a_split_gguf_file(exported, tmp_path):
    path = rewritten(exported / "dense.gguf", tmp_path / "m-00001-of-00002.gguf", without=["blk.2."])
    refused(call("generate", "stars", "--model", path, "--mode", "dense"), "part 1 of 2", "llama-gguf-split --merge")


def test_settings_of_training_and_other_parts_are_notes(tmp_path):
    folder = with_tensors(saved(tmp_path / "model"), lambda tensors: tensors.update({"visual.x": torch.ones(2)}))
    for name in ("config.json", "generation_config.json"):
        with_json(folder, name, use_cache=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    for more in ([], ["--memory-budget", "8GiB"]):
        done = succeeded("generate", "stars", "--model", folder, "--mode", "dense", "--max-new-tokens", "3", *more)
        notes = [line for line in done.stderr.splitlines() if line.startswith("Note: ")]
        assert [any(word in note for note in notes) for word in ("use_cache", "[PAD]", "visual.x")] == [True] * 3
        assert len(notes) == 3


def test_an_index_of_a_static_encoder(rows, tiny_checkpoint, tmp_path):
    encoder, out = static(tmp_path / "encoder"), tmp_path / "new"
    more = ["--set", f"model.encoder={encoder}", "--clusters", "2"]
    succeeded("build-index", rows, "--model", tiny_checkpoint, "--out", out, *ONE_PROCESS, *more)
    assert "8 dimensions" in succeeded("info", out).stdout
    assert "cluster" in succeeded("lookup", out, "how do stars form", "-k", "2").stdout
    succeeded("generate", "how do stars form", "--index", out, "--max-new-tokens", "3")


def test_weights_of_torch_alone(tmp_path):
    folder = saved(tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    whole = shutil.copytree(folder, tmp_path / "whole")
    (folder / "model.safetensors").unlink()
    options = ["--mode", "dense", "--max-new-tokens", "5"]
    texts = [succeeded("generate", "stars", "--model", each, *options).stdout for each in (whole, folder)]
    assert texts[0] == texts[1]
