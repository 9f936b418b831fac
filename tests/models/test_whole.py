"""A model that is not whole, or whose configuration is another one's, is refused by both ways of loading."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import loads, refused_by_all, rewritten, saved, saved_family, with_json, with_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import coreinfer_sim
from coreinfer_sim.base.errors import GenerationError, ModelError, UnsupportedModelError
from coreinfer_sim.models.loading import load_model

IDS = torch.arange(5, 20)[None]
SOME = ["llama", "phi3", "opt", "gpt2", "gpt-neox", "gemma2"]
"""Gated, fused, flattened, Conv1D, a head of another name, more norms."""


def first_of(names, *parts: str) -> str:
    """Return the first tensor of the second layer whose name has one of some parts."""
    return next(name for name in sorted(names) if ".1." in name and any(part in name for part in parts))


def test_every_family_that_is_whole_loads_without_a_word(tiny, tmp_path):
    folder = saved_family(tmp_path / "model", tiny.key)
    first, second = loads(folder)
    assert list(first.notes) == list(second.notes) == []
    with torch.no_grad():
        assert torch.allclose(first.model(IDS).logits.float(), second.model(IDS).logits.float(), atol=1e-3)


@pytest.mark.parametrize("key", SOME)
@pytest.mark.parametrize(
    "parts",
    [("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"), ("norm", "ln_"), ("attn", "attention")],
    ids=["MLP", "norm", "attention"],
)
def test_a_missing_tensor_is_named(key, parts, tmp_path):
    folder = saved_family(tmp_path / "model", key)
    name = first_of(load_file(folder / "model.safetensors"), *parts)
    with_tensors(folder, lambda tensors: tensors.pop(name))
    refused_by_all(folder, ModelError, "lacks 1 of the", f"({name})", "fetch it again, whole")


@pytest.mark.parametrize("key", ["llama", "opt", "gpt-neox", "starcoder2"])
def test_an_output_head_that_is_not_tied_is_missed(key, tmp_path):
    folder = saved_family(tmp_path / "model", key)
    heads = [name for name in load_file(folder / "model.safetensors") if name.startswith(("lm_head", "embed_out"))]
    with_tensors(folder, lambda tensors: [tensors.pop(name) for name in heads])
    refused_by_all(folder, ModelError, f"lacks {len(heads)} of", "weight", "set tie_word_embeddings")


def test_many_missing_tensors_are_counted_and_a_few_named(tmp_path):
    def cut(tensors):
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    refused_by_all(
        with_tensors(saved(tmp_path / "model"), cut),
        ModelError,
        "lacks 9 of the 30 tensors",
        "model.layers.1.input_layernorm.weight, ",
        " and 6 more)",
    )


def test_names_of_a_wrapped_model_are_shown(tmp_path):
    def wrap(tensors):
        for name in list(tensors):
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    folder = with_tensors(saved(tmp_path / "model"), wrap)
    refused_by_all(folder, ModelError, "lacks 30 of the 30", "but holds 30 others (_orig_mod.lm_head.weight, ")


@pytest.mark.parametrize("stored", ["table", "head", "both"])
def test_a_tied_head_may_be_stored_under_either_name(stored, tmp_path):
    def change(tensors):
        if stored != "table":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if stored == "head":
            del tensors["model.embed_tokens.weight"]

    folder = with_tensors(saved(tmp_path / "model", tie_word_embeddings=True), change)
    first, second = loads(folder)
    with torch.no_grad():
        assert torch.allclose(first.model(IDS).logits.float(), second.model(IDS).logits.float(), atol=1e-3)
    if stored == "head":
        with_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
        refused_by_all(folder, ModelError, "model.embed_tokens.weight")


def test_a_head_that_is_stored_is_read_though_the_configuration_ties_it(tmp_path):
    folder = saved(tmp_path / "model")
    expected = load_model(str(folder)).model(IDS).logits
    for found in loads(with_json(folder, tie_word_embeddings=True)):
        assert torch.allclose(found.model(IDS).logits, expected, atol=1e-3)


def sharded(folder: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(saved(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_a_shard_that_is_listed_but_absent(tmp_path):
    shards = sharded(tmp_path / "model")
    loads(tmp_path / "model")
    shards[1].unlink()
    refused_by_all(
        tmp_path / "model", ModelError, f"lacks 1 of the {len(shards)} files", shards[1].name, "fetch the checkpoint"
    )


def test_a_tensor_that_is_listed_but_not_in_its_shard(tmp_path):
    shard = sharded(tmp_path / "model")[2]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    refused_by_all(tmp_path / "model", ModelError, "lacks 1 of the 30 tensors", name)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("llama", "model.layers.3.mlp.up_proj.weight"),
        ("llama", "model.layers.30.input_layernorm.weight"),
        ("llama", "model.layers.1.self_attn.q_proj.bias"),
        ("llama", "model.layers.1.self_attn.q_norm.weight"),
        ("llama", "model.layers.1.self_attn.sinks"),
        ("llama", "layers.1.another_norm.weight"),
        ("llama", "model.norm.bias"),
        ("llama", "lm_head.bias"),
        ("gpt2", "transformer.h.3.ln_1.weight"),
        ("gpt2", "h.2.mlp.gate.weight"),
        ("opt", "model.decoder.layers.1.self_attn.k_norm.weight"),
        ("gpt-neox", "gpt_neox.layers.1.mlp.up.weight"),
        ("bloom", "transformer.h.2.mlp.gate.bias"),
    ],
)
def test_a_tensor_that_the_decoder_has_no_place_for(key, name, tmp_path):
    folder = with_tensors(saved_family(tmp_path / "model", key), lambda tensors: tensors.update({name: torch.ones(32)}))
    refused_by_all(folder, ModelError, f"1 tensor that its configuration has no place for ({name})", "one model")


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("llama", ["vision_tower.encoder.layers.0.q_proj.weight", "multi_modal_projector.weight"]),
        ("qwen2", ["mtp.layers.0.mlp.up_proj.weight", "model.mtp_layers.0.norm.weight"]),
        ("llama", ["v_head.summary.weight"]),
        ("gpt-neox", ["visual.patch_embed.proj.weight", "gpt_neox.layers.0.attention.masked_bias"]),
        ("gpt2", ["h.0.attn.masked_bias"]),
        ("phi2", ["visual.norm.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_other_parts_and_old_buffers_are_a_note(key, names, tmp_path):
    folder = saved_family(tmp_path / "model", key)
    with_tensors(folder, lambda tensors: tensors.update({name: torch.ones(3) for name in names}))
    for found in loads(folder):
        (note,) = found.notes
        assert "passed over, as no part of its decoder" in note and names[0] in note


def test_the_layer_that_predicts_further_tokens_is_no_layer_of_the_decoder(tmp_path):
    folder = saved(tmp_path / "model")
    with_tensors(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(3)}))
    refused_by_all(folder, ModelError, "model.layers.3.eh_proj.weight")
    for found in loads(with_json(folder, num_nextn_predict_layers=1)):
        assert "model.layers.3.eh_proj.weight" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "shape"), [("model.layers.1.mlp.up_proj.weight", (40, 32)), ("model.norm.weight", (16,))]
)
def test_a_tensor_of_another_shape(name, shape, tmp_path):
    folder = with_tensors(saved(tmp_path / "model"), lambda tensors: tensors.update({name: torch.ones(shape)}))
    refused_by_all(folder, ModelError, "1 tensor of another shape", f"{name} of {list(shape)}, expected [")


def test_a_configuration_of_a_wider_model(tmp_path):
    folder = with_json(saved(tmp_path / "model"), intermediate_size=64)
    refused_by_all(folder, ModelError, "9 tensors of another shape", "of [32, 48], expected [32, 64]")


@pytest.mark.parametrize(
    "leaf", ["qweight", "qzeros", "weight_packed", "weight_scale_inv", "weight.absmax", "SCB", "scales"]
)
def test_weights_that_are_quantised_without_saying_so(leaf, tmp_path):
    def quantise(tensors):
        projection = "model.layers.1.mlp.up_proj"
        tensors[f"{projection}.{leaf}"] = tensors.pop(f"{projection}.weight").to(torch.int32)

    folder = with_tensors(saved(tmp_path / "model"), quantise)
    refused_by_all(folder, UnsupportedModelError, "are quantised", leaf, "GGUF file")


def test_an_adapter_that_was_saved_unmerged(tmp_path):
    def adapt(tensors):
        projection = "model.layers.1.self_attn.q_proj"
        tensors[f"{projection}.base_layer.weight"] = tensors.pop(f"{projection}.weight")
        tensors[f"{projection}.lora_A.default.weight"] = torch.zeros(4, 32)

    folder = with_tensors(saved(tmp_path / "model"), adapt)
    refused_by_all(folder, ModelError, "an adapter that is not merged", "merge_and_unload")


@pytest.mark.parametrize(
    ("without", "more", "says"),
    [
        (["blk.1.ffn_up"], [], "lacks 1 of the 30 tensors of its model (model.layers.1.mlp.up_proj.weight)"),
        (["output_norm"], [], "(model.norm.weight)"),
        (["token_embd"], [], "(model.embed_tokens.weight)"),
        (["blk.2."], [], "lacks 9 of the 30 tensors"),
        ([], [("blk.3.ffn_up.weight", (192, 32))], "no place for (blk.3.ffn_up.weight)"),
        ([], [("blk.1.attn_q.bias", (32,))], "no place for (blk.1.attn_q.bias)"),
    ],
    ids=["MLP", "norm", "table", "layer", "layer too many", "bias too many"],
)
def test_gguf_files_that_are_not_whole(without, more, says, exported, tmp_path):
    path = rewritten(
        exported / "dense.gguf",
        tmp_path / "model.gguf",
        without=without,
        more=[(name, np.zeros(shape, np.float32)) for name, shape in more],
    )
    with pytest.raises(ModelError) as raised:
        load_model(str(path))
    assert says in str(raised.value)


def test_other_tensors_of_a_gguf_file_are_a_note(exported, tmp_path):
    more = [("rope_freqs.weight", np.ones(4, np.float32))]
    found = load_model(str(rewritten(exported / "dense.gguf", tmp_path / "model.gguf", more=more)), "float32")
    assert len(found.notes) == 1 and "(rope_freqs.weight)" in found.notes[0]
    expected = load_model(str(exported / "dense.gguf"), "float32")
    assert list(expected.notes) == []
    assert torch.equal(found.model(IDS).logits, expected.model(IDS).logits)


def test_an_exported_set_with_biases_is_not_read_without_them(exported, tmp_path):
    """As transformers would: its Llama of a GGUF file has none."""
    biases = [(f"blk.{layer}.ffn_down.bias", np.ones(32, np.float32)) for layer in range(3)]
    path = rewritten(exported / "dense.gguf", tmp_path / "model.gguf", more=biases)
    assert "blk.0.ffn_down.bias" in {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    with pytest.raises(ModelError, match=r"3 tensors that its configuration has no place for \(blk.0.ffn_down.bias"):
        load_model(str(path))


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_a_weight_that_is_no_number_is_said_and_not_decoded(engine, tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    folder = with_tensors(saved(tmp_path / "model"), spoil)
    with (
        coreinfer_sim.load(None, str(folder), mode="dense", engine=engine) as generator,
        pytest.raises(GenerationError, match=r"gives what is no number \(NaN\) for the prompt"),
    ):
        generator.generate("How do stars form?", max_new_tokens=4)
