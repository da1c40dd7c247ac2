"""The gateway: what a model server lacks before strangers may talk to it. Day 28.

A model server answers whoever asks, as long as they like, and says 500 to nonsense. The gateway stands before it with
an API key, limits on size, rate, length and number of requests, status codes that say whose turn it is, /health and
/ready, metrics and an access log (watch.py), and the chat page. It knows nothing of models but their tokenizer, so the
server behind it can be any that speaks OpenAI's API.
Sources: RFC 9110, section 15 (what the codes mean); platform.openai.com/docs/api-reference/chat.
"""

import base64
import hashlib
import hmac
import json
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import anyio
import httpx2
from jinja2 import TemplateError
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from capstone.serve.watch import CHAT, Seen, Watch

T = TypeVar("T")
# Of a body that is too large, this many times the limit is read and thrown away: a caller who is still sending when the
# connection closes would see a broken connection instead of the 413.
PATIENCE = 16
PROBE_S = 0.5  # /ready needs no key: however many ask, the model server is asked once in so many seconds
PAGE = Path(__file__).with_name("chat.html")


@dataclass(frozen=True)
class Limits:
    """What one request, one key, and all of them together may take."""

    max_body_bytes: int = 64 * 1024
    max_tokens: int = 256  # of an answer
    requests_per_minute: int = 120  # of a key
    max_in_flight: int = 64  # more get 503 at once instead of a long wait
    read_s: float = 10  # for sending the body
    answer_s: float = 120  # between two pieces of an answer


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]  # developer: OpenAI's newer name of system
    content: Annotated[str, Field(min_length=1)]
    name: str | None = None  # not passed on: chat templates have no place for it

    @field_validator("content", mode="before")
    @classmethod
    def text_of_parts(cls, content: object) -> object:
        """A list of text parts is one text, a line each, as vLLM reads it."""
        if not isinstance(content, list):
            return content
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise PydanticCustomError("parts", "only parts of the form {type: text, text: ...} can be read")
        return "\n".join(part["text"] for part in content)

    def passed(self) -> dict:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers who count bytes; there is none here


class ChatRequest(BaseModel):
    """The part of OpenAI's request that is answered. What would change the answer and cannot be done is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name of the same
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[str], Field(max_length=4)] | None = None
    # What clients send by habit: accepted with the values that change nothing, and not passed on.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def one_stop(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop


PASSED_ON = {"temperature", "top_p", "seed", "stop"}  # beside messages, model and max_tokens


class Refused(HTTPException):
    """A request that gets a status code and one sentence, in OpenAI's form."""

    def __init__(self, status: int, code: str, sentence: str, **headers: str) -> None:
        super().__init__(status, sentence, {name.replace("_", "-"): value for name, value in headers.items()})
        self.code = code


def error_body(status: int, code: str, sentence: str) -> dict:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": sentence, "type": kind, "code": code}}


def read_object(text: str | bytes) -> dict:
    """A JSON object of finite numbers. Raises ValueError for anything else."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of an object")
    json.dumps(found, allow_nan=False)
    return found


def is_last(event: dict) -> bool:
    """Whether an event of a stream says why the answer ends; one that breaks off has no such event."""
    choices = event.get("choices")
    return isinstance(choices, list) and any(isinstance(one, dict) and one.get("finish_reason") for one in choices)


def has_text(event: dict) -> bool:
    choices = event.get("choices")
    delta = choices[0].get("delta") if isinstance(choices, list) and isinstance(choices[0], dict) else None
    return isinstance(delta, dict) and bool(delta.get("content"))


async def say(request: Request, error: HTTPException) -> JSONResponse:
    code = getattr(error, "code", {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error"))
    request.state.seen.error = code
    return JSONResponse(error_body(error.status_code, code, error.detail), error.status_code, error.headers)


async def crashed(request: Request, error: Exception) -> JSONResponse:
    """A mistake of ours: the log has the traceback, the caller a 500 in OpenAI's form."""
    request.state.seen.error = type(error).__name__
    return JSONResponse(error_body(500, "internal_error", "the gateway failed on this request"), 500)


class Gateway:
    """The ASGI application `app`, and what it has to remember: who is in, and whether it is closing."""

    def __init__(
        self, backend: str, model: str, name: str, tokenizer, keys: list[str], limits: Limits, metrics_keys=(),
        adapters: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.tokenizer, self.limits = name, tokenizer, limits
        self.served = {name: model} | (adapters or {})  # what callers name -> what the model server calls it
        self.keys = [key.encode() for key in keys]
        self.metrics_keys = [*self.keys, *(key.encode() for key in metrics_keys)]  # these open /metrics alone
        self.rate, self.window = (
            RateLimitItemPerMinute(limits.requests_per_minute),
            MovingWindowRateLimiter(MemoryStorage()),
        )
        self.in_flight, self.draining, self.started = 0, False, int(time.time())
        self.probe, self.probed_at, self.answered = anyio.Lock(), -PROBE_S, False
        self.tokenizing = anyio.CapacityLimiter(1)  # a thread, or long texts would stop every stream meanwhile
        timeout = httpx2.Timeout(limits.answer_s, connect=5)
        connections = httpx2.Limits(max_connections=limits.max_in_flight + 8)
        self.client = httpx2.AsyncClient(base_url=backend, timeout=timeout, limits=connections, trust_env=False)
        routes = [
            Route("/", self.page), Route("/health", self.health), Route("/ready", self.ready),
            Route("/v1/models", self.models), Route(CHAT, self.chat, methods=["POST"]), Route("/metrics", self.metrics),
        ]  # fmt: skip
        app = Starlette(
            routes=routes, exception_handlers={HTTPException: say, Exception: crashed}, lifespan=self.lifespan
        )
        paths = [route.path for route in routes]
        self.app = self.watch = Watch(app, paths, lambda: self.in_flight, limits.max_in_flight)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self.client:
            yield

    # --- who may ask, and how much ---

    def key_of(self, request: Request, keys: list[bytes] | None = None) -> bytes:
        """The caller's key; 401 without a right one. Compared in constant time: the clock must not tell how near."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip().encode("latin-1")
        right = [key for key in keys or self.keys if hmac.compare_digest(key, given)]
        if scheme.lower() != "bearer" or not right:
            raise Refused(
                401, "invalid_api_key", "send a valid key: Authorization: Bearer KEY", WWW_Authenticate="Bearer"
            )
        request.state.seen.caller = name_of(right[0])[:8]
        return right[0]

    def count(self, key: bytes) -> None:
        """429 when this key has had its requests of the last minute."""
        name = name_of(key)  # the storage never sees the key itself
        if not self.window.hit(self.rate, name):
            wait = max(1, math.ceil(self.window.get_window_stats(self.rate, name).reset_time - time.time()))
            limit = self.limits.requests_per_minute
            raise Refused(
                429, "rate_limit_exceeded", f"more than {limit} requests a minute: wait {wait} s", Retry_After=str(wait)
            )

    async def body_of(self, request: Request) -> bytes:
        """The body; 413 when it is larger than allowed, whatever its header says, 408 when it does not come."""
        most, body, size = self.limits.max_body_bytes, bytearray(), 0
        too_large = Refused(413, "request_too_large", f"the request is larger than {most:,} bytes", Connection="close")
        if int(request.headers.get("content-length", 0)) > PATIENCE * most:
            raise too_large
        try:
            with anyio.fail_after(self.limits.read_s):
                async for piece in request.stream():
                    size += len(piece)
                    if size <= most:
                        body += piece
                    elif size > PATIENCE * most:
                        break
        except TimeoutError:
            raise Refused(408, "request_timeout", f"the request took longer than {self.limits.read_s:g} s") from None
        if size > most:
            raise too_large
        return bytes(body)

    def checked(self, body: bytes) -> tuple[dict, bool, int]:
        """What is passed on to the model server, whether a stream ends with its usage, and the prompt's tokens.

        400 for what is no JSON, 422 for what cannot be answered.
        """
        try:
            asked = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            found = error.errors()[0]
            if found["type"] == "json_invalid":
                raise Refused(400, "invalid_json", f"the request is not JSON: {found['ctx']['error']}") from None
            where = ".".join(str(part) for part in found["loc"])
            raise Refused(422, "invalid_value", f"{where}: {found['msg']}") from None
        if asked.model not in (None, *self.served):
            here = ", ".join(map(repr, self.served))
            raise Refused(404, "model_not_found", f"there is no model {asked.model!r} here, only {here}")
        messages = [message.passed() for message in asked.messages]
        try:
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:  # a model's template may insist on turns, or on a first message from the system
            raise Refused(422, "invalid_value", f"messages: {error}") from None
        prompt = prompt["input_ids"]
        room, wanted = self.tokenizer.model_max_length - len(prompt), asked.max_completion_tokens or asked.max_tokens
        if wanted and wanted > self.limits.max_tokens:
            raise Refused(
                422, "max_tokens_too_large", f"max_tokens is {wanted}, at most {self.limits.max_tokens} are allowed"
            )
        if room < (wanted or 1):
            has = f"{len(prompt)} tokens of messages and {wanted or 1} of answer"
            raise Refused(
                422, "context_length_exceeded", f"{has} do not fit the model's {self.tokenizer.model_max_length}"
            )
        passed = asked.model_dump(exclude_none=True, include=PASSED_ON) | {"messages": messages}
        passed["model"] = self.served[asked.model or self.name]
        passed["max_tokens"] = wanted or min(room, self.limits.max_tokens)
        passed["stream"] = bool(asked.stream)
        if asked.stream:
            passed["stream_options"] = {"include_usage": True}  # for our own count; vLLM sends it on demand alone
        return passed, bool(asked.stream_options and asked.stream_options.include_usage), len(prompt)

    # --- the answers ---

    async def page(self, request: Request) -> HTMLResponse:
        html = PAGE.read_text(encoding="utf-8")
        allowed = {}  # the page's own script and style, by their hash; nothing else runs, nothing else is fetched
        for tag in ("script", "style"):
            inline = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1].encode()
            allowed[tag] = f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inline).digest()).decode()}'"
        rules = [
            "default-src 'none'",
            *allowed.values(),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        ]
        return HTMLResponse(
            html, headers={"Content-Security-Policy": "; ".join(rules), "Referrer-Policy": "no-referrer"}
        )

    async def health(self, request: Request) -> JSONResponse:
        """Is this process alive? It does not ask the model server: restarting the gateway would not cure that one."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> JSONResponse:
        """Should requests be sent here? Not while closing, and not without a model server."""
        status = (
            "draining" if self.draining else "ok" if await self.backend_answers() else "model server does not answer"
        )
        return JSONResponse({"status": status, "in_flight": self.in_flight}, 200 if status == "ok" else 503)

    async def backend_answers(self) -> bool:
        async with self.probe:
            if time.monotonic() - self.probed_at >= PROBE_S:
                try:
                    self.answered = (await self.client.get("/health", timeout=2)).status_code == 200
                except httpx2.HTTPError:
                    self.answered = False
                self.probed_at = time.monotonic()
        return self.answered

    async def metrics(self, request: Request) -> Response:
        self.key_of(request, self.metrics_keys)
        return self.watch.page()

    async def models(self, request: Request) -> JSONResponse:
        self.key_of(request)
        entry = {"object": "model", "created": self.started, "owned_by": "capstone"}
        return JSONResponse({"object": "list", "data": [{"id": name} | entry for name in self.served]})

    async def chat(self, request: Request) -> Response:
        self.count(self.key_of(request))
        try:
            body = await self.body_of(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        asked, with_usage, read = await anyio.to_thread.run_sync(self.checked, body, limiter=self.tokenizing)
        if self.in_flight >= self.limits.max_in_flight:
            raise Refused(
                503, "overloaded", f"{self.in_flight} requests are being answered: try again", Retry_After="1"
            )
        self.in_flight += 1
        response, seen = None, request.state.seen
        seen.prompt_tokens = read
        try:
            response = await unless_gone(request, self.answer(asked, with_usage, seen)) or Response(status_code=499)
            return response
        except httpx2.TimeoutException:
            raise Refused(504, "timeout", f"no answer within {self.limits.answer_s:g} s") from None
        except httpx2.TransportError:
            raise Refused(503, "not_ready", "the model server does not answer: try again", Retry_After="5") from None
        finally:
            if not isinstance(response, Stream):  # which counts itself out
                self.in_flight -= 1

    async def answer(self, asked: dict, with_usage: bool, seen: Seen) -> Response:
        """Ask the model server. 502 when it fails, or says what is no answer."""
        request = self.client.build_request("POST", CHAT, json=asked, headers={"x-request-id": seen.id})
        name = next(name for name, model in self.served.items() if model == asked["model"])
        answer = await self.client.send(request, stream=True)
        if asked["stream"] and answer.status_code == 200:
            return Stream(self, answer, name, with_usage, seen)
        try:
            if answer.status_code != 200:
                raise Refused(502, "model_server_failed", f"the model server said {answer.status_code}")
            said = read_object(await answer.aread())
            seen.answer_tokens = tokens_made(said.get("usage"))
            return JSONResponse(said | {"model": name})
        except (ValueError, RecursionError):
            raise Refused(502, "model_server_failed", "the model server's answer is no JSON object") from None
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()

    async def pieces(self, answer: httpx2.Response, name: str, with_usage: bool, seen: Seen) -> AsyncIterator[str]:
        """The events of a streamed answer under the model's name here; a failure on the way is an event as well.

        Usage comes as OpenAI sends it: in an event of its own without choices, when asked for.
        """
        event, usage, whole = {}, None, False
        try:
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                if line[5:].strip() == "[DONE]":
                    whole = True
                    break
                event = read_object(line[5:])
                if "error" in event:
                    raise ValueError(event["error"])  # what went wrong inside is for the server's log
                usage, whole = event.pop("usage", None) or usage, whole or is_last(event)
                if not event.get("choices"):
                    continue  # the usage alone: the caller may not have asked for it
                if has_text(event):
                    if not seen.answer_tokens:
                        self.watch.first_token(seen)
                    seen.answer_tokens += 1  # until usage says how many there were
                yield sse(event | {"model": name})
        except (ValueError, RecursionError):
            seen.error = "model_server_failed"
            yield sse(error_body(502, seen.error, "the model server failed"))
            return
        except httpx2.HTTPError:
            whole = False
        if not whole:
            seen.error = "model_server_failed"
            yield sse(error_body(502, seen.error, "the model server went away"))
            return
        seen.answer_tokens = tokens_made(usage) or seen.answer_tokens
        if with_usage:
            yield sse(event | {"model": name, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def name_of(key: bytes) -> str:
    """A name for a key that does not tell it."""
    return hashlib.sha256(key).hexdigest()


def tokens_made(usage: object) -> int:
    """Tokens of an answer by the model server's own count; 0 where it says none."""
    made = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return made if isinstance(made, int) and made > 0 else 0


def sse(event: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


async def unless_gone(request: Request, call: Awaitable[T]) -> T | None:
    """What `call` returns, or None when the caller hangs up first: the call is then cancelled.

    (`transformers serve` goes on to the end of an answer that is not streamed; its place here is free.)
    """
    result = error = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            result = await call
        except Exception as raised:
            error = raised
        group.cancel_scope.cancel()
    if error:
        raise error
    return result


class Stream(StreamingResponse):
    """A streamed answer. However it ends - a caller that hangs up, too - the model server stops generating."""

    def __init__(self, gateway: Gateway, answer: httpx2.Response, name: str, with_usage: bool, seen: Seen) -> None:
        pieces = gateway.pieces(answer, name, with_usage, seen)
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.gateway, self.answer = gateway, answer

    async def __call__(self, scope: dict, receive: object, send: object) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.gateway.in_flight -= 1
            with anyio.CancelScope(shield=True):
                await self.answer.aclose()
