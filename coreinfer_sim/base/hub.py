"""The hub that ids stand for: whether it answers, asked once and before anything is loaded."""

from __future__ import annotations

from pathlib import Path

NO_CODE = {"trust_remote_code": False}
"""Option of transformers' ``from_pretrained``: it would else ask on the terminal whether a checkpoint's own code may run."""
_OF_MODELS = ("config.json", "adapter_config.json", "modules.json")
"""One of which a model of the hub has; modules.json is a sentence encoder's."""
_SECONDS = 10
"""In which a hub that can be reached answers."""
_ANSWERED: set[str] = set()
"""Addresses that have answered this process, which are not asked again: a start loads a model and an encoder."""


def no_answer() -> str | None:
    """Return why the hub does not answer, in a few words; None: it does.

    It is asked until it has answered once. The hub's own client asks again for half a minute where there is no connection.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if constants.ENDPOINT in _ANSWERED:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # of the client that the hub's library uses, which differs between its releases
        return " ".join(str(error).split())[:120] or type(error).__name__
    _ANSWERED.add(constants.ENDPOINT)
    return None


def out_of_reach(name: str) -> str | None:
    """Return why a model or an encoder is not to be had, in a few words; None: it may be.

    What lies in the hub's cache is taken from there where the hub does not answer, and nothing is asked any more.

    Args:
        name: a path, or an id on the hub.
    """
    if Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf"):
        return None
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        is_cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in _OF_MODELS)
    except HFValidationError:  # no id: who loads it says so
        return None
    why = no_answer()
    if why is not None and is_cached:
        constants.HF_HUB_OFFLINE = True
        return None
    return None if why is None else f"it is no path here, and the hub does not answer: {why}"
