"""Vision-language models: questions about frames, answered by an OpenAI-compatible server or in this process.

    vlm = Vlm(config)                                          # VlmConfig; checks what can be checked without a request
    frames = jpeg_frames(clip, config.frames, config.frame_height)      # (T, H, W, 3) uint8 -> list of JPEG bytes

    async def judge(item):                                     # any number of questions per item
        frames, caption = item
        return await vlm.yes_probability(frames, f"Does the video show {quoted(caption)}?")        # in [0, 1]

    results = vlm.run(judge, items)      # in the order of items: what `judge` returned, or the NoAnswer that it raised
    vlm.counts.summary()                 # requests, cache hits, retries by reason, tokens, latency, seconds

NoAnswer is about one question; VlmUnavailable, a ValueError, is about all of them (refused connection, wrong key or
model, a server that is down), and `run` raises it. What was answered until then is in the cache, so that running again
continues. A model's answer is data: it is compared and parsed, never executed, and never part of a path.
"""

import asyncio
import io
import json
import math
import random
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import TypeAdapter

from eval.vlm.backend import (
    GIVE_UP,
    SEED,
    TEMPERATURE,
    Backend,
    Malformed,
    Question,
    Rejected,
    Reply,
    Retry,
    VlmConfig,
    VlmUnavailable,
    check_config,
)
from eval.vlm.cache import Cache
from train.files import parse_json

RETRIES = 5  # further tries of a question
BACKOFF = 1.0  # seconds before the first retry after a failure of the server, then twice as long each time
MAX_WAIT = 60.0  # seconds between two tries
RETRY_TEMPERATURE = 0.7  # of a try after a malformed answer: at 0 the same would come again
LEAST_MASS = 0.01  # probability that Yes and No must have together: below, the model is saying something else
JPEG_QUALITY = 90
RAW_SHOWN = 2000  # characters of an answer that are kept with a refusal

T = TypeVar("T")


class NoAnswer(Exception):
    """A question that got no answer.

    reason: malformed | rejected (the server refuses this question) | limit | server | timeout | connection.
    raw: the last answer, at most 2000 characters; empty where there was none.
    """

    def __init__(self, reason: str, detail: str, raw: str = ""):
        self.reason = reason
        self.detail = storable(detail)
        super().__init__(f"{reason}: {self.detail}")
        self.raw = storable(raw[:RAW_SHOWN])


@dataclass
class Counts:
    """questions = cache_hits + shared + answers + refusals; requests = answers + refusals + all retries.

    Both hold after every `run` that was not stopped by an error.
    """

    questions: int = 0
    cache_hits: int = 0
    shared: int = 0  # asked while the same question was on its way
    requests: int = 0
    answers: int = 0
    refusals: int = 0
    retries: Counter[str] = field(default_factory=Counter)  # by reason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0  # in `run`
    latencies: array = field(default_factory=lambda: array("d"))  # seconds of each request that got a reply

    def summary(self) -> dict[str, Any]:
        """Plain JSON; latency percentiles in seconds, null where there was no request."""
        percentiles = np.percentile(self.latencies, [50, 95]).tolist() if self.latencies else [None, None]
        counts = {name: value for name, value in vars(self).items() if name not in ("retries", "latencies")}
        return counts | {"retries": dict(self.retries), "latency_p50": percentiles[0], "latency_p95": percentiles[1]}


class Vlm:
    """Asks with bounded concurrency, again after what may pass, and nothing twice.

    backend: in place of the one that the configuration names. Raises ValueError for settings that cannot work.
    """

    def __init__(self, config: VlmConfig, backend: Backend | None = None):
        check_config(config)
        self.config = config
        self.counts = Counts()
        self._backend = _backend(config) if backend is None else backend
        self._cache = Cache(Path(config.cache)) if config.cache else None
        self._pending: dict[str, asyncio.Future[Reply | NoAnswer | None]] = {}
        self._slots = asyncio.Semaphore(config.concurrency)
        self._unanswered = 0  # questions in a row

    def run(
        self,
        function: Callable[[Any], Awaitable[T]],
        items: Sequence[Any],
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[T | NoAnswer]:
        """`function` of each item, in order, many at a time; where it raised NoAnswer, that exception.

        advance: told 1 after each item. Any other exception, VlmUnavailable among them, ends all of it. Not to be
        called from a running event loop, nor from two threads at once.
        """
        return asyncio.run(self._run(function, items, advance))

    async def _run(self, function, items, advance) -> list:
        started = time.perf_counter()
        results: list = [None] * len(items)
        numbers = iter(range(len(items)))
        self._slots = asyncio.Semaphore(self.config.concurrency)

        async def work() -> None:
            for number in numbers:
                try:
                    results[number] = await function(items[number])
                except NoAnswer as refusal:
                    results[number] = refusal
                advance(1)

        async with self._backend:
            # Twice as many at work as may be in flight: while some wait for the server, others decode frames.
            workers = [asyncio.create_task(work()) for _ in range(min(len(items), 2 * self.config.concurrency))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                if self._cache is not None:
                    self._cache.sync()
                self.counts.seconds += time.perf_counter() - started
        return results

    async def ask(self, question: Question, check: Callable[[Reply], T]) -> T:
        """What `check` makes of the answer; a Malformed that it raises means asking again.

        Only answers that pass are cached. Raises NoAnswer and VlmUnavailable.
        """
        self.counts.questions += 1
        digest = question.digest(self.config)
        while digest in self._pending:
            (done,), _ = await asyncio.wait([self._pending[digest]])
            if done.result() is not None:  # None: the one who asked was stopped
                self.counts.shared += 1
                return _value(done.result(), check)
        cached = self._cache.get(digest) if self._cache is not None else None
        if cached is not None:
            try:
                value = check(cached)
            except Malformed:  # what counts as well-formed has changed since
                pass
            else:
                self.counts.cache_hits += 1
                return value
        self._pending[digest] = asyncio.get_running_loop().create_future()
        outcome = None
        try:
            outcome = await self._ask(question, digest, check)
        finally:
            self._pending.pop(digest).set_result(outcome)
        return _value(outcome, check)

    async def yes_probability(self, frames: Sequence[bytes], question: str) -> float:
        """Probability in [0, 1] that the model answers a yes-or-no question about JPEG frames with yes.

        P(yes) / (P(yes) + P(no)) of the first token, each summed over the spellings among the 20 likeliest tokens.
        Raises NoAnswer, as `malformed` where Yes and No have less than 1% together, and VlmUnavailable.
        """
        asked = Question(f"{question}\nAnswer with one word, Yes or No.", frames=tuple(frames), first_token=True)
        return await self.ask(asked, yes_share)

    async def _ask(self, question: Question, digest: str, check: Callable[[Reply], Any]) -> Reply | NoAnswer:
        jitter = random.Random(f"{SEED} {digest}")
        temperature, failures = TEMPERATURE, 0
        for attempt in range(RETRIES + 1):
            wait, raw = 0.0, ""
            try:
                reply = await self._request(question, temperature, SEED + attempt)
                check(reply)
            except Malformed as error:
                reason, detail, raw = "malformed", str(error), error.raw
                temperature = max(temperature, RETRY_TEMPERATURE)
            except Retry as error:
                reason, detail = error.reason, str(error)
                wait = max(min(BACKOFF * 2**failures, MAX_WAIT) * jitter.uniform(0.5, 1.0), error.wait)
                failures += 1
            except Rejected as error:
                reason, detail = "rejected", str(error)
                break
            else:
                self.counts.answers += 1
                self._unanswered = 0
                if self._cache is not None:
                    self._cache.put(digest, reply)
                return reply
            if attempt < RETRIES:
                self.counts.retries[reason] += 1
                await asyncio.sleep(min(wait, MAX_WAIT))
        self.counts.refusals += 1
        self._unanswered += 1
        if self._unanswered >= GIVE_UP:
            raise VlmUnavailable(
                f"{self._unanswered} questions in a row got no answer from {self.config.model!r}; the"
                f" last: {reason}: {detail}. See to the server or the model, then run again: answers are"
                f" {'kept' if self._cache is not None else 'not kept, set vlm.cache'}"
            )
        return NoAnswer(reason, detail, raw)

    async def _request(self, question: Question, temperature: float, seed: int) -> Reply:
        async with self._slots:
            self.counts.requests += 1
            started = time.perf_counter()
            reply = await self._backend.ask(question, temperature=temperature, seed=seed)
            self.counts.latencies.append(time.perf_counter() - started)
        self.counts.prompt_tokens += reply.prompt_tokens
        self.counts.completion_tokens += reply.completion_tokens
        return reply


def _backend(config: VlmConfig) -> Backend:
    if config.backend == "openai":
        from eval.vlm.server import Server

        return Server(config)
    from eval.vlm.local import LocalModel  # takes torch

    return LocalModel(config)


def _value(outcome: Reply | NoAnswer, check: Callable[[Reply], T]) -> T:
    if isinstance(outcome, NoAnswer):
        raise NoAnswer(outcome.reason, outcome.detail, outcome.raw)
    return check(outcome)


def yes_share(reply: Reply) -> float:
    """P(yes) / (P(yes) + P(no)) among the likeliest first tokens. Raises Malformed where the model says neither."""
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in reply.first_token:
        if math.isnan(logprob) or logprob > 1e-3:  # rounding may lift a certain token just above 0
            raise Malformed(f"{logprob} is no log-probability", reply.text)
        word = token.strip(
            " \t\n\u2581\u0120\"'*.,:"
        ).lower()  # with sentencepiece's and byte-level BPE's sign of a space
        if word in mass:
            mass[word] += math.exp(logprob)
    total = mass["yes"] + mass["no"]
    if total < LEAST_MASS:
        said = ", ".join(repr(token[:20]) for token, _ in reply.first_token[:5])
        raise Malformed(f"the model says neither Yes nor No ({said or 'no log-probabilities'})", reply.text)
    return mass["yes"] / total


# JSON answers


def sound(text: str) -> str:
    """A text that is not empty and can be stored, for pydantic's AfterValidator; ValueError for another."""
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    if text != storable(text):
        raise ValueError("it holds half a character (a lone surrogate)")
    if not text.strip():
        raise ValueError("it is empty")
    return text


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of a pydantic type without limits and titles: servers differ in the limits that they can hold a
    model to, and `read_answer` checks them again."""
    whole = TypeAdapter(kind).json_schema()

    def types(schema: dict[str, Any]) -> dict[str, Any]:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        kept = {key: schema[key] for key in ("type", "enum") if key in schema}
        if "properties" in schema:
            kept["properties"] = {name: types(inner) for name, inner in schema["properties"].items()}
            kept |= {"required": schema["required"], "additionalProperties": False}
        return kept | ({"items": types(schema["items"])} if "items" in schema else {})

    return types(whole)


def read_answer(reply: Reply, kind: type[T]) -> T:
    """The JSON object of an answer as a `kind`, a pydantic type. Raises Malformed, with the text, for anything else."""
    text = reply.text.strip()
    if text.startswith("```") and text.endswith("```"):  # models without a schema to hold them like to fence their JSON
        text = text[3:-3].removeprefix("json")
    try:
        return parse_json(text, kind, name="the answer", remedy="it is asked for again")
    except ValueError as error:
        raise Malformed(storable(str(error)[:400]), reply.text) from error


def storable(text: str) -> str:
    """`text` with ? for what UTF-8, and so a table, cannot hold: lone surrogates, as in names that are no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def quoted(caption: str) -> str:
    """A caption as a JSON string of one line, for a question.

    It cannot end its quotes, nor hold a model's control token <|...|> or a character that is not seen.
    """
    text = json.dumps(caption, ensure_ascii=False).replace("<", "\\u003c")
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)


def jpeg_frames(frames: npt.ArrayLike, count: int, height: int) -> list[bytes]:
    """`count` frames of an array or tensor (T, H, W, 3) uint8, as JPEG: evenly spaced, with the first and the last.

    All of them where T is less. Frames above `height` pixels are made smaller (antialiased bicubic), none larger.
    """
    pixels = np.asarray(frames)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"frames are {pixels.dtype} of shape {pixels.shape}; give uint8 (frames, height, width, 3)")
    chosen = np.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().astype(int)
    return [_jpeg(pixels[number], height) for number in chosen]


def _jpeg(pixels: np.ndarray, height: int) -> bytes:
    image = Image.fromarray(pixels)
    if image.height > height:
        width = max(1, round(image.width * height / image.height))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
