"""Wan2.1 text to video, 1.3B and 14B: one transformer, one timestep per clip.

Facts from the public configs of Wan-AI/Wan2.1-T2V-{1.3B,14B}-Diffusers. Wan2.1 I2V (CLIP image encoder) is left out.
"""

from __future__ import annotations

from train.backbones.wan import WanBackbone, wan_architecture


class Wan21(WanBackbone):
    architectures = {
        "tiny": wan_architecture(heads=4, head_dim=32, ffn=512, layers=3, text_dim=64),
        "1.3B": wan_architecture(heads=12, ffn=8960, layers=30),
        "14B": wan_architecture(heads=40, ffn=13824, layers=40),
        "sandbox": wan_architecture(heads=4, head_dim=64, ffn=896, layers=6, z_dim=8, text_dim=128),
    }
