"""A real HTTP server on a free local port that plays an OpenAI-compatible judge, good or broken, for the tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

Handler = Callable[["HttpJudge", str, dict[str, Any]], "Reply"]


@dataclass
class Reply:
    """One HTTP reply; `hang` never answers, `cut` sends only that many bytes of the body and closes."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    cut: int | None = None


@dataclass
class HttpJudge:
    """The running server: its `url`, every request it got, and how many were under way at once."""

    handler: Handler
    url: str = ""
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    active: int = 0
    most_active: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = json.loads(await reader.readexactly(int(headers.get("content-length", "0"))) or b"{}")
                path = head[0].split(" ")[1]
                self.requests.append((path, body, headers))
                self.active += 1
                self.most_active = max(self.most_active, self.active)
                reply = self.handler(self, path, body)
                await asyncio.sleep(3600 if reply.hang else 0.002)
                self.active -= 1
                lines = [f"HTTP/1.1 {reply.status} X", f"content-length: {len(reply.body)}"]
                lines += [f"{name}: {value}" for name, value in reply.headers.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + reply.body[: reply.cut])
                await writer.drain()
                if reply.cut is not None:
                    break
        writer.close()


@contextlib.asynccontextmanager
async def http_judge(handler: Handler) -> AsyncIterator[HttpJudge]:
    judge = HttpJudge(handler)
    tasks: set[asyncio.Task[None]] = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(judge.serve(reader, writer))
        tasks.add(task)

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    judge.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield judge
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def chat_reply(
    tokens: list[tuple[str, dict[str, float]]], *, text: str | None = None, logprobs: bool = True, n: int = 1
) -> Reply:
    """A chat completion whose tokens each list the given alternatives (token -> log-probability)."""
    content = "".join(token for token, _ in tokens) if text is None else text
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": content}}
    if logprobs:
        choice["logprobs"] = {
            "content": [
                {
                    "token": token,
                    "logprob": top.get(token, -0.01),
                    "top_logprobs": [{"token": t, "logprob": x} for t, x in top.items()],
                }
                for token, top in tokens
            ]
        }
    return Reply(json.dumps({"choices": [choice] * n, "usage": {"total_tokens": 100}}).encode())
