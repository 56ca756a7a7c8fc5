"""`--dry-run`: what follows from each shipped recipe, without weights."""

import pytest

import recipes
from tests.synthetic_groups import write_synthetic_groups
from train import gdpo, sft
from train.backbones import find_architecture
from train.backbones.architecture import parameter_count
from train.loop import accumulation_steps
from train.lora_switch import LoraConfig
from train.plan import GIB, lora_parameters, memory_estimate, plan
from train.tools import what_fits

BATCH = "optim.batch_size=8"
HIGH = ("backbone.expert=high_noise",)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no recipe's output folder exists here


def config_of(name, *arguments):
    return recipes.load(gdpo.Config, [f"recipe={name}", *arguments])


def lines_of(config, **options):
    """The plan's lines by their first word."""
    return {line.split(" ", 1)[0]: line for line in plan(config, **{"world": 1, "sharded": False, **options})}


def gib_of(config, *, world=1):
    """Parts of the memory estimate, GiB."""
    return {name: size / GIB for name, size in memory_estimate(config, world=world).items()}


@pytest.mark.parametrize("name", recipes.available())
@pytest.mark.parametrize(("world", "sharded"), [(1, False), (8, True)])
def test_every_recipe_can_be_planned_without_weights(name, world, sharded):
    lines = plan(config_of(name, BATCH, "train.pairs_per_pass=1"), world=world, sharded=sharded)
    starts = ["ranks", "backbone", "adapters", "clip", "step", "run", "learning rate", "memory a device", "loading"]
    starts.append("groups")
    starts[-1:-1] = ["experts"] if name.startswith("wan22_a14b") else []
    starts[-1:-1] = ["blocks"] if name in ("wan14b", "wan1_3b") else []
    starts[-1:-1] = ["physics terms"] if "physisforcing" in name or name == "wan14b" else []
    starts[-1:-1] = ["self-score"] if name.startswith("wan") else []
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert f"8 groups = {world} ranks x 1 a pass x {8 // world} accumulation" in lines[4]
    assert "none yet" in lines[-1] and f"runs/{name}/groups" in lines[-1]


def test_wan14b_in_words():
    lines = lines_of(config_of("wan14b"))
    assert "wan21 14B" in lines["backbone"] and "40 blocks of width 5120" in lines["backbone"]
    assert "rank 48: 78.64 M" in lines["adapters"]
    assert "480x832, 81 frames at 16 fps -> latents (16, 21, 60, 104), 32760 tokens" in lines["clip"]
    assert "10000 steps, 80000 groups drawn" in lines["run"]
    assert "1e-05, cosine to 1e-06" in lines["learning"]
    released = lines_of(config_of("wan14b", "objective.preset=released"))
    assert "1e-05, constant" in released["learning"] and "to 1e-06" not in released["learning"]
    assert "3000 steps, 24000 groups drawn" in released["run"]


@pytest.mark.parametrize(
    ("name", "billions"), [("wan14b", 14.29), ("wan1_3b", 1.42), ("wan22_5b", 5.0), ("wan22_a14b_t2v", 14.29)]
)
def test_parameter_counts(name, billions):
    config = config_of(name)
    count = parameter_count(find_architecture(config.backbone))
    assert count == pytest.approx(billions * 1e9, rel=0.01)
    assert f"{count / 1e6:,.2f} M parameters" in lines_of(config)["backbone"]


def test_lora_parameters_by_hand():
    architecture = find_architecture(config_of("wan14b").backbone)
    # Four square layers of 5120 in each of 40 blocks, rank 48.
    assert lora_parameters(architecture, LoraConfig()) == 4 * 40 * 48 * (5120 + 5120) == 78_643_200
    # Cross-attention is square too; the feed-forward goes to 13824 and back.
    released = config_of("wan14b", "objective.preset=released").lora
    assert lora_parameters(architecture, released) == 40 * 48 * (8 * (5120 + 5120) + 2 * (5120 + 13_824))
    assert lora_parameters(architecture, LoraConfig(rank=1, targets=["ffn.net.2"])) == 40 * (13_824 + 5120)


def test_memory_of_wan14b_fits_one_device_of_80_gb():
    """65.5 GiB were measured at 480x832x81 with compilation; a whole step keeps between 40 and 80."""
    parts = gib_of(config_of("wan14b", "validation.prompts=[]"))
    assert 40 < sum(parts.values()) < 80
    assert parts["weights"] == pytest.approx(14.29e9 * 2 / GIB, rel=0.01)
    # Float32: weight, two moments, gradient, and a gradient buffer for each clip of a pair.
    assert parts["adapters"] == pytest.approx(78_643_200 * 24 / GIB)


def test_memory_follows_what_it_depends_on():
    base = gib_of(config_of("wan14b"))
    sharded = gib_of(config_of("wan14b"), world=8)
    # Two of 40 blocks are whole at once.
    assert sharded == pytest.approx(
        {**base, "weights": base["weights"] / 8, "gathered": base["weights"] / 20}, rel=1e-6
    )
    precise = gib_of(config_of("wan14b", "backbone.dtype=float32"))
    assert precise == pytest.approx({name: size * (1 if name == "adapters" else 2) for name, size in base.items()})
    kept = gib_of(config_of("wan14b", "train.activation_checkpointing=false"))
    assert kept["activations"] > 10 * base["activations"]
    pairs = gib_of(config_of("wan14b", "train.pairs_per_pass=2"))
    assert pairs["activations"] == pytest.approx(4 * base["activations"])  # two winners and two losers in one pass


def test_what_blocks_keep():
    """Measured on one GPU: 74.5 GiB with 80 on the host, 74.8 without, 47.3 with the least."""
    keep = lines_of(config_of("wan14b"))["blocks"]
    assert "26 everything in host memory" in keep and "train.memory_budget_gib 75" in keep
    assert 74 < float(keep.split("peak ")[1].split()[0]) <= 76
    without = lines_of(config_of("wan14b", "train.offload_gib=0"))["blocks"]
    assert "host" not in without and 74 < float(without.split("peak ")[1].split()[0]) <= 76
    least = lines_of(config_of("wan14b", "train.offload_gib=0", "train.memory_budget_gib=0.001"))["blocks"]
    assert "keep 40 their input" in least and float(least.split("peak ")[1].split()[0]) == pytest.approx(47.3, abs=1)
    sharded = lines_of(config_of("wan14b"), world=8, sharded=True)["blocks"]
    assert "everything" in sharded and "hidden states" not in sharded  # the room that shards leave keeps all


def test_wan14b_streams_on_a_24_gb_card():
    """By hand, GiB: two blocks 2 x 0.655, the rest of the network 0.485, six sets of adapters 1.76; inputs 12.5 and a
    block's work 6.4 make 22.4, of which as much goes to the host as a budget asks for."""
    streamed = ("backbone.stream=true", "train.offload_gib=0", "train.memory_budget_gib")
    least = lines_of(config_of("wan14b", *streamed[:2], f"{streamed[2]}=0.001"))["blocks"]
    assert "keep 40 their input: peak 22.4 GiB" in least
    for budget, host in ((22.5, 80), (22.5, 13), (12, 13)):
        lines = lines_of(config_of("wan14b", streamed[0], f"train.offload_gib={host}", f"{streamed[2]}={budget}"))
        assert float(lines["blocks"].split("peak ")[1].split()[0]) <= budget and "input in host" in lines["blocks"]
        assert (
            f"26.2 GiB of weights, page-locked, one copy for the processes of a host; up to {host} GiB" in lines["host"]
        )
        assert "weights 1.8 +" in lines["memory"] and "at most 2.2 GiB" in lines["loading"]
    eight = lines_of(config_of("wan14b", streamed[0], "backbone.dtype=float8", "train.memory_budget_gib=22.5"))
    assert "13.1 GiB of weights" in eight["host"] and "weights 2.1 +" in eight["memory"]  # a block in 8 bits more
    whole = lines_of(config_of("wan14b", "train.memory_budget_gib=22.5"))
    assert "backbone.stream=true: 22.3 GiB" in whole["blocks"] and "host" not in whole
    assert "stream" not in lines_of(config_of("wan14b"))["blocks"]


def test_streaming_counts_every_expert_that_validation_samples_with():
    stream = ("wan22_a14b_t2v", "backbone.stream=true", "objective.t_min=0.875", "validation.prompts=[]")
    one, two = (lines_of(config_of(*stream, *more)) for more in (HIGH, (*HIGH, "validation.prompts=[a ball]")))
    assert two["host"] == lines_of(config_of(*stream, "objective.t_min=0"))["host"]  # as where both train
    assert "26.2 GiB of weights" in one["host"] and "52.4 GiB of weights" in two["host"]
    assert "weights 1.8 +" in one["memory"] and "weights 2.3 +" in two["memory"]  # they share two blocks' room


def test_what_fits_where(monkeypatch, capsys):
    monkeypatch.setattr(what_fits, "CARDS", (24, 80))
    what_fits.main(["recipe=wan14b", "train.offload_gib=13"])
    _, small, large = capsys.readouterr().out.splitlines()
    assert small.startswith(" 24 GB  does not fit, with train.offload_gib=13: 2")  # two passes wait for the self-score
    assert large.startswith(" 80 GB  backbone.stream=false train.memory_budget_gib=73.5: 7")
    monkeypatch.setattr(what_fits, "CARDS", (24,))
    what_fits.main(["recipe=wan14b", "train.offload_gib=13", "self_score.strength=0"])
    assert "24 GB  backbone.stream=true train.memory_budget_gib=21: 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="only fused blocks .* but backbone.compile=false, train.parameters=lora: set"):
        what_fits.main(["recipe=wan14b", "backbone.compile=false"])
    assert "blocks" not in lines_of(config_of("hunyuan15", "backbone.compile=true", "train.memory_budget_gib=75"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_full_weights_of_few_bits_are_refused_before_they_are_read(dtype):
    with pytest.raises(ValueError, match=f"full needs backbone.dtype=float32, not {dtype}"):
        gdpo.main(["recipe=tiny", "--dry-run", "train.parameters=full", f"backbone.dtype={dtype}"])


def test_blocks_that_are_not_fused_stream_with_checkpointing_alone():
    own = ("backbone.stream=true", "train.activation_checkpointing=false", "backbone.compile=true")
    with pytest.raises(ValueError, match="set train.activation_checkpointing=true"):
        gdpo.main(["recipe=hunyuan15", "--dry-run", *own])
    assert "host" in lines_of(config_of("hunyuan15", *own[:1], own[2]))
    assert "activations" not in lines_of(config_of("hunyuan15", *own[:1], own[2], "train.offload_gib=30"))["host"]


def test_no_budget_is_planned_for_blocks_that_are_not_fused():
    with pytest.raises(ValueError, match="only fused blocks .* but backbone.family=hunyuan15 has no fused blocks"):
        what_fits.main(["recipe=hunyuan15", "backbone.compile=true"])
    compiled = config_of("hunyuan15", "backbone.compile=true", "train.memory_budget_gib=40")
    assert "blocks" not in lines_of(compiled)


def test_two_experts_that_take_turns_count_in_host_memory(monkeypatch, capsys):
    """By hand: 2 x 14.288e9 parameters x 2 bytes are 53.2 GiB."""
    monkeypatch.setattr(what_fits, "CARDS", (80,))
    what_fits.main(["recipe=wan22_a14b_t2v"])
    assert "GiB, 53.2 of host memory; " in capsys.readouterr().out


def test_every_wan_recipe_divides_over_two_and_four_nodes_of_eight_with_one_group_a_rank():
    for name in recipes.available():
        if not name.startswith(("wan", "physisforcing")):
            continue
        for ranks in (16, 32):
            config = config_of(name)
            if config.optim.batch_size % ranks:
                config = config_of(name, f"optim.batch_size={ranks}")
            assert accumulation_steps(config, ranks) * ranks == config.optim.batch_size


def test_sharding_is_said_to_save_memory_only_under_zero3():
    def total(**options):
        return float(lines_of(config_of("wan14b"), **options)["memory"].split(" = ")[1].split(" GiB")[0])

    assert total(world=8, sharded=False) == total()
    assert total(world=8, sharded=True) == pytest.approx(total() - 26.6 * 7 / 8 + 26.6 / 20, abs=0.2)


def test_loading_holds_a_share_and_one_tensor():
    config = config_of("wan22_a14b_t2v", "validation.prompts=[a ball]", "backbone.expert=high_noise")
    both, tensor = 2 * 14.29e9 * 2 / GIB, 5120 * 13824 * 6 / GIB  # in bfloat16, and in float32 as the hub has it
    for options, share in (({"world": 8, "sharded": True}, both / 8), ({}, both)):
        line = lines_of(config, **options)["loading"]
        assert float(line.split("most ")[1].split()[0]) == pytest.approx(share + tensor, abs=0.1)


def test_both_experts_are_resident_while_validation_samples_with_them():
    one = "backbone.expert=high_noise"
    with_clips = gib_of(config_of("wan22_a14b_t2v", one))
    without = gib_of(config_of("wan22_a14b_t2v", one, "validation.prompts=[]"))
    assert with_clips == pytest.approx({**without, "weights": 2 * without["weights"]})
    both = [gib_of(config_of("wan22_a14b_t2v"), world=world) for world in (1, 8)]  # take turns, or are sharded
    assert [parts["weights"] for parts in both] == pytest.approx([without["weights"], with_clips["weights"] / 8])
    # In float32: weights and two moments of both experts and, as for one, three sets of gradients: 9 instead of 6.
    assert both[0]["adapters"] == pytest.approx(1.5 * without["adapters"])
    assert gib_of(config_of("wan14b")) == gib_of(config_of("wan14b", "validation.prompts=[]"))


@pytest.mark.parametrize(
    ("batch", "pairs", "world", "nearest"), [(8, 1, 3, "6 or 9"), (2, 1, 8, "8"), (10, 2, 2, "8 or 12")]
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_values(batch, pairs, world, nearest):
    config = config_of("wan14b", f"optim.batch_size={batch}", f"train.pairs_per_pass={pairs}")
    message = f"optim.batch_size={batch} does not divide over {world} ranks x train.pairs_per_pass={pairs}: use "
    with pytest.raises(ValueError, match=f"{message}optim.batch_size={nearest}$"):
        plan(config, world=world, sharded=False)
    for size in nearest.split(" or "):
        config.optim.batch_size = int(size)
        assert accumulation_steps(config, world) * world * pairs == int(size)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("video.height=470", "height=470 is no multiple of 16.*use 464"),
        ("video.num_frames=80", "num_frames=80 is not 1 .* use 81"),
        ("backbone.architecture=15B", "backbone.architecture='15B' is unknown: use one of"),
        ("lora.targets=[attn1.to_qq]", "did you mean 'attn1.to_q"),
    ],
)
def test_what_cannot_work_is_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        plan(config_of("wan14b", argument), world=1, sharded=False)


def test_built_groups_are_counted(tmp_path):
    folder = tmp_path / "groups"
    config = config_of("tiny", f"train.groups={folder}")
    write_synthetic_groups(folder, num_groups=10, fingerprint="tiny-1", latent_shape=(16, 5, 8, 8))
    line = lines_of(config)["groups"]
    assert f"10 in {folder}" in line and "backbone tiny-1: 16.00 epochs" in line  # 40 steps of 4 groups
    config.video.height = 128
    with pytest.raises(ValueError, match="hold latents of shape .16, 5, 8, 8., the recipe's video section gives"):
        lines_of(config)
    config.backbone.family = "wan22_ti2v"
    with pytest.raises(ValueError, match="hold latents of 16 channels, those of backbone.family=wan22_ti2v have 12"):
        lines_of(config)
    (folder / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="index.json"):
        lines_of(config)


@pytest.mark.parametrize("entry", [gdpo, sft])
def test_the_entry_points_print_the_plan_and_stop(entry, tmp_path, capsys):
    entry.main(["recipe=wan14b", f"output={tmp_path / 'run'}", "--dry-run"])
    printed = capsys.readouterr().out
    assert "78.64 M" in printed and "GiB (estimate)" in printed
    assert "ranks           1, the frozen network whole on each; ranks=16 plans for 16 under ZeRO-3" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", [gdpo, sft])
def test_a_dry_run_without_a_launcher_plans_for_any_ranks(entry, tmp_path, capsys):
    arguments = ["recipe=wan14b", f"output={tmp_path / 'run'}", "--dry-run", "ranks=16"]
    with pytest.raises(ValueError, match="batch_size=8 does not divide over 16 ranks .*: use optim.batch_size=16"):
        entry.main(arguments)
    entry.main([*arguments, "optim.batch_size=16"])
    printed = capsys.readouterr().out
    assert "ranks           16, the frozen network shared out over them (ZeRO-3)" in printed
    assert "16 groups = 16 ranks x 1 a pass x 1 accumulation" in printed
    with pytest.raises(ValueError, match="ranks=-1: give the processes to plan for"):
        entry.main([*arguments[:-1], "ranks=-1"])
