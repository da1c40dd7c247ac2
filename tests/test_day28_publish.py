"""Day 28: day 23's adapter is served by name, unmerged, beside its base, and says what it says without a server."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.errors import UserError
from day17.checkpoints import problem_with
from day22.pretrained import load_model, load_tokenizer, locate
from day23.lora import add_lora
from day28.publish import publish_model

NEEDS = "day 28's packages are not here: pip install -r day28/requirements.txt"
for package in ("fastapi", "openai", "limits"):
    pytest.importorskip(package, reason=NEEDS)

from openai import OpenAI

from capstone.serve.client import running_server
from tests.test_day28_serve import KEY, start

SAYS = [{"role": "user", "content": "The whale"}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter for tiny-llama as day 23 writes one, bold enough that it changes what is said."""
    folder = tmp_path_factory.mktemp("day28") / "adapter"
    torch.manual_seed(28)
    model = add_lora(load_model("tiny-llama"), 4, 16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.peft_config["default"].base_model_name_or_path = "tiny-llama"
    model.save_pretrained(folder)
    return folder


def says(model) -> str:
    tokenizer = load_tokenizer("tiny-llama")
    text = tokenizer.apply_chat_template(SAYS, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.eval().generate(**batch, max_new_tokens=12, do_sample=False, use_cache=True)
    return tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.launch
def test_an_adapter_is_served_by_its_name_beside_its_base(adapter, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    publish_model(adapter, tmp_path / "chat", "tiny-chat")
    assert before == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert (tmp_path / "chat/model.safetensors").is_symlink() and problem_with(tmp_path / "chat") is None
    want, base = says(PeftModel.from_pretrained(load_model("tiny-llama"), adapter)), says(load_model("tiny-llama"))
    assert want != base
    publish_model(Path(locate("tiny-llama")), tmp_path / "base", "tiny-base")
    flags = ["--device", "cpu", "--drain_s", "0", "--adapters", str(tmp_path / "chat")]
    with running_server(tmp_path / "base", KEY, *flags) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY)
        assert [model.id for model in client.models.list()] == ["tiny-base", "tiny-chat"]
        for name, text in (("tiny-chat", want), ("tiny-base", base), ("tiny-chat", want)):
            said = client.chat.completions.create(model=name, messages=SAYS, max_tokens=12, temperature=0)
            assert (said.model, said.choices[0].message.content) == (name, text)
    with pytest.raises(UserError, match="chat: 'tiny-chat' is the name of another one too"):
        start(monkeypatch, tmp_path / "chat", "--adapters", tmp_path / "chat")


def test_a_merged_model_is_published_whole_and_nothing_twice(adapter, tmp_path):
    merged = PeftModel.from_pretrained(load_model("tiny-llama"), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer("tiny-llama").save_pretrained(tmp_path / "merged")
    assert publish_model(tmp_path / "merged", tmp_path / "out", "tiny-merged")["base"] is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert says(loaded) == says(PeftModel.from_pretrained(load_model("tiny-llama"), adapter))
    with pytest.raises(UserError, match="is there already, and what is published never changes"):
        publish_model(tmp_path / "merged", tmp_path / "out", "tiny-merged")
    with pytest.raises(UserError, match="has neither adapter_config.json nor config.json"):
        publish_model(tmp_path, tmp_path / "new", "nothing")


def test_beside_another_base_an_adapter_is_not_served(adapter, tmp_path, monkeypatch):
    base = shutil.copytree(locate("tiny-llama"), tmp_path / "base")
    mine = shutil.copytree(adapter, tmp_path / "adapter")
    config = mine / "adapter_config.json"
    config.write_text(config.read_text().replace('"tiny-llama"', f'"{base}"'))
    publish_model(mine, tmp_path / "chat", "tiny-chat")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="chat: model.safetensors has another SHA-256"):
        start(monkeypatch, tmp_path / "chat")
    with pytest.raises(UserError, match="base 'a/name' is no folder here: download it"):
        config.write_text(config.read_text().replace(f'"{base}"', '"a/name"'))
        publish_model(mine, tmp_path / "other", "tiny-chat")
