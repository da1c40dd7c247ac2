"""Serving: an existing OpenAI-compatible server behind a small gateway, and a chat page. Day 28."""

import sys
from importlib.util import find_spec

if missing := [
    name for name in ("fastapi", "limits", "openai", "requests", "starlette", "uvicorn") if not find_spec(name)
]:
    sys.exit(f"error: serving needs {', '.join(missing)}: pip install -r capstone/serve/requirements.txt")

START_S = 120  # until a model has loaded and answers
