"""An exported model is an ordinary one: stock transformers and llama.cpp load it and compute what generate computes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from test_compensation import language_model_of, some_texts
from tiny_index import PROMPTS
from tiny_models import N_LAYERS, save_tiny_checkpoint
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from coreinfer_sim.base.errors import ExportError
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.building.build import build_index
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.compact import installed
from coreinfer_sim.export.compact import Source, compact_weights, needed_bytes
from coreinfer_sim.export.gguf import _pre_tokenizer, bits_per_value, export_gguf
from coreinfer_sim.export.hf import check_exportable, export_hf
from coreinfer_sim.fitting.calibration import Fit, fit_layers
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model

SOURCE = Source("some-model", "some-index", "abc", 3, 0.5, True, "f32")
WITHOUT_BIASES = ("Mistral", "Qwen3", "Gemma", "Gemma 2", "Gemma 3", "Phi-3", "OLMo-2")
"""Mistral because the tiny one attends to a window."""


class _Tokenizer:
    """Export asks a tokenizer to save itself; the tiny families have none of their own."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def exportable(model):
    return replace(language_model_of(model), tokenizer=_Tokenizer())


def logits_of(language_model, selection, ids):
    with installed(language_model.layers, selection), torch.inference_mode():
        return language_model.model(ids).logits


def stock_logits(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model, model(ids).logits


IDS = torch.tensor([[5, 9, 23, 7, 40, 11, 3, 64]])


def test_plain_sets_load_in_stock_transformers(model, tmp_path):
    language_model = exportable(model)
    layer = language_model.layers[0]
    kept = torch.arange(0, layer.d_ff, 2)
    selection = NeuronSelection("t", dict.fromkeys(range(N_LAYERS), kept))
    weights = compact_weights(language_model, selection, one_width=True)
    if layer.family.name == "Bloom":
        with pytest.raises(ExportError, match="fixes the width"):
            export_hf(language_model, weights, SOURCE, tmp_path / "out")
        return
    export_hf(language_model, weights, SOURCE, tmp_path / "out")
    stock, logits = stock_logits(tmp_path / "out", IDS)
    assert type(stock) is type(model)
    assert torch.allclose(logits, logits_of(language_model, selection, IDS), rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "out/coreinfer_sim.json").read_text())["which"] == 3
    assert (tmp_path / "out/tokenizer.json").exists() and (tmp_path / "out/generation_config.json").exists()


def test_square_matrices_of_gpt2_are_laid_out_as_it_stores_them(tmp_path):
    config = transformers.GPT2Config(vocab_size=80, n_positions=64, n_embd=64, n_layer=N_LAYERS, n_head=4, n_inner=256)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    language_model = exportable(model)
    kept = torch.arange(0, 256, 4)  # as many as the model is wide
    selection = NeuronSelection("t", dict.fromkeys(range(N_LAYERS), kept))
    export_hf(language_model, compact_weights(language_model, selection, one_width=True), SOURCE, tmp_path / "out")
    _, logits = stock_logits(tmp_path / "out", IDS)
    assert torch.allclose(logits, logits_of(language_model, selection, IDS), rtol=1e-3, atol=1e-4)


def test_compensated_sets_load_in_stock_transformers_or_are_refused(model, tmp_path):
    language_model = exportable(model)
    layer = language_model.layers[0]
    n_kept = [layer.d_ff // 3, layer.d_ff // 2, layer.d_ff // 2]
    selection = fit_layers(language_model, some_texts(10), n_kept, Fit())
    weights = compact_weights(language_model, selection, one_width=True)
    if layer.family.name in (*WITHOUT_BIASES, "Bloom"):
        assert layer.family.name == "Bloom" or weights.has_bias
        with pytest.raises(ExportError, match="generate"):
            check_exportable(language_model, weights.has_bias)
        return
    export_hf(language_model, weights, SOURCE, tmp_path / "out")
    stock, logits = stock_logits(tmp_path / "out", IDS)
    expected = logits_of(language_model, selection, IDS)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    assert type(stock).__name__ == ("LlamaForCausalLM" if layer.family.name == "Qwen2" else type(model).__name__)


def test_what_it_takes_on_disk(models, tmp_path):
    language_model = exportable(models["llama"])
    weights = compact_weights(language_model, NeuronSelection("t", {1: torch.arange(20)}), one_width=False)
    export_hf(language_model, weights, SOURCE, tmp_path / "out")
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert needed_bytes(weights, 4) <= size < needed_bytes(weights, 4) + 10_000
    assert bits_per_value("q8_0") == 8.5 and bits_per_value("q4_k_m") == 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Wide enough that widths are rounded."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("wide"), intermediate_size=192)


@pytest.fixture(scope="module")
def wide(checkpoint):
    return load_model(checkpoint, "float32")


@pytest.fixture(scope="module")
def index(checkpoint, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{q} {n}"}) + "\n" for q in PROMPTS for n in "123")
    )
    config = BuildConfig(clusters=3, gamma=0.5)
    build_index(checkpoint, str(folder / "prompts.jsonl"), folder / "index", config, encoder=encoder, threads=1)
    return folder / "index"


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
    selection = fit_layers(wide, some_texts(10), n_kept, Fit())
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


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command_writes_models_and_their_router(index, checkpoint, tmp_path):
    out = tmp_path / "out"
    given = (index, "--model", checkpoint, "--keep-ratio", 0.5, "--out", out)
    result = run("export", *given, "--cluster", "all", "--cluster", "global", "--manifest", "--json")
    assert result.exit_code == 0, result.output
    router = json.loads((out / "router.json").read_text())
    n_clusters = len(router["clusters"])
    assert [each["path"] for each in json.loads(result.stdout)] == [
        str(out / name) for name in (*(f"cluster-{c:04d}" for c in range(n_clusters)), "global", "router.json")
    ]
    assert router["fallback"] == "global" and router["clusters"][1]["file"] == "cluster-0001"
    loaded = SemanticIndex.load(index)
    assert np.allclose([each["centroid"] for each in router["clusters"]], loaded.centroids, atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "cluster-0001")
    ids = tokenizer("Stars form", return_tensors="pt")["input_ids"]
    _, logits = stock_logits(out / "cluster-0001", ids)
    lm = load_model(checkpoint)
    assert torch.allclose(
        logits, logits_of(lm, loaded.cluster_selection(1, 128 / 192), ids), atol=1e-3
    )  # 96, rounded up
    written = (out / "cluster-0000/model.safetensors").stat().st_mtime_ns
    again = run("export", f"{given[0]}/", *given[1:], "--cluster", "all")  # the same index in other words
    assert again.exit_code == 0 and f"{n_clusters} of {n_clusters} models there already" in again.output
    assert (out / "cluster-0000/model.safetensors").stat().st_mtime_ns == written
    other = run("export", *given[:3], "--keep-ratio", 0.4, "--out", out, "--cluster", 0)
    assert other.exit_code == 1 and "holds something else than was asked for" in other.output
    (out / "cluster-0000/coreinfer_sim.json").unlink()
    other = run("export", *given, "--cluster", 0)
    assert other.exit_code == 1 and "holds something else than was asked for" in other.output
    assert run("export", *given, "--cluster", 0, "--force").exit_code == 0
    assert (out / "cluster-0000/model.safetensors").stat().st_mtime_ns > written
    assert not list(out.glob(".*"))


def test_a_broken_off_export_goes_on(index, checkpoint, tmp_path, monkeypatch):
    given = ("export", index, "--model", checkpoint, "--keep-ratio", 0.5, "--format", "gguf", "--type", "f16")
    given = (*given, "--cluster", "all", "--manifest", "--out", tmp_path)
    real, written = export_gguf, []

    def broken_off(*arguments):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(arguments[3])
        real(*arguments)

    monkeypatch.setattr("coreinfer_sim.export.gguf.export_gguf", broken_off)
    result = run(*given)
    assert result.exit_code == 130 and "run the same command again to go on" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["cluster-0000.gguf"]
    monkeypatch.undo()
    first = (tmp_path / "cluster-0000.gguf").stat()
    result = run(*given)
    assert result.exit_code == 0 and "1 of 3 models there already" in result.output
    assert (tmp_path / "cluster-0000.gguf").stat().st_mtime_ns == first.st_mtime_ns
    router = json.loads((tmp_path / "router.json").read_text())
    assert router["bytes"] == {path.name: path.stat().st_size for path in tmp_path.glob("*.gguf")}
    (tmp_path / "cluster-0001.gguf").write_bytes(b"something else")
    result = run(*given)
    assert result.exit_code == 1 and "cluster-0001.gguf exists already and holds something else" in result.output


def test_byte_pairs_are_merged_as_the_tokenizer_cuts_text_or_not_at_all():
    def name_of(pre_tokenizer):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizer
        return _pre_tokenizer(SimpleNamespace(tokenizer=SimpleNamespace(backend_tokenizer=tokenizer)))

    cut = pre_tokenizers
    assert name_of(cut.ByteLevel(add_prefix_space=False)) == "gpt-2"
    assert name_of(cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel()])) == "smollm"
    single = cut.Split(
        Regex(r"\p{N}| ?[^\s\p{L}\p{N}]+"), "isolated"
    )  # digits one by one, in another way than smollm's
    with pytest.raises(ExportError, match="cuts text in a way unknown here"):
        name_of(cut.Sequence([single, cut.ByteLevel(use_regex=False)]))


def test_what_cannot_be_exported(index, checkpoint, tmp_path, monkeypatch):
    given = ("export", index, "--model", checkpoint, "--out", tmp_path / "out")
    result = run(*given, "--cluster", 99)
    assert result.exit_code == 1 and "expected 0 to" in result.output
    assert run(*given, "--cluster", "x").exit_code == 2
    assert run(*given, "--cluster", 0, "--type", "q8_0").exit_code == 2
    for ratio in ("1.7", "0", "-1", "nan"):
        result = run(*given, "--cluster", 0, "--keep-ratio", ratio)
        assert result.exit_code == 1 and "expected a number above 0 and at most 1" in result.output
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run(*given, "--cluster", 0, "--format", "gguf", "--type", "q4_k_m")
    assert result.exit_code == 1 and "llama-quantize, which is not on the PATH" in result.output
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10))
    result = run(*given, "--cluster", 0)
    assert result.exit_code == 1 and "are free in" in result.output
    assert not list((tmp_path / "out").iterdir())


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
    with pytest.raises(ExportError, match="OPT models are not written as GGUF"):
        export_gguf(language_model, weights, SOURCE, tmp_path / "out.gguf", "f32")
