"""The memory plan, and models loaded by it, whose dense MLPs stay in the store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_checkpoint, tiny_model, tiny_tokenizer

from coreinfer_sim.base.errors import BudgetError, ConfigError, ModelError
from coreinfer_sim.base.settings import Fallback, Mode
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.engines.cutting import compact_projections
from coreinfer_sim.generation.memory_plan import MIB, ModelShape, Use, load_within, most_kept, plan_budget
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.fingerprint import weight_sketch
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import find_mlps
from coreinfer_sim.models.streaming import Scratch

AMPLE = 64 << 30
USE = Use(n_kept=[24] * 3, n_prompt=8, n_new=16)
IDS = torch.tensor([[5, 9, 30, 31, 32, 7, 11]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


def saved(folder: Path, key: str, **options) -> str:
    """Save a tiny model of a family with a tokenizer."""
    tiny_model(key).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def streamed(folder: str):
    return load_within(folder, AMPLE, lambda _tokenizer, _layers: USE)[0]


def test_every_family_streams_what_its_dense_model_computes(tiny, model, tmp_path):
    folder = saved(tmp_path / "model", tiny.key)
    found = streamed(folder)
    dense, layers = find_mlps(model), found.layers
    assert all(layer.store is not None for layer in layers)
    assert [(a.d_model, a.d_ff, a.n_bytes) for a in layers] == [(a.d_model, a.d_ff, a.n_bytes) for a in dense]
    assert weight_sketch(layers) == weight_sketch(dense)
    ids = torch.tensor([0, 1, 2, 11, 30, tiny.d_ff - 1])
    for ours, theirs in zip(layers, dense, strict=True):
        a, b = compact_projections(ours, ids), compact_projections(theirs, ids)
        assert list(a) == list(b)
        for name in a:
            assert torch.equal(a[name].weight, b[name].weight)
            assert (a[name].bias is None) == (b[name].bias is None)
            assert a[name].bias is None or torch.equal(a[name].bias, b[name].bias)
    with torch.no_grad():
        assert torch.allclose(found.model(IDS).logits, model(IDS).logits, atol=2e-4)


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("key", ["llama-relu-bias", "gemma2", "phi3", "opt", "gpt2"])
def test_tokens_under_a_budget_are_those_without_one(tmp_path, key, prefill):
    folder = saved(tmp_path / "model", key)
    tokens = []
    for lm in (load_model(folder), streamed(folder)):
        lm.model.generation_config.eos_token_id = None
        predictor = make_predictor("random", lm.layers, keep_ratio=0.5, sparse_layers="1:")
        sparse = SparseModel(lm.model, predictor, lm.tokenizer, prefill=prefill)
        for _ in range(2):
            tokens.append(sparse.generate(IDS, max_new_tokens=12, do_sample=False))
    assert all(torch.equal(each, tokens[0]) for each in tokens)


def test_stability_reads_the_prompts_activations_from_layers_on_disk(tmp_path):
    folder = saved(tmp_path / "model", "qwen2")
    chosen = []
    for lm in (load_model(folder), streamed(folder)):
        sparse = SparseModel(lm.model, make_predictor("stability", lm.layers, keep_ratio=0.3), lm.tokenizer)
        sparse.generate(IDS, max_new_tokens=3, do_sample=False)
        chosen.append(sparse.latest.selections[0].ids)
    assert all(torch.equal(chosen[0][n], chosen[1][n]) for n in chosen[0])


def test_layers_on_disk_are_read_once_for_a_long_prompt(tmp_path, monkeypatch):
    """The lean engine reads it in one pass, though it would take several where the weights are in memory."""
    monkeypatch.setattr("coreinfer_sim.engines.lean.engine.PASS_TOKENS", 3)
    lm, read = streamed(saved(tmp_path / "model", "llama")), []
    blocks = Scratch.blocks
    monkeypatch.setattr(Scratch, "blocks", lambda self, store: read.append(store) or blocks(self, store))
    sparse = SparseModel(lm.model, make_predictor("random", lm.layers, keep_ratio=0.5), engine="lean")
    sparse.generate(IDS, max_new_tokens=3, do_sample=False)
    assert len(read) == len(lm.layers)


def test_sparse_prefill_uses_the_compact_mlps_only(tmp_path, monkeypatch):
    lm = streamed(saved(tmp_path / "model", "llama"))
    monkeypatch.setattr(Scratch, "blocks", lambda *_: pytest.fail("a dense layer was read"))
    predictor = make_predictor("random", lm.layers, keep_ratio=0.5)
    SparseModel(lm.model, predictor, lm.tokenizer, prefill="sparse").generate(IDS, max_new_tokens=3, do_sample=False)


def test_sparse_prefill_needs_the_set_before_the_prompt(models):
    layers = find_mlps(models["llama"])
    with pytest.raises(ConfigError, match="stability mode may take it"):
        SparseModel(models["llama"], make_predictor("stability", layers, keep_ratio=0.5), prefill="sparse")
    with pytest.raises(ConfigError, match="expected one of dense, sparse"):
        SparseModel(models["llama"], make_predictor("dense", layers), prefill="none")


def test_blocks_of_few_neurons_and_bfloat16_compute_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("coreinfer_sim.models.streaming.BLOCK_BYTES", 2000)
    folder = tmp_path / "model"
    tiny_model("llama").bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    lm = streamed(str(folder))
    assert lm.model.dtype is torch.bfloat16
    with torch.no_grad():
        expected = load_model(str(folder), "stored").model(IDS).logits
        assert torch.allclose(lm.model(IDS).logits.float(), expected.float(), atol=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_checkpoints_and_tied_tables(tmp_path, tied):
    tokenizer = tiny_tokenizer()
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    lm = streamed(str(tmp_path / "model"))
    with torch.no_grad():
        assert torch.allclose(lm.model(IDS).logits, model(IDS).logits, atol=1e-5)
    resident = sum(p.numel() for p in lm.model.parameters() if p.device.type != "meta")
    table = len(tokenizer) * 32
    assert resident == sum(p.numel() for p in model.parameters()) - 3 * 3 * 32 * 48 - (0 if tied else table)


def test_a_store_is_made_once_and_anew_for_a_changed_checkpoint(tmp_path, cache):
    folder = saved(tmp_path / "model", "llama")
    streamed(folder)
    (store,) = cache.glob("*.neurons")
    before = store.stat().st_mtime_ns
    streamed(folder)
    assert [p.stat().st_mtime_ns for p in cache.glob("*.neurons")] == [before]
    os.utime(tmp_path / "model" / "model.safetensors")
    streamed(folder)
    assert len(list(cache.glob("*.neurons"))) == 2


SHAPE = ModelShape(10, 100, 400, 2, 10 * 400 * 3 * 100 * 2, 5 * MIB, 1000, 500)


def test_the_plan_is_a_sum():
    plan = plan_budget(0, SHAPE, Use([160] * 10, 10, 20), base=100 * MIB)
    assert plan.parts["libraries and index"] == 100 * MIB
    assert plan.parts["held neurons"] == 10 * 160 * 3 * 100 * 2 + 10 * 100 * 2
    assert plan.parts["cache of 30 positions"] == 30_000
    assert plan.needed == sum(plan.parts.values())
    assert plan_budget(0, SHAPE, Use([160] * 10, 10, 20), 100 * MIB, 10**9).needed == 10**9
    larger = plan_budget(0, SHAPE, Use([160] * 6 + [400] * 4, 10, 20), base=100 * MIB)
    assert larger.parts["held neurons"] == (6 * 160 + 4 * 400) * 3 * 100 * 2 + 10 * 100 * 2
    assert plan_budget(0, SHAPE, Use([160] * 10, 10, 20, streams=False), base=100 * MIB).needed < plan.needed


def test_an_engine_says_what_it_holds():
    use = Use([160] * 10, 10, 20, held_by=lambda neuron_bytes: round(7 * neuron_bytes))
    assert plan_budget(0, SHAPE, use, base=0).parts["held neurons"] == 7 * 3 * 100 * 2 + 10 * 100 * 2


def test_embedding_a_prompt_is_planned_for_as_far_as_it_takes_more_than_reading_it():
    plan = plan_budget(0, SHAPE, Use([160] * 10, 10, 20), base=100 * MIB)
    passing = sum(n for name, n in plan.parts.items() if re.match("cache|reading|cutting|logits", name))
    for more in (-1, 0, 1000):
        looking_up = plan_budget(0, SHAPE, Use([160] * 10, 10, 20, lookup_bytes=passing + more), base=100 * MIB)
        assert looking_up.parts["embedding prompts"] == max(0, more)
        assert looking_up.needed == plan.needed + max(0, more)


def test_the_most_that_decode_may_hold():
    def held(*modes: Mode, **options) -> list[int]:
        return most_kept(3, 100, modes, 0.4, **options)

    assert held(Mode.SIMILARITY) == held(Mode.STABILITY) == [40, 40, 40]
    assert held(Mode.SIMILARITY, sparse_layers="1:") == [100, 40, 40]
    assert held(Mode.SIMILARITY, fitted=[30, 45, 60]) == [40, 45, 60]
    assert held(Mode.SIMILARITY, Mode.DENSE) == held(Mode.SIMILARITY, fallback=Fallback.DENSE) == [100] * 3


def test_an_impossible_budget_names_the_smallest_that_works():
    use = Use([160] * 10, 10, 20)
    with pytest.raises(BudgetError, match="needs") as refused:
        plan_budget(50 * MIB, SHAPE, use, base=100 * MIB).check()
    plan = plan_budget(50 * MIB, SHAPE, use, base=100 * MIB)
    assert f"give at least {plan.smallest // MIB}MiB" in str(refused.value)
    works = plan_budget(plan.smallest, SHAPE, use, base=101 * MIB)
    works.check()
    assert works.position_limit > 30


def test_a_refused_budget_loads_and_writes_nothing(tmp_path, cache):
    folder = saved(tmp_path / "model", "llama")
    with pytest.raises(BudgetError):
        load_within(folder, 10 * MIB, lambda *_: USE)
    assert not cache.exists()


def test_what_a_budget_cannot_load(tmp_path):
    folder = saved(tmp_path / "model", "llama")
    for options, message in (({"dtype": "bfloat16"}, "stay as"), ({"device": "cuda"}, "load_on_device")):
        with pytest.raises(ConfigError, match=message):
            load_within(folder, AMPLE, lambda *_: USE, **options)
    with pytest.raises(
        ModelError, match="some/hub-id.* cannot be loaded .it is no path here, and the hub does not answer"
    ):
        load_within("some/hub-id", AMPLE, lambda *_: USE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no model.safetensors"):
        load_within(str(tmp_path / "empty"), AMPLE, lambda *_: USE)
    weights = Path(folder, "model.safetensors")
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(ModelError, match="bytes, expected at least"):
        load_within(folder, AMPLE, lambda *_: USE)


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path / "model", "llama")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 of the 30 tensors of its model \(model.layers.1.mlp.up_proj.weight\)"
    ):
        streamed(folder)


_PROCESS = """
import json, sys
import torch
from numba.core import event
torch.set_num_threads(1)
from coreinfer_sim.generation.memory_plan import Use, load_within
from coreinfer_sim.base.memory import peak_bytes
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.generation.sparse_model import SparseModel
use = Use(n_kept=[6144] * 8, n_prompt=20, n_new=8)
with event.install_recorder("numba:compile") as compiled:
    lm, plan = load_within(sys.argv[1], 1 << 40, lambda *_: use)
    sparse = SparseModel(lm.model, make_predictor("random", lm.layers, keep_ratio=0.25), lm.tokenizer)
    sparse.generate(torch.arange(4, 24)[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)
mlps = sum(layer.n_bytes for layer in lm.layers)
held = plan.parts["libraries and index"]
found = {"peak": peak_bytes(), "held": held, "needed": plan.needed, "mlps": mlps}
print(json.dumps({**found, "n_compiled": len(compiled.buffer)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak that Linux counts")
def test_a_process_keeps_to_its_plan(tmp_path):
    folder = save_tiny_checkpoint(
        tmp_path / "model", hidden_size=256, intermediate_size=24576, num_attention_heads=8, head_dim=32,
        num_hidden_layers=8,
    )  # fmt: skip
    for _ in range(3):  # one that compiles loops, for which LLVM takes memory of its own, is followed by another
        done = subprocess.run([sys.executable, "-c", _PROCESS, folder], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        if found["n_compiled"] == 0:
            break
    assert found["n_compiled"] == 0
    assert found["mlps"] > 600e6  # beside which it is little how many pages of libraries the system maps
    assert found["peak"] <= found["needed"]
    assert found["peak"] - found["held"] < 0.5 * found["mlps"]  # the dense MLPs are never all in memory
