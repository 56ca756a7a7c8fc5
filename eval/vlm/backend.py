"""What a backend of `eval.vlm.client` takes and gives: a Question, a Reply, and the ways in which asking can fail.

    async with backend:
        reply = await backend.ask(question, temperature=0.0, seed=0)

A failure says what is to be done about it: Malformed and Retry ask again, Rejected gives up this question,
VlmUnavailable gives up all of them.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from recipes import redacted
from train.files import sha256

TOP_LOGPROBS = 20  # alternatives of the first token; as many as OpenAI and vLLM give at most
BACKENDS = ("openai", "transformers")
SENDS = ("images", "video")
TEMPERATURE, SEED = 0.0, 0  # of a question's first try
GIVE_UP = 32  # questions in a row without an answer after which the server or the model counts as unfit


@dataclass
class VlmConfig:
    backend: str = (
        "openai"  # openai: a server (vLLM, SGLang, OpenAI ...) | transformers: in this process, for small runs
    )
    base_url: str = ""  # of the server, with its /v1; credentials in it are sent, and in no file that is written
    model: str = ""  # as the server names it; transformers: folder or hub id
    api_key_env: str = ""  # NAME of the environment variable that holds the key; empty: the server needs none
    concurrency: int = 64  # questions in flight, per process
    timeout_s: float = 120.0  # seconds for one request
    max_tokens: int = 1024  # of an answer
    cache: str = ""  # folder of the answers, for all runs; empty: none kept
    frames: int = 8  # of a clip that the model sees, evenly spaced
    frame_height: int = 360  # pixels; higher frames are made smaller
    send: str = "images"  # images: a picture each | video: all in one video_url, data:video/jpeg, which vLLM reads
    device: str = ""  # transformers: cuda, cpu, auto (over all GPUs); empty: cuda where there is one


def recorded(config: VlmConfig) -> dict[str, Any]:
    """The settings as digests of finished work hold them: five that are constants now had keys of their own."""
    fixed = {"backoff": 1.0, "retries": 5, "temperature": TEMPERATURE, "seed": SEED, "give_up": 32}
    return asdict(config) | fixed


def check_config(config: VlmConfig) -> None:
    """ValueError for a setting that cannot work, naming it and the remedy; never the key itself."""
    for name, known in (("backend", BACKENDS), ("send", SENDS)):
        if (value := getattr(config, name)) not in known:
            raise ValueError(f"vlm.{name}={value!r} is not known; use one of {', '.join(known)}")
    if not config.model:
        raise ValueError("vlm.model is empty; name the model, as `vllm serve` was told, or its folder or hub id")
    if config.backend == "openai" and not config.base_url.startswith(("http://", "https://")):
        address = redacted(config.base_url)
        raise ValueError(f"vlm.base_url={address!r} is no address; write one like http://localhost:8000/v1")
    if config.backend == "transformers" and config.send == "video":
        raise ValueError("vlm.send=video is for servers; use vlm.send=images with vlm.backend=transformers")
    key = config.api_key_env
    if key and not key.isidentifier():
        raise ValueError("vlm.api_key_env is no name of an environment variable; put the key into one and name that")
    if key and not os.environ.get(key):
        raise ValueError(f"vlm.api_key_env={key}, but the environment has no such variable: export {key}=...")
    for name in ("concurrency", "max_tokens", "frames", "frame_height"):
        if getattr(config, name) < 1:
            raise ValueError(f"vlm.{name}={getattr(config, name)} must be 1 or more")
    if not 0 < config.timeout_s < math.inf:
        raise ValueError(f"vlm.timeout_s={config.timeout_s} must be a number of seconds above 0")


@dataclass(frozen=True)
class Question:
    """What is asked. Everything that decides the answer, apart from the model, stands here."""

    text: str  # of the user's message, after the frames
    rules: str = ""  # system message
    frames: tuple[bytes, ...] = ()  # JPEG, in order of time
    video_url: str = ""  # in place of frames: an address or data URL that the server reads
    schema: dict[str, Any] | None = None  # JSON schema of the answer
    first_token: bool = False  # one token only, with the log-probabilities of its alternatives

    def digest(self, config: VlmConfig) -> str:
        """Hexadecimal SHA-256 of the question, the model and how it is asked; the server's address plays no part."""
        asked = [config.backend, config.model, config.send, config.max_tokens, TEMPERATURE, SEED]
        said = [self.text, self.rules, self.video_url, self.schema, self.first_token]
        frames = [sha256(frame) for frame in self.frames]
        return sha256(json.dumps([asked, said, frames]).encode("ascii"))  # keys of a schema in their order: no `digest`


@dataclass(frozen=True)
class Reply:
    text: str
    first_token: tuple[tuple[str, float], ...] = ()  # likeliest first tokens with their log-probabilities
    prompt_tokens: int = field(default=0, compare=False)
    completion_tokens: int = field(default=0, compare=False)


class Backend(Protocol):
    async def __aenter__(self) -> "Backend": ...

    async def __aexit__(self, *details: object) -> None: ...

    async def ask(self, question: Question, *, temperature: float, seed: int) -> Reply: ...


class Malformed(ValueError):
    """An answer that is not what was asked for; `raw` is it."""

    def __init__(self, detail: str, raw: str = ""):
        super().__init__(detail)
        self.raw = raw


class Retry(Exception):
    """The server failed in a way that may pass: `reason` is one of limit (429), server (5xx), timeout, connection."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0):
        super().__init__(detail)
        self.reason = reason
        self.wait = wait  # seconds that the server asks for


class Rejected(Exception):
    """The server refuses this question, and will again (4xx)."""


class VlmUnavailable(ValueError):
    """No question can be answered: wrong address, key or model, or a server that is down for good."""
