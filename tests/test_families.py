"""What is known of a network stands in its family's file: nobody else names its classes, layers or config keys."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("losses", "recipes", "train", "eval", "data_pipeline")
# Files of train/backbones that are a family's own, and what writes tiny pipelines of each.
# `fused` are kernels of Wan's blocks.
FAMILIES = re.compile(r"train/backbones/((wan|hunyuan15|cosmos25|qwen25|tiny)\w*|fused/\w+)\.py")
# Simulated scenes and robots train small Wan pipelines of their own, by the code of eval/small_wan.
OUTSIDE = ("eval/sandbox", "eval/robots", "eval/small_wan")

CLASSES = r"(Wan|Cosmos)\w*(Transformer|Pipeline)\w*|AutoencoderKL\w+|UMT5\w*|HunyuanVideo\w*|T5Encoder\w*"
CLASSES += r"|Qwen2_5_VL\w*"
LAYERS = r"attn[12]|to_[qkv]|to_out|add_[qkv]_proj|norm_[qk]|ffn\.net|patch_embedding|condition_embedder|proj_out"
LAYERS += r"|transformer_blocks|refiner_blocks"
KEYS = r"ffn_dim|num_attention_heads|attention_head_dim|text_dim|text_embed\w*_dim|freq_dim|image_dim|mlp_ratio"
KEYS += r"|crossattn_proj\w*|adaln_lora_dim|latents_mean|latents_std|scaling_factor|expand_timesteps|rope_axes_dim"
WORDS = re.compile(rf"\b({CLASSES}|{LAYERS}|{KEYS})\b")
NETWORKS = {"network", "transformer", "expert", "one", "model"}  # names whose `.blocks` are a transformer's

# Files that name some all the same, and why. A file that does so no longer leaves this list.
ALLOWED = {
    "train/lora_switch.py": "the default of lora.targets is PhyGDPO's, in diffusers' names for Wan",
    "eval/experiments/world_model/sources.py": "the config of a V-JEPA 2",
}


def words(tree):
    """Identifiers and text of a module without its docstrings, as far as they are on the list; blocks of networks."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        found = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg", ast.alias: "name"}
        said = getattr(node, found[type(node)]) if type(node) in found else None
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            said = node.value
            if said.startswith("blocks."):
                yield said
        yield from (match[0] for match in WORDS.finditer(said or ""))
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "blocks"
            and isinstance(node.value, ast.Name | ast.Attribute)
        ):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if owner in NETWORKS:
                yield f"{owner}.blocks"


def test_no_other_module_names_a_familys_classes_layers_or_keys():
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not FAMILIES.fullmatch(name) and not name.startswith(OUTSIDE):
                found[name] = sorted(set(words(ast.parse(path.read_text(encoding="utf-8")))))
    assert {name: said for name, said in found.items() if said and name not in ALLOWED} == {}
    assert {name for name in ALLOWED if not found[name]} == set(), "no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "from diffusers import WanTransformer3DModel",
        "from diffusers import Cosmos2_5_PredictBasePipeline",
        "vae = diffusers.AutoencoderKLWan()",
        'config["ffn_dim"]',
        "block.attn1.to_q",
        'targets = ["attn1.to_q"]',
        "len(network.blocks)",
        "type(self.transformer.blocks[0])",
        'key.startswith("blocks.")',
        "shapes.num_attention_heads",
        'f"{name}.attn2"',
    ],
)
def test_the_rule_sees(source):
    assert list(words(ast.parse(source)))


@pytest.mark.parametrize("source", ['"""WanPipeline"""', "backbone.blocks", "sizes.blocks", "kind.blocks", "shape.ffn"])
def test_the_rule_lets_pass(source):
    assert not list(words(ast.parse(source)))
