"""What is in an index: the numbers are those of the definitions."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import FILES, TOPICS, contents, write_rows
from safetensors.numpy import load_file

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.files import sha256_of
from coreinfer_sim.base.rows import read_corpus
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model, tokenizer_hash


def test_the_manifest_says_what_the_index_was_built_from(built, corpus, tiny_checkpoint, encoder):
    raw = json.loads((built / "manifest.json").read_text(encoding="utf-8"))
    language_model = load_model(tiny_checkpoint)
    tokenize = language_model.tokenizer
    prompts = [json.loads(line)["prompt"] for line in Path(corpus).read_text().splitlines()]
    drawn, report = read_corpus(CorpusConfig(corpus), lambda texts: tokenize(texts)["input_ids"])
    assert len(list(drawn)) == 60

    assert raw["format_version"] == 2
    for name in ("coreinfer-sim", "torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy"):
        assert raw["versions"][name] == version(name)
    sketch = raw["model"].pop("weight_sketch")
    assert np.array(sketch).shape == (3, 32)
    stored = {
        f"{value:.6g}" for layer in language_model.layers for value in layer.output.weight.detach().flatten().tolist()
    }
    assert {f"{value:.6g}" for row in sketch for value in row} <= stored
    assert raw["model"] == {
        "name": tiny_checkpoint,
        "revision": None,
        "family": "llama",
        "dtype": "float32",
        "n_layers": 3,
        "d_model": 32,
        "d_ff": 48,
        "tokenizer_sha256": tokenizer_hash(tokenize),
        "activation_site": "input of down_proj",
        "path": tiny_checkpoint,
        "relative_path": os.path.relpath(os.path.realpath(tiny_checkpoint), os.path.realpath(built)),
    }
    assert raw["encoder"] == {
        "name": "sentence-transformers/all-MiniLM-L6-v2",
        "dimension": 384,
        "normalised": True,
        "metric": "cosine",
        "probe": encoder.probe(),
    }
    assert raw["corpus"] == {
        "source": "prompts.jsonl",
        "sha256": report.sha256,
        "n_sentences": 60,
        "n_tokens": sum(len(tokenize(prompt)["input_ids"]) for prompt in prompts),
    }
    assert raw["settings"] == {
        "n_clusters": 3,
        "alpha": 0.4,
        "beta": 0.4,
        "gamma": 0.8,
        "seed": 0,
        "layers": [0, 1, 2],
        "batch_size": 16,
        "shard_size": 8,
        "n_threads": 1,
    }
    for name in FILES[:-1]:
        assert raw["files"][name] == {"size": (built / name).stat().st_size, "sha256": sha256_of(built / name)}


def test_the_clusters_are_the_topics(built, corpus, encoder):
    index = SemanticIndex.load(built, encoder)
    topics = {noun: topic for topic, nouns in TOPICS.items() for noun in nouns}
    found = []
    for cluster in index.clusters:
        assert cluster.size == 20 and len(cluster.exemplars) == len(cluster.exemplar_ids) == 3
        (topic,) = {topics[id_.split("-")[0]] for id_ in cluster.exemplar_ids}
        assert topic in cluster.label
        assert all(topic in exemplar for exemplar in cluster.exemplars)
        quantiles = list(cluster.similarity_quantiles.values())
        assert quantiles[0] > 0.5 and quantiles == sorted(quantiles) and quantiles[-1] < 1
        found.append(topic)
    assert sorted(found) == sorted(TOPICS)
    assert sum(cluster.n_tokens for cluster in index.clusters) == index.manifest.corpus.n_tokens
    rows = [json.loads(line) for line in Path(corpus).read_text().splitlines()]
    matches = index.lookup([row["prompt"] for row in rows])
    assert [found[match.cluster] for (match,) in matches] == [topics[row["id"].split("-")[0]] for row in rows]


def test_a_finished_build_leaves_nothing_beside_the_index(built):
    assert [path.name for path in built.parent.iterdir()] == ["index"]
    contents(built)


def keep(seen: dict[int, torch.Tensor], layer: int, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    """Note what a down projection reads: the activation site [n_tokens, d_ff]."""
    seen[layer] = inputs[0][0]


def definitions(checkpoint: str, texts: list[str], alpha: float, beta: float) -> dict[str, np.ndarray]:
    """Compute a model's statistics of each sentence from the definitions, plainly: arrays [n_texts, n_layers, d_ff]."""
    language_model = load_model(checkpoint, "float32")
    d_ff, n_layers = 48, 3
    shape = (len(texts), n_layers, d_ff)
    found = {name: np.zeros(shape) for name in ("counts", "energy", "activation")}
    for s, text in enumerate(texts):
        seen: dict[int, torch.Tensor] = {}
        hooks = [
            block.mlp.down_proj.register_forward_pre_hook(partial(keep, seen, layer))
            for layer, block in enumerate(language_model.model.model.layers)
        ]
        with torch.no_grad():
            language_model.model(language_model.tokenizer(text, return_tensors="pt")["input_ids"])
        for hook in hooks:
            hook.remove()
        for layer, z in seen.items():
            f = [0] * d_ff  # f(n; s)
            for token in z.tolist():
                positive = sorted((n for n in range(d_ff) if token[n] > 0), key=lambda n: -token[n])
                for n in positive[: math.ceil(alpha * len(positive))]:  # C_alpha of the token
                    f[n] += 1
                norm = math.sqrt(sum(value**2 for value in token))
                found["energy"][s, layer] += [(value / norm) ** 2 for value in token]
                found["activation"][s, layer] += [max(value, 0) for value in token]
            ranked = sorted(range(d_ff), key=lambda n: (-f[n], -found["activation"][s, layer, n], n))
            found["counts"][s, layer, ranked[: math.floor(beta * d_ff)]] = 1  # C_alpha^beta of the sentence
    return found


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 1), (4, 6), (2, 4)])
def test_the_statistics_are_those_of_the_definitions(build, tmp_path, tiny_checkpoint, encoder, batch_size, shard_size):
    texts = [
        "How do stars form from gas and dust?",
        "Why do planets circle their star?",
        "What is a galaxy?",
        "Why does bread rise in the oven, and what does the yeast eat while it does?",
        "How is cheese made?",
        "What makes a soup thick?",
    ]
    source = write_rows(tmp_path / "six.jsonl", [{"prompt": text} for text in texts])
    config = BuildConfig(clusters=2, alpha=0.3, beta=0.35, batch_size=batch_size, shard_size=shard_size)
    index = build(tmp_path / "index", config, source=source)
    cluster_of = [match.cluster for (match,) in index.lookup(texts)]
    assert sorted(cluster.size for cluster in index.clusters) == sorted(np.bincount(cluster_of).tolist())
    expected = definitions(tiny_checkpoint, texts, 0.3, 0.35)
    stored = load_file(tmp_path / "index" / "neurons.safetensors")
    for c in range(2):
        members = [s for s in range(6) if cluster_of[s] == c]
        sums = {name: values[members].sum(axis=0) for name, values in expected.items()}
        np.testing.assert_array_equal(stored["counts"][c], sums["counts"])
        np.testing.assert_allclose(stored["energy"][c], sums["energy"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(stored["activation"][c], sums["activation"], rtol=1e-4, atol=1e-4)
        for score, name in (("energy", "energy"), ("paper", "counts")):
            for layer, ids in index.core_neurons(c, 0.25, score).items():
                key = list(zip(-sums[name][layer], -sums["activation"][layer], range(48), strict=True))
                assert ids.tolist() == sorted(sorted(range(48), key=key.__getitem__)[:12])


def test_the_energies_of_a_token_sum_to_one(built):
    index, stored = SemanticIndex.load(built), load_file(built / "neurons.safetensors")
    n_tokens = np.array([cluster.n_tokens for cluster in index.clusters])
    np.testing.assert_allclose(stored["energy"].sum(axis=2), np.tile(n_tokens[:, None], 3), rtol=1e-4)
    n_core = 20 * math.floor(0.4 * 48)  # sentences of a cluster, times their sentence-wise core neurons
    assert (stored["counts"].sum(axis=2) == n_core).all()


def test_only_the_layers_asked_for_are_recorded(build, built, tmp_path):
    index = build(tmp_path / "index", BuildConfig(clusters=3, shard_size=8, layers="1:"))
    assert index.manifest.settings.layers == [1, 2] and index.manifest.model.n_layers == 3
    some, every = (load_file(folder / "neurons.safetensors") for folder in (tmp_path / "index", built))
    for name, values in some.items():
        np.testing.assert_array_equal(values, every[name][:, 1:])
    assert list(index.core_neurons(0, layers="2")) == [2]
    with pytest.raises(ConfigError, match=r"layers \[0\] were not recorded"):
        index.core_neurons(0)


def test_layers_that_the_model_lacks_are_refused(build, tmp_path):
    with pytest.raises(ConfigError, match="'3:', which names none of 3 layers"):
        build(tmp_path / "index", BuildConfig(layers="3:"))
    assert list(tmp_path.iterdir()) == []


def test_long_texts_are_cut_before_the_model_reads_them(build, tmp_path):
    rows = [{"prompt": noun, "completion": f"{noun} " * 50} for noun in ("stars", "bread", "courts", "moons")]
    source = CorpusConfig(
        write_rows(tmp_path / "c.jsonl", rows), prompt_column="prompt", template="{completion}", max_tokens=10
    )
    index = build(tmp_path / "index", BuildConfig(clusters=2), source=source)
    assert index.manifest.corpus.n_tokens == 40
    energy = load_file(tmp_path / "index" / "neurons.safetensors")["energy"]
    np.testing.assert_allclose(energy.sum(axis=(0, 2)), 40, rtol=1e-4)


def test_more_tokens_than_the_model_reads_are_refused(build, corpus, tmp_path):
    with pytest.raises(ConfigError, match="max_tokens is 1025, but the model's context is 1024; .*smaller max_tokens"):
        build(tmp_path / "index", source=CorpusConfig(corpus, max_tokens=1025))
    assert list(tmp_path.iterdir()) == []


def test_the_map_shows_every_prompt_with_its_topic(built, corpus, encoder):
    index = SemanticIndex.load(built, encoder)
    prompts = [json.loads(line)["prompt"] for line in Path(corpus).read_text().splitlines()]
    assert index.manifest.map is not None and index.manifest.map.n_prompts == 60 and index.manifest.map.texts
    assert index.map.excerpts == prompts
    assert [match.cluster for (match,) in index.lookup(prompts)] == index.map.clusters.tolist()
    place = index.place(prompts[7])
    assert place.nearest[0] == 7 and np.allclose((place.x, place.y), index.map.coordinates[7], atol=0.05)
    dots, _, _, cross = index.plot(prompts[7]).to_dict()["layer"]  # what a notebook shows
    assert [dot["prompt"] for dot in dots["data"]["values"]] == prompts
    assert cross["data"]["values"] == [{"x": place.x, "y": place.y, "prompt": prompts[7]}]


def test_an_index_may_be_built_without_texts(build, built, tmp_path):
    index = build(tmp_path / "index", BuildConfig(clusters=3, shard_size=8, texts=False))
    assert index.map.excerpts is None and index.manifest.map.texts is False
    assert [cluster.exemplars for cluster in index.clusters] == [[], [], []]
    with_texts = SemanticIndex.load(built)
    np.testing.assert_array_equal(index.map.coordinates, with_texts.map.coordinates)
    assert [cluster.label for cluster in index.clusters] == [cluster.label for cluster in with_texts.clusters]
    for path in (tmp_path / "index").iterdir():
        assert b"tell us about" not in path.read_bytes()
