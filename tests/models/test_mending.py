"""Settings of a checkpoint that decode cannot use are put right in memory, and told in a line."""

from __future__ import annotations

import pytest
import torch
from calls import everything
from checkpoints import loads, saved, with_json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from coreinfer_sim.base.errors import ModelError, PromptError
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.loading import load_model

TEXTS = ["Hi", "How do stars form in space?"]


@pytest.mark.parametrize(
    "files", [["config.json"], ["generation_config.json"], ["config.json", "generation_config.json"]]
)
def test_use_cache_is_passed_over(files, tmp_path):
    folder = saved(tmp_path / "model")
    for name in files:
        with_json(folder, name, use_cache=False)
    for found in loads(folder):
        assert ["use_cache is false" in note for note in found.notes] == [True]
        assert found.model.config.use_cache is found.model.generation_config.use_cache is True


def padded_and_alone(folder, **options):
    """Return the new tokens of two texts that are padded by the model's own tokenizer, and of each alone."""
    loaded = load_model(str(folder), "float32")
    tokenizer, sparse = loaded.tokenizer, SparseModel(loaded.model, everything(loaded.model), loaded.tokenizer)
    tokenizer.padding_side = "left"
    calls = [tokenizer(TEXTS, return_tensors="pt", padding=True)]
    calls += [tokenizer([text], return_tensors="pt") for text in TEXTS]
    both, *alone = (sparse.generate(**call, max_new_tokens=6, do_sample=False, **options)[:, -6:] for call in calls)
    return loaded, both, torch.cat(alone)


def with_pad(folder, token: str | None):
    """Give a checkpoint's tokenizer another padding token; one that it does not know gets an id behind the table."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if token is None:
        tokenizer.pad_token = None
    else:
        tokenizer.add_special_tokens({"pad_token": token})
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token == token
    return folder


@pytest.mark.parametrize(("token", "pads", "n_notes"), [
    ("[PAD]", "</s>", 1), ("<|padding|>", "</s>", 1), ("</s>", "</s>", 0), ("<unk>", "<unk>", 0), (None, "</s>", 0),
])  # fmt: skip
def test_any_padding_token(token, pads, n_notes, tmp_path):
    folder = with_pad(saved(tmp_path / "model"), token)
    loaded, both, alone = padded_and_alone(folder)
    assert torch.equal(both, alone)
    assert loaded.tokenizer.pad_token == pads and len(loaded.notes) == n_notes
    assert all(f"{token} has the id " in note and f"{pads} pads instead" in note for note in loaded.notes)


@pytest.mark.parametrize("pad", [-1, 100_000, 3, None])
@pytest.mark.parametrize(
    "files", [["config.json"], ["generation_config.json"], ["config.json", "generation_config.json"]]
)
def test_any_padding_id_of_the_configuration(pad, files, tmp_path):
    """With a tokenizer that has no padding token."""
    folder = with_pad(saved(tmp_path / "model"), None)
    for name in files:
        with_json(folder, name, pad_token_id=pad)
    loaded, both, alone = padded_and_alone(folder)
    assert torch.equal(both, alone)
    n_rows = loaded.model.get_input_embeddings().weight.shape[0]
    for found in loads(folder):
        settings = (found.model.config.pad_token_id, found.model.generation_config.pad_token_id)
        assert all(each is None or 0 <= each < n_rows for each in settings)
        assert len(found.notes) == (len(files) if pad in (-1, 100_000) else 0)


def test_a_tokenizer_without_any_special_token_can_pad_and_decodes_all_it_reads(tmp_path):
    folder = saved(tmp_path / "model", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    letters = Tokenizer(models.WordLevel({chr(number): number for number in range(128)}, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    loaded, both, alone = padded_and_alone(folder, pad_token_id=None)
    assert torch.equal(both, alone)
    whole = list(range(32, 128))
    decode = loaded.tokenizer.decode
    assert decode(whole, skip_special_tokens=True) == decode(whole)


def test_a_token_without_a_row_in_the_table_is_refused_where_a_text_holds_it(tmp_path):
    folder = with_pad(saved(tmp_path / "model"), "[PAD]")
    for found in loads(folder):
        ids = found.tokenizer("[PAD] stars", return_tensors="pt")["input_ids"]
        for call in (found.model, found.model.base_model):
            with pytest.raises(ModelError, match="a token of the id 400, but the embedding table has 400 rows"):
                call(ids)
        generator = TextGenerator(found, predictor=everything(found.model))
        with pytest.raises(PromptError, match="the ids hold 400, expected 0 to 399"):
            generator.generate("[PAD] stars", max_new_tokens=2)
        with pytest.raises(ModelError, match="a token of the id 400"):
            generator.score("[PAD]", " stars")
        assert generator.generate("stars", max_new_tokens=2).n_new_tokens == 2
