"""Every experiment beside what its definition says, computed text by text and neuron by neuron."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from coreinfer_sim.analysis.analyze import EXPERIMENTS, analyze
from coreinfer_sim.analysis.reading import Reader
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.rows import read_corpus
from coreinfer_sim.choosing.statistics import activation_statistics
from coreinfer_sim.index.ranking import n_kept

CONFIG = AnalysisConfig(length=20, clusters=(3, 6))


def texts_of(corpus, small):
    rows, _ = read_corpus(corpus, lambda texts: small.tokenizer(texts)["input_ids"])
    return list(rows)


def activations_of(small, text, max_tokens=48):
    """Return z of each layer, [n_tokens, d_ff], by hooks of one's own, and the tokens."""
    ids = small.tokenizer([text], truncation=True, max_length=max_tokens, return_tensors="pt")["input_ids"]
    found = []
    hooks = [
        layer.output.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0][0].clone()))
        for layer in small.layers
    ]
    with torch.no_grad():
        small.model(ids)
    for hook in hooks:
        hook.remove()
    return found, ids[0].tolist()


def sets_of(z, alpha=0.4, beta=0.4):
    """Return C_α^β and the set of highest energy of one layer's activations, as sets of ids."""
    counts, energy, activation = np.zeros(z.shape[1]), np.zeros(z.shape[1]), np.zeros(z.shape[1])
    for token in z.double().numpy():
        n = math.ceil(alpha * (token > 0).sum() - 1e-6)
        counts[np.argsort(-token, kind="stable")[:n]] += 1
        energy += token**2 / (token**2).sum()
        activation += np.maximum(token, 0)
    n = n_kept(beta, z.shape[1])
    ids = np.arange(len(counts))
    return [set(np.lexsort((ids, -activation, -score))[:n].tolist()) for score in (counts, energy)]


def one(rows, **labels):
    """Return the only number with these labels."""
    (row,) = [row for row in rows if all(row.get(name) == value for name, value in labels.items())]
    return row


@pytest.fixture(scope="module")
def read(small, topics):
    """Activations and tokens of every text."""
    rows = texts_of(topics, small)
    return rows, [activations_of(small, row.text) for row in rows]


def test_stability(small, topics, read):
    found = analyze("stability", small, topics, CONFIG)
    long = [z for z, ids in read[1] if len(ids) >= 20]
    assert 5 < len(long) < 84 and found.remarks == [f"{len(long)} of 84 texts have 20 tokens, the others are left out"]
    n = n_kept(0.4, small.layers[0].d_ff)
    for score, name in enumerate(("counts", "energy")):
        for measure, position, more, begin, end in (
            ("overlap with the final set", 8, None, 8, 20),
            ("share that changes", 8, 8, 8, 16),
        ):
            shares = [len(sets_of(layer[:begin])[score] & sets_of(layer[:end])[score]) / n for z in long for layer in z]
            expected = np.mean(shares) if more is None else 1 - np.mean(shares)
            labels = {"measure": measure, "score": name, "position": position, "more": more}
            assert one(found.rows, layers="all", **labels)["value"] == pytest.approx(expected, abs=1e-4)
        final = one(found.rows, measure="overlap with the final set", score=name, position=20, layer=1)
        assert (final["value"], final["low"], final["high"]) == (1, 1, 1)


def blocks(found_texts, rows):
    """Return the numbers of the texts in each block, in the order in which an analysis reads them."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [order[begin : begin + 32] for begin in range(0, len(order), 32)]


def overlaps(read, block, layer, score):
    held = [sets_of(read[1][text][0][layer])[score] for text in block]
    return np.array([len(held[a] & held[b]) for a in range(len(block)) for b in range(a + 1, len(block))])


def test_similarity(small, topics, encoder, read):
    found = analyze("similarity", small, topics, CONFIG, encoder=encoder)
    rows = read[0]
    rho, by_tokens, beyond = [], [], []
    for block in blocks(found, rows):
        vectors = encoder.encode([rows[text].prompt for text in block])
        pairs = np.triu_indices(len(block), 1)
        similarity = (vectors @ vectors.T)[pairs]
        tokens = [set(read[1][text][1]) for text in block]
        shared = [len(tokens[a] & tokens[b]) / len(tokens[a] | tokens[b]) for a, b in zip(*pairs, strict=True)]
        common = overlaps(read, block, 1, 0)
        rho.append(stats.spearmanr(common, similarity).statistic)
        by_tokens.append(stats.spearmanr(common, shared).statistic)
        # what is left of either's ranks when those of shared tokens are taken out by regression
        x, y, given = (stats.rankdata(each) for each in (common, similarity, shared))
        left = [each - np.polyval(np.polyfit(given, each, 1), given) for each in (x, y)]
        beyond.append(stats.pearsonr(*left).statistic)
    of = {"score": "counts", "layer": 1}
    assert one(found.rows, measure="similarity", **of)["value"] == pytest.approx(np.mean(rho), abs=1e-4)
    assert one(found.rows, measure="shared tokens", **of)["value"] == pytest.approx(np.mean(by_tokens), abs=1e-4)
    assert one(found.rows, measure="similarity beyond tokens", **of)["value"] == pytest.approx(
        np.mean(beyond), abs=1e-4
    )
    shuffled = one(found.rows, measure="shuffled pairs", score="counts", layers="all")
    assert shuffled["low"] < 0 < shuffled["high"]


def test_clusters(small, topics, encoder, read):
    found = analyze("clusters", small, topics, CONFIG, encoder=encoder)
    rows = read[0]
    within, between = [], []
    for block in blocks(found, rows):
        common = overlaps(read, block, 2, 1) / n_kept(0.4, small.layers[0].d_ff)
        labels = [rows[text].label for text in block]
        same = np.array([labels[a] == labels[b] for a in range(len(block)) for b in range(a + 1, len(block))])
        within += common[same].tolist()
        between += common[~same].tolist()
    of = {"score": "energy", "layer": 2, "clusters": "labels"}
    assert one(found.rows, measure="overlap within", **of)["value"] == pytest.approx(np.mean(within), abs=1e-4)
    assert one(found.rows, measure="overlap between", **of)["value"] == pytest.approx(np.mean(between), abs=1e-4)
    # three topics without a word in common are three clusters, and random ones of their sizes are not
    assert one(found.rows, measure="purity", k=3, clusters="semantic")["value"] == 1
    assert one(found.rows, measure="purity", k=3, clusters="random")["high"] < 0.7
    gap = {"measure": "overlap within over between", "k": 3, "score": "counts", "layers": "all"}
    assert one(found.rows, clusters="semantic", **gap)["value"] > 0.03  # of three blocks no interval is narrow
    random = one(found.rows, clusters="random", **gap)
    assert random["low"] < 0 < random["high"]


def test_layers(small, topics, read):
    found = analyze("layers", small, topics, CONFIG)
    every = [z[0] for z, _ in read[1]]
    tokens = torch.cat(every)
    expected = float((tokens > 0).double().mean())
    assert one(found.rows, measure="positive activations", layer=0)["value"] == pytest.approx(expected, abs=1e-4)
    n = math.ceil(0.4 * tokens.shape[1] - 1e-6)
    energy = tokens.double() ** 2 / (tokens.double() ** 2).sum(1, keepdim=True)
    expected = float(energy.topk(n, dim=1).values.sum(1).mean())
    assert one(found.rows, measure="energy in a token's own top share", layer=0)["value"] == pytest.approx(
        expected, abs=1e-3
    )
    both = total = 0
    for z in every:
        top = [set(row.topk(n).indices.tolist()) for row in z.abs()]
        both += sum(len(a & b) for a, b in zip(top[1:], top, strict=False))
        total += n * (len(top) - 1)
    assert one(found.rows, measure="in common with the token before", layer=0)["value"] == pytest.approx(
        both / total, abs=1e-4
    )
    of_sets = [
        sum(float(energy_of(z)[:, sorted(sets_of(z)[1])].sum()) for z in every) / len(tokens),
        one(found.rows, measure="energy in its text's set by energy", layer=0)["value"],
    ]
    assert of_sets[0] == pytest.approx(of_sets[1], abs=1e-4)


def energy_of(z):
    square = z.double() ** 2
    return square / square.sum(1, keepdim=True)


def test_information(small, topics, encoder, read):
    found = analyze("information", small, topics, CONFIG, encoder=encoder)
    rows = read[0]
    norms = small.layers[1].output.weight.detach().norm(dim=0)
    needs = []
    for z, _ in read[1]:
        counts = (z[1].abs() * norms).detach()
        n = math.ceil(0.4 * counts.shape[1] - 1e-6)
        needs.append(torch.zeros_like(counts).scatter_(1, counts.topk(n, 1).indices, 1.0).double().numpy())
    taught, n_taught, bits, coded = np.zeros(needs[0].shape[1]), 0, {"share": 0.0, "neuron": 0.0}, 0
    for number, block in enumerate(blocks(found, rows)):
        for text in block:
            second = needs[text][len(needs[text]) // 2 :]
            if number >= 1:
                share = taught.mean() / n_taught
                of_neuron = (taught + share) / (n_taught + 1)
                for name, likely in (("share", np.full_like(taught, share)), ("neuron", of_neuron)):
                    bits[name] -= (second * np.log2(likely) + (1 - second) * np.log2(1 - likely)).sum()
                coded += second.size
        for text in block:
            taught += needs[text].sum(0)
            n_taught += len(needs[text])
    assert one(found.rows, measure="share alone", layer=1)["value"] == pytest.approx(bits["share"] / coded, abs=1e-4)
    assert one(found.rows, measure="neuron", layer=1)["value"] == pytest.approx(bits["neuron"] / coded, abs=1e-4)
    # clusters at random teach nothing, at any number, and those of topics something
    for k in (3, 6):
        assert abs(one(found.rows, measure="fewer bits by random cluster", k=k)["value"]) < 1e-3
        assert one(found.rows, measure="fewer bits by cluster", k=k)["value"] > 2e-3


def test_alpha_beta(small, topics, read):
    found = analyze("alpha-beta", small, topics, CONFIG)
    dense, text_set, token_set, positive, n = 0.0, 0.0, 0.0, 0.0, 0
    for z, ids in read[1]:
        masks = []
        for layer in z:
            statistics = activation_statistics(layer.contiguous(), np.array([0, len(layer)]), 0.4)
            masks.append(torch.from_numpy(statistics.core_mask(0.2)[0]))
        dense += loss_of(small, ids, lambda _place, values: values)
        text_set += loss_of(small, ids, lambda place, values, masks=masks: values * masks[place])
        token_set += loss_of(small, ids, lambda _place, values: values * top(values.abs(), 0.4))
        positive += loss_of(small, ids, lambda _place, values: values.clamp_min(0))
        n += len(ids) - 1
    for kept, share, loss in (
        ("text: counts", 0.2, text_set), ("token: by size", 0.4, token_set), ("token: positive values", 1.0, positive)
    ):  # fmt: skip
        value = one(found.rows, kept=kept, share=share)["value"]
        assert value == pytest.approx(math.exp((loss - dense) / n), rel=1e-3), kept
    assert one(found.rows, measure="perplexity, dense")["value"] == pytest.approx(math.exp(dense / n), rel=1e-3)


def top(values, share):
    n = math.ceil(share * values.shape[-1] - 1e-6)
    return torch.zeros_like(values).scatter_(-1, values.topk(n, -1).indices, 1.0)


def loss_of(small, ids, edit):
    hooks = [
        layer.output.register_forward_pre_hook(lambda _m, inputs, place=place: edit(place, inputs[0]))
        for place, layer in enumerate(small.layers)
    ]
    ids = torch.tensor([ids])
    with torch.no_grad():
        logits = small.model(ids).logits[0, :-1]
    for hook in hooks:
        hook.remove()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


@pytest.mark.parametrize("experiment", [each.value for each in EXPERIMENTS])
def test_every_number_has_an_interval_and_is_plain_json(experiment, small, topics, encoder):
    found = analyze(experiment, small, topics, CONFIG, encoder=encoder)
    for row in json.loads(json.dumps(found.as_dict()))["rows"]:
        assert row["low"] <= row["value"] <= row["high"], row


def test_layers_are_a_slice(small, topics):
    found = analyze("layers", small, topics, AnalysisConfig(layers="1:"))
    assert {row["layer"] for row in found.rows if "layer" in row} == {1, 2}


def test_where_nothing_is_left_out_the_loss_is_the_dense_one(small, topics):
    reader = Reader.of(small, ":", 48)
    ids = reader.ids(texts_of(topics, small)[:9])
    for batch in reader.scored(ids):
        np.testing.assert_allclose(reader.losses(batch, lambda _place, z, _positions: z), reader.losses(batch))
        without = reader.losses(batch, lambda _place, z, _positions: z * 0)
        assert (np.abs(without - reader.losses(batch)) > 1e-3).all()
