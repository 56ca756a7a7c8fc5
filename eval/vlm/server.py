"""A backend of `eval.vlm.client`: servers that speak OpenAI's chat protocol (vLLM, SGLang, llama.cpp, OpenAI ...)."""

import asyncio
import base64
import json
import math
import os
from typing import Any

from eval.vlm.backend import TOP_LOGPROBS, Malformed, Question, Rejected, Reply, Retry, VlmConfig, VlmUnavailable
from recipes import redacted

PASSING = {408: "timeout", 409: "server", 425: "server", 429: "limit"}  # and all 5xx
MAX_BODY = 4_000_000  # characters of a response; more is no answer
SHOWN = 300  # characters of a server's words in a message


class Server:
    """One connection pool, opened by `async with` in the event loop that uses it."""

    def __init__(self, config: VlmConfig):
        try:
            import openai
        except ImportError as error:
            raise ValueError("vlm.backend=openai needs the package openai: pip install 'physalign[vlm]'") from error
        self._openai = openai
        self._config = config
        self._client: Any = None
        self._heard = False  # whether the server ever answered: then a refused connection may be a restart

    async def __aenter__(self) -> "Server":
        # A key of its own in every case: the package would take OPENAI_API_KEY and show it to whatever server this is.
        key = os.environ[self._config.api_key_env] if self._config.api_key_env else "none"
        self._client = self._openai.AsyncOpenAI(
            base_url=self._config.base_url, api_key=key, max_retries=0, timeout=self._config.timeout_s
        )
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._client.close()

    async def ask(self, question: Question, *, temperature: float, seed: int) -> Reply:
        """Raises Malformed, Retry, Rejected or VlmUnavailable."""
        request = self._request(question, temperature, seed)
        try:
            # The package's own limit is one between two bytes; this one is for the whole.
            async with asyncio.timeout(self._config.timeout_s):
                # As text: the typed call walks through the request and the response, for a third of the time.
                body = await self._client.post("/chat/completions", cast_to=str, body=request)
        except (TimeoutError, self._openai.APITimeoutError):
            raise Retry("timeout", f"no answer within vlm.timeout_s={self._config.timeout_s:g} s") from None
        except self._openai.APIConnectionError as error:
            raise self._connection_failure(error) from None  # the cause may show the address with its credentials
        except self._openai.APIStatusError as error:
            raise self._status_failure(error) from error
        self._heard = True
        return read_reply(body, question)

    def _request(self, question: Question, temperature: float, seed: int) -> dict[str, Any]:
        content = [*self._media(question), {"type": "text", "text": question.text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if question.rules:
            messages.insert(0, {"role": "system", "content": question.rules})
        request: dict[str, Any] = {
            "model": self._config.model,
            "messages": messages,
            "temperature": temperature,
            "seed": seed,
            "max_tokens": 1 if question.first_token else self._config.max_tokens,
        }
        if question.first_token:
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if question.schema is not None:
            named = {"name": "answer", "strict": True, "schema": question.schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        return request

    def _media(self, question: Question) -> list[dict[str, Any]]:
        if question.video_url:
            return [{"type": "video_url", "video_url": {"url": question.video_url}}]
        frames = [base64.b64encode(frame).decode("ascii") for frame in question.frames]
        if frames and self._config.send == "video":
            return [{"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(frames)}}]
        return [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + frame}} for frame in frames]

    def _connection_failure(self, error: Exception) -> Exception:
        cause = error.__cause__ or error
        detail = redacted(f"{type(cause).__name__}: {str(cause)[:SHOWN]}")
        if self._heard or type(cause).__name__ != "ConnectError":
            return Retry("connection", detail)
        return VlmUnavailable(
            f"vlm.base_url={redacted(self._config.base_url)!r}: no connection ({detail});"
            f" start the server (vllm serve {self._config.model}) or correct the address"
        )

    def _status_failure(self, error: Any) -> Exception:
        status, said = error.status_code, redacted(str(error.message)[:SHOWN])
        if status in PASSING or status >= 500:
            try:
                wait = float(error.response.headers.get("retry-after", 0))
            except ValueError:  # a date
                wait = 0.0
            wait = wait if math.isfinite(wait) else 0.0
            return Retry(PASSING.get(status, "server"), f"status {status}: {said}", wait)
        if status in (401, 403):
            name = self._config.api_key_env
            remedy = f"put a valid key into {name}" if name else "name the variable that holds the key"
            return VlmUnavailable(f"vlm.api_key_env={name!r}: the server refuses this key ({status}); {remedy}")
        if status == 404:
            return VlmUnavailable(
                f"vlm.model={self._config.model!r} at vlm.base_url={redacted(self._config.base_url)!r}: not found"
                f" (404: {said}); the address ends in /v1 most often, and /v1/models lists the models"
            )
        self._heard = True
        return Rejected(f"status {status}: {said}")


def read_reply(body: str, question: Question) -> Reply:
    """The reply out of a response's body. Raises Malformed for whatever is no chat completion, or one cut short."""
    if len(body) > MAX_BODY:
        raise Malformed(f"the response has {len(body)} characters", body)
    try:
        response = json.loads(body)
        choice = response["choices"][0]
        text = choice["message"]["content"]
        usage = response.get("usage") or {}
        tokens = [int(usage.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")]
        first_token = _first_token(choice) if question.first_token else ()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise Malformed(f"the response is no chat completion ({type(error).__name__}: {error})", body) from error
    if not isinstance(text, str):
        raise Malformed("the response has no text", body)
    if not question.first_token and choice.get("finish_reason") == "length":
        raise Malformed("the answer was cut; raise vlm.max_tokens", text)
    return Reply(text, first_token, *tokens)


def _first_token(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    alternatives = choice["logprobs"]["content"][0]["top_logprobs"]
    return tuple((str(one["token"]), float(one["logprob"])) for one in alternatives)
