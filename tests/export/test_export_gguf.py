"""An exported GGUF file is an ordinary one: llama.cpp loads it and computes what generate computes."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from exportable import SOURCE, exportable, fitted
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from coreinfer_sim.base.errors import ExportError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.export.gguf import export_gguf, pre_tokenizer_name
from coreinfer_sim.export.weights import compact_weights
from coreinfer_sim.models.loading import load_model


@pytest.fixture(scope="module")
def wide(wide_checkpoint):
    return load_model(wide_checkpoint, "float32")


def llama_cpp_continuation(path, prompt, n):
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    answer = xllamacpp.Server(parameters).handle_completions(
        {"prompt": prompt, "n_predict": n, "temperature": 0.0, "logprobs": 1}
    )
    return answer["choices"][0]["text"]


@pytest.mark.parametrize("n_kept", [[60, 60, 60], [40, 100, 192]], ids=["one width", "several widths"])
def test_llama_cpp_computes_the_same(wide, n_kept, tmp_path):
    selection = fitted(wide, n_kept)
    weights = compact_weights(wide, selection, one_width=False)
    assert weights.widths == [-(-n // 64) * 64 for n in n_kept]
    path = tmp_path / "wide.gguf"
    export_gguf(wide, weights, SOURCE, path, "f32")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    assert arch == ("llama" if len(set(weights.widths)) == 1 else "deci")
    assert fields["coreinfer_sim.set"] == "cluster-0003" and fields["coreinfer_sim.model"] == "some-model"
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    assert np.array_equal(down.data, weights.parameters["model.layers.0.mlp.down_proj.weight"].numpy())
    prompt = wide.tokenizer("Stars form when clouds of gas", return_tensors="pt")
    with installed(wide.layers, selection):
        expected = wide.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = wide.tokenizer.decode(expected[0, prompt["input_ids"].shape[1] :])
    assert llama_cpp_continuation(path, "Stars form when clouds of gas", 12) == text


def test_byte_pairs_are_merged_as_the_tokenizer_cuts_text_or_not_at_all():
    def name_of(pre_tokenizer):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizer
        return pre_tokenizer_name(SimpleNamespace(backend_tokenizer=tokenizer))

    cut = pre_tokenizers
    assert name_of(cut.ByteLevel(add_prefix_space=False)) == "gpt-2"
    assert name_of(cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel()])) == "smollm"
    single = cut.Split(
        Regex(r"\p{N}| ?[^\s\p{L}\p{N}]+"), "isolated"
    )  # digits one by one, in another way than smollm's
    with pytest.raises(ExportError, match="cuts text in a way unknown here"):
        name_of(cut.Sequence([single, cut.ByteLevel(use_regex=False)]))


def test_a_failing_quantiser_is_told_and_leaves_nothing(wide, tmp_path, monkeypatch):
    quantiser = tmp_path / "llama-quantize"
    quantiser.write_text("#!/bin/sh\necho no such type >&2\nexit 3\n")
    quantiser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    weights = compact_weights(wide, NeuronSelection("t", {}), one_width=False)
    with pytest.raises(ExportError, match="no such type"):
        export_gguf(wide, weights, SOURCE, tmp_path / "out.gguf", "q4_k_m")
    assert [path.name for path in tmp_path.iterdir()] == ["llama-quantize"]


def test_families_without_gguf_are_refused(models, tmp_path):
    language_model = exportable(models["opt"])
    weights = compact_weights(language_model, NeuronSelection("t", {}), one_width=False)
    with pytest.raises(ExportError, match="opt models are not written as GGUF"):
        export_gguf(language_model, weights, SOURCE, tmp_path / "out.gguf", "f32")
