"""An analysis as a whole: what is broken off goes on, memory stays, other kinds of models, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import call, parsed, refused, setting, succeeded
from mixtures import mixtral_of_own_experts, saved
from tiny_models import tiny_mixtral, tiny_model

from coreinfer_sim.analysis import analyze as analysis
from coreinfer_sim.analysis.analyze import EXPERIMENTS, analyze
from coreinfer_sim.analysis.experiment import Setting
from coreinfer_sim.analysis.plot import plot
from coreinfer_sim.analysis.reading import Reader
from coreinfer_sim.analysis.texts import draw
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.errors import ConfigError, CorpusError, ModelError
from coreinfer_sim.base.plots import COLORS
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.models.kept import kept
from coreinfer_sim.models.loading import LanguageModel, load_model
from coreinfer_sim.models.mlps import find_mlps

CONFIG = AnalysisConfig(length=20, clusters=(3, 6))
NAMES = [each.value for each in EXPERIMENTS]


class Killed(Progress):
    """Breaks off where the second block has been read, and notes what is said."""

    def __init__(self, after: int) -> None:
        self.left, self.stage, self.said = after, "", []

    def say(self, text):
        self.said.append(text)

    def start(self, stage, total, unit, done=0):
        self.stage, self.done = stage, done

    def advance(self, n):
        if self.stage == "Language model":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("experiment", NAMES)
def test_what_was_broken_off_goes_on_with_the_same_numbers(experiment, small, topics, encoder, tmp_path, monkeypatch):
    whole = analyze(experiment, small, topics, CONFIG, encoder=encoder)
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(analysis, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        analyze(experiment, small, topics, CONFIG, encoder=encoder, progress=Killed(1))
    second = Killed(9)
    again = analyze(experiment, small, topics, CONFIG, encoder=encoder, progress=second)
    assert second.done == 64 and "Going on after 66 % of the texts." in second.said
    assert again == whole
    third = Killed(0)  # all is there
    assert analyze(experiment, small, topics, CONFIG, encoder=encoder, progress=third).rows == whole.rows
    assert [each.what for each in kept()] == ["what an analysis has counted"]


def test_other_texts_or_settings_begin_anew(small, topics, tmp_path):
    one = analyze("layers", small, topics, CONFIG)
    rows = Path(topics.source).read_text(encoding="utf-8").splitlines()
    other = tmp_path / "topics.jsonl"
    other.write_text("\n".join(rows[:60]))
    fewer = analyze("layers", small, CorpusConfig(str(other), max_tokens=48), CONFIG)
    assert fewer.corpus["n_kept"] == 60 and fewer.rows != one.rows
    assert analyze("layers", small, topics, AnalysisConfig(beta=0.2)).rows != one.rows


def test_damaged_sums_are_counted_anew(small, topics):
    one, progress = analyze("layers", small, topics, CONFIG), Killed(9)
    (path,) = kept()[0].path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert analyze("layers", small, topics, CONFIG, progress=progress).rows == one.rows
    assert any(text.endswith("is damaged; counting anew.") for text in progress.said)


def test_a_file_that_moved_goes_on(small, topics, tmp_path):
    one = analyze("layers", small, topics, CONFIG)
    shutil.copy(topics.source, tmp_path / "moved.jsonl")
    moved = CorpusConfig(str(tmp_path / "moved.jsonl"), label_column="topic", max_tokens=48)
    assert analyze("layers", small, moved, CONFIG, progress=Killed(0)).rows == one.rows


@pytest.mark.parametrize("experiment", NAMES)
def test_sums_do_not_grow_with_the_texts(experiment, small, topics, encoder, tmp_path):
    sizes = []
    for limit in (32, 84):
        corpus = CorpusConfig(topics.source, label_column="topic", max_tokens=48, limit=limit)
        texts = draw(tmp_path / f"{limit}.jsonl", corpus, small.tokenizer, 0, Progress())
        setting = Setting(Reader.of(small, ":", 48), CONFIG, [encoder], texts, Progress())
        work = EXPERIMENTS[analysis.settings.Experiment(experiment)](setting)
        work.prepare()
        for number in range(texts.n_blocks):
            rows = texts.block(number)
            work.add(number, number, rows, work.reader.ids(rows))
        arrays = {**work.sums, **work.memory}
        sizes.append({name: values.shape for name, values in arrays.items()})
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", ["opt", "gpt2", "mixtral", "own experts"])
def test_other_kinds_of_models(kind, topics, encoder, small):
    makers = {"mixtral": tiny_mixtral, "own experts": mixtral_of_own_experts}
    model = makers[kind]() if kind in makers else tiny_model(kind)
    model.resize_token_embeddings(len(small.tokenizer))
    language_model = LanguageModel(model, small.tokenizer, kind, find_mlps(model))
    for experiment in NAMES:
        found = analyze(experiment, language_model, topics, CONFIG, encoder=encoder)
        assert all(row["value"] is not None for row in found.rows), experiment
    by_size = [row["value"] for row in analyze("alpha-beta", language_model, topics, CONFIG).rows if "kept" in row]
    assert np.isfinite(by_size).all() and len(set(by_size)) > 6


def test_a_mixture_from_a_folder(topics, tmp_path):
    found = analyze("stability", saved(tmp_path / "mixtral", tiny_mixtral()), topics, CONFIG)
    assert len({row["layer"] for row in found.rows if "layer" in row}) == 12  # 4 experts in each of 3 layers


@pytest.mark.parametrize("experiment", NAMES)
def test_pictures(experiment, small, topics, encoder, tmp_path):
    path = tmp_path / "picture.svg"
    found = analyze(experiment, small, topics, CONFIG, encoder=encoder)
    plot(found, path)
    text = path.read_text(encoding="utf-8")
    assert found.n_texts == 84 if experiment != "stability" else 0 < found.n_texts < 84
    assert (
        f"{found.n_texts} texts" in text and COLORS[0] in text and COLORS[1] in text and found.picture.x_title in text
    )


def test_too_few_texts_for_intervals_are_said(small, topics, tmp_path):
    found = analyze("layers", small, replace(topics, limit=30), CONFIG)
    assert not found.has_intervals and any("30 texts gave too few" in remark for remark in found.remarks)
    plot(found, tmp_path / "a.svg")
    assert "30 texts" in (tmp_path / "a.svg").read_text() and "intervals" not in (tmp_path / "a.svg").read_text()


# The command


def test_the_command_prints_a_table_and_json(tiny_checkpoint, topics, tmp_path):
    arguments = ["analyze", "stability", topics.source, "--model", tiny_checkpoint, "--limit", 40]
    arguments += [*setting("analyze.length", 16), *setting("corpus.max_tokens", 48)]
    table = succeeded(*arguments, "--plot", tmp_path / "a.png").stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000
    result = parsed(*arguments, "--json")
    assert (result["experiment"], result["corpus"]["n_kept"], result["config"]["length"]) == ("stability", 40, 16)
    row = result["rows"][0]
    assert f"{row['value']:.4g}  ({row['low']:.4g} to {row['high']:.4g})" in table
    assert "of 40 texts have 16 tokens" in table and "layer" not in table.splitlines()[0]


def test_bad_input_is_one_sentence(tiny_checkpoint, topics, tmp_path):
    def run(experiment, *more, corpus=topics.source):
        model = ["--model", tiny_checkpoint, *setting("corpus.max_tokens", 48)]
        return call("analyze", experiment, corpus, *model, *more)

    refused(run("colours"), "'colours' is not one of", code=2)
    refused(run("layers", corpus=tmp_path / "none.jsonl"), "none.jsonl")
    refused(run("layers", "--plot", tmp_path / "a.pdf"), "the plot is to be a.pdf")
    refused(run("layers", *setting("analyze.layers", "7:")), "layers is '7:', which names none of 3 layers")
    refused(run("layers", *setting("analyze.alpha", 0)), "alpha is 0.0, expected a number above 0")
    refused(
        run("layers", *setting("analyze.clusters", "1,4")), "clusters is 1,4, expected different numbers of 2 or more"
    )
    refused(run("layers", *setting("analyze.further_encoders", "x")), "further_encoders are of clusters")
    refused(run("layers", *setting("corpus.label_column", "colour")), "expected colour")
    refused(run("clusters", "--limit", 40), "holds 40 texts, expected 64 or more for 32 clusters")
    refused(run("information", "--limit", 32), "holds 32 texts, expected 33 or more, which information compares")
    refused(run("similarity", "--limit", 3), "holds 3 texts, expected 8 or more")
    refused(run("stability"), "texts are cut to 48 tokens, expected 256 or more")
    (tmp_path / "short.txt").write_text("star\nmoon\n")
    short = run("stability", *setting("analyze.length", 48), corpus=tmp_path / "short.txt")
    refused(short, "none of 2 texts has 48 tokens")
    refused(run("stability", *setting("analyze.length", 3)), "length is 3, expected 16 tokens or more")
    assert not list(tmp_path.glob("*.p*"))


def test_labels_are_few(small, tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}", "id_of": f"n{n}"}) + "\n" for n in range(300)))
    with pytest.raises(CorpusError, match="'id_of' of .* has more than 256 different labels"):
        analyze("layers", small, CorpusConfig(str(path), label_column="id_of"))


def test_labels_are_of_analyses_alone(small, topics, tmp_path):
    from coreinfer_sim.building.build import build_index

    with pytest.raises(ConfigError, match="corpus.label_column is of analyses"):
        build_index(small, topics, tmp_path / "index")
    refused(
        call("evaluate", topics.source, "--model", "m", *setting("corpus.label_column", "topic")),
        "corpus.label_column is of analyses",
    )


def test_a_damaged_model_is_told(tiny_checkpoint, topics):
    damaged = load_model(tiny_checkpoint, "float32")
    damaged.layers[1].output.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="no number"):
        analyze("layers", damaged, topics, CONFIG)
