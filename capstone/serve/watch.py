"""What the gateway tells those who run it: metrics for Prometheus, an access log, an id for every request. Day 28.

Nothing that callers wrote gets into metrics or log: no prompt, no answer, no key, no path but the gateway's own. Labels
have few values, or a stranger could fill Prometheus's memory by asking for a million paths.
Sources: Beyer et al. 2016, Site Reliability Engineering, chapter 6 (latency, traffic, errors, saturation);
https://prometheus.io/docs/practices/naming/.
"""

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as as_text
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

CHAT = "/v1/chat/completions"
PROBES = ("/health", "/ready", "/metrics")  # every few seconds: in the log only when they fail
GONE = 499  # nginx's code for a caller who hung up before the answer ended
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")  # a caller's own id that is taken over: nothing else gets into a log
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
log = logging.getLogger("capstone.access")


@dataclass
class Seen:
    """What is known of one request when it has ended."""

    id: str
    start: float = field(default_factory=time.monotonic)
    caller: str = "-"  # the beginning of the key's SHA-256: tells keys apart and opens nothing
    code: int = 0
    error: str | None = None  # what went wrong, by the name that the caller was given
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Watch:
    """ASGI middleware round the gateway. `in_flight` is asked when Prometheus reads."""

    def __init__(self, app: Callable, paths: Iterable[str], in_flight: Callable[[], int], limit: int) -> None:
        self.app, self.paths, self.registry = app, frozenset(paths), CollectorRegistry()
        more = {"registry": self.registry}
        self.requests = Counter("serving_requests", "Requests that have ended", ["path", "code"], **more)
        self.seconds = Histogram("serving_request_seconds", "Of whole answers to chats", buckets=BUCKETS, **more)
        self.first = Histogram("serving_first_token_seconds", "Of streamed answers", buckets=BUCKETS, **more)
        self.tokens = Counter("serving_tokens", "Tokens of chats, read and made", ["kind"], **more)
        Gauge("serving_in_flight", "Chats that are being answered", **more).set_function(in_flight)
        Gauge("serving_in_flight_limit", "Beyond it callers get 503", **more).set(limit)
        ProcessCollector(registry=self.registry)  # memory, open files, and when the process started
        for code in (200, 502, 503, 504):  # rate() sees no first error: a counter has to be there before it counts
            self.requests.labels(CHAT, code)

    def page(self) -> Response:
        return Response(as_text(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given, whole = Headers(scope=scope).get("x-request-id", ""), False
        seen = Seen(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["seen"] = seen

        async def passed_on(message: dict) -> None:
            nonlocal whole
            if message["type"] == "http.response.start":
                seen.code = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = seen.id
            whole = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, receive, passed_on)
        finally:
            if not whole:
                seen.code = GONE
            self.note(scope, seen)

    def note(self, scope: dict, seen: Seen) -> None:
        path, took = scope["path"] if scope["path"] in self.paths else "other", time.monotonic() - seen.start
        if seen.error and seen.code == 200:  # a stream that broke off after it had begun with 200
            seen.code = 502
        self.requests.labels(path, seen.code).inc()
        if path == CHAT and seen.code == 200:
            self.seconds.observe(took)
        self.tokens.labels("prompt").inc(seen.prompt_tokens)
        self.tokens.labels("answer").inc(seen.answer_tokens)
        if path not in PROBES or seen.code != 200:
            row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "id": seen.id, "caller": seen.caller}
            row |= {"method": scope["method"], "path": path, "code": seen.code, "error": seen.error}
            row |= {"seconds": round(took, 3), "prompt_tokens": seen.prompt_tokens, "answer_tokens": seen.answer_tokens}
            log.info(json.dumps(row))

    def first_token(self, seen: Seen) -> None:
        self.first.observe(time.monotonic() - seen.start)
