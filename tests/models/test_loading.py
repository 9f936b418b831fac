"""The type that a model computes in is the stored one, or float32 where the processor has no instructions for that."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny_checkpoint
from transformers import AutoModelForCausalLM

from coreinfer_sim.base.errors import ModelError
from coreinfer_sim.models.loading import load_model, usable

SUPPORTED = {
    torch.float32: True,
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
def test_what_auto_computes_in(dtype, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "stored")
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    expected = dtype if SUPPORTED[dtype] else torch.float32
    assert usable(dtype, "cpu") is load_model(folder, device="cpu").model.dtype is expected
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
