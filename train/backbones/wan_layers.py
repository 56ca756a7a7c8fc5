"""What the layers of Wan's network are called: by diffusers, by Wan's own code, by other tools' LoRA files."""

import re
from typing import Any

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

# diffusers' layer names within a block, and those of Wan's own code, which ComfyUI uses.
ORIGINAL_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
OTHERS = ("cross_attn.k_img", "cross_attn.v_img", "head.head", "time_projection.1", "patch_embedding")
OTHERS += tuple(f"{name}_embedding.{layer}" for name in ("text", "time") for layer in (0, 2))
# kohya writes _ for every dot.
FLAT_NAMES = {name.replace(".", "_"): name for name in (*ORIGINAL_NAMES.values(), *OTHERS)}

# Names that only diffusers gives; `transformer_blocks` it gives to the blocks of other models.
_DIFFUSERS = re.compile(r"attn[12]\.|ffn\.net\.|condition_embedder|proj_out|scale_shift_table|transformer_blocks\.")
_OTHER_MODELS = re.compile("face_adapter|motion_encoder")  # of which diffusers' table asks more than a name


def unflattened(layer: str) -> str | None:
    """kohya's name with its dots; others as they are. None for one of another network."""
    if not layer.startswith("lora_"):
        return layer
    match = re.fullmatch(r"lora_unet_(?:(blocks)_(\d+)_)?(.+)", layer)
    if match is None or match[3] not in FLAT_NAMES:
        return None
    return f"blocks.{match[2]}.{FLAT_NAMES[match[3]]}" if match[1] else FLAT_NAMES[match[3]]


def to_diffusers(layers: dict[str, Any]) -> dict[str, Any]:
    """The same by diffusers' names, unless it has those: their norm2 is another one's norm3."""
    if any(map(_DIFFUSERS.search, layers)):
        return layers
    ours = {f"{layer}.weight": layer for layer in layers if not _OTHER_MODELS.search(layer)}
    names = convert_wan_transformer_to_diffusers(ours)
    renamed = {layer: name.removesuffix(".weight") for name, layer in names.items()}
    return {renamed.get(layer, layer): slots for layer, slots in layers.items()}
