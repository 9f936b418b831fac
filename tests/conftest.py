"""Fixtures that the tests share; everything runs offline, on one thread."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tiny_models import TINY_FAMILIES, TinyFamily, save_tiny_checkpoint, tiny_model

from coreinfer_sim.index.encoder import SentenceEncoder

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing that tests measure or make lands in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COREINFER_SIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> str:
    """Folder of a tiny Llama with a real tokenizer and a chat template; read-only."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llama")


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
