"""Qwen2.5-VL's text model without weights: the 7B's sizes or small ones by its width, and what no checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH, LAYERS = 3584, 28  # of Qwen2.5-VL-7B
REAL = {"vocab_size": 152_064, "intermediate_size": 18_944, "num_hidden_layers": LAYERS}
REAL |= {"num_attention_heads": 28, "num_key_value_heads": 4}
SMALL_LAYERS = 3


def text_sizes(width: int, words: int) -> dict[str, Any]:
    """Arguments of Qwen2_5_VLTextConfig; of a width that no checkpoint has, small ones and `words` tokens."""
    if width == WIDTH:
        return {"hidden_size": width, **REAL}
    part = width // 32  # of a quarter of the width, a head, whose rotation has three parts: 1, 2 and 1 of 4
    small = {"vocab_size": words, "intermediate_size": 2 * width, "num_hidden_layers": SMALL_LAYERS}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    small |= {"rope_scaling": {"rope_type": "default", "mrope_section": [part, 2 * part, part]}}
    return {"hidden_size": width, **small}


def make_positions(text: nn.Module, device: torch.device) -> None:
    """Give a text model that was made without storage its position table, a buffer."""
    text.rotary_emb = type(text.rotary_emb)(text.config).to(device)
