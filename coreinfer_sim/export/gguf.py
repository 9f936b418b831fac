"""Export as a GGUF file for llama.cpp, through the gguf package."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from coreinfer_sim.base.errors import ExportError
from coreinfer_sim.export.weights import CompactWeights, Source
from coreinfer_sim.models.loading import LanguageModel

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
"""What the gguf package itself can write."""
QUANTISED = ("q8_0", "q4_0")
"""Those with scales."""
K_QUANTS = ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k")
"""What llama.cpp's own quantiser makes of a BF16 file."""
QUANTISER = "llama-quantize"
_PREFIX = "coreinfer_sim."
_KINDS = {
    str: gguf.GGUFValueType.STRING,
    float: gguf.GGUFValueType.FLOAT64,
    bool: gguf.GGUFValueType.BOOL,
}
_LLAMA_LIKE = ("llama", "mistral", "qwen2")
_PRE_TOKENIZERS = {
    "llama-bpe": r"\p{N}{1,3}",
    "qwen2": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    "smollm": '"Digits"',
}
"""Names that llama.cpp gives to ways of cutting text before byte pairs are merged, and what each one's description holds;
the first that fits counts. Bytes cut by their own pattern alone are "gpt-2"."""


def bits_per_value(kind: str) -> float:
    """Return the bits of one value of a matrix."""
    values, n_bytes = gguf.GGML_QUANT_SIZES[_written_as(kind)]
    return 8 * n_bytes / values


def source_of(path: Path) -> dict[str, Any]:
    """Return what a file says it was exported from; nothing if it does not."""
    try:
        fields = gguf.GGUFReader(path).fields
    except (OSError, ValueError, IndexError, KeyError):
        return {}
    return {name.removeprefix(_PREFIX): each.contents() for name, each in fields.items() if name.startswith(_PREFIX)}


def facts_of(source: Source) -> dict[str, Any]:
    """Return a source as the metadata hold it."""
    return {"set": source.title, **{name: value for name, value in asdict(source).items() if name != "which"}}


def check_exportable(language_model: LanguageModel, kind: str) -> None:
    """Raise ExportError unless the model can be written as ``kind``."""
    family, config = language_model.layers[0].family, language_model.model.config
    if family not in _LLAMA_LIKE:
        raise ExportError(
            f"{family} models are not written as GGUF, expected {', '.join(_LLAMA_LIKE)}; export a checkpoint and convert "
            "that with llama.cpp's own script."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ExportError(
            f"the model scales its positions ({rope['rope_type']}), expected plain rotary ones; export a checkpoint and "
            "convert that with llama.cpp's own script."
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise ExportError(f"the model attends to a window of {window} positions, which Llama in llama.cpp cannot.")
    if kind in K_QUANTS and shutil.which(QUANTISER) is None:
        raise ExportError(
            f"{kind} needs llama.cpp's {QUANTISER}, which is not on the PATH; install it, or use one of {', '.join(TYPES)}."
        )
    pre_tokenizer_name(language_model.tokenizer)


def export_gguf(
    language_model: LanguageModel, weights: CompactWeights, source: Source, out: Path, kind: str = "bf16"
) -> None:
    """Write one GGUF file.

    Layers of one width make a ``llama`` model. Layers of several make a ``deci`` model: the same computation, for which
    llama.cpp reads a list of widths.

    Args:
        language_model: the dense model.
        weights: cut down to a selection.
        source: what is exported; named in the metadata.
        out: a new file.
        kind: one of TYPES or K_QUANTS.

    Raises:
        ExportError: see `check_exportable`; or the quantiser failed.
    """
    check_exportable(language_model, kind)
    if kind not in K_QUANTS:
        return _write(language_model, weights, source, out, kind)
    whole = out.with_name(out.name + ".bf16")
    try:
        _write(language_model, weights, source, whole, "bf16")
        quantise(QUANTISER, whole, out, kind)
    finally:
        whole.unlink(missing_ok=True)


def quantise(quantiser: str | Path, whole: Path, out: Path, kind: str) -> None:
    """Let llama.cpp's own quantiser make a file of another type, such as ``q4_k_m``.

    Raises:
        ExportError: it failed.
    """
    command = [str(quantiser), str(whole.absolute()), str(out.absolute()), kind.upper()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ExportError(f"{QUANTISER} failed: {' '.join(done.stderr.split())[-300:]}")


def _write(language_model: LanguageModel, weights: CompactWeights, source: Source, out: Path, kind: str) -> None:
    one_width = len(set(weights.widths)) == 1
    arch = gguf.MODEL_ARCH.LLAMA if one_width else gguf.MODEL_ARCH.DECI
    matrix_type, file_type = TYPES[kind]
    writer = gguf.GGUFWriter(str(out), gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(f"{Path(source.model).stem} {source.title}")
    writer.add_file_type(file_type)
    _add_architecture(writer, language_model.model.config, weights.widths)
    for key, value in facts_of(source).items():
        writer.add_key_value(f"{_PREFIX}{key}", value, _KINDS[type(value)])
    _add_tokenizer(writer, language_model)
    try:
        _add_tensors(writer, language_model.model.config, weights, arch, matrix_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _heads(config: Any) -> tuple[int, int]:
    """Return the heads of queries, and of keys and values."""
    n_heads: int = config.num_attention_heads
    return n_heads, getattr(config, "num_key_value_heads", None) or n_heads


def _add_architecture(writer: gguf.GGUFWriter, config: Any, widths: list[int]) -> None:
    """Add the sizes; a model whose layers differ in width states its heads for each layer as well."""
    one_width = len(set(widths)) == 1
    n_heads, n_kv_heads = _heads(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(widths))
    writer.add_feed_forward_length(widths[0] if one_width else widths)
    writer.add_head_count(n_heads if one_width else [n_heads] * len(widths))
    writer.add_head_count_kv(n_kv_heads if one_width else [n_kv_heads] * len(widths))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tensors(
    writer: gguf.GGUFWriter,
    config: Any,
    weights: CompactWeights,
    arch: gguf.MODEL_ARCH,
    matrix_type: gguf.GGMLQuantizationType,
) -> None:
    """Add all parameters under llama.cpp's names, vectors in float32."""
    names = gguf.get_tensor_name_map(arch, len(weights.widths))
    n_heads, n_kv_heads = _heads(config)
    for name, value in weights.parameters.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # llama.cpp reads the embeddings instead
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"llama.cpp has no name for the parameter {name}; export a checkpoint instead.")
        heads = n_heads if ".q_proj." in name else n_kv_heads if ".k_proj." in name else None
        if heads is not None:
            value = _interleaved(value, heads)
        array = value.detach().float().cpu().numpy()
        stored = matrix_type if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)


def _written_as(kind: str) -> gguf.GGMLQuantizationType:
    return TYPES.get(kind, TYPES["bf16"])[0]


def _interleaved(value: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of queries or keys: llama.cpp's Llama rotates neighbours, transformers halves."""
    rows = value.reshape(n_heads, 2, value.shape[0] // n_heads // 2, *value.shape[1:])
    return rows.transpose(1, 2).reshape(value.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, language_model: LanguageModel) -> None:
    """Add the vocabulary, its merges, special tokens and the chat template."""
    tokenizer = language_model.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.get_vocab()
    by_id = {number: token for token, number in ids.items()}
    added = {each["id"]: each["special"] for each in backend["added_tokens"]}
    tokens, types = [], []
    for number in range(language_model.model.config.vocab_size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif number in added:
            types.append(gguf.TokenType.CONTROL if added[number] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(language_model.tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]])
    special: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for name, number in special.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_name(tokenizer: Any) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text before byte pairs are merged.

    Raises:
        ExportError: llama.cpp knows no such way.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE" or not isinstance(backend["pre_tokenizer"], dict):
        raise ExportError(
            f"the tokenizer is a {backend['model']['type']} model, expected byte-level BPE; export a checkpoint and convert "
            "that with llama.cpp's own script."
        )
    description = json.dumps(backend["pre_tokenizer"])
    for name, part in _PRE_TOKENIZERS.items():
        if part in description.replace("\\\\", "\\"):
            return name
    if backend["pre_tokenizer"].get("type") == "ByteLevel" and backend["pre_tokenizer"].get("use_regex", True):
        return "gpt-2"
    raise ExportError(
        f"the tokenizer cuts text in a way unknown here ({description[:120]}); export a checkpoint and convert that with "
        "llama.cpp's own script."
    )
