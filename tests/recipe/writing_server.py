"""A real HTTP server in a thread that plays an OpenAI-compatible model: it answers, drafts, criticises, reviews, splits
and judges by script, and can be told to break."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "judging"))
from http_judge import HttpJudge, Reply, chat_reply, http_judge

# What the scripted policy answers, one a seed: they differ in what the scripted drafts ask for.
ANSWERS = [
    "The ten o'clock ferry to Brora leaves at noon: fog. Tickets stay valid.",
    "What a great question! We are so very sorry. The ferry is late, dear passengers, please bear with us.",
    "The ferry is late because of fog. It leaves at noon.",
    "Fog. Wait in the hall, tea is free, the ferry leaves at noon, tickets stay valid, and we thank you all.",
]
TIERS = [{"value": 0, "text": "It is nowhere in the note."}, {"value": 1, "text": "The note has it in so many words."}]


def criterion(description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "weight": 1.0, "tiers": TIERS, "veto": False, "needs_reference": False} | more


DRAFT = {
    "title": "Late ferry to Brora",
    "family": "instruction",
    "criteria": [
        criterion("Says that the ferry leaves at noon."),  # tells the answers apart
        criterion("Gives fog as the cause of the delay."),  # the same
        criterion("Says that tickets stay valid."),  # the same
        criterion("Does not praise the reader for asking.", weight=1.5, veto=True),  # a gate
        criterion("The note is about a ferry."),  # true of every answer
        criterion("Mentions a moonlit harbour at low tide."),  # the judge cannot make up its mind
        criterion("Offers tea and tells passengers where to wait."),  # compound
        criterion("Says the ferry leaves at noon."),  # a duplicate
        {**criterion("At most twelve words.", weight=2), "tiers": None}
        | {"check": {"kind": "length_constraints:number_words", "relation": "at most", "num_words": 12}},
    ],
}
# Words whose presence decides the scripted judge's verdict on a criterion with these words in it.
PRESENCE = {
    "noon": "noon",
    "fog": "Fog|fog",
    "tickets": "Tickets|tickets",
    "Offers tea": "tea",
    "wait": "hall",
    "about a ferry": "",
}


def judged(description: str, answer: str, listed: list[str]) -> float:
    """Probability of the second listed tier, by the words of the criterion."""
    if "moonlit" in description:
        return 0.9  # always the second listed, whichever that is
    if "Does not" in description:
        met = ("great question" if "praise" in description else "dear") not in answer
    else:
        words = next((p for key, p in PRESENCE.items() if key in description), None)
        met = words is not None and re.search(words, answer) is not None
    best_is_second = "so many words" in listed[1] or listed[1].endswith("Yes.")
    return 0.95 if met == best_is_second else 0.05


def kind_of(body: dict[str, Any]) -> str:
    """What a request is for, by the words of its template."""
    text = body["messages"][-1]["content"]
    marks = {
        "judge": "Which tier does the answer reach",
        "revise": "Then write the whole rubric again",
        "split": "Split each into criteria",
        "criticise": "List up to five faults",
        "mine": "the rubric that this criticism calls for",
        "stronger": "by which answers to this request should be graded",
        "seeded": "by which these experts would grade",
    }
    return next((kind for kind, mark in marks.items() if mark in text), "answer")


def completion(text: str) -> Reply:
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return Reply(json.dumps(body).encode())


def judge_reply(text: str) -> Reply:
    answer = re.search(r"\[answer \w+\]\n(.*)\n\[end of answer", text, re.DOTALL)
    description = re.search(r"Criterion: (.*)", text)
    listed = re.findall(r"^\d: (.*)$", text, re.MULTILINE)
    assert answer and description
    p = judged(description[1], answer[1], listed)
    return chat_reply([("1" if p > 0.5 else "0", {"1": math.log(p), "0": math.log(1 - p)})])


class WritingServer:
    """`replies` overrides what a kind of request gets: a text, a `Reply`, or a function of the request's body and how
    often this kind was asked before. `count` counts requests by kind."""

    def __init__(self, **replies: Any) -> None:
        self.replies: dict[str, Any] = {"revise": json.dumps(DRAFT), "stronger": json.dumps(DRAFT), **replies}
        self.replies.setdefault("seeded", self.replies["stronger"])
        self.replies.setdefault("mine", self.replies["stronger"])
        self.count: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.url = ""
        self.on_request: Callable[[int], None] = lambda n: None

    def handle(self, server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        if path.endswith("/models"):
            return Reply(json.dumps({"data": [{"id": "scripted-70b"}]}).encode())
        kind = kind_of(body)
        nth = self.count[kind]
        self.count[kind] += 1
        self.bodies.append(body)
        self.on_request(len(self.bodies))
        given = self.replies.get(kind)
        if callable(given):
            given = given(body, nth)
        if isinstance(given, Reply):
            return given
        if given is not None:
            return completion(given)
        text = body["messages"][-1]["content"]
        if kind == "answer":
            return completion(ANSWERS[body.get("seed", 0) % len(ANSWERS)])
        if kind == "criticise":
            return completion("It says nothing of when the ferry leaves.")
        if kind == "split":
            parts = [
                {"of": 1, "description": "Offers tea.", "tiers": TIERS},
                {"of": 1, "description": "Tells passengers where to wait.", "tiers": TIERS},
            ]
            return completion(json.dumps({"parts": parts}))
        return judge_reply(text)


@contextlib.contextmanager
def writing_server(**replies: Any) -> Iterator[WritingServer]:
    """The server, running in a thread of its own while the block lasts."""
    script = WritingServer(**replies)
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready = threading.Event()

    async def serve() -> None:
        async with http_judge(script.handle) as server:
            script.url = server.url
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield script
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
