"""Builds with compensated sets: the same files from any number of workers, and the sets that serve best."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from compensation_cases import COMPENSATION
from coreinfer_sim_cli.main import main

from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.building.build import build_index
from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.fitting import sets
from coreinfer_sim.fitting.comparing import compare_sets
from coreinfer_sim.generation.opening import load
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import compensation_file


def test_clusters_that_the_corpus_serves_better_hold_its_set(tiny_checkpoint, encoder, tmp_path, monkeypatch):
    rows = [
        {"question": f"Tell me of {'stars' if i % 2 else 'bread'}, {i}.", "answer": f"It is {i}."} for i in range(48)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = CorpusConfig(str(tmp_path / "rows.jsonl"), template="{question} {answer}")
    config = BuildConfig(clusters=2, compensation=replace(COMPENSATION, keep_ratios=(0.5,)))

    def found(*arguments):
        measured = compare_sets(*arguments)
        assert set(measured["0.5"]) == {"0", "1"}
        level = {"corpus": [1.0, 1.0], "plain": [3.0, 3.0]}
        return {"0.5": {"0": {**level, "own": [2.0, 2.0]}, "1": {**level, "own": [1.0, 1.0]}}}

    monkeypatch.setattr("coreinfer_sim.fitting.pipeline.compare_sets", found)
    index = build_index(tiny_checkpoint, corpus, tmp_path / "index", config, encoder=encoder)
    assert index.manifest.served_by_corpus(0.5) == [0]
    files = [(tmp_path / "index" / compensation_file(0.5, each)).read_bytes() for each in (None, 0, 1)]
    assert files[0] == files[1] != files[2]
    described = CliRunner().invoke(main, ["info", str(tmp_path / "index")])
    assert "the whole corpus's set in clusters 0," in described.stdout
    (told,) = json.loads(CliRunner().invoke(main, ["info", str(tmp_path / "index"), "--json"]).stdout)["compensation"]
    assert told["served_by_corpus"] == [0] and told["plain"] is False


@pytest.mark.parametrize("n_clusters", [1, 2])
def test_where_compensation_does_harm_plain_neurons_decode(tiny_checkpoint, encoder, tmp_path, monkeypatch, n_clusters):
    rows = [
        {"question": f"Tell me of {'stars' if i % 2 else 'bread'}, {i}.", "answer": f"It is {i}."} for i in range(48)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = CorpusConfig(str(tmp_path / "rows.jsonl"), template="{question} {answer}")
    config = BuildConfig(clusters=n_clusters, compensation=replace(COMPENSATION, keep_ratios=(0.5,)))
    fit = sets.fit_layers

    def spoilt(*arguments, **more):
        fitted = fit(*arguments, **more)
        return replace(fitted, compensation={k: replace(c, bias=c.bias + 9) for k, c in fitted.compensation.items()})

    monkeypatch.setattr(sets, "fit_layers", spoilt)
    lines = []

    class Told(Progress):
        def say(self, message: str) -> None:
            lines.append(message)

    out = tmp_path / "index"
    index = build_index(tiny_checkpoint, corpus, out, config, encoder=encoder, progress=Told(), workers=1)
    assert any("Keep ratio 0.5: on held-out texts compensation does more harm than good" in line for line in lines)
    for cluster in (None, *range(n_clusters)):
        chosen = IndexSets(index).of_corpus() if cluster is None else IndexSets(index).of_cluster(cluster)
        of = None if n_clusters == 1 else cluster
        n_kept = index.manifest.compensation[0].n_kept
        for number, ids in chosen.ids.items():
            wanted = index.core_neurons(of, n_kept[number] / index.manifest.model.d_ff)[number]
            assert torch.equal(ids, wanted) and chosen.compensation[number].delta is None
    with load(index, tiny_checkpoint, mode="global") as generator:
        run = generator.generate("Tell me of stars.", max_new_tokens=3)
    assert len(run.token_ids) == 3 and run.mlp_bytes_per_token <= 0.5 * run.dense_mlp_bytes_per_token
    assert "plain neurons after all" in CliRunner().invoke(main, ["info", str(out)]).stdout
    verified = CliRunner().invoke(main, ["verify", str(out), "--model", tiny_checkpoint])
    assert verified.exit_code == 0, verified.output


def test_a_single_cluster_holds_the_corpus_set(tiny_checkpoint, encoder, tmp_path):
    rows = [{"question": f"Tell me of stars, {i}.", "answer": f"It is {i}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = CorpusConfig(str(tmp_path / "rows.jsonl"), template="{question} {answer}")
    index = build_index(
        tiny_checkpoint, corpus, tmp_path / "index", BuildConfig(clusters=1, compensation=COMPENSATION), encoder=encoder
    )
    for ratio in COMPENSATION.keep_ratios:
        assert index.manifest.served_by_corpus(ratio) == [0]
        own, everywhere = IndexSets(index, ratio).of_cluster(0), IndexSets(index, ratio).of_corpus()
        assert torch.equal(own.ids[0], everywhere.ids[0]) and own.compensation is not None
    told = CliRunner().invoke(main, ["info", str(tmp_path / "index")])
    assert told.exit_code == 0 and "keep ratio 0.5" in told.stdout and "serves better" not in told.stdout
    assert "up to 300 tokens a cluster, and trained on up to 200\n" in told.stdout and "\n1 cluster:\n" in told.stdout


def test_workers_leave_the_same_files(built, tiny_checkpoint, encoder):
    again = built.with_name("again")
    build_index(
        tiny_checkpoint,
        CorpusConfig(str(built.with_name("rows.jsonl")), template="{question} {answer}"),
        again,
        BuildConfig(clusters=3, compensation=COMPENSATION),
        encoder=encoder,
    )
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert len(files) == 6 + 2 * 4
    assert all((built / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_clusters_keep_their_own_neurons(built, encoder):
    index = SemanticIndex.load(built, encoder)
    found, served = IndexSets(index, 0.5), index.manifest.served_by_corpus(0.5)
    own = [found.of_cluster(cluster) for cluster in range(3) if cluster not in served]
    everywhere = found.of_corpus()
    assert any(not torch.equal(ids, everywhere.ids[number]) for each in own for number, ids in each.ids.items())
