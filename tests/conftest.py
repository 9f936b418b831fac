"""Fixtures that the tests share; everything runs offline, on one thread."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tqdm reads this once, when it is first imported, and tests look at bars
os.environ.pop("TQDM_DISABLE", None)

import pytest
import torch
from tiny_index import WIDE_RATIO, build_tiny_index
from tiny_models import TINY_FAMILIES, TinyFamily, save_tiny_checkpoint, tiny_model

from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.index.encoder import SentenceEncoder
from coreinfer_sim.index.index import SemanticIndex

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory):
    """Nothing that tests measure or make lands in the user's folders, and nothing there changes what they do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COREINFER_SIM_CACHE", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> str:
    """Folder of a tiny Llama with a real tokenizer and a chat template; read-only."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llama")


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory) -> str:
    """Folder of a tiny Llama whose MLPs are wide enough that exported widths are rounded; read-only."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("wide") / "tiny-llama", intermediate_size=192)


@pytest.fixture(scope="session")
def wide_index(wide_checkpoint, encoder, tmp_path_factory) -> SemanticIndex:
    """An index of that model with three clusters that keep WIDE_RATIO; read-only."""
    config = BuildConfig(clusters=3, gamma=WIDE_RATIO)
    folder = build_tiny_index(wide_checkpoint, tmp_path_factory.mktemp("wide-index"), config, encoder)
    return SemanticIndex.load(folder, encoder)


@pytest.fixture(scope="session")
def exported(wide_index, wide_checkpoint, tmp_path_factory) -> Path:
    """Folder with that index's sets as GGUF files in float32, and their router; read-only."""
    from coreinfer_sim.export.export import export
    from coreinfer_sim.models.loading import load_model

    out = tmp_path_factory.mktemp("exported")
    sets = [0, 1, 2, "global", "dense"]
    export(load_model(wide_checkpoint, "float32"), wide_index, sets, out, kind="gguf", weights="f32", router=True)
    return out


@pytest.fixture
def quantised_file(tmp_path):
    """Writes a tiny Llama as a GGUF file of a type, beside its checkpoint in the folder ``source``."""
    from coreinfer_sim.choosing.selection import NeuronSelection
    from coreinfer_sim.engines.llamacpp.router import DENSE
    from coreinfer_sim.export.gguf import export_gguf
    from coreinfer_sim.export.weights import Source, compact_weights
    from coreinfer_sim.models.loading import load_model

    def written(kind):
        loaded = load_model(save_tiny_checkpoint(tmp_path / "source", hidden_size=64, intermediate_size=96))
        weights = compact_weights(loaded, NeuronSelection(DENSE), one_width=False)
        source = Source("model", "none", "none", DENSE, 1.0, False, kind)
        export_gguf(loaded, weights, source, tmp_path / "model.gguf", kind)
        return tmp_path / "model.gguf"

    return written


@pytest.fixture(scope="module")
def browser():
    """A real browser; what needs it is skipped where Chromium is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def encoder() -> SentenceEncoder:
    """The packaged all-MiniLM-L6-v2."""
    return SentenceEncoder()


@pytest.fixture(scope="session", params=TINY_FAMILIES, ids=lambda tiny: tiny.key)
def tiny(request) -> TinyFamily:
    """Each supported family in turn."""
    return request.param


@pytest.fixture(scope="session")
def models() -> dict:
    """Tiny models by family, built once; a test leaves them as they were."""
    return {each.key: tiny_model(each.key) for each in TINY_FAMILIES}


@pytest.fixture
def model(tiny, models):
    """The tiny model of the family in turn; a test leaves it as it was."""
    return models[tiny.key]
