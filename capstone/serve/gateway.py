"""The gateway: what a model server lacks before strangers may talk to it. Day 28.

A model server answers whoever asks, as long as they like, and says 500 to nonsense. The gateway stands before it with
an API key, limits on size, rate, length and number of requests, status codes that say whose turn it is, /health and
/ready, and the chat page. It knows nothing of models but their tokenizer, so the server behind it can be any that
speaks OpenAI's API. Sources: RFC 9110, section 15 (what the codes mean); platform.openai.com/docs/api-reference/chat.
"""

import base64
import hashlib
import hmac
import json
import math
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import anyio
import httpx2
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

# Of a body that is too large, this many times the limit is read and thrown away: a caller who is still sending when the
# connection closes would see a broken connection instead of the 413.
PATIENCE = 16
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
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class ChatRequest(BaseModel):
    """The part of OpenAI's request that is passed on; anything else is refused instead of ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name of the same
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[str], Field(max_length=4)] | None = None


class Refused(HTTPException):
    """A request that gets a status code and one sentence, in OpenAI's form."""

    def __init__(self, status: int, code: str, sentence: str, **headers: str) -> None:
        super().__init__(status, sentence, {name.replace("_", "-"): value for name, value in headers.items()})
        self.code = code


def error_body(status: int, code: str, sentence: str) -> dict:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": sentence, "type": kind, "code": code}}


async def say(request: Request, error: HTTPException) -> JSONResponse:
    code = getattr(error, "code", {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error"))
    return JSONResponse(error_body(error.status_code, code, error.detail), error.status_code, error.headers)


class Gateway:
    """The ASGI application `app`, and what it has to remember: who is in, and whether it is closing."""

    def __init__(self, backend: str, model: str, name: str, tokenizer, keys: list[str], limits: Limits) -> None:
        self.model, self.name, self.tokenizer, self.limits = model, name, tokenizer, limits
        self.keys = [key.encode() for key in keys]
        self.rate, self.window = (
            RateLimitItemPerMinute(limits.requests_per_minute),
            MovingWindowRateLimiter(MemoryStorage()),
        )
        self.in_flight, self.draining, self.started = 0, False, int(time.time())
        timeout = httpx2.Timeout(limits.answer_s, connect=5)
        connections = httpx2.Limits(max_connections=limits.max_in_flight + 8)
        self.client = httpx2.AsyncClient(base_url=backend, timeout=timeout, limits=connections, trust_env=False)
        routes = [
            Route("/", self.page), Route("/health", self.health), Route("/ready", self.ready),
            Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]  # fmt: skip
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: say}, lifespan=self.lifespan)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self.client:
            yield

    # --- who may ask, and how much ---

    def key_of(self, request: Request) -> bytes:
        """The caller's key; 401 without a right one. Compared in constant time: the clock must not tell how near."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip().encode("latin-1")
        right = [key for key in self.keys if hmac.compare_digest(key, given)]
        if scheme.lower() != "bearer" or not right:
            raise Refused(
                401, "invalid_api_key", "send a valid key: Authorization: Bearer KEY", WWW_Authenticate="Bearer"
            )
        return right[0]

    def count(self, key: bytes) -> None:
        """429 when this key has had its requests of the last minute."""
        name = hashlib.sha256(key).hexdigest()  # the storage never sees the key itself
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

    def checked(self, body: bytes) -> dict:
        """What is passed on to the model server: 400 for what is no JSON, 422 for what cannot be answered."""
        try:
            asked = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            found = error.errors()[0]
            if found["type"] == "json_invalid":
                raise Refused(400, "invalid_json", f"the request is not JSON: {found['ctx']['error']}") from None
            where = ".".join(str(part) for part in found["loc"])
            raise Refused(422, "invalid_value", f"{where}: {found['msg']}") from None
        if asked.model not in (None, self.name):
            raise Refused(404, "model_not_found", f"there is no model {asked.model!r} here, only {self.name!r}")
        messages = [message.model_dump() for message in asked.messages]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
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
        passed = asked.model_dump(exclude_none=True, exclude={"max_completion_tokens"})
        return passed | {"model": self.model, "max_tokens": wanted or min(room, self.limits.max_tokens)}

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
        try:
            return (await self.client.get("/health", timeout=2)).status_code == 200
        except httpx2.HTTPError:
            return False

    async def models(self, request: Request) -> JSONResponse:
        self.key_of(request)
        entry = {"id": self.name, "object": "model", "created": self.started, "owned_by": "capstone"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat(self, request: Request) -> Response:
        self.count(self.key_of(request))
        try:
            body = self.checked(await self.body_of(request))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        if self.in_flight >= self.limits.max_in_flight:
            raise Refused(
                503, "overloaded", f"{self.in_flight} requests are being answered: try again", Retry_After="1"
            )
        self.in_flight += 1
        try:
            answer = await self.client.send(
                self.client.build_request("POST", "/v1/chat/completions", json=body), stream=True
            )
            if answer.status_code != 200:
                await answer.aclose()
                raise Refused(502, "model_server_failed", f"the model server said {answer.status_code}")
            if body["stream"]:
                return Stream(self, answer)  # which counts itself out
            whole = json.loads(await answer.aread())
            self.in_flight -= 1
            return JSONResponse(whole | {"model": self.name})
        except BaseException as error:
            self.in_flight -= 1
            if isinstance(error, httpx2.TimeoutException):
                raise Refused(504, "timeout", f"no answer within {self.limits.answer_s:g} s") from None
            if isinstance(error, httpx2.TransportError):
                raise Refused(
                    503, "not_ready", "the model server does not answer: try again", Retry_After="5"
                ) from None
            raise

    async def pieces(self, answer: httpx2.Response) -> AsyncIterator[str]:
        """The events of a streamed answer under our model's name; a failure on the way is an event as well."""
        try:
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                try:
                    event = json.loads(line[5:])
                except ValueError:
                    event = {"error": line[5:]}
                if line[5:].strip() == "[DONE]":
                    break
                if "error" in event:  # what went wrong inside is for the server's log
                    yield f"data: {json.dumps(error_body(502, 'model_server_failed', 'the model server failed'))}\n\n"
                    return
                yield f"data: {json.dumps(event | {'model': self.name}, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        except httpx2.HTTPError:
            yield f"data: {json.dumps(error_body(502, 'model_server_failed', 'the model server went away'))}\n\n"


class Stream(StreamingResponse):
    """A streamed answer. However it ends - a caller that hangs up, too - the model server stops generating."""

    def __init__(self, gateway: Gateway, answer: httpx2.Response) -> None:
        super().__init__(gateway.pieces(answer), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.gateway, self.answer = gateway, answer

    async def __call__(self, scope: dict, receive: object, send: object) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.gateway.in_flight -= 1
            with anyio.CancelScope(shield=True):
                await self.answer.aclose()
