"""A backend of `eval.vlm.client`: a Qwen-VL-like model in this process, through transformers.

One question at a time and no schema to hold the model to: for trials, single machines and tests. A server is many times
as fast, so filter a million clips with one.
"""

import asyncio
import io
import threading
from typing import Any

import torch
from PIL import Image

from eval.vlm.backend import TOP_LOGPROBS, Malformed, Question, Rejected, Reply, VlmConfig, VlmUnavailable

SHOWN = 300  # characters of the library's words in a message


class LocalModel:
    """Loads at the first question. `model` and `processor` can be given instead."""

    def __init__(self, config: VlmConfig, model: Any = None, processor: Any = None):
        self._config = config
        self._model, self._processor = model, processor
        self._lock = threading.Lock()

    async def __aenter__(self) -> "LocalModel":
        return self

    async def __aexit__(self, *details: object) -> None: ...

    async def ask(self, question: Question, *, temperature: float, seed: int) -> Reply:
        """Raises Malformed, Rejected or VlmUnavailable."""
        return await asyncio.to_thread(self._ask, question, temperature, seed)

    def _ask(self, question: Question, temperature: float, seed: int) -> Reply:
        with self._lock:
            if self._model is None:
                self._load()
            return self._generate(question, temperature, seed)

    def _load(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        name = self._config.model
        device = self._config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            self._model = AutoModelForImageTextToText.from_pretrained(
                name, dtype="auto", device_map=device, use_safetensors=True, trust_remote_code=False
            ).eval()
        except (OSError, ValueError, ImportError) as error:
            said = " ".join(str(error).split())[:SHOWN]
            raise VlmUnavailable(
                f"vlm.model={name!r} on vlm.device={device!r} cannot be loaded ({said});"
                " name a folder or hub id of an image-text-to-text model"
            ) from error

    @torch.inference_mode()
    def _generate(self, question: Question, temperature: float, seed: int) -> Reply:
        if question.video_url:
            raise Rejected("a video_url needs a server (vlm.backend=openai)")
        images = [Image.open(io.BytesIO(frame), formats=["JPEG"]) for frame in question.frames]
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}]
        if question.rules:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": question.rules}]})
        inputs = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        prompt_tokens = inputs["input_ids"].shape[1]
        limit = 1 if question.first_token else self._config.max_tokens
        made = self._model.generate(
            **inputs,
            max_new_tokens=limit,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=[_Noise(temperature, seed)] if temperature > 0 else None,
            return_dict_in_generate=True,
            output_logits=question.first_token,
        )
        tokens = made.sequences[0, prompt_tokens:]
        text = self._processor.decode(tokens, skip_special_tokens=True)
        ends = self._model.generation_config.eos_token_id  # a number, several or None
        ended = int(tokens[-1]) in (ends if isinstance(ends, list) else [ends])
        if not question.first_token and len(tokens) == limit and not ended:
            raise Malformed("the answer was cut; raise vlm.max_tokens", text)
        first_token = ()
        if question.first_token:
            likeliest = made.logits[0][0].float().log_softmax(-1).topk(TOP_LOGPROBS)
            logprobs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            first_token = tuple((self._processor.decode([token]), logprob) for token, logprob in logprobs)
        return Reply(text, first_token, prompt_tokens, len(tokens))


class _Noise:
    """Gumbel noise on scores (B, V) / temperature: their largest entry is then a sample of the softmax.

    transformers samples with the global generator; this has one of its own.
    """

    def __init__(self, temperature: float, seed: int):
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(scores.shape, generator=self._generator).clamp_min(1e-20)
        return scores.float() / self._temperature - torch.log(-torch.log(uniform)).to(scores.device)
