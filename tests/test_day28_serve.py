"""Day 28: the export is the model, everybody gets the right status code, the page works, a signal drains."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from capstone import export as ex
from capstone.config import as_yaml, load_config
from capstone.data import load_blocks
from capstone.evaluate import evaluate
from capstone.prepare import prepare
from common.data import load_tokenizer
from common.errors import UserError
from common.model import build_model
from day17.checkpoints import read_manifest
from tests.launch import free_port

NEEDS = "day 28's packages are not here: pip install -r day28/requirements.txt"
for package in ("fastapi", "openai", "limits", "selenium"):
    pytest.importorskip(package, reason=NEEDS)

import httpx2
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

import capstone.serve.__main__ as serving
import day28.labs.load as loading
from capstone.serve.client import chat, is_ready, running_server
from capstone.serve.gateway import Gateway, Limits
from day28.labs.screenshot import By, WebDriverWait, give_key, open_browser, say

KEY = "a-key-for-tests-0123456789"


# --- export ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as training leaves it, with fresh weights: config, data, model, evaluation."""
    folder = tmp_path_factory.mktemp("day28") / "run"
    settings = ["data.sources=[data/moby_dick.jsonl.xz]", "evaluate.items=8", "evaluate.max_blocks=4"]
    config = load_config(overrides=[f"run_dir={folder}", "data.workers=1", "evaluate.sample_tokens=4", *settings])
    manifest, tokenizer = prepare(config), load_tokenizer("bpe4096")
    (folder / "config.yaml").write_text(as_yaml(config))
    torch.manual_seed(28)
    model = build_model("tiny", len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model/training.json").write_text(json.dumps({"data": manifest["fingerprint"], "ranks": 2}))
    report = evaluate(model, config, torch.device("cpu"))
    (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


@pytest.fixture(scope="module")
def exported(run):
    ex.export(run, run / "export")
    return run / "export"


def test_the_export_is_the_runs_model(run, exported):
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "model", exported))
    blocks = load_blocks(load_config(run / "config.yaml"), "held_out", 128)
    ids = torch.stack([blocks[number]["input_ids"] for number in range(4)])
    with torch.no_grad():
        assert torch.equal(before(input_ids=ids).logits, after(input_ids=ids).logits)
    assert after.config.use_cache and not before.config.use_cache  # generation without it starts anew at each token
    assert {path.suffix for path in exported.iterdir()} == {".safetensors", ".json", ".jinja", ".md"}  # no pickles
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in exported.iterdir())  # the server is another user
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.model_max_length == 128
    said = [("user", "The whale"), ("assistant", " swam"), ("user", "The ship")]
    said = [{"role": role, "content": content} for role, content in said]
    assert tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) == "The whale swam\nThe ship"


def test_the_export_says_where_it_comes_from(run, exported):
    facts, manifest = json.loads((exported / "provenance.json").read_text()), read_manifest(run / "data")
    assert facts["data"]["fingerprint"] == manifest["fingerprint"] and facts["data"]["sources"] == manifest["sources"]
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", facts["code"])
    assert facts["config"] == load_config(run / "config.yaml").model_dump() and "torch" in facts["versions"]
    card = ex.ModelCard.load(exported / "README.md")
    measured = json.loads((run / "evaluation.json").read_text())["held_out"]
    assert [round(r.metric_value, 2) for r in card.data.eval_results][0] == round(measured["perplexity"], 2)
    assert f"| bits a byte | {measured['bits_per_byte']:.4f} |" in card.text and manifest["fingerprint"] in card.text
    assert yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0]) == facts["config"]


def test_a_second_export_does_nothing_and_another_model_is_refused(run, exported, tmp_path, capsys):
    before = {path.name: path.stat().st_ino for path in exported.iterdir()}
    ex.export(run, exported)
    assert "done already" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_ino for path in exported.iterdir()}
    other = shutil.copytree(run, tmp_path / "run")
    report = json.loads((other / "evaluation.json").read_text())
    report["held_out"]["perplexity"] += 1
    (other / "evaluation.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="holds another model or other figures"):
        ex.export(other, other / "export")
    weights = other / "export/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="model.safetensors has another SHA-256"):
        ex.export(other, other / "export")
    (other / "evaluation.json").write_text(json.dumps(report | {"data_manifest_sha256": "0"}))
    with pytest.raises(UserError, match="was measured on other data"):
        ex.export(other, tmp_path / "new")
    (other / "evaluation.json").unlink()
    with pytest.raises(UserError, match="has no evaluation.json: python -m capstone.evaluate"):
        ex.export(other, tmp_path / "new")
    with pytest.raises(UserError, match="it is no run of the capstone"):
        ex.export(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- the gateway, before a model server that is made up ---


USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def gateway_before(fake: "Fake", limits: Limits = Limits(), backend: str = "", **more) -> Gateway:  # noqa: B008
    """A gateway that asks `fake` in this process, or the one at `backend`; its context is 128 tokens."""
    tokenizer = load_tokenizer("bpe4096")
    tokenizer.model_max_length, tokenizer.chat_template = 128, ex.CONTINUE_TEMPLATE
    keys = ["old-key-0123456789", KEY]
    gateway = Gateway(backend or "http://fake", "/secret/path", "tiny", tokenizer, keys, limits, **more)
    if not backend:
        inside = httpx2.ASGITransport(app=fake.app)  # hands an answer over when it is whole, streams as well
        gateway.client = httpx2.AsyncClient(base_url="http://fake", transport=inside, timeout=limits.answer_s)
    return gateway


class Fake:
    """A model server that answers at once, when told, or wrongly: `how` it is told, or by the text of a message."""

    def __init__(self) -> None:
        self.how, self.asked, self.ids, self.probes, self.go = "well", [], [], 0, asyncio.Event()
        self.app = Starlette(
            routes=[Route("/health", self.health), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        )

    async def health(self, request):
        self.probes += 1
        return PlainTextResponse("ok", 500 if self.how == "down" else 200)

    async def chat(self, request):
        asked = json.loads(await request.body())
        self.asked.append(asked)
        self.ids.append(request.headers["x-request-id"])
        how = asked["messages"][-1]["content"].removeprefix("be ") if self.how == "as told" else self.how
        if how == "broken":
            return PlainTextResponse("Internal Server Error", 500)
        if how == "slow":
            await self.go.wait()
        if not asked["stream"]:
            answer = {"model": "/secret/path@main", "choices": [{"message": {"content": "hello"}}], "usage": USAGE}
            return JSONResponse(answer) if how in ("well", "slow") else PlainTextResponse(how)

        async def events():
            for word in ("a", "b"):
                event = {"model": "/secret/path@main", "choices": [{"delta": {"content": word}}]}
                yield f"data: {json.dumps(event)}\n\n"
            if how == "breaks":
                yield 'data: {"error": "index out of range in "self""}\n\n'  # transformers does not escape it
            if how == "endless":
                await self.go.wait()
            last = {"model": "/secret/path@main", "choices": [{"delta": {}, "finish_reason": "stop"}]}
            if how == "well":  # it sends no [DONE] either
                yield f"data: {json.dumps(last | {'usage': USAGE})}\n\n"
            if how == "vllm":  # usage comes alone
                yield f"data: {json.dumps(last)}\n\n"
                yield f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\n"
                yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def with_gateway(limits=Limits()):  # noqa: B008 - frozen
    """Run an async test with (client, gateway, fake model server), all in this process."""

    def decorate(test):
        def runs():
            async def inside():
                fake = Fake()
                gateway = gateway_before(fake, limits)
                headers = {"Authorization": f"Bearer {KEY}"}
                reach = httpx2.ASGITransport(app=gateway.app)
                async with httpx2.AsyncClient(base_url="http://test", transport=reach, headers=headers) as client:
                    await asyncio.wait_for(test(client, gateway, fake), 30)
                assert gateway.in_flight == 0  # whatever happened, nobody is left inside

            asyncio.run(inside())

        runs.__name__ = test.__name__  # not functools.wraps, which would show pytest the inner arguments
        return runs

    return decorate


def message(text="The whale", **more):
    return {"messages": [{"role": "user", "content": text}], **more}


async def post(client, body=None, **more):
    content = body if isinstance(body, bytes) else json.dumps(body or message()).encode()
    answer = await client.post("/v1/chat/completions", content=content, **more)
    return answer.status_code, answer.json().get("error", {}).get("code"), answer


@with_gateway()
async def test_every_kind_of_request_gets_its_code(client, gateway, fake):
    assert (await post(client))[0] == 200 and fake.asked[-1]["model"] == "/secret/path"
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        status, code, answer = await post(client, headers=headers)
        assert (status, code, answer.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert (await post(client, headers={"Authorization": "Bearer old-key-0123456789"}))[
        0
    ] == 200  # two while they change
    for body in (b"", b"{bad", b"\xff", b'{"messages": [' + b"[" * 5000, b'{"messages": NaN}'):
        assert (await post(client, body))[:2] in ((400, "invalid_json"), (422, "invalid_value")), body
    assert (await post(client, b"{bad"))[:2] == (400, "invalid_json")
    for body in (
        {}, {"messages": "x"}, {"messages": []}, {"messages": ["x"]}, {"messages": [{"role": "king", "content": "x"}]},
        message(""), message(max_tokens=0), message(max_tokens="many"), message(temperature=3), message(tools=[]),
        message(generation_config="{}"), [1],
    ):  # fmt: skip
        assert (await post(client, body if body else b"{}"))[:2] == (422, "invalid_value"), body
    assert (await post(client, message(model="other")))[:2] == (404, "model_not_found")
    assert (await client.get("/nowhere")).status_code == 404 and (
        await client.get("/v1/chat/completions")
    ).status_code == 405
    status, code, answer = await post(client, message("x" * 70_000))
    assert (status, code) == (413, "request_too_large") and len(fake.asked) == 2


@with_gateway(Limits(max_body_bytes=1000))
async def test_a_body_without_a_length_is_cut_off_as_well(client, gateway, fake):
    sent = []

    async def long():
        while len(sent) < 1000:
            sent.append(1)
            yield b"x" * 400

    answer = await client.post("/v1/chat/completions", content=long())
    assert answer.status_code == 413 and len(sent) <= 16 * 1000 / 400 + 1  # read on for a while, then closed


@with_gateway(Limits(read_s=0.2))
async def test_a_body_that_does_not_come_times_out(client, gateway, fake):
    async def stuck():
        yield b"{"
        await asyncio.sleep(30)

    assert (await client.post("/v1/chat/completions", content=stuck())).status_code == 408


@with_gateway(Limits(max_tokens=50))
async def test_answers_are_no_longer_than_allowed_and_fit_the_context(client, gateway, fake):
    for given, passed in ((message(), 50), (message(max_tokens=7), 7), (message(max_completion_tokens=9), 9)):
        assert (await post(client, given))[0] == 200 and fake.asked[-1]["max_tokens"] == passed
    assert (await post(client, message("whale " * 115)))[0] == 200 and fake.asked[-1]["max_tokens"] < 50  # what is left
    assert (await post(client, message(max_tokens=51)))[:2] == (422, "max_tokens_too_large")
    assert (await post(client, message("whale " * 115, max_tokens=50)))[:2] == (422, "context_length_exceeded")
    assert (await post(client, message("whale " * 500)))[:2] == (422, "context_length_exceeded")


@with_gateway(Limits(requests_per_minute=3))
async def test_each_key_has_its_rate(client, gateway, fake):
    codes = [(await post(client))[0] for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    status, code, answer = await post(client)
    assert code == "rate_limit_exceeded" and 1 <= int(answer.headers["retry-after"]) <= 60
    assert (await post(client, headers={"Authorization": "Bearer old-key-0123456789"}))[0] == 200
    assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 200


@with_gateway(Limits(max_in_flight=2, answer_s=0.5))
async def test_a_full_or_failing_server_says_so(client, gateway, fake):
    fake.how = "slow"
    waiting = [asyncio.create_task(post(client)) for _ in range(2)]
    while len(fake.asked) < 2:
        await asyncio.sleep(0.01)
    status, code, answer = await post(client)
    assert (status, code, answer.headers["retry-after"]) == (503, "overloaded", "1")
    fake.go.set()
    assert [(await task)[0] for task in waiting] == [200, 200]
    fake.how = "broken"
    status, code, answer = await post(client)
    assert (status, code) == (502, "model_server_failed") and "Internal" not in answer.text
    fake.how = "down"
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "model server does not answer")
    assert (await client.get("/health")).status_code == 200
    gateway.draining, fake.how = True, "well"
    assert (await client.get("/ready")).json()["status"] == "draining" and (await post(client))[0] == 200

    def fails(error):
        def send(request):
            raise error

        return httpx2.AsyncClient(base_url="http://fake", transport=httpx2.MockTransport(send))

    gateway.client = fails(httpx2.ConnectError("no"))
    assert (await post(client))[:2] == (503, "not_ready")
    gateway.client = fails(httpx2.ReadTimeout("no"))
    assert (await post(client))[:2] == (504, "timeout")


@with_gateway()
async def test_a_stream_has_our_models_name_and_ends_in_words(client, gateway, fake):
    for how, end in (("well", "[DONE]"), ("breaks", "model_server_failed"), ("cut", "model server went away")):
        fake.how = how
        answer = await client.post("/v1/chat/completions", json=message(stream=True))
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        said = [json.loads(event) for event in events[:2]]
        assert [event["choices"][0]["delta"]["content"] for event in said] == ["a", "b"]
        assert {event["model"] for event in said} == {"tiny"} and "secret" not in answer.text and end in events[-1]


@with_gateway()
async def test_a_request_names_the_base_or_an_adapter(client, gateway, fake):
    gateway.served["chat"] = "/secret/chat"
    for name, asked in ((None, "/secret/path"), ("tiny", "/secret/path"), ("chat", "/secret/chat")):
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json=message(model=name, stream=stream))
            assert fake.asked[-1]["model"] == asked and "secret" not in answer.text
            assert f'"model": "{name or "tiny"}"' in answer.text.replace('":"', '": "')
    assert "there is no model 'other' here, only 'tiny', 'chat'" in (await post(client, message(model="other")))[2].text


@with_gateway()
async def test_what_clients_of_openai_send_is_answered(client, gateway, fake):
    parts = [{"type": "text", "text": "The whale"}, {"type": "text", "text": "swims"}]
    developer, user = {"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts, "name": "me"}
    habits = {"n": 1, "user": "u", "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "store": False}
    habits |= {"response_format": {"type": "text"}, "metadata": {"a": "b"}, "stream_options": None, "stream": None}
    status, _, answer = await post(client, {"messages": [developer, user], "stop": "\n", **habits})
    assert status == 200, answer.text
    said = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "The whale\nswims"}]
    passed = {"messages": said, "stop": ["\n"], "stream": False, "model": "/secret/path"}
    assert {key: fake.asked[-1][key] for key in passed} == passed and set(fake.asked[-1]) == {*passed, "max_tokens"}
    for changes in ({"n": 2}, {"presence_penalty": 0.5}, {"logprobs": True}, {"response_format": {"type": "json"}}):
        assert (await post(client, message(**changes)))[:2] == (422, "invalid_value"), changes
    gateway.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"  # as some models' do
    status, code, answer = await post(client)
    assert (status, code) == (422, "invalid_value") and "messages: roles must alternate" in answer.text
    gateway.tokenizer.chat_template = ex.CONTINUE_TEMPLATE
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    status, _, answer = await post(client, {"messages": [{"role": "user", "content": image}]})
    assert status == 422 and "messages.0.content: only parts of the form {type: text" in answer.text
    for how, with_usage in (("well", True), ("well", False), ("vllm", True), ("vllm", False)):
        fake.how = how
        asked = message(stream=True, stream_options={"include_usage": with_usage})
        answer = await client.post("/v1/chat/completions", json=asked)
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        counted = [event for event in events if "usage" in event]
        found = [{"choices": event["choices"], "usage": event["usage"]} for event in counted]
        assert found == ([{"choices": [], "usage": USAGE}] if with_usage else []), how
        assert fake.asked[-1]["stream_options"] == {"include_usage": True}  # vLLM counts on demand alone
        assert with_usage or all(event["choices"] for event in events), how  # clients take the first of them


@with_gateway(Limits(max_in_flight=2))
async def test_answers_that_are_none_cost_no_place(client, gateway, fake):
    for wrong in ("[1]", '{"a": NaN}', '{"a": 1e999}', "hello", "", "[" * 5000):
        fake.how = wrong
        assert (await post(client))[:2] == (502, "model_server_failed"), wrong
        assert gateway.in_flight == 0, wrong


@with_gateway(Limits(max_in_flight=1))
async def test_who_hangs_up_leaves_his_place(client, gateway, fake):
    fake.how, left, sent = "slow", asyncio.Event(), []
    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    body = [{"type": "http.request", "body": json.dumps(message()).encode()}]

    async def receive():
        if body:
            return body.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(event):
        sent.append(event)

    task = asyncio.create_task(gateway.app(scope, receive, send))
    while not fake.asked:
        await asyncio.sleep(0.01)
    assert (await post(client))[0] == 503
    left.set()
    await asyncio.wait_for(task, 5)
    assert gateway.in_flight == 0 and sent[0]["status"] == 499


@with_gateway()
async def test_strangers_cannot_make_the_gateway_ask(client, gateway, fake):
    answers = await asyncio.gather(*(client.get("/ready", headers={"Authorization": ""}) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200} and fake.probes == 1


@with_gateway()
async def test_a_long_text_stops_nobody_else(client, gateway, fake):
    tokenize, others, in_time = gateway.tokenizer.apply_chat_template, threading.Event(), []

    def slow(*args, **more):
        in_time.append(others.wait(5))
        return tokenize(*args, **more)

    gateway.tokenizer.apply_chat_template = slow
    task = asyncio.create_task(post(client))
    await asyncio.sleep(0.05)
    assert (await client.get("/health")).status_code == 200
    others.set()
    assert (await task)[0] == 200 and in_time == [True]


def start(monkeypatch, *arguments: object, key: str = KEY) -> None:
    """`python -m capstone.serve ARGUMENTS` in this process."""
    monkeypatch.setenv("CAPSTONE_API_KEY", key)
    monkeypatch.setattr(sys, "argv", ["serve", *map(str, arguments)])
    serving.main()


def test_keys_folders_and_ports_that_are_wrong_get_one_sentence(exported, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="CAPSTONE_API_KEY is not set"):
        start(monkeypatch, exported, key=" , ")
    with pytest.raises(UserError, match="a key of 5 characters: 16 are the least"):
        start(monkeypatch, exported, key=f"{KEY},short")
    with pytest.raises(UserError, match="no manifest.json.*: python -m capstone.export RUN"):
        start(monkeypatch, tmp_path)
    for flag, value, sentence in (
        ("--requests_per_minute", 0, "--requests_per_minute 0 would refuse every request"),
        ("--port", 99999999, "--port 99999999: ports are 1 to 65535"),
        ("--backend", "127.0.0.1:8001", "--backend 127.0.0.1:8001: want an address such as http://"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            start(monkeypatch, exported, flag, value)
    with socket.socket() as taken, pytest.raises(UserError, match="cannot listen on 127.0.0.1:.*choose another --port"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        start(monkeypatch, exported, "--port", taken.getsockname()[1])


def test_without_its_model_server_it_ends_with_one(exported, monkeypatch):
    @contextmanager
    def short_lived(model, device):
        with subprocess.Popen(["sleep", "1"]) as process:
            yield "http://127.0.0.1:9", process

    monkeypatch.setattr(serving, "model_server", short_lived)
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, exported, "--port", free_port())
    assert ended.value.code == 1


# --- the real server ---


@pytest.fixture(scope="module")
def server(exported):
    with running_server(exported, KEY, "--device", "cpu", "--requests_per_minute", "100000", "--drain_s", "1") as found:
        yield found


def memory_mib(process) -> float:
    root = psutil.Process(process.pid)
    return sum(one.memory_info().rss for one in [root, *root.children(recursive=True)]) / 2**20


@pytest.mark.launch
def test_openais_own_client_gets_an_answer(server):
    text = chat(server[0], KEY, "The whale", max_tokens=12)
    assert isinstance(text, str) and text
    from openai import AuthenticationError, NotFoundError, OpenAI, UnprocessableEntityError

    client = OpenAI(base_url=f"{server[0]}/v1", api_key=KEY)
    asked = {"model": "capstone-tiny", "messages": message()["messages"], "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [event.choices[0].delta.content or "" for event in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole and len(pieces) > 5
    *_, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 9
    assert [entry.id for entry in client.models.list()] == ["capstone-tiny"]
    for error, wrong in ((NotFoundError, {"model": "other"}), (UnprocessableEntityError, {"n": 2})):
        with pytest.raises(error):
            client.chat.completions.create(**asked | wrong)
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{server[0]}/v1", api_key="wrong-key-0123456789").models.list()


@pytest.mark.launch
def test_what_the_model_server_says_alone(server):
    """The left column of the notes' table: why there is a gateway."""
    (below,) = psutil.Process(server[1].pid).children()
    (port,) = {one.laddr.port for one in below.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    (address,) = {one.laddr.ip for one in below.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    assert address == "127.0.0.1"  # nobody else reaches it
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    assert httpx2.post(url, json=message(max_tokens=2)).status_code == 200  # without a key
    assert httpx2.post(url, json={"messages": "x"}).status_code == 500
    assert httpx2.post(url, content=b"{bad").status_code == 422
    too_long = httpx2.post(url, json=message("whale " * 100, max_tokens=100, stream=True, temperature=0), timeout=60)
    assert too_long.status_code == 200 and "index out of range in self" in too_long.text
    for door in ("/reset", "/load_model"):
        assert httpx2.post(f"{server[0]}{door}").status_code == 404


@pytest.mark.launch
def test_thirty_two_at_a_time_of_every_kind(server):
    """Right codes for all, and the memory of a second round is that of the first."""
    url, process = server
    kinds = {
        "good": (200, lambda: {"json": message(max_tokens=8)}),
        "streamed": (200, lambda: {"json": message(max_tokens=8, stream=True)}),
        "malformed": (400, lambda: {"content": b"{bad"}),
        "unauthorised": (401, lambda: {"json": message(), "headers": {"Authorization": "Bearer no"}}),
        "oversized": (413, lambda: {"content": b"x" * 1_000_000}),
        "too long": (422, lambda: {"json": message("whale " * 500)}),
    }

    async def one_round():
        wanted, limits = Counter(), httpx2.Limits(max_connections=32)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(
            base_url=url, limits=limits, headers=headers, timeout=120, trust_env=False
        ) as client:
            calls = []
            for number in range(192):
                name = list(kinds)[number % len(kinds)]
                wanted[name, kinds[name][0]] += 1
                calls.append((name, client.post("/v1/chat/completions", **kinds[name][1]())))
            answers = await asyncio.gather(*(call for _, call in calls))
        return wanted, Counter((name, answer.status_code) for (name, _), answer in zip(calls, answers, strict=True))

    used = []
    for _ in range(3):
        wanted, found = asyncio.run(one_round())
        assert found == wanted
        used.append(memory_mib(process))
    assert used[-1] < 1.05 * used[0], used
    assert httpx2.get(f"{url}/ready").json() == {"status": "ok", "in_flight": 0}


@pytest.mark.launch
def test_a_caller_that_hangs_up_stops_the_model(server):
    url = server[0]
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(4):
        body = message(max_tokens=120, stream=True)
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
            next(answer.iter_lines())
    ends = time.monotonic() + 20
    while httpx2.get(f"{url}/ready").json()["in_flight"] and time.monotonic() < ends:
        time.sleep(0.05)
    assert httpx2.get(f"{url}/ready").json()["in_flight"] == 0
    assert chat(url, KEY, "The whale", 4)


# --- the page, in a browser ---


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium is not installed: sudo apt-get install chromium chromium-driver")
    with open_browser() as chromium:
        yield chromium


@pytest.mark.launch
def test_the_chat_page_in_chromium(server, browser):
    find, wait = (lambda name: browser.find_element(By.ID, name)), WebDriverWait(browser, 20)
    browser.get(server[0])
    for field in ("text", "key", "tokens", "heat"):  # each has a label, as a screen reader needs
        assert browser.find_element(By.CSS_SELECTOR, f"label[for={field}]").text
    assert find("log").get_attribute("aria-live") == "polite" and find("problem").get_attribute("role") == "alert"

    find("heat").clear()
    find("heat").send_keys("0")  # the same answer each time: at 0.8 an untrained model ends one in a hundred early

    give_key(browser, "wrong-key-0123456789")
    wait.until(lambda _: "valid key" in find("problem").text)
    give_key(browser, KEY)
    wait.until(lambda _: find("model").text == "capstone-tiny")
    assert find("problem").text == ""

    browser.get_log("browser")  # the 401 that was asked for
    answer = say(browser, "<b>The whale</b>")
    assert browser.find_element(By.CSS_SELECTOR, "#log .user").text.endswith("<b>The whale</b>")
    assert not browser.find_elements(By.CSS_SELECTOR, "#log b")  # text stays text
    assert "cut at 40 tokens" in answer and len(answer) > 30
    for _ in range(3):  # more than the context holds: the page leaves out the oldest texts
        answer = say(browser, "And the sea, and the ship")
    assert "left out" in answer and not find("problem").text

    bad = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("422" in entry["message"] for entry in bad), bad  # those of the context, and nothing that was blocked
    find("new").click()
    assert not browser.find_elements(By.CSS_SELECTOR, "#log li") and find("empty").is_displayed()


@pytest.mark.launch
def test_load_counts_what_it_sends(server, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "running_server", lambda *_: nullcontext(server))
    monkeypatch.setattr(loading.secrets, "token_urlsafe", lambda _: KEY)
    flags = ["--utilisation", "0.5", "0.9", "--requests", "12", "--tokens", "3", "--run_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["load.py", *flags, str(exported)])
    loading.main()
    found = json.loads((tmp_path / "load.json").read_text())
    sent = [(row["utilisation"], row["requests"], row["errors"], row["statuses"]) for row in found["table"]]
    assert sent == [(0.5, 12, 0, {"200": 12}), (0.9, 12, 0, {"200": 12})]
    for row in found["table"]:
        assert 0 < row["first_token_p50_s"] <= row["p50_s"] <= row["p99_s"] and row["before_mib"] > 100
        assert row["theory_s"] > found["alone_s"] > 0
    assert found["tokens_per_answer"] == pytest.approx(3, abs=0.5)  # or an end of text
    assert (tmp_path / "load.png").exists() and "answers/s of" in capsys.readouterr().out
    monkeypatch.setattr(loading.secrets, "token_urlsafe", lambda _: "wrong-key-0123456789")
    with pytest.raises(UserError, match=r"no request of 8 was answered: \{'401': 8\}"):
        loading.main()


def test_requests_come_whether_others_are_answered_or_not():
    """The difference between the loops: a server that stands still is asked no more in one, as before in the other."""

    def waits(loop):
        async def inside():
            free, done = asyncio.Lock(), []

            async def ask(number, due):
                async with free:  # one at a time
                    await asyncio.sleep(0.2 if not done else 0)
                    done.append(number)
                return time.perf_counter() - due

            return await loop(ask)

        return asyncio.run(inside())

    due = [0.01 * number for number in range(10)]
    closed, opened = waits(lambda ask: loading.closed_loop(ask, 1, 10)), waits(lambda ask: loading.open_loop(ask, due))
    assert sum(wait > 0.05 for wait in closed) == 1 and sum(wait > 0.05 for wait in opened) == 10
    assert opened[9] > 0.09  # counted from when it was due, not from when its turn came


def test_arrivals_are_by_chance_and_waiting_follows_the_formula():
    due = loading.poisson(50, 20_000, seed=0)
    gaps = [after - before for before, after in zip(due, due[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.03) and spread == pytest.approx(mean, rel=0.05)  # exponential
    free_at, waited = 0.0, 0.0
    for at in due:  # a queue before one server that takes 16 ms: busy for 80 % of the time
        begins = max(at, free_at)
        free_at, waited = begins + 0.016, waited + begins - at
    assert loading.theory(0.02, 0.016, 0.8) - 0.02 == pytest.approx(waited / len(due), rel=0.1)
    assert loading.theory(0.02, 0.016, 1.0) is None


@pytest.mark.launch
def test_sigterm_drains(server):
    """Not ready at once, the stream under way and a late caller are answered in full, exit code 0, nothing left.

    The last test that uses the server.
    """
    headers = {"Authorization": f"Bearer {KEY}"}
    url, process = server
    below = psutil.Process(process.pid).children(recursive=True)
    body = message(max_tokens=120, stream=True, seed=1, temperature=0)
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        got = [next(lines)]
        process.send_signal(signal.SIGTERM)
        ends = time.monotonic() + 10
        while is_ready(url) and time.monotonic() < ends:
            time.sleep(0.01)
        assert httpx2.get(f"{url}/ready").json()["status"] == "draining"
        assert httpx2.get(f"{url}/health").status_code == 200
        late = httpx2.post(f"{url}/v1/chat/completions", json=message(max_tokens=2), headers=headers, timeout=60)
        assert late.status_code == 200
        got += list(lines)
    assert "data: [DONE]" in got
    assert process.wait(30) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")
    assert below and not any(one.is_running() for one in below)


def test_percentiles_were_really_measured():
    assert (
        loading.percentile([float(number) for number in range(1, 101)], 0.99) == 99
        and loading.percentile([3.0], 0.5) == 3
    )
