"""Tiny backbones of random weights, whole: text encoder, VAE and network."""

import torch

from train.backbones import load_backbone
from train.backbones.base import BackboneConfig


def load(family, path):
    config = BackboneConfig(family=family, path=str(path), dtype="float32", text_length=16)
    return load_backbone(config, torch.device("cpu"), parts=("text", "vae", "transformer"))
