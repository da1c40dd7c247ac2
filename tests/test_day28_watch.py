"""Day 28: what the server tells those who run it, its alerts, and a thousand requests of people who mean no good."""

import asyncio
import contextlib
import gc
import json
import re
import shutil
import socket
import subprocess
from collections import Counter

import httpx2
import psutil
import pytest
import yaml

from capstone.config import ROOT
from capstone.monitor import METRICS
from common.errors import UserError
from day27.prometheus import find_tool

NEEDS = "day 28's packages are not here: pip install -r day28/requirements.txt"
for package in ("fastapi", "openai", "limits", "selenium"):
    pytest.importorskip(package, reason=NEEDS)

import uvicorn
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

import capstone.serve.__main__ as serving
from capstone.serve.gateway import Limits
from tests.test_day28_serve import KEY, Fake, gateway_before, message, post, with_gateway

SERVE = ROOT / "capstone/serve"
METRICS_KEY = "only-for-metrics-0123456789"
CHAT = "/v1/chat/completions"


def numbers(text: str) -> dict[str, float]:
    """{name{labels}: value} of a page of metrics."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def rows_of(caplog) -> list[dict]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "capstone.access"]


# --- what it tells ---


def test_metrics_count_every_request_by_its_code(caplog):
    @with_gateway(Limits(max_in_flight=7))
    async def inside(client, gateway, fake):
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
            assert (await client.get("/metrics", headers=headers)).status_code == 401
        for _ in range(3):
            assert (await post(client))[0] == 200
        answer = await client.post(CHAT, json=message(stream=True))
        assert answer.text.endswith("data: [DONE]\n\n")
        fake.how = "breaks"
        assert "model_server_failed" in (await client.post(CHAT, json=message(stream=True))).text
        fake.how = "broken"
        assert (await post(client))[0] == 502
        await post(client, b"{bad")
        for number in range(50):
            await client.get(f"/nowhere/{number}?secret={number}")
        await post(client, headers={"Authorization": "Bearer wrong"})
        page = await client.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        found = numbers(page.text)
        codes = {key: value for key, value in found.items() if key.startswith("serving_requests_total") and value}
        chats = {code: value for key, value in codes.items() if CHAT in key for code in re.findall(r"code=(\d+)", key)}
        assert chats == {"200": 4, "502": 2, "400": 1, "401": 1}  # the stream that broke off among them
        assert codes["serving_requests_total{code=404,path=other}"] == 50 and "nowhere" not in page.text
        assert found["serving_request_seconds_count{}"] == 4 and found["serving_first_token_seconds_count{}"] == 2
        assert found["serving_tokens_total{kind=answer}"] == 4 * 3 + 2  # by usage, or by pieces where it broke off
        assert found["serving_tokens_total{kind=prompt}"] == 6 * len(gateway.tokenizer("The whale")["input_ids"])
        assert found["serving_in_flight{}"] == 0 and found["serving_in_flight_limit{}"] == 7
        assert found["process_resident_memory_bytes{}"] > 2**20 and found["process_start_time_seconds{}"] > 1e9
        fake.how, fake.asked = "slow", []
        waiting = asyncio.create_task(post(client))
        while not fake.asked:
            await asyncio.sleep(0.01)
        assert numbers((await client.get("/metrics")).text)["serving_in_flight{}"] == 1
        fake.go.set()
        await waiting

    inside()


def test_a_key_for_metrics_opens_nothing_else():
    async def inside():
        gateway = gateway_before(Fake(), metrics_keys=[METRICS_KEY])
        headers, reach = {"Authorization": f"Bearer {METRICS_KEY}"}, httpx2.ASGITransport(app=gateway.app)
        async with httpx2.AsyncClient(base_url="http://test", transport=reach, headers=headers) as client:
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/v1/models")).status_code == (await post(client))[0] == 401

    asyncio.run(inside())


def test_every_request_has_an_id_that_client_log_and_model_server_share(caplog):
    @with_gateway()
    async def inside(client, gateway, fake):
        caplog.set_level("INFO", "capstone.access")
        for given in ("mine-0.1:2_3", "bad\tid", "x" * 65, '"}', ""):
            status, _, answer = await post(client, headers={"x-request-id": given})
            id = answer.headers["x-request-id"]
            assert (id == given) == (given == "mine-0.1:2_3") and re.fullmatch(r"[\w.:-]{1,64}", id)
            assert fake.ids[-1] == id == rows_of(caplog)[-1]["id"]
        ids = {(await client.get("/nowhere")).headers["x-request-id"] for _ in range(3)}  # errors have one, too
        assert len(ids) == 3
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=gateway.app), base_url="http://test")
        openai = AsyncOpenAI(base_url="http://test/v1", api_key=KEY, http_client=http)
        said = await openai.chat.completions.create(model="tiny", messages=message()["messages"])
        assert said._request_id == fake.ids[-1]

    inside()


def test_the_log_has_a_line_for_every_request_and_nothing_that_was_said(caplog):
    @with_gateway()
    async def inside(client, gateway, fake):
        caplog.set_level("INFO", "capstone.access")
        await post(client, message("my secret prompt"))
        await post(client, b'{"messages": [{"role": "my secret role"}]}')
        await post(client, message(model="my secret model"))
        await client.get("/my/secret/path?my=secret")
        await post(client, headers={"Authorization": "Bearer my-secret-key"})
        assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 200
        fake.how, gateway.probed_at = "down", 0
        assert (await client.get("/ready")).status_code == 503
        rows = rows_of(caplog)
        assert [(row["path"], row["code"], row["error"]) for row in rows] == [
            (CHAT, 200, None), (CHAT, 422, "invalid_value"), (CHAT, 404, "model_not_found"),
            ("other", 404, "not_found"), (CHAT, 401, "invalid_api_key"), ("/ready", 503, None),
        ]  # fmt: skip
        assert rows[0]["answer_tokens"] == 3 and rows[0]["prompt_tokens"] > 2 and rows[0]["seconds"] >= 0
        assert rows[0]["caller"] == rows[1]["caller"] != "-" == rows[4]["caller"]
        for secret in ("secret", "hello", KEY):
            assert secret not in caplog.text

    inside()


def test_a_mistake_of_ours_is_a_500_in_the_same_form(caplog):
    @with_gateway()
    async def inside(client, gateway, fake):
        caplog.set_level("INFO", "capstone.access")
        gateway.checked = None
        reach = httpx2.ASGITransport(app=gateway.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(base_url="http://test", transport=reach, headers=client.headers) as careless:
            status, code, answer = await post(careless)
        assert (status, code) == (500, "internal_error") and answer.headers["x-request-id"]
        assert (rows_of(caplog)[-1]["code"], rows_of(caplog)[-1]["error"]) == (500, "TypeError")

    inside()


# --- alerts ---


@pytest.fixture(scope="module")
def promtool():
    """Prometheus's own checker, fetched once from Debian where it is not on the PATH."""
    try:
        path = find_tool("promtool")
    except UserError as error:
        pytest.skip(str(error))
    return lambda *words, **more: subprocess.run([path, *map(str, words)], capture_output=True, text=True, **more)


def test_each_alert_of_the_server_fires_and_keeps_quiet_when_it_should(promtool, tmp_path):
    run = promtool("test", "rules", SERVE / "rules_test.yml")
    assert run.returncode == 0, run.stdout + run.stderr
    config = (ROOT / "capstone/deploy/prometheus.yml").read_text()
    (tmp_path / "key").touch()
    config = config.replace("/run/secrets/metrics_key", str(tmp_path / "key")).replace("../", f"{ROOT}/capstone/")
    (tmp_path / "prometheus.yml").write_text(config)
    assert promtool("check", "config", tmp_path / "prometheus.yml").returncode == 0
    rules = yaml.safe_load((SERVE / "rules.yml").read_text())
    names = {rule["alert"] for rule in rules["groups"][0]["rules"]}
    shutil.copy(SERVE / "rules_test.yml", tmp_path)
    for wrong in ("vector(1) < 0", "vector(1)"):  # one that never fires, one that always does
        for rule in rules["groups"][0]["rules"]:
            rule["expr"], rule["for"] = wrong, "0s"
        (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
        run = promtool("test", "rules", tmp_path / "rules_test.yml")
        assert set(re.findall(r"alertname: ?(\w+), time", run.stdout + run.stderr)) == names, wrong


def test_alerts_ask_for_what_the_server_tells(promtool):
    page = gateway_before(Fake()).watch.page().body.decode()
    told = {re.match(r"\w+", line)[0] for line in page.splitlines() if not line.startswith("#")}
    asked = set(re.findall(r"\b(?:serving|process)_\w+", (SERVE / "rules.yml").read_text()))
    assert asked - {"serving_request_seconds_bucket"} <= told and len(asked) >= 5
    told = {*METRICS, *re.findall(r"^# TYPE (\w+)", page, re.M)}  # a histogram as a whole, and labels without a value
    named = set(re.findall(r"`((?:serving|training)_\w+)`", (ROOT / "capstone/deploy/runbook.md").read_text()))
    assert named <= told and len(named) >= 5, f"the runbook names what nobody tells: {named - told}"
    check = promtool("check", "metrics", input=page)
    assert check.returncode == 0, check.stderr  # names and units as Prometheus's own advice has them


# --- a thousand requests of people who mean no good ---


def request(body: bytes, head: str = "", key: str = KEY, method: str = "POST", path: str = CHAT) -> bytes:
    length = "" if "ransfer-" in head or "ength" in head else f"Content-Length: {len(body)}\r\n"
    lines = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    return f"{lines}{length}{head}\r\n".encode() + body


def asks(how: str, **more) -> bytes:
    return request(json.dumps(message(f"be {how}", **more)).encode())


LARGE = b"x" * 3000
UPGRADE = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
UPGRADE += b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
# What is sent, and what the status line and the end of the answer have to be. None: he does not wait for an answer.
KINDS: dict[str, tuple[bytes, int | None, bytes]] = {
    "good": (asks("well"), 200, b"hello"),
    "streamed": (asks("well", stream=True), 200, b"[DONE]"),
    "no HTTP": (b"\x16\x03\x01 hello\r\n\r\n", 400, b""),
    "no JSON": (request(b"{bad"), 400, b"invalid_json"),
    "no text": (request(b"\xff\xfe{}"), 400, b"invalid_json"),
    "a deep nest": (request(b"[" * 900), 400, b"invalid_json"),
    "a length below zero": (request(b"{}", "Content-Length: -1\r\n"), 400, b""),
    "no sense": (request(b'{"messages": "x"}'), 422, b"invalid_value"),
    "not a number": (request(b'{"messages": [], "temperature": NaN}'), 422, b"invalid_value"),
    "too long": (asks("x " * 200), 422, b"context_length_exceeded"),
    "no key": (request(b"{}", key="no"), 401, b"invalid_api_key"),
    "no key, large": (request(LARGE, key="no"), 401, b"invalid_api_key"),
    "large": (request(LARGE), 413, b"request_too_large"),
    "large in pieces": (request(b"BB8\r\n" + LARGE + b"\r\n0\r\n\r\n", CHUNKED), 413, b"request_too_large"),
    "another model": (asks("well", model="other"), 404, b"model_not_found"),
    "another path": (request(b"", method="GET", path="/../etc/passwd"), 404, b"not_found"),
    "another method": (request(b"", method="DELETE"), 405, b"method_not_allowed"),
    "an upgrade": (UPGRADE, 200, b""),  # to a WebSocket: there are none, it gets the page, and then 408
    "a slow body": (request(b"{", "Content-Length: 50\r\n"), 408, b"request_timeout"),
    "a slow head": (request(b"{}")[:60], 408, b""),
    "silence": (b"", 408, b""),
    "cut in the body": (request(b"{", "Content-Length: 50\r\n"), None, b""),
    "gone while waiting": (asks("slow"), None, b""),
    "gone in the stream": (asks("endless", stream=True), None, b""),
    "not finite": (asks('{"a": 1e999}'), 502, b"model_server_failed"),
    "NaN": (asks('{"a": NaN}'), 502, b"model_server_failed"),
    "no object": (asks("[1]"), 502, b"model_server_failed"),
    "broken": (asks("broken"), 502, b"model_server_failed"),
    "breaks": (asks("breaks", stream=True), 200, b"model_server_failed"),
    "cut stream": (asks("cut", stream=True), 200, b"model_server_failed"),
}


@contextlib.asynccontextmanager
async def served(server: uvicorn.Server):
    """The server on a port of this machine, in this process: (server, port)."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(sockets=[door]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield server, door.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def send(port: int, kind: str) -> int | None:
    """Send one request of this kind; its status, or None for a caller who has gone. Fails when the end is another."""
    sent, status, end = KINDS[kind]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        if status is None:
            if kind == "gone in the stream":
                await reader.readuntil(b"data: ")
            else:
                await asyncio.sleep(0.05)
            return None
        answer = await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert end in body[-300:], (kind, answer)
    return int(head.split()[1])


@pytest.mark.launch
def test_a_thousand_requests_that_mean_no_good(monkeypatch):
    """Right codes for all, no place is lost, the metrics have counted each, and memory stays where it was."""
    monkeypatch.setattr(serving, "HEAD_S", 0.5)
    limits = Limits(max_body_bytes=2000, requests_per_minute=10**6, read_s=0.3, answer_s=20)
    memory, names = [], list(KINDS)

    quiet = {"log_level": "critical", "access_log": False}

    async def inside():
        fake = Fake()
        fake.how = "as told"
        async with served(uvicorn.Server(uvicorn.Config(fake.app, **quiet))) as (_, behind):
            gateway = gateway_before(fake, limits, f"http://127.0.0.1:{behind}")
            async with served(serving.Server(uvicorn.Config(gateway.app, **quiet), gateway, 0)) as (server, port):
                for turn in range(5):
                    for start in (turn, turn + 105):
                        kinds = [names[number % len(names)] for number in range(start, start + 105)]
                        found = await asyncio.gather(*(send(port, kind) for kind in kinds))
                        assert list(zip(kinds, found, strict=True)) == [(kind, KINDS[kind][1]) for kind in kinds]
                    while gateway.in_flight or server.server_state.connections:
                        await asyncio.sleep(0.01)
                    fake.go.set()  # for those who wait for the slow one, and have gone
                    await asyncio.sleep(0.05)
                    fake.go.clear()
                    fake.asked.clear()
                    gc.collect()
                    memory.append(psutil.Process().memory_info().rss / 2**20)
        return numbers(gateway.watch.page().body.decode())

    counted = asyncio.run(asyncio.wait_for(inside(), 60))
    sent = Counter(names[number % len(names)] for turn in range(5) for number in range(turn, turn + 210))
    assert sum(sent.values()) == 1050
    wanted = Counter()
    for kind, number in sent.items():
        _, code, end = KINDS[kind]
        if kind not in ("no HTTP", "a length below zero", "a slow head", "silence"):  # these never reach the gateway
            wanted[502 if end == b"model_server_failed" else code or 499] += number
    codes = Counter()
    for key, value in counted.items():
        if found := re.match(r"serving_requests_total\{code=(\d+)", key):
            codes[int(found[1])] += int(value)
    for counter in (codes, wanted):  # who leaves within his body is too slow where the machine is
        counter[499] += counter.pop(408)
    assert +codes == wanted
    assert counted["serving_in_flight{}"] == 0
    assert memory[-1] < memory[0] + 8, memory  # MiB; the first turn pays for code that is loaded on first use
