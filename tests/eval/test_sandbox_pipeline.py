"""The sandbox's pipeline folder: standard, small, and its text tells words, colours and their order apart."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from eval.sandbox.clips import simulate
from eval.sandbox.pipeline import NETWORK, main
from eval.sandbox.prompts import STATES, TEMPLATES
from eval.sandbox.vae import ARCHITECTURE
from eval.sandbox.world import COLOUR_NAMES
from eval.small_wan.pipeline import new_transformer, small_text_encoder, small_tokenizer, write_pipeline
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig

TEXT_LENGTH = 32


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """An untrained VAE of the sandbox's architecture."""
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKLWan(**ARCHITECTURE).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(vae, tmp_path_factory):
    return write_pipeline(vae, tmp_path_factory.mktemp("model"), NETWORK)


@pytest.fixture(scope="module")
def backbone(model):
    return load_backbone(BackboneConfig(path=str(model), dtype="float32", text_length=TEXT_LENGTH), "cpu")


def test_the_folder_is_a_small_standard_pipeline(model, backbone):
    assert sum(file.stat().st_size for file in model.rglob("*") if file.is_file()) < 20e6
    assert backbone.latent_shape(64, 64, 17) == (8, 5, 8, 8) and backbone.num_tokens(64, 64, 17) == 80
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 17}
    shown = pipeline("a red ball bounces", **size, num_inference_steps=1, max_sequence_length=32, output_type="pt")
    assert shown.frames.shape == (1, 17, 3, 64, 64)
    frames = backbone.decode_latents(backbone.encode_video(torch.zeros(1, 3, 17, 64, 64)))
    assert frames.shape == (1, 3, 17, 64, 64)


def test_the_seed_decides_and_a_trained_transformer_is_kept(vae, model, tmp_path):
    main(["--vae", str(vae), "--folder", str(tmp_path / "same"), "--seed", "0"])
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        assert (tmp_path / "same" / f"{name}.safetensors").read_bytes() == (model / f"{name}.safetensors").read_bytes()
    trained = new_transformer(NETWORK, seed=7)
    trained.save_pretrained(tmp_path / "trained")
    folder = write_pipeline(vae, tmp_path / "model", NETWORK, transformer_folder=tmp_path / "trained")
    loaded = WanPipeline.from_pretrained(folder).transformer
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name).bfloat16().float()), name
    new_transformer(NETWORK | {"in_channels": 4, "out_channels": 4}, seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="reads 4 channels, but --vae .* has 8"):
        write_pipeline(vae, tmp_path / "model", NETWORK, transformer_folder=tmp_path / "other")
    with pytest.raises(ValueError, match="--vae .* holds no model"):
        write_pipeline(tmp_path / "none", tmp_path / "model", NETWORK)


def test_every_word_of_the_prompts_is_one_token():
    tokenizer = small_tokenizer()
    templates = re.sub(r"\{\w+\}", "", " ".join(template for choices in TEMPLATES.values() for template in choices))
    words = {*re.findall(r"[a-z]+", templates), *STATES.values(), *COLOUR_NAMES, "left", "right"}
    assert {word for word in words if len(tokenizer(word).input_ids) != 2} == set()
    assert tokenizer("A Red BALL").input_ids == tokenizer("a red ball").input_ids
    prompts = simulate("mixed", 200, torch.Generator().manual_seed(0), height=8, width=8).prompts
    assert max(len(tokenizer(prompt).input_ids) for prompt in prompts) <= TEXT_LENGTH


def test_a_words_embedding_tells_the_word_and_its_place(backbone):
    """A linear reading of a colour's token tells which ball it belongs to, in prompts that were not fitted."""
    clips = simulate("collision", 300, torch.Generator().manual_seed(0), height=8, width=8)
    embeddings = backbone.encode_text(clips.prompts).bfloat16().double()
    tokens = backbone.tokenizer(clips.prompts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    colours, places, rows = [], [], []
    for number, attributes in enumerate(clips.attributes):
        for place, name in ((-1.0, "colour"), (1.0, "second_colour")):
            (token, _) = backbone.tokenizer(attributes[name]).input_ids
            (position,) = (tokens[number] == token).nonzero()[:, 0].tolist()
            rows.append(embeddings[number, position])
            places.append(place)
            colours.append(COLOUR_NAMES.index(attributes[name]))
    inputs = torch.cat([torch.stack(rows), torch.ones(len(rows), 1)], dim=1).double()
    targets = torch.cat([torch.tensor(places)[:, None], torch.nn.functional.one_hot(torch.tensor(colours))], dim=1)
    half = len(rows) // 2
    fitted, regular = inputs[:half], 0.1 * torch.eye(inputs.shape[1])
    solution = torch.linalg.solve(fitted.T @ fitted + regular, fitted.T @ targets[:half].double())
    read = inputs[half:] @ solution
    assert (read[:, 0] * torch.tensor(places[half:]) > 0.3).double().mean() > 0.98
    assert (read[:, 1:].argmax(dim=1) == torch.tensor(colours[half:])).double().mean() > 0.99


def test_the_text_encoder_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    one, two = (small_text_encoder(300, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(one.shared.weight, two.shared.weight)
