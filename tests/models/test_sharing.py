"""One copy of a model's weights for several processes."""

from __future__ import annotations

import copy
import pickle

import torch
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.sharing import share

IDS = torch.arange(3, 15)[None]


def logits(language_model) -> torch.Tensor:
    with torch.inference_mode():
        return language_model.model(input_ids=IDS).logits


def test_a_shared_model_is_the_same_and_holds_no_weights_of_its_own(tmp_path):
    loaded = load_model(save_tiny_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=96), "float32")
    before = copy.deepcopy(dict(loaded.model.named_parameters()))
    expected = logits(loaded)
    shared = pickle.loads(pickle.dumps(share(loaded, tmp_path / "weights")))
    assert len(shared.rest) < sum(each.nbytes for each in before.values())
    others = [shared.load(), shared.load()]
    for each in (loaded, *others):
        found = dict(each.model.named_parameters())
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)
        assert torch.equal(logits(each), expected)
        assert each.layers[0].output is next(m for n, m in each.model.named_modules() if n.endswith("0.mlp.down_proj"))
    assert others[0].name == loaded.name and others[0].tokenizer("How do stars form?") == loaded.tokenizer(
        "How do stars form?"
    )
    with torch.no_grad():  # what one changes is its own
        others[0].layers[0].output.weight.zero_()
    assert torch.equal(logits(others[1]), expected) and not torch.equal(logits(others[0]), expected)


def test_tied_matrices_stay_tied(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model", hidden_size=64, tie_word_embeddings=True)
    loaded = load_model(folder, "float32")
    other = share(loaded, tmp_path / "weights").load()
    for each in (loaded, other):
        assert each.model.get_input_embeddings().weight is each.model.get_output_embeddings().weight


def test_what_cannot_be_sent_is_not_shared(tmp_path):
    loaded = load_model(save_tiny_checkpoint(tmp_path / "model"))
    loaded.model.note = lambda: None
    assert share(loaded, tmp_path / "weights") is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_codes_of_a_gguf_file_are_shared_too(quantised_file, tmp_path):
    loaded = load_model(str(quantised_file("q8_0")))
    other = share(loaded, tmp_path / "weights").load()
    codes, others = loaded.model.own_codes, other.model.own_codes
    assert codes and codes.keys() == others.keys()
    assert all((codes[name].raw == others[name].raw).all() for name in codes)
