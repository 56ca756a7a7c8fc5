"""A stand-in for an OpenAI-compatible server, on a port of this machine: answers, waits and fails as a test wants.

with StubServer() as server:                   # answers the filter's question and yes-or-no questions
    config = VlmConfig(base_url=server.url, model="stub")
    ...
    server.requests                            # the bodies, parsed, in the order in which they came

with StubServer(lambda request: Response("not JSON")) as server: ...        # or a str
with StubServer(latency=0.2, faults=0.2, hang=5) as server: ...             # a fifth: 500s, time-outs, no JSON
with StubServer(full=64, until=448) as server: ...                          # answers only while 64 are in flight
with stub_process(latency=0.2) as url: ...                                  # in a process of its own, for vlm_rate.py

python tests/eval/vlm_stub.py --latency 0.2                                 # prints its address
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FAULTS = ("server", "timeout", "malformed")  # injected in turn; named as the client counts them
HEADER_END = b"\r\n\r\n"


@dataclass
class Response:
    """text: of the answer; first_token: (token, logprob) pairs; body: of the HTTP response, in place of all that."""

    text: str = ""
    first_token: Sequence[tuple[str, float]] = ()
    finish: str = "stop"
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds, beside the server's latency
    drop: bool = False  # close the connection without a word


def filter_answer(**changes: Any) -> str:
    """A good answer to the question of data_pipeline.stages.filter, as JSON, with some fields changed."""
    answer = {
        "parse": {
            "entities": [{"name": "ball", "material": "rubber"}, {"name": "floor", "material": "wood"}],
            "actions": ["the ball falls on the floor"],
            "forces": ["gravity on the ball", "impact of the floor"],
            "outcomes": ["the ball bounces"],
        },
        "removed": ["a dog"],
        "added": [],
        "reason": "Gravity pulls the ball down, and the elastic impact throws it up again.",
        "penalties": [],
        "physics_richness": 0.8,
        "extended": "A rubber ball falls under gravity, hits the wooden floor and bounces.",
    }
    return json.dumps(answer | changes)


def question_of(request: dict[str, Any]) -> str:
    """Text of the user's message, without pictures."""
    return "".join(part.get("text", "") for part in request["messages"][-1]["content"])


def media_of(request: dict[str, Any]) -> list[str]:
    """Addresses of the pictures or the video of the user's message."""
    parts = request["messages"][-1]["content"]
    return [part[part["type"]]["url"] for part in parts if part["type"] != "text"]


def usual_answer(request: dict[str, Any]) -> Response:
    return Response(filter_answer(), first_token=[("Yes", -0.25), ("No", -1.75)])


class StubServer:
    """answer: request -> Response or the text of one; called in the server's thread.

    latency: seconds before every response. faults: share of the requests that fail, chosen by their number and `seed`;
    `injected` counts them. hang: seconds that a time-out takes. keep: whether to parse and keep `requests`.
    full: an answer leaves, the oldest first, only while so many requests are in flight; all that wait leave whenever
    another `until` requests have come.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Response | str] = usual_answer,
        *,
        latency: float = 0.0,
        faults: float = 0.0,
        hang: float = 60.0,
        seed: int = 0,
        port: int = 0,
        keep: bool = True,
        full: int = 0,
        until: int = 0,
    ):
        self.answer, self.latency, self.faults, self.hang, self.keep = answer, latency, faults, hang, keep
        self.full, self.until = full, until
        self._held: deque[tuple[_Connection, Response]] = deque()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.injected: Counter[str] = Counter()
        self.number = 0
        self.in_flight = self.most_in_flight = 0
        self.port = port
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "StubServer":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(self, *details: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._connections: set[_Connection] = set()
        self._server = await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def deliver(self, connection: "_Connection", response: Response) -> None:
        if not self.full:
            connection.task = self._loop.call_later(self.latency + response.delay, connection.send, response)
            return
        self._held.append((connection, response))
        while self._held and (self.in_flight >= self.full or self.number % self.until == 0):
            waiting, ready = self._held.popleft()
            waiting.send(ready)

    def respond(self, head: str, body: bytes) -> Response:
        self.number += 1
        request = json.loads(body) if self.keep else {}
        if self.keep:
            self.requests.append(request)
            self.headers.append(head)
        if self.faults and self._random.random() < self.faults:
            fault = FAULTS[self.injected.total() % len(FAULTS)]
            self.injected[fault] += 1
            if fault == "server":
                return Response(status=500, body='{"error": {"message": "injected"}}')
            if fault == "timeout":
                return Response(delay=self.hang)
            return Response('{"parse": {"entities": [')
        answer = self.answer(request)
        return Response(answer) if isinstance(answer, str) else answer


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as a client of chat completions needs it: one request after the other, kept alive."""

    def __init__(self, server: StubServer):
        self.server = server
        self.received = bytearray()
        self.task: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.server._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.server._connections.discard(self)
        if self.task is not None and not self.task.cancelled():
            self.task.cancel()
            self.server.in_flight -= 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(HEADER_END)
        if end < 0:
            return
        head = self.received[:end].decode("latin-1")
        lengths = [line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-length:")]
        total = end + len(HEADER_END) + (int(lengths[0]) if lengths else 0)
        if len(self.received) < total:
            return
        body = bytes(self.received[end + len(HEADER_END) : total])
        del self.received[:total]
        response = self.server.respond(head, body)
        self.server.in_flight += 1
        self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        self.server.deliver(self, response)

    def send(self, response: Response) -> None:
        self.task = None
        self.server.in_flight -= 1
        if response.drop:
            self.transport.abort()
            return
        body = (completion(response) if response.body is None else response.body).encode("utf-8", "surrogatepass")
        lines = [f"HTTP/1.1 {response.status} Stub", "content-type: application/json", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        self.transport.write("\r\n".join(lines).encode("latin-1") + HEADER_END + body)


def completion(response: Response) -> str:
    """A chat completion as servers write it."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": response.text},
        "finish_reason": response.finish,
    }
    if response.first_token:
        alternatives = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in response.first_token]
        choice["logprobs"] = {"content": [{**alternatives[0], "top_logprobs": alternatives}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    whole = {"id": "stub", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}
    return json.dumps(whole | {"usage": usage})


@contextmanager
def stub_process(latency: float = 0.0) -> Iterator[str]:
    """The usual server in a process of its own, which does not share the client's interpreter; gives the address."""
    command = [sys.executable, __file__, "--latency", str(latency)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate("stop\n", timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for an OpenAI-compatible server.")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every response")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    usual = usual_answer({})
    fixed = Response(body=completion(usual))
    with StubServer(lambda request: fixed, latency=options.latency, port=options.port, keep=False) as server:
        print(server.url, flush=True)
        sys.stdin.readline()  # until the one who started it says so, or is gone


if __name__ == "__main__":
    main()
