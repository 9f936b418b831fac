"""Settings of a checkpoint that decode cannot use, put right in memory; each is told in one line."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from coreinfer_sim.base.errors import ModelError


def mend_config(config: Any) -> list[str]:
    """Take a padding token that has no row in the embedding table out of a configuration, and return a note if it had one.

    With it torch cannot even make the table.
    """
    notes = []
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        pad, n_rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if pad is not None and n_rows is not None and not 0 <= pad < n_rows:
            part.pad_token_id = None
            notes.append(
                _outside(f"the padding token of the configuration has the id {pad}", n_rows, "it is passed over")
            )
    return notes


def mend(model: Any, tokenizer: Any) -> list[str]:
    """Make a model's own settings ones that decode can use, and its tokenizer able to pad; return notes on what was changed.

    Decode reads the cache, whatever training has left in ``use_cache``.
    """
    notes, settings, n_rows = [], model.generation_config, model.get_input_embeddings().weight.shape[0]
    configs = (settings, model.config, model.config.get_text_config())
    if any(getattr(each, "use_cache", None) is False for each in configs):
        for each in configs:
            each.use_cache = True
        notes.append(
            "Note: use_cache is false in the model's configuration; it is passed over, as decode needs the cache."
        )
    given = tokenizer.pad_token, tokenizer.pad_token_id
    if given[1] is None or not 0 <= given[1] < n_rows:
        tokenizer.pad_token = _padding(tokenizer, n_rows)
        if given[1] is not None:
            what = f"the padding token {given[0]} has the id {given[1]}"
            notes.append(_outside(what, n_rows, f"{tokenizer.pad_token} pads instead"))
    if settings.pad_token_id is not None and not 0 <= settings.pad_token_id < n_rows:
        what = f"the padding token of the generation settings has the id {settings.pad_token_id}"
        notes.append(_outside(what, n_rows, f"{tokenizer.pad_token} pads instead"))
        settings.pad_token_id = tokenizer.pad_token_id
    if max(tokenizer.get_vocab().values(), default=0) >= n_rows:
        model.get_input_embeddings().register_forward_pre_hook(partial(_checked, n_rows=n_rows))
    return notes


def outside(ids: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Return which ids stand for no row of a table."""
    return (ids < 0) | (ids >= n_rows)


def check_rows(ids: torch.Tensor, n_rows: int) -> None:
    """Raise ModelError if one of some ids stands for no row of the embedding table."""
    strange = ids[outside(ids, n_rows)]
    if len(strange) > 0:
        raise ModelError(
            f"the text holds a token of the id {int(strange[0])}, but the embedding table has {n_rows:,} rows; leave the "
            "token out of the text, or take the tokenizer that the model was trained with."
        )


def _checked(_table: Any, given: tuple[torch.Tensor, ...], n_rows: int) -> None:
    check_rows(given[0], n_rows)


def _padding(tokenizer: Any, n_rows: int) -> str:
    """Return a token that can pad: one that decoding passes over, if there is such, else that of the last row."""
    ids = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    fitting = (each for each in ids if each is not None and 0 <= each < n_rows)
    token: str = tokenizer.convert_ids_to_tokens(next(fitting, min(n_rows, len(tokenizer)) - 1))
    return token


def _outside(what: str, n_rows: int, done: str) -> str:
    return f"Note: {what}, but the embedding table has {n_rows:,} rows; {done}."
