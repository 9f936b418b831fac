"""What a model's name stands for, and why what lies there is no model of plain weights; nothing large is read."""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from gguf import GGUFReader, GGUFValueType
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.peft_utils import find_adapter_config_file

from coreinfer_sim.base.errors import CoreInferSimError, ModelError, UnsupportedModelError
from coreinfer_sim.base.hub import NO_CODE, out_of_reach
from coreinfer_sim.models.checkpoint import SHARDED, Checkpoint, has_safetensors

ADAPTER_FILE = "adapter_config.json"
_UNMERGEABLE = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANTISED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Beside configurations that say nothing of it, and which method's they are."""
_UNKNOWN = re.compile(
    r"model type `?([\w.-]+)`? but Transformers does not recognize|GGUF model with architecture (\S+) is not supported"
)
"""What transformers says of an architecture that it lacks."""
_OTHER_KIND = re.compile(r"Unrecognized configuration class <class '[\w.]+\.(\w+)Config'>")
"""What it says of one that writes no text from left to right."""
_CODE = "trust_remote_code"
"""What it names where a checkpoint needs code of its own."""
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_OF_TOKENIZERS = re.compile(r"(?i)tokenizer|vocab|merges|spiece|sentencepiece|tiktoken|tekken|\.model$|\.spm$")
_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_POINTER = 1024
_KINDS = "a hub id, a checkpoint folder or a GGUF file"


def source_of(name: str) -> tuple[str, dict[str, str]]:
    """Return what ``from_pretrained`` takes for a name, and its further options.

    Raises:
        ModelError: nothing is there, or what is there is plainly no whole model.
    """
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name}, expected a GGUF model; check the path.")
        _check_gguf(path)
        return _nothing_beside(), {"gguf_file": str(path.absolute())}
    if path.is_dir():
        _check_folder(path)
    elif path.is_file() or path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"{name} is no checkpoint folder and no .gguf file; check the path.")
    elif why := out_of_reach(name):
        raise ModelError(
            f"the model {name!r} cannot be loaded ({why}), expected {_KINDS}; check the name or the connection."
        )
    return name, {}


@functools.cache
def _nothing_beside() -> str:
    """Return an empty folder: what lies beside a GGUF file, such as another model's tokenizer, is not part of it."""
    folder = tempfile.TemporaryDirectory(prefix="coreinfer-sim-")
    atexit.register(folder.cleanup)
    return folder.name


def read_config(name: str, source: str, options: dict[str, str], fp8: bool = False) -> Any:
    """Return the configuration of a model of plain weights.

    Args:
        name: what the user called it.
        source: of `source_of`.
        options: of `source_of`.
        fp8: whether weights in FP8 with a scale for each block are taken, too; see `holds_fp8`.

    Raises:
        ModelError: it cannot be read.
        UnsupportedModelError: the weights are quantised.
    """
    with load_errors(name):
        config = AutoConfig.from_pretrained(source, **options, **NO_CODE)
    for part in (config, config.get_text_config()):
        for field, method in (("quantization_config", "a method that it does not name"), ("quantization", "MLX")):
            settings = getattr(part, field, None)
            if settings and not (fp8 and holds_fp8(part)):
                raise quantised(name, _method(settings if isinstance(settings, dict) else settings.to_dict(), method))
    for file, method in _QUANTISED_FILES.items():
        if Path(name, file).is_file():
            content = _json(Path(name, file))
            raise quantised(name, _method(content.get("quantization", content), method) + f", as its {file} says")
    return config


def holds_fp8(config: Any) -> bool:
    """Return whether weights are in FP8 with a scale for each block, which transformers widens as it reads them."""
    settings = getattr(config, "quantization_config", None)
    return (
        isinstance(settings, dict) and settings.get("quant_method") == "fp8" and bool(settings.get("weight_block_size"))
    )


def auto_class(config: Any) -> Any:
    """Return which of transformers' auto classes makes a model that writes text: one for texts alone if there is such."""
    about_images = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if about_images else AutoModelForCausalLM


def quantised(name: str, method: str) -> UnsupportedModelError:
    """Return the error of a checkpoint whose weights are quantised."""
    return UnsupportedModelError(
        f"the weights of {name} are quantised ({method}), expected plain ones; name the checkpoint that was quantised, or a "
        "GGUF file of it, which is dequantised as it is read."
    )


@contextmanager
def load_errors(name: str, what: str = "model") -> Iterator[None]:
    """Turn what a library raises into a ModelError; transformers raises the errors of a dozen others."""
    try:
        yield
    except (MemoryError, CoreInferSimError):
        raise
    except Exception as error:
        is_here = Path(name).exists()
        if not is_here:
            check_no_adapter(name)
        unknown = _UNKNOWN.search(str(error))
        if unknown is not None:
            raise UnsupportedModelError(
                f"{name} is of the architecture {unknown[1] or unknown[2]}, which transformers {transformers.__version__} does "
                "not know; upgrade transformers, or name another model."
            ) from error
        if other := _OTHER_KIND.search(str(error)):
            raise UnsupportedModelError(
                f"{name} is of the type {other[1]}, expected a causal language model; name one, such as a Llama or a Qwen."
            ) from error
        if _CODE in str(error):
            raise UnsupportedModelError(
                f"{name} needs code of its own, which its config.json or tokenizer_config.json names, and such code does not "
                f"run here; name a model of an architecture that transformers {transformers.__version__} knows."
            ) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if is_here and Path(name).is_file() and "cannot reshape array" in reason:  # fewer bytes than its header says
            raise ModelError(f"{name} is cut off, expected a whole GGUF file; fetch it again.") from error
        expected = "a whole checkpoint folder or GGUF file; fetch it again" if is_here else _KINDS
        raise ModelError(f"the {what} {name!r} cannot be loaded ({reason}), expected {expected}.") from error


def check_no_adapter(name: str) -> None:
    """Raise ModelError if a hub id or folder has the configuration of an adapter."""
    try:
        # the hub is only asked again if it has answered, and said that there is no config.json
        unanswered = not Path(name).exists() and try_to_load_from_cache(name, "config.json") is None
        found = find_adapter_config_file(name, local_files_only=unanswered)
    except Exception:  # no such repository: then it is not this that went wrong
        return
    if found is None:
        return
    try:
        config = _json(Path(found))
    except ModelError:
        config = {}
    kind, base = str(config.get("peft_type") or "LoRA"), config.get("base_model_name_or_path")
    is_of = f"{name} is an adapter ({kind}) of {base or 'a model that it does not name'}, expected a whole model; "
    if kind in _UNMERGEABLE:
        raise ModelError(f"{is_of}this kind cannot be merged into weights: name the model itself.")
    raise ModelError(
        f"{is_of}merge it with peft (AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload()), save the result "
        "and the tokenizer into one folder with save_pretrained, and name that folder."
    )


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is no checkpoint, or one whose safetensors files are absent or cut off."""
    has_config = (folder / "config.json").is_file()
    has_weights = any(any(folder.glob(f"{stem}*")) for stem in ("model", "pytorch_model"))
    if (folder / ADAPTER_FILE).is_file() and not (has_config and has_weights):
        check_no_adapter(str(folder))
    if not has_config:
        files = sorted(path.name for path in folder.glob("*.gguf"))
        if files:
            raise ModelError(f"{folder} is a folder of GGUF files ({', '.join(files[:3])}); name one of the files.")
        raise ModelError(f"the folder {folder} has no config.json, expected a transformers checkpoint; check the path.")
    for path in sorted(folder.iterdir()):
        _check_no_pointer(path)
    _json(folder / "config.json")
    if has_safetensors(folder):
        Checkpoint(folder)
    elif parts := sorted(path.name for path in folder.glob("*-of-*.safetensors")):
        raise ModelError(
            f"{folder} holds parts of a model ({', '.join(parts[:3])}) without their {SHARDED}, expected it beside them; fetch "
            "it, too."
        )
    weights = any(path.suffix in _WEIGHTS for path in folder.iterdir())
    if weights and not any(_OF_TOKENIZERS.search(path.name) for path in folder.iterdir()):
        raise ModelError(
            f"{folder} has no tokenizer (such as tokenizer.json), expected one beside the weights; copy it from the model that "
            "this one was made of."
        )


def _check_no_pointer(path: Path) -> None:
    """Refuse a file in whose place a clone without Git LFS has left a note."""
    if path.is_file() and path.stat().st_size <= _LARGEST_POINTER and path.read_bytes().startswith(_POINTER):
        raise ModelError(
            f"{path} is a pointer of Git LFS, expected the file itself; fetch it with 'git lfs pull', or the model with 'hf "
            "download'."
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}), expected JSON; fetch it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, expected a JSON object; fetch it again.")
    return content


def _method(settings: dict[str, Any], otherwise: str) -> str:
    """Name a quantisation as its configuration does, with the bits of a weight if they are stated."""
    loaded_in = next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), None)
    bits = settings.get("bits") or settings.get("w_bit") or loaded_in
    given = settings.get("quant_method") or settings.get("quant_algo") or ("bitsandbytes" if loaded_in else otherwise)
    method = str(given).upper() if len(str(given)) <= 5 else str(given)
    return method + (f", {bits} bits" if bits else "")


def gguf_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Return a GGUF file's metadata that are single values, and the names of its tensors.

    Raises:
        ModelError: it is none, or is cut off.
    """
    try:
        quick: Any = importlib.import_module("transformers.integrations.gguf")
        metadata, names = quick.read_gguf_metadata(str(path))
        return metadata, set(names)
    except Exception:  # an earlier release, or a part without a model's metadata: gguf's own reader takes seconds
        pass
    try:
        reader = GGUFReader(path)
        values = {key: field.parts[-1] for key, field in reader.fields.items() if len(field.types) == 1}
        strings = {key for key in values if reader.fields[key].types[0] == GGUFValueType.STRING}
        singles = {key: bytes(value).decode() if key in strings else value[0] for key, value in values.items()}
        return singles, {tensor.name for tensor in reader.tensors}
    except Exception as error:  # it reads on as if nothing were wrong, and raises what comes of it
        with path.open("rb") as file:
            found = "is cut off" if file.read(4) == b"GGUF" else "is no GGUF file"
        raise ModelError(f"{path} {found}, expected a whole GGUF file; fetch it again.") from error


def _check_gguf(path: Path) -> None:
    """Refuse a GGUF file that is damaged, no model, or one of several parts."""
    _check_no_pointer(path)
    fields, _ = gguf_header(path)
    kind, named = fields.get("general.type", "model"), _PART.search(path.name)
    if kind != "model":
        raise ModelError(
            f"{path} is a GGUF file of the type {kind}, expected a model; name the file of the model that it belongs to."
        )
    number, n_parts = (int(named[1]), int(named[2])) if named else (1, 1)
    if "split.count" in fields:  # 0 in a joined file
        number, n_parts = int(fields.get("split.no", number - 1)) + 1, int(fields["split.count"])
    if n_parts > 1:
        raise _is_part(path, number, n_parts)


def _is_part(path: Path, number: int, n_parts: int) -> ModelError:
    stem = _PART.sub("", path.name).removesuffix(".gguf")
    parts = {n: path.with_name(f"{stem}-{n:05d}-of-{n_parts:05d}.gguf") for n in range(1, n_parts + 1)}
    absent = [str(n) for n, part in parts.items() if n != number and not part.is_file()]
    fetch = f"fetch its other parts beside it ({', '.join(absent)}), " if absent else ""
    return ModelError(
        f"{path} is part {number} of {n_parts} of a split GGUF file, expected a whole one; {fetch}join the parts with "
        f"'llama-gguf-split --merge {parts[1]} {path.with_name(stem + '.gguf')}', and name the joined file."
    )
