"""What stands under a model's name: adapters, quantised, split and damaged files are refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil

import gguf
import pytest
import torch
from checkpoints import refused_by_all, rewritten, saved, with_json
from safetensors.torch import load_file
from transformers import T5Config

from coreinfer_sim.base.errors import ModelError, UnsupportedModelError
from coreinfer_sim.models.loading import load_model, load_tokenizer

NUMBER, TEXT = gguf.GGUFValueType.UINT16, gguf.GGUFValueType.STRING


def adapter(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


@pytest.mark.parametrize("base", ["some/base-model", "/models/base", None])
@pytest.mark.parametrize("beside", ["nothing", "config.json"])
def test_an_adapter_is_named_with_its_base_and_how_to_merge_it(base, beside, tmp_path):
    folder = adapter(tmp_path / "lora", base_model_name_or_path=base)
    if beside == "config.json":
        shutil.copy(saved(tmp_path / "model") / "config.json", folder)
    refused_by_all(folder, ModelError, "is an adapter (LORA) of", base or "does not name", "merge_and_unload")
    with pytest.raises(ModelError, match="is an adapter"):
        load_tokenizer(str(folder))


def test_an_adapter_of_a_kind_that_cannot_be_merged(tmp_path):
    folder = adapter(tmp_path / "prefix", peft_type="PREFIX_TUNING", base_model_name_or_path="some/base")
    refused_by_all(folder, ModelError, "PREFIX_TUNING", "some/base", "cannot be merged")


def test_an_adapter_whose_configuration_is_no_json(tmp_path):
    folder = adapter(tmp_path / "lora")
    (folder / "adapter_config.json").write_text("{")
    refused_by_all(folder, ModelError, "is an adapter")


def test_an_adapter_beside_the_whole_model_is_a_note(tmp_path):
    folder = adapter(saved(tmp_path / "model"), base_model_name_or_path="some/base")
    assert "an adapter beside the whole model" in load_model(str(folder)).notes[0]


def test_an_adapter_in_the_hubs_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--lora" / "snapshots" / "abc"
    adapter(snapshot.parent.parent).rename(tmp_path / "made")
    snapshot.mkdir(parents=True)
    shutil.copy(tmp_path / "made" / "adapter_config.json", snapshot)
    (tmp_path / "models--me--lora" / "refs").mkdir()
    (tmp_path / "models--me--lora" / "refs" / "main").write_text("abc")
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(module, str(tmp_path))
    with pytest.raises(ModelError, match="me/lora is an adapter"):
        load_model("me/lora")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "AWQ, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "exl2", "bits": 3.5}, "EXL2, 3.5 bits"),
        ({"quant_method": "a-method-of-next-year"}, "a-method-of-next-year"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantised_checkpoints_are_refused_by_their_method(settings, named, tmp_path):
    folder = with_json(saved(tmp_path / "model"), quantization_config=settings)
    refused_by_all(
        folder, UnsupportedModelError, f"are quantised ({named}", "the checkpoint that was quantised", "GGUF"
    )


def test_quantised_checkpoints_of_mlx(tmp_path):
    folder = with_json(saved(tmp_path / "model"), quantization={"group_size": 64, "bits": 4})
    refused_by_all(folder, UnsupportedModelError, "quantised (MLX, 4 bits)")


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("quantize_config.json", {"bits": 4}, "GPTQ, 4 bits"),
        ("quant_config.json", {"w_bit": 4}, "AWQ, 4 bits"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "FP8"),
    ],
)
def test_a_quantisation_that_a_file_of_its_own_names(file, content, named, tmp_path):
    folder = with_json(saved(tmp_path / "model"), file, **content)
    refused_by_all(folder, UnsupportedModelError, named, file)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "<html>not found</html>", "\x00\x01"])
def test_a_configuration_that_is_no_json_object(content, tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "config.json").write_text(content)
    refused_by_all(folder, ModelError, "config.json", "fetch it again")


@pytest.mark.parametrize("n_bytes", [0, 5, 20, 3000, -1])
def test_safetensors_that_are_cut_off(n_bytes, tmp_path):
    folder = saved(tmp_path / "model")
    path = folder / "model.safetensors"
    os.truncate(path, n_bytes if n_bytes >= 0 else path.stat().st_size + n_bytes)
    refused_by_all(folder, ModelError, str(path), "fetch it again")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_file(name, tmp_path):
    folder = saved(tmp_path / "model")
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1234567\n")
    refused_by_all(folder, ModelError, f"{name} is a pointer of Git LFS", "git lfs pull")
    shutil.copy(folder / name, tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="is a pointer of Git LFS"):
        load_model(str(tmp_path / "model.gguf"))


def test_an_index_of_shards_that_is_no_json(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")
    refused_by_all(folder, ModelError, "model.safetensors.index.json cannot be read")


def test_an_old_index_of_shards_beside_the_whole_file_is_not_looked_at(tmp_path):
    folder = with_json(saved(tmp_path / "model"), "model.safetensors.index.json", weight_map={"x": "gone.safetensors"})
    load_model(str(folder))


def test_a_folder_with_a_configuration_alone(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    refused_by_all(folder, ModelError, "no", "model.safetensors")


def test_weights_of_torch_are_read_or_refused_where_they_are_damaged(tmp_path):
    folder = saved(tmp_path / "model")
    expected = load_model(str(folder)).model.state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load_model(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for n_bytes in (5000, 0):
        os.truncate(folder / "pytorch_model.bin", n_bytes)
        with pytest.raises(ModelError, match="cannot be loaded .*fetch it again"):
            load_model(str(folder))


def test_shards_without_their_index_file(tmp_path):
    folder = saved(tmp_path / "model")
    for part in (1, 2):
        shutil.copy(folder / "model.safetensors", folder / f"model-0000{part}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    refused_by_all(
        folder,
        ModelError,
        "holds parts of a model",
        "without their model.safetensors.index.json, expected it beside them",
    )


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    folder = saved(tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    refused_by_all(
        folder,
        ModelError,
        "has no tokenizer (such as tokenizer.json)",
        "copy it from the model that this one was made of",
    )


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    folder = with_json(saved(tmp_path / "model"), model_type="later9", architectures=["Later9ForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="is of the architecture later9, .*; upgrade transformers"):
        load_model(str(folder))


def test_a_folder_of_gguf_files_says_so(exported):
    with pytest.raises(ModelError, match=r"a folder of GGUF files .*dense\.gguf|a folder of GGUF files .*; name one"):
        load_model(str(exported))


def part_fields(number: int, count: int):
    return [("split.no", number - 1, NUMBER), ("split.count", count, NUMBER)]


@pytest.mark.parametrize(
    ("name", "fields", "number", "count"),
    [
        ("model-00001-of-00003.gguf", part_fields(1, 3), 1, 3),
        ("renamed.gguf", part_fields(1, 2), 1, 2),
        ("model-00002-of-00003.gguf", [], 2, 3),
        ("MODEL-00001-of-00002.GGUF", [], 1, 2),
    ],
)
def test_a_part_of_a_split_gguf_file(name, fields, number, count, exported, tmp_path):
    path = rewritten(exported / "dense.gguf", tmp_path / name, without=["blk.2."], fields=fields)
    with pytest.raises(ModelError) as raised:
        load_model(str(path))
    others = ", ".join(str(n) for n in range(1, count + 1) if n != number)
    for text in (f"part {number} of {count}", f"({others})", "llama-gguf-split --merge", "name the joined file."):
        assert text in str(raised.value)


def test_a_part_without_a_models_metadata(tmp_path):
    """As llama.cpp writes all but the first one."""
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    del writer.kv_data[0]["general.architecture"]
    writer.add_key_value("split.no", 1, NUMBER)
    writer.add_key_value("split.count", 2, NUMBER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="part 2 of 2"):
        load_model(str(tmp_path / "x.gguf"))


def test_parts_that_are_there_are_not_asked_for(exported, tmp_path):
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.gguf"
        rewritten(exported / "dense.gguf", tmp_path / name, fields=part_fields(number, 2))
    with pytest.raises(ModelError, match=r"part 1 of 2 of a split GGUF file, expected a whole one; join the parts"):
        load_model(str(tmp_path / "model-00001-of-00002.gguf"))


@pytest.mark.parametrize(("name", "count"), [("model-00001-of-00003.gguf", 0), ("model-00001-of-00001.gguf", 1)])
def test_a_joined_file_and_one_of_a_single_part_are_read(name, count, exported, tmp_path):
    path = rewritten(exported / "dense.gguf", tmp_path / name, fields=[("split.count", count, NUMBER)])
    assert len(load_model(str(path)).layers) == 3


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_gguf_file_that_is_no_model(kind, exported, tmp_path):
    path = rewritten(exported / "dense.gguf", tmp_path / "x.gguf", fields=[("general.type", kind, TEXT)])
    with pytest.raises(ModelError, match=f"of the type {kind}, expected a model"):
        load_model(str(path))


@pytest.mark.parametrize("n_bytes", [0, 3, 2000, 60_000, 100_000])
def test_a_gguf_file_that_is_cut_off(n_bytes, exported, tmp_path):
    path = shutil.copy(exported / "dense.gguf", tmp_path / "model.gguf")
    os.truncate(path, n_bytes)
    found = "is cut off" if n_bytes > 3 else "is no GGUF file"
    with pytest.raises(ModelError, match=f"model.gguf {found}, expected a whole GGUF file; fetch it again"):
        load_model(str(path))


def test_a_gguf_file_is_read_where_it_was_named(exported, tmp_path, monkeypatch):
    """And not from here, where another one has its name."""
    (tmp_path / "dense.gguf").write_bytes(b"no model")
    monkeypatch.chdir(tmp_path)
    assert len(load_model(str(exported / "dense.gguf")).layers) == 3


def test_a_gguf_file_is_parsed_once(exported, monkeypatch):
    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path, *rest):
            parsed.append(path)
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    before = gguf.get_tensor_name_map
    loaded = load_model(str(exported / "dense.gguf"))
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counted and gguf.get_tensor_name_map is before
    monkeypatch.undo()
    again = load_model(str(exported / "dense.gguf"))
    for one, other in zip(loaded.model.parameters(), again.model.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("model_type", "of", "file"),
    [
        ("llamazilla", "config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("llama", "tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}),
    ],
    ids=["model", "tokenizer"],
)
def test_a_checkpoints_own_code_does_not_run(model_type, of, file, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model")
    with_json(folder, model_type=model_type)
    with_json(folder, of, auto_map=file, **({"tokenizer_class": "Own"} if of.startswith("tok") else {}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    refused_by_all(folder, UnsupportedModelError, "needs code of its own", "does not run here")
    assert not asked and not (tmp_path / "ran").exists()


def test_a_model_of_another_kind(tmp_path):
    folder = saved(tmp_path / "model")
    T5Config(vocab_size=64, d_model=16).save_pretrained(folder)
    refused_by_all(folder, UnsupportedModelError, "is of the type T5, expected a causal language model")
