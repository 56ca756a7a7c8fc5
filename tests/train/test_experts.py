"""`backbone.expert=both`: one run trains the two experts of A14B, one of them in a step."""

import json
import re
import shutil

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, safe_open, save_file

import recipes
from eval.loras import attach, read_lora
from tests.conftest import LATENT_SHAPE, TEXT_SHAPE, Tiny
from tests.synthetic_groups import write_synthetic_groups
from tests.train.test_resume import assert_equal_runs
from tests.train.test_two_processes import assert_close_metrics, distance, finish, launch
from train import checkpoint, export, gdpo, sft, timesteps
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.fused.inference import fuse
from train.backbones.loading import fingerprint
from train.backbones.tiny import write_tiny_pipeline
from train.data import build_loader
from train.experts import as_one
from train.groups import GroupSet
from train.lora_start import start_from
from train.lora_switch import LoraSwitch
from train.plan import plan
from train.policy import Policy
from train.timesteps import Turns, draw_time
from train.tools import inspect_targets

BOTH = ("backbone.family=wan22_t2v", "backbone.expert=both")
BOTH += ("objective.timestep_shift=7", "objective.timesteps=uniform")  # half of the steps each
TERMS = ("physics.trajectory=2", "physics.relational=0.5", "self_score.strength=3", "self_score.every=2")
EVERY_STEP = ("train.checkpoint_every=1", "train.keep_checkpoints=20")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Tiny:
    """A tiny pipeline of two experts and its groups, with physics targets."""
    pipeline = write_tiny_pipeline("wan22_t2v", tmp_path_factory.mktemp("two") / "model")
    name, groups = fingerprint("wan22_t2v", pipeline), tmp_path_factory.mktemp("two_groups")
    shapes = {"latent_shape": LATENT_SHAPE, "text_shape": TEXT_SHAPE}
    write_synthetic_groups(groups, num_groups=8, num_losers=4, **shapes, fingerprint=name, targets=True)
    return Tiny(pipeline, groups, name)


@pytest.fixture
def short_turns(monkeypatch):
    """Turns of one step: high, high, low, low, high, low."""
    monkeypatch.setattr(timesteps, "EXPERT_STEPS", 1)


def policy_of(config, *, expert="both"):
    """Seeded random adapters, as large as trained ones, on one or both experts; the same for an expert alone."""
    config.backbone.expert = expert
    both = expert == "both"
    parts = ("transformer",) if both else ("expert",)
    backbone = load_backbone(config.backbone, "cpu", parts=parts, host=both)
    switch = LoraSwitch(as_one(backbone.experts) if both else backbone.transformer, config.lora)
    for name, weight in switch.weights.items():
        folder = name.partition(".")[0] if both else backbone.expert_folders[expert]
        generator = torch.Generator().manual_seed(len(folder) + sum(map(ord, name.removeprefix(f"{folder}."))))
        with torch.no_grad():
            weight.copy_(0.03 * torch.randn(weight.shape, generator=generator))
    return Policy(backbone, switch)


# Whose turn it is


def config_of(**objective):
    config = gdpo.Config()
    for key, value in objective.items():
        setattr(config.objective, key, value)
    return config


def test_t_has_the_recipes_distribution_and_a_step_one_expert():
    """By hand: uniform t of shift 7 is at least 0.875 where u >= 0.875 / (7 - 6 x 0.875) = 0.5: half of the steps."""
    config = config_of(timesteps="uniform", timestep_shift=7.0)
    turns, times, served = Turns(config, 0.875), [], []
    for step in range(0, 4000 * timesteps.EXPERT_STEPS, timesteps.EXPERT_STEPS):
        share = turns.of_step(step)
        assert share == turns.of_step(step + timesteps.EXPERT_STEPS - 1)
        assert share == turns.of_sample((step + 1) * config.optim.batch_size - 1)
        t = draw_time(config.objective, torch.Generator().manual_seed(step), share)
        assert (t >= 0.875) == (share.expert == "high_noise")
        served.append(share.expert == "high_noise")
        times.append(t)
    assert sum(served) / len(served) == pytest.approx(0.5, abs=0.02)
    u = torch.stack(times)
    u = (u / (7 - 6 * u)).sort().values  # uniform again
    assert (u - torch.linspace(0, 1, len(u))).abs().max() < 0.03


def test_the_boundary_itself_is_the_high_noise_experts():
    for boundary in (0.875, 0.9):
        at = torch.tensor(boundary)
        high, low = (timesteps.Share(expert, boundary) for expert in ("high_noise", "low_noise"))
        assert high.holds(at) and not low.holds(at)
    low = timesteps.Share("low_noise", 0.9)
    assert low.nearest(torch.tensor(0.95)) == torch.tensor(0.9) and low.nearest(torch.tensor(0.3)) == torch.tensor(0.3)


# One step


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_a_step_is_that_of_a_run_of_its_expert_alone(two, tmp_path, expert):
    config = two.config(tmp_path, *BOTH, "objective.loss=plackett_luce")
    pair, alone = policy_of(config), policy_of(config, expert=expert)
    turns = Turns(config, 0.875)
    position = next(n for n in range(0, 999, 16) if turns.of_sample(n).expert == expert)
    loader = batches(config, two, turns, position)
    batch = next(loader)
    pair.backbone.serve(batch["t"])
    assert pair.backbone.expert == expert
    found, metrics = gdpo.step(config, pair, batch)
    expected, expected_metrics = gdpo.step(config, alone, batch)
    assert len(found) == len(alone.switch.weights) == len(pair.switch.weights) / 2
    assert all(map(torch.equal, found, expected)) and any(gradient.any() for gradient in found)
    assert all(torch.equal(metrics[name], expected_metrics[name]) for name in expected_metrics)


def batches(config, two, turns, position):
    return iter(build_loader(config, GroupSet(two.groups), gdpo.prepare, turns, start=position, rank=0, world=1))


def test_networks_take_turns_on_the_device(two):
    """A pass of either expert is what it is with both there; one network's worth of memory is used."""
    config = BackboneConfig(family="wan22_t2v", path=str(two.model), dtype="float32", text_length=64, expert="both")
    whole = load_backbone(config, "cpu", parts=("transformer",))
    parked = load_backbone(config, "cpu", parts=("transformer",), host=True)
    assert parked.host.here == "high_noise"  # what fuses blocks sees the kernels of the device
    latents, text = torch.randn(1, *LATENT_SHAPE), torch.randn(1, 64, TEXT_SHAPE[1])
    for t in (0.9, 0.5, 0.1, 1.0):
        args = latents, t, Conditioning(text)
        assert torch.equal(parked.velocity_at(*args), whole.velocity_at(*args))
        there = {name: next(n.parameters()).data_ptr() for name, n in parked.experts.items()}
        here = "high_noise" if t >= 0.875 else "low_noise"
        assert [name for name, place in there.items() if place == parked.host.device[0].data_ptr()] == [here]


# Runs


def moved(two, folder, steps):
    """By step: which networks' weights and moments differ from those of the step before, and the metrics' word."""
    before, lines = {}, two.metrics(folder)
    for step in range(1, steps + 1):
        after = two.weights(folder / "train" / "checkpoints" / f"step_{step:08d}")
        names = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
        if step > 1:  # the first checkpoint has none before it
            yield {name.removeprefix("heads.").partition(".")[0] for name in names}, lines[step - 1]["high_noise"]
        before = after


def test_what_did_not_serve_a_step_does_not_move(two, tmp_path, short_turns):
    two.train(tmp_path, *BOTH, *TERMS, *EVERY_STEP, "optim.steps=6", "optim.weight_decay=0.5")
    found = list(moved(two, tmp_path, 6))
    assert [high for _, high in found] == [1, 0, 0, 1, 0]
    assert all(networks == {"transformer" if high else "transformer_2"} for networks, high in found)
    last = two.weights(tmp_path / "train" / "checkpoints" / "step_00000006")
    steps = {name.removeprefix("heads.").partition(".")[0]: int(last[name]) for name in last if name.endswith(".step")}
    assert steps == {"transformer": 3, "transformer_2": 3}  # each expert's own count
    heads = load_file(tmp_path / "train" / "checkpoints" / "step_00000006" / checkpoint.HEADS_FILE)
    assert {name.rpartition(".")[0] for name in heads} == {
        f"{network}.{head}.{layer}"
        for network in ("transformer", "transformer_2")
        for head in ("pix", "sem")
        for layer in "02"
    }


@pytest.mark.parametrize(
    ("entry", "more"),
    [
        pytest.param(gdpo, TERMS, id="bound with all terms"),
        pytest.param(gdpo, ("objective.loss=plackett_luce", "train.pairs_per_pass=2"), id="plackett_luce"),
        pytest.param(sft, (), id="sft"),
    ],
)
@pytest.mark.parametrize(
    "start", [1, pytest.param(4, marks=pytest.mark.slow)]
)  # before the low-noise expert has served, and after
def test_a_resumed_run_equals_the_whole_one(two, tmp_path, short_turns, entry, more, start):
    whole, parts, run = tmp_path / "whole", tmp_path / "parts", (*BOTH, *EVERY_STEP, "optim.steps=6", *more)
    two.train(whole, *run, entry=entry)
    name = f"train/checkpoints/step_{start:08d}"
    shutil.copytree(whole / name, parts / name)
    shutil.copy(whole / "train" / "metrics.jsonl", parts / "train" / "metrics.jsonl")
    two.train(parts, *run, entry=entry)
    assert_equal_runs(two, parts, whole, step=6)


@pytest.mark.slow
def test_fused_blocks_of_both_give_what_eager_ones_do(two, tmp_path, short_turns):
    run = (*BOTH, *TERMS, "optim.steps=4", "train.memory_budget_gib=1e-9")
    with torch._dynamo.config.patch(disable=True):  # fused, but run as written
        for name in ("eager", "fused"):
            two.train(tmp_path / name, *run, f"backbone.compile={name == 'fused'}".lower())
    assert_close_metrics(two.metrics(tmp_path / "fused"), two.metrics(tmp_path / "eager"), 5e-4)


@pytest.mark.slow
def test_the_student_is_drawn_by_the_expert_that_serves_its_level(two, tmp_path, short_turns):
    two.train(tmp_path, *BOTH, *TERMS, "optim.steps=3")
    inspect_targets.main(two.arguments(tmp_path, *BOTH, *TERMS, f"inspect.checkpoint={tmp_path}/train"))
    assert (tmp_path / "targets.png").stat().st_size > 10_000


def test_a_reference_cache_is_read_by_the_next_run(two, tmp_path, short_turns, capsys):
    run = (*BOTH, "optim.steps=4", f"train.reference_cache={tmp_path / 'cache'}")
    for name in ("one", "two"):
        two.train(tmp_path / name, *run)
    assert "reference cache: 4 steps known" in capsys.readouterr().out
    assert_equal_runs(two, tmp_path / "two", tmp_path / "one", step=4)
    settings = json.loads((tmp_path / "cache" / "settings.json").read_text(encoding="utf-8"))
    assert settings["boundary"] == 0.875 and settings["expert_steps"] == 1


@pytest.mark.slow
def test_clips_are_made_by_both_while_both_train(two, tmp_path, short_turns):
    """Made between steps 2 and 3, each by both; step 3 goes on as if nothing had been."""
    clips = ("validation.prompts=[a ball]", "validation.every=2", "sampler.steps=2", "sampler.shift=7")
    two.train(tmp_path / "clips", *BOTH, *clips, "optim.steps=3")
    two.train(tmp_path / "none", *BOTH, "optim.steps=3")
    assert two.metrics(tmp_path / "clips") == two.metrics(tmp_path / "none")
    assert len(list((tmp_path / "clips" / "train" / "validation").glob("step_*/*.mp4"))) == 3


# Trained files


@pytest.fixture
def trained(two, tmp_path):
    """A policy with adapters on both experts, and the file that a run would write."""
    policy = policy_of(two.config(tmp_path, *BOTH, "lora.alpha=12"))
    path = tmp_path / LoraSwitch.file
    write(policy.switch, policy.switch.state_dict(), policy.backbone.fingerprint, path)
    return policy, path


def write(switch, tensors, name, path):
    save_file(tensors, path, metadata=checkpoint.weights_metadata(switch, fingerprint=name, expert="both"))


@pytest.mark.parametrize("fused", [False, True])
def test_each_experts_lora_changes_its_own_times_alone(two, tmp_path, trained, fused):
    policy, path = trained
    latents, text = torch.randn(1, *LATENT_SHAPE), Conditioning(torch.randn(1, 64, TEXT_SHAPE[1]))
    config = BackboneConfig(family="wan22_t2v", path=str(two.model), dtype="float32", text_length=64, expert="both")
    served = {"transformer": (0.875, 1.0), "transformer_2": (0.8, 0.1)}
    for ours, changed in served.items():
        backbone = load_backbone(config, "cpu", parts=("transformer",))
        tensors = policy.switch.state_dict()
        tensors = {name: w if name.startswith(f"{ours}.") else torch.zeros_like(w) for name, w in tensors.items()}
        write(policy.switch, tensors, policy.backbone.fingerprint, path)
        switch = checkpoint.attach_trained(path, backbone.experts, fingerprint=backbone.fingerprint)
        assert not fused or fuse(backbone, switch, compiled=False) == ""
        for t in (t for times in served.values() for t in times):
            with torch.no_grad():
                tuned = backbone.velocity_at(latents, t, text)
                with switch.reference():
                    base = backbone.velocity_at(latents, t, text)
            assert torch.equal(tuned, base) == (t not in changed)


def test_diffusers_gives_both_networks_their_exact_weights(two, tmp_path, trained):
    policy, path = trained
    written = export.to_diffusers(path, tmp_path / "out" / export.DIFFUSERS_FILE)
    with safe_open(written, framework="pt") as file:
        assert file.metadata()["expert"] == "both"
        adapters = json.loads(file.metadata()["lora_adapter_metadata"])
    assert adapters["transformer.lora_alpha"] == adapters["transformer_2.lora_alpha"] == 12.0
    pipeline = WanPipeline.from_pretrained(two.model)
    pipeline.load_lora_weights(written.parent)
    pipeline.transformer_2.load_lora_adapter(written.parent, prefix="transformer_2", use_safetensors=True)
    deltas = {}
    for folder in ("transformer", "transformer_2"):
        network, weights = getattr(pipeline, folder), policy.switch.weights
        layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
        assert len(layers) == len(weights) / 4
        for name, layer in layers.items():
            down, up = (weights[f"{folder}.{name}.lora_{matrix}.weight"] for matrix in "AB")
            (adapter,) = layer.active_adapters
            deltas[folder, name] = layer.get_delta_weight(adapter)
            torch.testing.assert_close(deltas[folder, name], 1.5 * up @ down, rtol=0, atol=1e-6)
    assert not torch.allclose(deltas["transformer", name], deltas["transformer_2", name], atol=1e-2)
    pipeline.unload_lora_weights()
    assert not any(hasattr(layer, "lora_A") for layer in pipeline.transformer_2.modules())


def test_comfyui_gets_a_file_for_each_expert(two, tmp_path, trained, capsys):
    policy, path = trained
    export.main([str(path), str(tmp_path / "out" / "lora.safetensors"), "--to", "comfyui"])
    high, low = (tmp_path / "out" / f"lora_{name}.safetensors" for name in ("high_noise", "low_noise"))
    assert capsys.readouterr().out == f"wrote {high} and {low}, for both experts\n"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {high.name, low.name}
    for file, folder in ((high, "transformer"), (low, "transformer_2")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["expert"] == file.stem.removeprefix("lora_")
        up = load_file(file)["diffusion_model.blocks.1.self_attn.q.lora_up.weight"]
        assert torch.equal(up, policy.switch.weights[f"{folder}.blocks.1.attn1.to_q.lora_B.weight"])


def test_all_forms_of_a_lora_of_both_come_back_as_one(two, tmp_path, trained):
    """Our file, its exports for diffusers (one file) and for ComfyUI (two), bit for bit."""
    _, path = trained
    diffusers = export.to_diffusers(path, tmp_path / "out" / export.DIFFUSERS_FILE)
    export.to_comfyui(path, tmp_path / "comfy.safetensors")
    high, low = export.comfyui_files(tmp_path / "comfy.safetensors", "both")
    config = BackboneConfig(family="wan22_t2v", path=str(two.model), dtype="float32", text_length=64)
    latents, text, found = torch.randn(1, *LATENT_SHAPE), Conditioning(torch.randn(1, 64, TEXT_SHAPE[1])), []
    for given in (str(path), str(diffusers), {"high_noise": str(high), "low_noise": str(low)}):
        backbone = load_backbone(config, "cpu", parts=("transformer",))
        attach(read_lora(given, backbone, key="run.lora"), backbone)
        with torch.no_grad():
            found.append([backbone.velocity_at(latents, t, text) for t in (0.95, 0.3)])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_both_start_from_a_lora_of_both(two, tmp_path, trained, short_turns):
    policy, path = trained
    diffusers = export.to_diffusers(path, tmp_path / "out" / export.DIFFUSERS_FILE)
    alpha = ("lora.alpha=12", "objective.loss=bound")
    config = two.config(tmp_path, *BOTH, *alpha, f"lora.start={diffusers}")
    fresh = policy_of(two.config(tmp_path, *BOTH, *alpha))
    for weight in fresh.switch.parameters():
        weight.data.zero_()
    start_from(config, fresh.backbone, fresh.switch)
    assert all(torch.equal(weight, policy.switch.weights[name]) for name, weight in fresh.switch.weights.items())
    low = two.config(tmp_path, *BOTH, *alpha, f"lora.start={diffusers}")
    half = policy_of(low, expert="low_noise")
    start_from(low, half.backbone, half.switch)
    for name, weight in half.switch.weights.items():
        assert torch.equal(weight, policy.switch.weights[f"transformer_2.{name}"])
    export.to_comfyui(path, tmp_path / "one.safetensors")
    one, _ = export.comfyui_files(tmp_path / "one.safetensors", "both")
    with pytest.raises(ValueError, match="is for high_noise, this run trains both: set backbone.expert=high_noise"):
        start_from(two.config(tmp_path, *BOTH, f"lora.start={one}"), fresh.backbone, fresh.switch)
    save_file(load_file(one), tmp_path / "nobodys.safetensors")
    with pytest.raises(ValueError, match="it is for: a run of both starts from one of both: set backbone.expert to"):
        start_from(
            two.config(tmp_path, *BOTH, f"lora.start={tmp_path}/nobodys.safetensors"), fresh.backbone, fresh.switch
        )
    two.train(tmp_path / "run", *BOTH, *alpha, f"lora.start={diffusers}", "optim.steps=2")
    assert two.metrics(tmp_path / "run")[0]["margin"] != 0


def test_both_networks_are_merged(two, tmp_path, trained):
    policy, path = trained
    merged = export.to_merged(path, tmp_path / "merged", base=str(two.model), dtype=torch.float32)
    latents, text = torch.randn(1, *LATENT_SHAPE), torch.randn(1, 64, TEXT_SHAPE[1])
    for folder, t in (("transformer", 0.95), ("transformer_2", 0.4)):
        network = WanTransformer3DModel.from_pretrained(merged / folder)
        with torch.no_grad():
            found = network(latents, torch.tensor([1000 * t]), text, return_dict=False)[0]
            expected = policy.backbone.velocity_at(latents, t, Conditioning(text))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# What cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("backbone.family=wan21",), "backbone.expert=both, but backbone.family=wan21 has one expert: leave it out"),
        (("train.parameters=full",), "train.parameters=full trains one network: set backbone.expert to high_noise or"),
        (
            ("objective.t_min=0.875",),
            "needs times on both sides of 0.875.* objective.t_min=0.875 and t_max=1: set them",
        ),
        (("objective.t_max=0.5",), "needs times on both sides of 0.875.* objective.t_min=0 and t_max=0.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(two, tmp_path, settings, message):
    for more in ((), ("--dry-run",)):
        with pytest.raises(ValueError, match=message):
            two.train(tmp_path, *BOTH, *settings, *more)
    assert not (tmp_path / "train").exists()


def test_a_file_that_lacks_an_expert_is_refused(trained):
    policy, path = trained
    tensors = policy.switch.state_dict()
    half = {name: tensor for name, tensor in tensors.items() if name.startswith("transformer.")}
    bare = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    for wrong in (half, bare):
        write(policy.switch, wrong, policy.backbone.fingerprint, path)
        with pytest.raises(ValueError, match="is damaged: its metadata say both experts, but its tensors are not of"):
            export.to_diffusers(path, path.with_name("out.safetensors"))
    write(policy.switch, tensors, policy.backbone.fingerprint, path)
    high = {"high_noise": policy.backbone.experts["high_noise"]}
    with pytest.raises(ValueError, match="is for the network 'low_noise', this backbone has: high_noise"):
        checkpoint.attach_trained(path, high, fingerprint=policy.backbone.fingerprint)


def test_another_batch_size_is_refused_on_resume(two, tmp_path, short_turns):
    two.train(tmp_path, *BOTH, "optim.steps=3")
    with pytest.raises(ValueError, match="batch_size=4 does not divide the 6 groups seen so far, by which backbone.ex"):
        two.train(tmp_path, *BOTH, "optim.steps=5", "optim.batch_size=4")
    with pytest.raises(
        ValueError, match="trained on the expert both, this run trains low_noise: set backbone.expert=bo"
    ):
        two.train(tmp_path, *BOTH, "optim.steps=5", "backbone.expert=low_noise")


def test_the_plan_says_whose_steps_they_are(tmp_path):
    config = recipes.load(gdpo.Config, ["recipe=wan22_a14b_t2v", f"output={tmp_path}"])
    assert config.backbone.expert == "both"
    lines = {line.split()[0]: line for line in plan(config, world=1, sharded=False)}
    # 63 % of uniform u are at least 0.875 / (12 - 11 x 0.875) = 0.368.
    high, low = (int(word) for word in re.findall(r"(\d+)(?= steps,|, 8 in a row)", lines["experts"]))
    assert high + low == config.optim.steps and high / config.optim.steps == pytest.approx(0.632, abs=0.03)
    assert "one at a time on the device, 53.2 GiB of host memory" in lines["experts"]
    assert "78.64 M parameters trained for each of two experts" in lines["adapters"]
    sharded = {line.split()[0]: line for line in plan(config, world=8, sharded=True)}
    assert "both sharded" in sharded["experts"]


# Several ranks


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "zero3"])
def test_two_ranks_train_both_and_resume_to_the_bit(two, tmp_path, launcher):
    """8 steps of the low-noise expert, 2 of the high-noise one; resumed where both have served."""
    run = (*BOTH, *TERMS, *EVERY_STEP, "optim.steps=10", "seed=2")
    whole, parts, script = tmp_path / "whole", tmp_path / "parts", ("-m", "train.gdpo")
    finish(launch(launcher, script, *two.arguments(whole, *run), tmp_path=tmp_path), tmp_path)
    said = "sharded over the ranks" if launcher == "zero3" else "whole on every rank"
    assert said in (tmp_path / "output.txt").read_text(encoding="utf-8", errors="replace")
    assert [line["high_noise"] for line in two.metrics(whole)] == [0] * 8 + [1] * 2
    name = "train/checkpoints/step_00000009"
    shutil.copytree(whole / name, parts / name)
    shutil.copy(whole / "train" / "metrics.jsonl", parts / "train" / "metrics.jsonl")
    finish(launch(launcher, script, *two.arguments(parts, *run), tmp_path=tmp_path), tmp_path)
    assert_equal_runs(two, parts, whole, step=10)

    two.train(tmp_path / "one", *run)
    assert_close_metrics(two.metrics(whole), two.metrics(tmp_path / "one"), 5e-4)
    last = "train/checkpoints/step_00000010"
    assert distance(two.weights(whole / last), two.weights(tmp_path / "one" / last)) < 1e-4


def test_both_experts_stream_through_one_ring(two, tmp_path, short_turns):
    run = (*BOTH, "optim.steps=3", "backbone.compile=false")
    whole, streamed = (
        checkpoint.latest(two.train(tmp_path / name, *run, f"backbone.stream={name == 'streamed'}"))
        for name in ("whole", "streamed")
    )
    assert two.metrics(tmp_path / "whole") == two.metrics(tmp_path / "streamed")
    assert {line["high_noise"] for line in two.metrics(tmp_path / "whole")} == {0, 1}
    weights, others = (load_file(path / "lora.safetensors") for path in (whole, streamed))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_host_without_room_for_both_is_refused(two, tmp_path, monkeypatch):
    monkeypatch.setattr("train.host_memory.host_memory", lambda: 2**20)
    with pytest.raises(ValueError, match="backbone.expert=both keeps .* GiB of weights in page-locked host memory"):
        two.train(tmp_path, *BOTH, "optim.steps=1")
