"""The type that a model computes in is the stored one, or float32 where the processor has no instructions for that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import saved, with_json, with_tensors
from exportable import SOURCE
from tiny_models import save_tiny_checkpoint
from transformers import AutoModelForCausalLM

from coreinfer_sim.base.errors import ModelError, UnsupportedModelError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.export.gguf import export_gguf
from coreinfer_sim.export.weights import compact_weights
from coreinfer_sim.models.budgeted import load_within
from coreinfer_sim.models.loading import dtype_name, load_model, usable
from coreinfer_sim.models.weightless import open_weightless

SUPPORTED = {
    torch.float32: True,
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
BLOCK = 16


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
def test_what_auto_computes_in(dtype, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "stored")
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    expected = dtype if SUPPORTED[dtype] else torch.float32
    model = load_model(folder, device="cpu").model
    assert usable(dtype, "cpu") is model.dtype is expected
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert usable(dtype, "cuda") is dtype
    named = str(dtype).removeprefix("torch.")
    assert load_model(folder, dtype=named, device="cpu").model.dtype is dtype  # who names a type gets it


@pytest.mark.parametrize("device", ["cuda", "no-such-device"])
def test_a_device_that_is_not_there(device, tmp_path):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folder = save_tiny_checkpoint(tmp_path / "model")
    with pytest.raises(ModelError, match=f"the device '{device}' cannot be used, as this machine has cpu"):
        load_model(folder, device=device)


def test_the_output_head_is_given_packed_hidden_states(tmp_path):
    model = load_model(save_tiny_checkpoint(tmp_path / "model")).model
    given = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _head, args: given.append(args[0]))
    ids = torch.arange(5, 17).view(2, 6)
    whole = model(input_ids=ids).logits
    for rows, n_last in ((1, 1), (1, 3), (2, 1)):
        last = model(input_ids=ids[:rows], logits_to_keep=n_last).logits
        assert torch.allclose(last, whole[:rows, -n_last:], atol=1e-5)
        d_model = model.config.hidden_size
        assert given[-1].stride() == (n_last * d_model, d_model, 1)  # else torch copies the head, see `_packed`


def test_a_type_is_known_by_any_of_its_names(tiny_checkpoint):
    for given in ("bf16", "torch.bfloat16", "BFloat16", torch.bfloat16):
        assert dtype_name(given) == "bfloat16"
    assert [dtype_name(each) for each in ("half", "fp16", "float", "fp32", "auto")] == [
        "float16",
        "float16",
        "float32",
        "float32",
        "auto",
    ]
    assert load_model(tiny_checkpoint, "half", "cpu").model.dtype is torch.float16
    with pytest.raises(ModelError, match="dtype is 'int7', expected one of auto, stored, float32"):
        load_model(tiny_checkpoint, "int7")


def test_fp8_in_blocks_is_widened_with_a_note_and_saved_as_what_it_is(tmp_path):
    folder, expected = saved(tmp_path / "model", dtype="bfloat16"), {}

    def quantise(tensors):
        for name, weight in list(tensors.items()):
            if not name.endswith("_proj.weight"):
                continue
            blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            codes = (blocks / scale).to(torch.float8_e4m3fn)
            tensors[name] = codes.reshape(weight.shape)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0]
            expected[name] = (codes.float() * scale).reshape(weight.shape)

    with_tensors(folder, quantise)
    with_json(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    loaded = load_model(str(folder), "float32", "cpu")
    assert any("FP8 with a scale for each 16 × 16" in note for note in loaded.notes)
    weights = loaded.model.state_dict()
    assert len(expected) == 7 * len(loaded.layers)
    for name, value in expected.items():
        assert torch.equal(weights[name], value)
    loaded.model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again/config.json").read_text()
    with pytest.raises(UnsupportedModelError, match="quantised .FP8."):
        load_within(str(folder), lambda _model, _shape: 64)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_gguf_file_of_plain_weights_is_read_as_it_stands(kind, dtype, tiny_checkpoint, tmp_path):
    original = load_model(tiny_checkpoint, "float32", "cpu")
    weights = compact_weights(original, NeuronSelection("dense"), one_width=True)
    export_gguf(original, weights, SOURCE, tmp_path / "model.gguf", kind)
    loaded = load_model(str(tmp_path / "model.gguf"), "stored", "cpu")
    assert loaded.model.dtype is dtype
    found, expected = loaded.layers[1].output.weight, original.layers[1].output.weight
    assert torch.equal(found, expected.to(dtype))


def test_what_lies_beside_a_gguf_file_is_not_part_of_it(exported, tiny_checkpoint, tmp_path):
    """Such as the tokenizer and settings of the checkpoint that it was made from, or of another model."""
    alone, beside = tmp_path / "alone" / "model.gguf", tmp_path / "beside" / "model.gguf"
    for path in (alone, beside):
        path.parent.mkdir()
        shutil.copy(exported / "dense.gguf", path)
    for path in Path(tiny_checkpoint).iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, beside.parent)
    (beside.parent / "generation_config.json").write_text(json.dumps({"max_new_tokens": 1, "eos_token_id": 7}))
    one, two = (load_model(str(path), "stored", "cpu") for path in (alone, beside))
    for name in ("chat_template", "eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(one.tokenizer, name) == getattr(two.tokenizer, name), name
    assert one.model.generation_config == two.model.generation_config
    assert open_weightless(str(beside), {"llama"}).tokenizer.chat_template == one.tokenizer.chat_template
