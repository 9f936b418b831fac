"""What tries the rows about models and folders of the table of cases."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from figures.inputs import QUESTION, Found, Trial, python_of_ours, refused, trial

FOUR = "Why is the sky blue?\nHow do I bake bread?\nWhat is a star?\nHow do I boil an egg?\n"


def generate(case: Trial, model: object, *more: object) -> subprocess.CompletedProcess[str]:
    """Generate two tokens densely with a model, without an index."""
    return case.run("generate", QUESTION, "--mode", "dense", "--model", model, "--max-new-tokens", 2, *more)


def lacking(case: Trial, part: str) -> Path:
    """Return a tiny model without the tensors that hold a text in their name."""
    from safetensors.torch import load_file, save_file

    folder = case.tiny("lacking")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def edited(path: Path, **values: Any) -> None:
    """Put values into a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


@trial("tiny_cases.py")
def headless(case: Trial) -> Found:
    """A checkpoint without its head is refused by name."""
    return refused(generate(case, lacking(case, "lm_head")), "lm_head")


@trial("tiny_cases.py")
def without_mlp(case: Trial) -> Found:
    """A checkpoint without one MLP is refused by name."""
    return refused(generate(case, lacking(case, "layers.1.mlp")), r"layers\.1\.mlp")


@trial("tiny_cases.py")
def split_gguf(case: Trial) -> Found:
    """Part 1 of a split GGUF file is refused, or all parts are read."""
    code = (
        "import gguf, shutil\n"
        "reader = gguf.GGUFReader(sys.argv[1])\n"
        "half = len(reader.tensors) // 2\n"
        "for part in (0, 1):\n"
        "    name = f'{sys.argv[2]}/m-{part + 1:05d}-of-00002.gguf'\n"
        "    writer = gguf.GGUFWriter(name, 'llama')\n"
        "    for field in reader.fields.values() if part == 0 else ():\n"
        "        if field.name.startswith('GGUF.') or field.name == 'general.architecture':\n"
        "            continue\n"
        "        kind, value = field.types[0], field.contents()\n"
        "        writer.add_array(field.name, value) if kind == gguf.GGUFValueType.ARRAY else "
        "writer.add_key_value(field.name, value, kind)\n"
        "    writer.add_uint16('split.no', part)\n"
        "    writer.add_uint16('split.count', 2)\n"
        "    writer.add_int32('split.tensors.count', len(reader.tensors))\n"
        "    for tensor in reader.tensors[:half] if part == 0 else reader.tensors[half:]:\n"
        "        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)\n"
        "    writer.write_header_to_file()\n"
        "    writer.write_kv_data_to_file()\n"
        "    writer.write_tensors_to_file()\n"
        "    writer.close()\n"
    )
    python_of_ours(code, case.model, case.scratch).check_returncode()
    first, second = (case.scratch / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    whole = generate(case, first)
    second.unlink()
    alone, line = refused(generate(case, first), "of 2|00002-of-00002|part")
    return alone and (whole.returncode == 0 or refused(whole, "part")[0]), line


@trial("tiny_cases.py")
def use_cache(case: Trial) -> Found:
    """A checkpoint's use_cache false is ignored."""
    folder = case.tiny("no-cache")
    for name in ("config.json", "generation_config.json"):
        edited(folder / name, use_cache=False)
    done = generate(case, folder, "--json")
    return done.returncode == 0 and json.loads(done.stdout)["n_new_tokens"] == 2, done.stderr.splitlines()[
        -1
    ] if done.stderr else "2 tokens"


@trial("tiny_cases.py")
def padding(case: Trial) -> Found:
    """Padding works whose id lies behind the embeddings."""
    folder = case.tiny("pad")
    code = (
        "import transformers, coreinfer_sim\n"
        "t = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "t.add_special_tokens({'pad_token': '[PAD]'}); t.save_pretrained(sys.argv[1])\n"
        "from coreinfer_sim import SparseModel, find_mlps, load_model, make_predictor\n"
        "m = load_model(sys.argv[1]); m.tokenizer.padding_side = 'left'\n"
        "ids = m.tokenizer(['Hi', 'How do stars form in space?'], return_tensors='pt', padding=True)\n"
        "s = SparseModel(m.model, make_predictor('random', find_mlps(m.model), keep_ratio=0.8), m.tokenizer)\n"
        "print(tuple(s.generate(**ids, max_new_tokens=4).shape), ids['input_ids'].shape[1] + 4)"
    )
    done = python_of_ours(code, folder)
    return done.returncode == 0, (done.stdout or done.stderr).strip().splitlines()[-1]


@trial("tiny_cases.py")
def static_encoder(case: Trial) -> Found:
    """A static sentence encoder builds and looks up."""
    code = (
        "from sentence_transformers import SentenceTransformer\n"
        "from sentence_transformers.sentence_transformer.modules import StaticEmbedding\n"
        "from tokenizers import Tokenizer, models, pre_tokenizers\n"
        "words = Tokenizer(models.WordLevel({'[UNK]': 0, 'sky': 1, 'grass': 2}, '[UNK]'))\n"
        "words.pre_tokenizer = pre_tokenizers.Whitespace()\n"
        "SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8)]).save(sys.argv[1])\n"
    )
    encoder = case.scratch / "static"
    python_of_ours(code, encoder).check_returncode()
    built = case.build(case.cases / "06_semicolon.csv", "--set", f"model.encoder={encoder}", model=case.tiny("model"))
    found = case.run("lookup", case.scratch / "index", "Why is the sky blue?")
    return built.done.returncode == 0 and found.returncode == 0, (
        found.stdout + found.stderr + built.line
    ).splitlines()[0]


@trial("tiny_cases.py")
def no_template(case: Trial) -> Found:
    """A chat with a model that has no template is refused."""
    return refused(generate(case, case.tiny("base", chat=False), "--chat"), "no chat template")


@trial("18_link.sh")
def link(case: Trial) -> Found:
    """Through a link --force replaces the index where the link points, as often as it is called."""
    corpus, real, link = case.scratch / "four.txt", case.scratch / "big" / "idx", case.scratch / "link"
    corpus.write_text(FOUR, encoding="utf-8")
    model = case.tiny("model")
    case.build(corpus, model=model, out="big/idx")
    link.symlink_to(real)
    old, done = (real / "manifest.json").stat().st_ino, []
    for _ in range(2):
        done.append(case.run("build-index", corpus, "--model", model, "--clusters", 2, "--out", link, "--force"))
    there = (real / "manifest.json").is_file() and link.is_symlink() and (real / "manifest.json").stat().st_ino != old
    loaded = case.run("info", link)
    line = (done[-1].stdout or done[-1].stderr).splitlines()[0]
    return there and loaded.returncode == 0 and all(each.returncode == 0 for each in done), line


@trial("18_link.sh")
def empty_folder(case: Trial) -> Found:
    """An empty folder is taken."""
    corpus, out = case.scratch / "four.txt", case.scratch / "empty"
    corpus.write_text(FOUR, encoding="utf-8")
    out.mkdir()
    done = case.run("build-index", corpus, "--model", case.tiny("model"), "--clusters", 2, "--out", out)
    return done.returncode == 0 and (out / "manifest.json").is_file(), (done.stdout or done.stderr).splitlines()[0]


def _elsewhere(case: Trial, index: Path) -> subprocess.CompletedProcess[str]:
    return case.run("generate", QUESTION, "--index", index, "--max-new-tokens", 2, cwd=Path("/"))


@trial("an index used from another folder")
def another_folder(case: Trial) -> Found:
    """The model is found from where the build was called, and beside an index that moved with it."""
    work = case.scratch / "work"
    (work / "models").mkdir(parents=True)
    shutil.copytree(case.tiny("tiny"), work / "models" / "tiny")
    (work / "four.txt").write_text(FOUR, encoding="utf-8")
    built = case.run("build-index", "four.txt", "--model", "models/tiny", "--out", "./index", "--clusters", 1, cwd=work)
    before = _elsewhere(case, work / "index")
    work.rename(case.scratch / "moved")
    after = _elsewhere(case, case.scratch / "moved" / "index")
    line = (after.stderr or built.stderr).splitlines()[-1]
    return before.returncode == after.returncode == 0, line


@trial("an index used from another folder")
def model_gone(case: Trial) -> Found:
    """Where the model is not found, the message says that the index names it and that --model mends it."""
    corpus = case.scratch / "four.txt"
    corpus.write_text(FOUR, encoding="utf-8")
    model = case.tiny("tiny")
    case.build(corpus, model=model)
    shutil.rmtree(model)
    return refused(_elsewhere(case, case.scratch / "index"), "index", "--model")


@trial("O1_overwritten_in_place.py")
def overwritten(case: Trial) -> Found:
    """An index that is overwritten while it is loaded is no mixture: what was loaded is served, or one sentence."""
    model, folders = case.tiny("model"), []
    for name, texts in (
        ("a", FOUR),
        ("b", "Who won the match?\nHow long is a game?\nWhat is a goal?\nWho is the judge?\n"),
    ):
        (case.scratch / f"{name}.txt").write_text(texts, encoding="utf-8")
        case.build(case.scratch / f"{name}.txt", model=model, out=name)
        folders.append(case.scratch / name)
    code = (
        "import shutil, torch\n"
        "from pathlib import Path\n"
        "from coreinfer_sim import SemanticIndex\n"
        "from coreinfer_sim.choosing.index_sets import IndexSets\n"
        "from coreinfer_sim.base.errors import CoreInferSimError\n"
        "from coreinfer_sim.base.settings import Score\n"
        "a, b, live = map(Path, sys.argv[1:])\n"
        "shutil.copytree(a, live)\n"
        "sets = lambda i: i.core_neurons(0, 0.5)\n"
        "old, new, loaded = sets(SemanticIndex.load(a)), sets(SemanticIndex.load(b)), SemanticIndex.load(live)\n"
        "for path in b.iterdir():\n"
        "    shutil.copyfile(path, live / path.name)\n"
        "same = lambda x, y: all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in y)\n"
        "try:\n"
        "    now = sets(loaded)\n"
        "    print('served as loaded' if same(now, old) and not same(old, new) else 'a mixture')\n"
        "except CoreInferSimError as error:\n"
        "    print('one sentence:', error)\n"
    )
    done = python_of_ours(code, *folders, case.scratch / "live")
    line = (done.stdout.strip() or done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
    return line.startswith(("served", "one sentence")), line


@trial("O2_llamacpp_json.sh")
def llamacpp_json(case: Trial) -> Found:
    """The text of --json is the text that streams: without the end token, cut before a stop text."""
    exported = case.scratch / "gguf"
    of_index = [case.index, "--model", case.model, "--format", "gguf", "--manifest"]
    done = case.run("export", *of_index, "--cluster", "global", "--cluster", "dense", "--out", exported)
    if done.returncode:
        return False, done.stderr.splitlines()[-1]
    asked = [
        "generate",
        "--chat",
        "--index",
        case.index,
        "--engine",
        "llamacpp",
        "--set",
        f"decode.exported={exported}",
    ]
    asked += ["--mode", "global", "--max-new-tokens", 60]
    found = []
    for more in ([], ["--stop", "."]):
        whole = json.loads(case.run(*asked, *more, "Say hello.", "--json").stdout)["text"]
        streamed = case.run(*asked, *more, "Say hello.").stdout.partition("\n")[2].rstrip("\n")
        found.append((whole, streamed))
    right = all(whole == streamed and "<|" not in whole for whole, streamed in found) and "." not in found[1][0]
    return right, str(found[0])


@trial("an adapter (LoRA) folder")
def adapter(case: Trial) -> Found:
    """It says that it is an adapter, of what, and to merge it."""
    folder = case.scratch / "adapter"
    folder.mkdir()
    edited(folder / "adapter_config.json", base_model_name_or_path="org/base-model", peft_type="LORA", r=8)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return refused(generate(case, folder), "adapter", "org/base-model", "merge")
