"""Weights rounded to the formats of files, and the bytes that they count for."""

from __future__ import annotations

import copy

import gguf
import pytest
import torch
from scored import ROWS
from tiny_models import tiny_model
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.choosing.predictors import random_selection
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import compact_model
from coreinfer_sim.engines.llamacpp.server import LlamaServer
from coreinfer_sim.evaluation.contenders import Contender, parse_contenders
from coreinfer_sim.evaluation.formats import engine_for, file_bytes, is_quantised, rounded, rounded_model
from coreinfer_sim.evaluation.run import evaluate
from coreinfer_sim.evaluation.summary import summarise
from coreinfer_sim.models.loading import LanguageModel, load_model
from coreinfer_sim.models.mlps import dense_bytes, find_mlps, other_bytes


def test_rounding_is_closer_with_more_bits_and_leaves_the_original_alone(language_model):
    weight = torch.randn(7, 45)
    q8, q4 = (float((rounded(weight, kind) - weight).abs().mean()) for kind in ("q8_0", "q4_0"))
    assert 0 < q8 < q4 / 4
    before = {name: value.clone() for name, value in language_model.model.state_dict().items()}
    variant = rounded_model(language_model, "q4_0")
    assert all(torch.equal(value, before[name]) for name, value in language_model.model.state_dict().items())
    own = variant.layers[0].output.weight
    assert not torch.equal(own, language_model.layers[0].output.weight)
    assert own is variant.model.get_submodule(path_of(variant.model, variant.layers[0].output)).weight


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_weights_are_rounded_as_by_ggml_to_the_bit(kind):
    halves = torch.randint(-254, 255, (50, 96)) / 2  # of a scale about 1
    for weight in (
        torch.randn(300, 1000),
        torch.randn(3, 45).bfloat16(),
        halves,
        1e-9 * torch.randn(2, 64),
        halves * 0,
    ):
        n_in, type_ = weight.shape[1], gguf.GGMLQuantizationType[kind.upper()]
        filled = torch.nn.functional.pad(weight.float(), (0, -n_in % 32)).numpy()
        expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(filled, type_), type_))
        assert torch.equal(rounded(weight, kind), expected[:, :n_in].to(weight.dtype))


def test_a_rounded_model_computes_as_llama_cpp_does(quantised_file, tmp_path):
    """Rounding weights alone is not what llama.cpp does: log-probabilities would lie further from its own."""
    pytest.importorskip("xllamacpp")
    path = quantised_file("q8_0")
    assert is_quantised(path) and not is_quantised(quantised_file("f32"))
    path = quantised_file("q8_0")
    whole = load_model(str(tmp_path / "source"), "float32")
    ids = whole.tokenizer("Stars form when clouds of gas", return_tensors="pt")["input_ids"]
    request = {"prompt": ids[0].tolist(), "n_predict": 1, "temperature": 0.0, "n_probs": len(whole.tokenizer)}
    server = LlamaServer(path, str(tmp_path), 64, 1)
    (step,) = server.complete(request)["completion_probabilities"]
    expected = {each["id"]: each["logprob"] for each in step["top_logprobs"]}
    known = torch.tensor(sorted(expected))
    assert len(known) > len(whole.tokenizer) / 2
    embeddings = whole.model.get_input_embeddings().weight
    embeddings.data = rounded(embeddings.data, "q8_0")  # in the file, too
    as_ggml = rounded_model(whole, "q8_0").model
    weights_alone = copy.deepcopy(as_ggml)
    for module in weights_alone.modules():
        module._forward_pre_hooks.clear()
    wanted = torch.tensor([expected[int(number)] for number in known])
    error = {}
    for name, model in (("as ggml", as_ggml), ("weights alone", weights_alone)):
        found = model(ids).logits[0, -1].log_softmax(-1)[known]
        error[name] = float((found - wanted).detach().abs().mean())
    assert error["as ggml"] < 0.75 * error["weights alone"], error  # its cache is in float16, besides


def path_of(model, wanted) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def test_only_formats_of_files_decode_a_rounded_model(language_model):
    for weights, kind in (("16bit", Weights.STORED), ("int8", Weights.INT8)):
        model, engine = engine_for(language_model, weights, DecodeConfig())
        assert model is language_model and engine.model is model.model
        assert (engine.name, engine.config.weights) == ("lean", kind)
    model, engine = engine_for(language_model, "q4_0", DecodeConfig(engine="lean"))
    assert model is not language_model and engine.model is model.model and engine.name == "transformers"


def test_held_neurons_are_cut_before_they_are_rounded(language_model):
    _, engine = engine_for(language_model, "q4_0", DecodeConfig())
    half = random_selection(language_model.layers, range(len(language_model.layers)), 0.5, seed=0)
    (held,) = engine.prepare([half])
    for number, parts in compact_model(language_model.layers, half).items():
        for name, module in parts.items():
            assert torch.equal(held.layers[number][name].weight, rounded(module.weight.data, "q4_0"))
    assert engine.mlp_bytes([held]) == round(dense_bytes(language_model.layers) / 2 * 4.5 / 32)


@pytest.mark.parametrize("key", ["llama", "gpt2"])
def test_of_4_bits_all_matrices_but_the_head_have_4(key):
    model = tiny_model(key)
    whole = LanguageModel(model, None, key, find_mlps(model))
    variant = rounded_model(whole, "q4_0").model
    matrices = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    assert len(matrices) > 6
    for name, weight in matrices.items():
        kind = "q8_0" if name == "lm_head" else "q4_0"
        flat = isinstance(model.get_submodule(name), Conv1D)
        wanted = rounded(weight.data.T, kind).T if flat else rounded(weight.data, kind)
        assert torch.equal(variant.get_submodule(name).weight, wanted) and not torch.equal(wanted, weight)
    _, engine = engine_for(whole, "q4_0", DecodeConfig())
    (dense,) = engine.prepare([NeuronSelection("dense")])
    assert engine.mlp_bytes([dense]) == round(dense_bytes(whole.layers) * 4.5 / 32)
    head = model.lm_head.weight.numel() * model.dtype.itemsize
    others = other_bytes(model, whole.layers) - head
    assert engine.other_bytes() == round(others * 4.5 / 32 + head * 8.5 / 32)
    _, in_8_bits = engine_for(whole, "q8_0", DecodeConfig())
    assert in_8_bits.other_bytes() == pytest.approx((others + head) * 8.5 / 32, abs=1)


def test_another_file_of_the_model_stands_beside_it(quantised_file, tmp_path):
    path = quantised_file("q8_0")
    whole = load_model(str(tmp_path / "source"), "float32")
    contenders = parse_contenders(["dense", "all", "griffin"], [0.5], ["energy"], ["16bit", "q8_0", str(path)])
    assert [str(each) for each in contenders if each.of_file] == ["dense model.gguf"]
    found = {row["contender"]: row for row in summarise(evaluate(whole, contenders, ROWS))}
    of_file, rounded_here = found["dense model.gguf"], found["dense q8_0"]
    assert 1 / 3 < of_file["kl"] / rounded_here["kl"] < 3  # the file rounds embeddings too
    mlp, other = file_bytes(path)
    sizes = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors}
    assert mlp == sum(size for name, size in sizes.items() if "ffn_up" in name) * 3
    assert (of_file["mlp_bytes_per_token"], of_file["total_bytes_per_token"]) == (mlp, mlp + other)
    assert mlp + other == sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def test_files_that_cannot_stand_beside_a_model(quantised_file, language_model, tmp_path):
    path = quantised_file("q8_0")
    with pytest.raises(ConfigError, match=r"holds another model than .*: layers, widths or vocabulary differ"):
        engine_for(language_model, str(path), DecodeConfig())
    with pytest.raises(ConfigError, match=r"no file .*none\.gguf, expected a GGUF file of the same model"):
        parse_contenders(["dense"], [1.0], ["energy"], [str(tmp_path / "none.gguf")])
    with pytest.raises(ConfigError, match="another file, which is read densely"):
        Contender("griffin", weights=str(path))
    second = tmp_path / "again" / path.name
    second.parent.mkdir()
    second.write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="have one name in the table"):
        parse_contenders(["dense"], [1.0], ["energy"], [str(path), str(second)])
