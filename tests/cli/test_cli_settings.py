"""``--set group.name=value``: every field of every group is read into its type, and what is wrong is said."""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum

import click
import pytest
from click.testing import CliRunner
from commands import call
from commands import refused as refused_by
from coreinfer_sim_cli.settings import GROUPS, Settings, names, set_option

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill, SamplingConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.scale_settings import Executor
from coreinfer_sim.base.settings import BuildConfig, CompensationConfig, CorpusConfig, Fallback, Mode, Weights

ALL = tuple(GROUPS)
TEXTS = {
    **{"source": "rows.jsonl", "name": "main", "split": "test", "prompt_column": "text", "template": "Q: {text}"},
    **{"sparse_layers": "4:", "layers": "1:3", "engine": "lean", "exported": "ggufs", "dtype": "bfloat16"},
    **{
        "completion_column": "answer",
        "centroids": "first",
        "ray_address": "10.0.0.1:6379",
        "label_column": "topic",
        "separator": "tab",
        "device": "cpu",
        "encoder": "./encoder",
        "clusters": "auto",
        "stop": "END",
    },
}
"""A value of each field of text, by the field's name."""


def read(*texts: str, groups: tuple[str, ...] = ALL) -> Settings:
    """Give texts to --set; raise what a command would refuse them with."""
    found = []

    @click.command()
    @set_option(*groups)
    def command(settings: Settings) -> None:
        found.append(settings)

    command.main([part for text in texts for part in ("--set", text)], standalone_mode=False)
    return found[0]


def fields() -> list[tuple[str, str, object]]:
    """Return group, name and type of every field that --set knows."""
    hints = {group: typing.get_type_hints(kind) for group, kind in GROUPS.items()}
    return [(*full.split("."), hints[full.split(".")[0]][full.split(".")[1]]) for full in names(ALL)]


def example(name: str, hint: object) -> tuple[str, object]:
    """Return a text and the value that it stands for."""
    choices = [each for each in typing.get_args(hint) if each is not type(None)] or [hint]
    kind = choices[0]
    if typing.get_origin(kind) is tuple:
        return "cpu, cpu", ("cpu", "cpu")
    if typing.get_origin(hint) is tuple:
        numbers = {float: ("0.3, 0.5", (0.3, 0.5)), int: ("3, 5", (3, 5))}
        return numbers.get(kind, ("END, STOP", ("END", "STOP")))
    if isinstance(kind, type) and issubclass(kind, Enum):
        last = list(kind)[-1]
        return str(last.value), last
    return {bool: ("no", False), int: ("40", 40), float: ("0.3", 0.3), str: (TEXTS.get(name, ""), TEXTS.get(name))}[
        kind
    ]


def test_an_option_that_is_a_setting_is_named_as_one():
    refused_by(
        call("build-index", "a.jsonl", "--executor", "ray"),
        "there is no option --executor; it is a setting: --set scale.executor=VALUE",
        code=2,
    )
    refused_by(call("run", "stars", "--top-k", 3), "it is a setting: --set sample.top_k=VALUE", code=2)
    refused_by(call("run", "stars", "--executor", "ray"), "No such option", code=2)  # of another command


@pytest.mark.parametrize(("group", "name", "hint"), fields(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_field_is_read_into_its_type(group, name, hint):
    text, value = example(name, hint)
    settings = read(f"{group}.{name}={text}")
    assert settings.given(group) == [name]
    others: dict[str, object] = {"source": "rows.jsonl"} if group == "corpus" else {}
    others |= {"executor": Executor.RAY} if name == "ray_address" else {}
    made = settings.make(GROUPS[group], **others)
    found = getattr(made, name)
    assert found == value and type(found) is type(value)
    rest = [field.name for field in dataclasses.fields(made) if field.name not in (name, *others)]
    plain = GROUPS[group](**others)
    assert all(getattr(made, each) == getattr(plain, each) for each in rest)
    if type(None) in typing.get_args(hint) and name != "fallback":
        assert getattr(read(f"{group}.{name}=None").make(GROUPS[group], **others), name) is None


def test_names_are_those_that_commands_do_not_fill_by_themselves():
    assert {"sample.top_k", "select.seed", "decode.prefill", "model.encoder", "corpus.split"} <= set(names(ALL))
    assert not {"corpus.source", "build.compensation"} & set(names(ALL))
    assert all(name.startswith("model.") for name in names(("model",)))


def test_several_groups_and_values():
    settings = read("sample.top_k=5", "decode.prefill=sparse", "sample.seed=7", " select.mode = global ")
    assert settings.given("sample") == ["top_k", "seed"] and settings.given("model") == []
    assert settings.make(SamplingConfig, max_new_tokens=9) == SamplingConfig(max_new_tokens=9, top_k=5, seed=7)
    assert settings.make(DecodeConfig, weights=None).prefill is Prefill.SPARSE
    assert settings.make(SelectionConfig).mode is Mode.GLOBAL
    assert read("sample.stop=a=b").make(SamplingConfig).stop == ("a=b",)
    assert read().make(DecodeConfig, weights="int8").weights is Weights.INT8


@pytest.mark.parametrize(("text", "n_bytes"), [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("4096", 4096)])
@pytest.mark.parametrize("name", ["cache_bytes", "prefix_bytes", "memory_budget", "memory_limit"])
def test_sizes(name, text, n_bytes):
    assert getattr(read(f"decode.{name}={text}").make(DecodeConfig), name) == n_bytes


def test_none_is_a_fallback_before_it_is_nothing():
    assert read("select.fallback=none").make(SelectionConfig).fallback is Fallback.NONE


def test_a_setting_that_is_a_number_or_a_word():
    assert read("build.clusters=7").make(BuildConfig).clusters == 7
    assert read("build.clusters=auto").make(BuildConfig).clusters == "auto"
    assert read("compensate.keep_ratios=0.5").make(CompensationConfig).keep_ratios == (0.5,)
    assert read("decode.cache_bytes=0").make(DecodeConfig).cache_bytes == 0
    assert read("corpus.deduplicate=YES").make(CorpusConfig, source="x").deduplicate is True


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sample.topk=4", "there is no setting 'sample.topk'; nearest: .*sample.top_k"),
        ("smaple.top_k=4", "nearest: sample.top_k"),
        ("top_k=4", "nearest: .*sample.top_k"),
        ("other.seed=4", "nearest: .*sample.seed"),
        ("zzzzzz=4", "known groups are select, .*sample"),
        ("corpus.source=x", "there is no setting 'corpus.source'"),
        ("build.compensation=x", "there is no setting 'build.compensation'"),
        ("sample.top_k", "'sample.top_k' has no value, expected GROUP.NAME=VALUE"),
        ("", "'' has no value"),
        ("sample.top_k=many", "sample.top_k is 'many', expected a whole number or none"),
        ("sample.top_p=much", "sample.top_p is 'much', expected a number or none"),
        ("sample.num_beams=none", "sample.num_beams is 'none', expected a whole number"),
        ("select.compensated=perhaps", "select.compensated is 'perhaps', expected true or false"),
        ("select.mode=best", "select.mode is 'best', expected one of similarity, hybrid"),
        ("select.fallback=best", "select.fallback is 'best', expected one of hybrid, dense, global, none"),
        ("decode.cache_bytes=much", "decode.cache_bytes is 'much', expected .*size"),
        ("decode.memory_limit=-1", "decode.memory_limit is '-1', expected .*size"),
        ("compensate.keep_ratios=a,b", "compensate.keep_ratios is 'a,b', expected a number, several parted by commas"),
    ],
)
def test_what_is_wrong_is_said_with_what_was_expected(text, says):
    with pytest.raises(click.BadParameter, match=says) as refused:
        read(text)
    assert refused.value.exit_code == 2


def test_only_the_groups_of_a_command_are_known():
    with pytest.raises(click.BadParameter, match="sample.top_k is of another command"):
        read("sample.top_k=4", groups=("model", "decode"))


def test_a_setting_is_given_once():
    with pytest.raises(click.UsageError, match="num_beams was given as an option and by --set sample.num_beams"):
        read("sample.num_beams=2").make(SamplingConfig, num_beams=3)
    with pytest.raises(click.UsageError, match="sample.top_k was given twice"):
        read("sample.top_k=4", "sample.top_k=5")


def test_a_value_out_of_range_is_an_error_of_the_setting():
    with pytest.raises(ConfigError, match="top_p is 1.5"):
        read("sample.top_p=1.5").make(SamplingConfig)


def test_help_names_the_groups():
    @click.command()
    @set_option("decode", "model")
    def command(settings: Settings) -> None: ...

    shown = CliRunner().invoke(command, ["--help"]).stdout
    assert "--set GROUP.NAME=VALUE" in shown and "decode, model" in shown
