"""Settings in published snapshots: OmegaConf's records, and what an import says that it leaves out."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from published_files import Call, Name, New, ddpmpp_snapshot, dumps, flow_map_snapshot, record, torch_file, written
from torch import nn

from imm import Sampler
from imm.checkpoints import CheckpointError, import_published, read_published

WRITTEN_BY_OMEGACONF = Path(__file__).parent / "data" / "omegaconf_snapshot.pkl"


def test_settings_that_omegaconf_wrote() -> None:
    state, settings = read_published(WRITTEN_BY_OMEGACONF)
    assert torch.equal(state["model.weight"], torch.full((1, 2), 0.5))
    expected = {"model_type": "SongUNet", "model_channels": 32, "channel_mult": [1, 2], "resample_filter": [1, 1]}
    expected |= {"attn_resolutions": [4], "nested": {"a": 1, "b": ["x", None, 1.5, True]}, "width": 32}
    assert {name: settings[name] for name in expected} == expected
    assert type(settings["channel_mult"]) is list


@pytest.mark.parametrize("form", ["pickle 3", "pickle 4", "torch.save", "torch.save, older"])
def test_a_network_with_such_settings_is_imported(form, small_ddpmpp, tmp_path) -> None:
    builtins = "__builtin__" if form.startswith("torch") else "builtins"  # as protocol 2 has it
    lists = {"channel_mult": [1, 2], "resample_filter": [1, 1], "attn_resolutions": [4]}
    keywords = {name: record(value, builtins) for name, value in {**lists, "num_blocks": 1, "nested": {"a": [None]}}.items()}
    tree = ddpmpp_snapshot(small_ddpmpp, **keywords)
    data = dumps(tree, int(form[-1])) if form.startswith("pickle") else torch_file(tree, form == "torch.save")
    imported = import_published(written(tmp_path / "a.pkl", data), tmp_path / "a.safetensors")
    assert imported.network.settings == small_ddpmpp.network.settings
    assert torch.equal(Sampler(imported, steps=1).sample([3]), Sampler(small_ddpmpp, steps=1).sample([3]))


LIST = "omegaconf.listconfig.ListConfig"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (New(LIST, {"__class__": 1}), "attributes: expected a plain name, got '__class__'"),
        (Call(LIST, [1]), f"the file calls {LIST}, which no such file does"),
        (Call("builtins.list", [1]), "the file calls builtins.list, which no such file does"),
        (New("builtins.dict", {}), "NEWOBJ class argument must be a type"),
        (Call("collections.defaultdict", Name("torch.storage._load_from_bytes")), "collections.defaultdict: expected a plain"),
        (New("omegaconf.omegaconf.OmegaConf", {}), "the file names 'omegaconf.omegaconf.OmegaConf'"),
        (New("omegaconf.nodes.EnumNode", {}), "the file names 'omegaconf.nodes.EnumNode'"),
        (New(LIST, {"_content": [New(LIST, [1])]}), "attributes: expected a dict, got a list"),
    ],
)
def test_records_that_are_none_get_one_line(value, text, tmp_path) -> None:
    path = written(tmp_path / "a.pkl", {"ema": New("torch.nn.modules.linear.Linear", {"channel_mult": value})})
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        read_published(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["channel_mult", "model_type", "augment_dim"])
def test_a_setting_that_refers_to_another_gets_one_line(name, small_ddpmpp, tmp_path) -> None:
    """OmegaConf resolves what is taken out of a record, but leaves the items of a list as they are."""
    value = record(["${network.model_channels}", 2] if name == "channel_mult" else "${network.model_channels}")
    source = written(tmp_path / "a.pkl", ddpmpp_snapshot(small_ddpmpp, **{name: value}))
    text = f"{name}: expected a value, got OmegaConf's reference to another setting: .*model_channels.*; save"
    with pytest.raises(CheckpointError, match=text) as caught:
        import_published(source, tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_record_within_itself_is_no_setting(tmp_path) -> None:
    content: list[Any] = []
    loop = New(LIST, {"_content": content})
    content.append(loop)
    tree = {"ema": New("torch.nn.modules.linear.Linear", {"loop": loop, "no_content": New(LIST, {}), "n": record(3)})}
    assert read_published(written(tmp_path / "a.pkl", tree))[1] == {"n": 3, "class_name": "Linear"}


@pytest.mark.parametrize("where", ["keyword", "modules", "nowhere"])
def test_a_dropout_that_ours_has_not_is_said(where, small_dit, tmp_path) -> None:
    tree = flow_map_snapshot(small_dit, "DiT_T_4")
    state = tree["ema"].call.args[0]["state"]
    state["_init_kwargs"] |= {"dropout": 0.25} if where == "keyword" else {}
    if where == "modules":
        block = state["_modules"]["model"].call.args[0]["state"]["_modules"]["blocks"].state["_modules"]["0"]
        mlp = block.call.args[0]["state"]["_modules"]["mlp"]
        mlp.state["_modules"]["drop1"] = New("torch.nn.modules.dropout.Dropout", {**nn.Dropout(0.25).__dict__})
    source, dest = written(tmp_path / "a.pkl", tree), tmp_path / "a.safetensors"
    text = "the DiT's dropout of 0.25 is left out: ours has none"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import_published(source, dest)
    assert [text in str(one.message) for one in caught] == ([] if where == "nowhere" else [True])
    done = call("import", "--net", source, "--out", dest)
    assert (f"note: {text}" in done.output) == (where != "nowhere")
    assert len(done.stderr) == 0
