"""Serving: an existing OpenAI-compatible server behind a small gateway, and a chat page. Day 28."""

import sys
from importlib.util import find_spec

from common.errors import say_error

if missing := [
    name
    for name in ("anyio", "fastapi", "httpx2", "limits", "openai", "requests", "starlette", "uvicorn")
    if not find_spec(name)
]:
    say_error(f"serving needs {', '.join(missing)}: pip install -r capstone/serve/requirements.txt")
    sys.exit(1)

START_S = 120  # until a model has loaded and answers
