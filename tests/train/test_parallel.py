"""Two ranks: what each holds while a network is loaded under ZeRO-3, and what they refuse. As a script: one rank."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train.test_two_processes import finish, launch
from train import parallel
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.tiny import write_tiny_pipeline


def whole_parameters() -> int:
    """Bytes of all parameters of this process that are not shared out."""
    found = (item for item in gc.get_objects() if isinstance(item, nn.Parameter) and item.device.type != "meta")
    return sum(item.numel() * item.element_size() for item in found if not hasattr(item, "ds_tensor"))


class Counting(parallel.Sharding):
    def __init__(self, accelerator):
        super().__init__(accelerator)
        self.held, self.own = [], []

    def take(self, parameters):
        self.own.append(sum(item.numel() * item.element_size() for item in parameters))
        self.held.append(whole_parameters())
        super().take(parameters)


def load(pipeline: str, folder: Path) -> None:
    from deepspeed import zero

    accelerator = parallel.build_accelerator()
    facts = {}
    sources = {"read": {"path": pipeline}, "random": {"architecture": "tiny", "random_weights": True}}
    for name, changes in sources.items():
        config, sharding = BackboneConfig("wan22_t2v", **changes), Counting(accelerator)
        backbone = load_backbone(config, accelerator.device, parts=("transformer",), sharding=sharding)
        facts[f"{name} held"] = max(sharding.held)
        facts[f"{name} largest"] = max(sharding.own)
        facts[f"{name} shared out"] = all(map(parallel.is_partitioned, backbone.experts.values()))
        plain = load_backbone(config, "cpu", parts=("transformer",))
        for expert, network in backbone.experts.items():
            expected = dict(plain.experts[expert].named_parameters())
            with zero.GatheredParameters(list(network.parameters())):
                facts[f"{name} {expert}"] = all(
                    torch.equal(value, expected[key]) and value.dtype == expected[key].dtype
                    for key, value in network.named_parameters()
                )
        del backbone, plain, expected, network
        gc.collect()
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(facts), encoding="utf-8")


@pytest.mark.slow
def test_under_zero3_no_rank_ever_holds_more_than_one_module_whole(tmp_path):
    pipeline = write_tiny_pipeline("wan22_t2v", tmp_path / "pipeline")
    finish(launch("zero3", (__file__, str(pipeline), str(tmp_path)), tmp_path=tmp_path), tmp_path)
    for rank in range(2):
        facts = json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8"))
        for name in ("read", "random"):
            assert facts[f"{name} held"] == facts[f"{name} largest"] > 0
            assert facts[f"{name} shared out"]
            assert facts[f"{name} high_noise"] and facts[f"{name} low_noise"]  # the plain network's weights


if __name__ == "__main__":
    load(sys.argv[1], Path(sys.argv[2]))
