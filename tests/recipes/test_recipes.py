"""Recipes: every shipped one under every entry point, the order of the layers, and what a mistake is answered with."""

import hashlib
import importlib
import re
from dataclasses import asdict, dataclass, field, is_dataclass, replace

import pytest
from omegaconf import OmegaConf

import recipes
from train import gdpo, sft
from train.backbones import find_architecture, load_backbone
from train.sampling import grid, sigma_grid
from train.terms.physics import feature_block

ENTRY_POINTS = [
    "train.gdpo",
    "train.sft",
    "train.tools.benchmark",
    "train.tools.inspect_targets",
    "data_pipeline.build",
    "eval.generate",
    "eval.run",
    "eval.experiments.search.run",
    "eval.experiments.search.frontier",
    "eval.experiments.search.benchmark",
    "eval.prompt_refinement.run",
]


def config_class(entry):
    return importlib.import_module(entry).Config


def load(*arguments):
    return recipes.load(gdpo.Config, list(arguments))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# What ships


@pytest.mark.parametrize("name", recipes.available())
def test_every_recipe_loads_under_every_entry_point(name, capsys):
    shipped = OmegaConf.to_container(OmegaConf.load(recipes.FOLDER / f"{name}.yaml"), resolve=True)
    for entry in ENTRY_POINTS:
        config = recipes.load(config_class(entry), [f"recipe={name}"])
        assert (config.recipe, config.output, config.dry_run) == (name, f"runs/{name}", False), entry
        assert getattr(config, "seed", 0) == 0, entry
        assert capsys.readouterr().err == "", entry  # a section for another entry point is not worth a word
        found = asdict(config)
        for section in shipped.keys() & found.keys():
            if isinstance(shipped[section], dict):
                assert within(shipped[section], found[section]) == shipped[section], entry


def within(shipped, found):
    """What `found` holds at the keys of `shipped`."""
    return {key: within(value, found[key]) if isinstance(value, dict) else found[key] for key, value in shipped.items()}


def test_every_section_and_key_of_a_recipe_is_read_by_an_entry_point():
    """The loader checks a section's keys only where it is read: none may be read nowhere."""
    read = {}
    for entry in ENTRY_POINTS:
        for section, value in asdict(config_class(entry)()).items():
            if isinstance(value, dict):
                read.setdefault(section, set()).update(value)
    assert set(recipes.SECTIONS) == set(read)
    for name in recipes.available():
        for section, value in OmegaConf.to_container(OmegaConf.load(recipes.FOLDER / f"{name}.yaml")).items():
            assert section in recipes.KEYS or set(value) <= read[section], f"{name}.yaml: {section}"


def test_moved_keys_are_refused_with_their_new_place():
    for key, place in recipes.MOVED.items():
        section, _, inner = key.partition(".")
        readers = [one for one in map(config_class, ENTRY_POINTS) if inner and section in one.__dataclass_fields__]
        for reader in readers:
            with pytest.raises(ValueError, match=f"unknown key {key}; it is {re.escape(place)} now$"):
                recipes.load(reader, [f"{key}=1"])
        assert readers or key == "benchmark"  # the section moved as a whole


def test_moved_keys_of_a_recipe_are_named_together(tmp_path):
    mine = write(tmp_path / "mine.yaml", "train: {resume: true, max_nonfinite: 3}\noptim: {eps: 1, lr: 1}\n")
    with pytest.raises(
        ValueError, match=r"mine.yaml: 3 keys are elsewhere now.*: train.resume: .*; train.max_nonf.*; optim.eps: a"
    ):
        load(f"recipe={mine}")


def test_moved_keys_name_constants_that_are_there():
    for key, place in recipes.MOVED.items():
        if place.startswith("the constant "):
            module, _, name = place.removeprefix("the constant ").split()[0].rpartition(".")
            lines = (recipes.FOLDER.parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8").splitlines()
            assert any(line.startswith(f"{name} = ") for line in lines), f"{key}: {place}"


@pytest.mark.parametrize("name", recipes.available())
def test_every_recipe_names_a_known_backbone_and_trains_where_its_expert_serves(name):
    config = load(f"recipe={name}")
    find_architecture(config.backbone)
    gdpo.check(config)
    assert (config.objective.t_min, config.objective.t_max) == (0, 1)
    both = name.startswith("wan22_a14b")  # physisforcing_a14b trains one expert for all t, as its paper
    assert config.backbone.expert == ("both" if both else "high_noise")
    if both:  # in as many of its steps as sampling has
        assert (config.objective.timesteps, config.objective.timestep_shift) == ("uniform", config.sampler.shift)


@pytest.mark.parametrize(
    ("name", "steps", "shift", "guidance", "high"),
    [
        ("wan1_3b", 50, 5, (5, None), None),
        ("wan14b", 50, 5, (5, None), None),
        ("wan22_5b", 50, 5, (5, None), None),
        ("physisforcing_5b", 50, 5, (5, None), None),
        ("wan22_a14b_t2v", 40, 12, (4, 3), 26),
        ("wan22_a14b_i2v", 40, 5, (3.5, 3.5), 15),
        ("physisforcing_a14b", 40, 5, (3.5, 3.5), 15),
    ],
)
def test_recipes_sample_as_wan_itself_does(name, steps, shift, guidance, high):
    """Values of Wan's public configs. Step i = 0, 1 ... of n begins at s u / (1 + (s - 1) u) with u = 1 - i / n, at
    least b where u >= b / (s - (s - 1) b): .875 / 2.375 = .368, so i <= 25, and .9 / 1.4 = .643, so i <= 14."""
    config = load(f"recipe={name}")
    sampler = config.sampler
    assert (sampler.steps, sampler.shift, (sampler.guidance, sampler.guidance_low)) == (steps, shift, guidance)
    assert hashlib.sha256(sampler.negative_prompt.encode()).hexdigest().startswith("ce96e0324e4b54ce")  # Wan's own
    backbone = load_backbone(replace(config.backbone, path="", random_weights=True), "cpu", parts=())
    served = [backbone._expert_at(t) for t in sigma_grid(sampler.steps, sampler.shift)[:-1]]
    assert high is None or served == ["high_noise"] * high + ["low_noise"] * (steps - high)


def test_turbo_samples_as_its_authors_script_does():
    """TurboDiffusion's wan2.2_i2v_infer.py: sigma_max 200, boundary .9: the high-noise expert serves two of four."""
    config = load("recipe=turbo_wan22_a14b")
    backbone = load_backbone(replace(config.backbone, path="", random_weights=True), "cpu", parts=())
    times = grid(config.sampler)[0]
    assert times.tolist() == pytest.approx([0.995025, 0.933781, 0.852895, 0.608979, 0], abs=1e-6)
    assert [backbone._expert_at(t) for t in times[:-1]] == ["high_noise"] * 2 + ["low_noise"] * 2
    clips = recipes.load(config_class("eval.generate"), ["recipe=turbo_wan22_a14b"])
    clips.check("generate")  # search and refinement go with the sampler


def test_the_preset_proprio_is_the_papers_refinement():
    """Table 10 and appendix E."""
    entry = config_class("eval.generate")
    refine = recipes.load(entry, ["recipe=wan14b", "objective.preset=proprio"]).search.refine
    printed = {"updates": 10, "learning_rate": 2e-3, "levels": 4, "draws": 4, "gradient": "proprio"}
    assert printed.items() <= asdict(refine).items() and (refine.first, refine.last, refine.steps) == (0.3, 0.6, 4)
    assert recipes.load(entry, ["recipe=wan14b"]).search.refine.fresh


def test_groups_validation_and_benchmarks_of_a_recipe_agree_on_the_first_frame():
    """wan22_ti2v, which can do both: from text in wan22_5b, from an image in physisforcing_5b."""
    for name, image in (("wan22_5b", False), ("physisforcing_5b", True)):
        build = recipes.load(config_class("data_pipeline.build"), [f"recipe={name}"])
        assert build.pipeline.first_frame is image
        shipped = OmegaConf.load(recipes.FOLDER / f"{name}.yaml")
        assert image is not bool(shipped.validation.get("prompts"))  # prompts alone are for text
        assert not {"physics_iq", "pai_bench"} & set(shipped.get("benchmarks", []))  # they show an image


def test_the_preset_paper_holds_the_papers_values():
    config = load("recipe=wan14b", "objective.preset=paper")
    paper = {
        "video": {"height": 480, "width": 832, "num_frames": 81, "fps": 16.0},
        "lora": {
            "rank": 48,
            "alpha": 48.0,
            "targets": ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"],
        },
        "objective": {
            "preset": "paper",
            "loss": "bound",
            "beta": 1000.0,
            "physics_guided": True,
            "alpha_min": 0.5,
            "k_alpha": 5.0,
            "b_alpha": 0.5,
            "k_gamma": 2.0,
            "b_gamma": 0.4,
            "lam": 0.6,
            "gamma_per_loser": False,
            "score_floor": 0.0,
            "group_factor": True,
            "weighting": "none",
            "winner": "real",
            "noise": "shared",
            "anchor": 0.0,
            "t_min": 0.0,
            "t_max": 1.0,
        },
        "physics": {"trajectory": 0.0, "relational": 0.0},
        "self_score": {"strength": 0.0},
        "optim": {
            "steps": 10_000,
            "batch_size": 8,
            "lr": 1e-5,
            "lr_end": 1e-6,
            "schedule": "cosine",
            "warmup_steps": 0,
            "weight_decay": 0.01,
        },
    }
    found = asdict(config)
    for section, values in paper.items():
        assert {key: found[section][key] for key in values} == values
    assert (config.backbone.family, config.backbone.architecture) == ("wan21", "14B")
    assert config.backbone.path == "Wan-AI/Wan2.1-T2V-14B-Diffusers"


@pytest.mark.parametrize(("name", "blocks", "block"), [("physisforcing_a14b", 40, 20), ("physisforcing_5b", 30, 15)])
def test_physisforcing_holds_its_papers_values(name, blocks, block):
    config = recipes.load(sft.Config, [f"recipe={name}"])
    assert config.physics.trajectory > 0 and config.physics.relational > 0 and config.physics.region_focus
    assert find_architecture(config.backbone)["transformer"]["num_layers"] == blocks
    assert feature_block(config.physics, blocks) == block
    assert (config.optim.steps, config.optim.batch_size) == (20_000, 128)
    assert (config.objective.timesteps, config.objective.timestep_shift) == ("uniform", 1.0)
    assert (config.video.height, config.video.width, config.video.num_frames) == (480, 832, 81)
    targets = recipes.load(config_class("data_pipeline.build"), [f"recipe={name}"]).targets
    assert (targets.tracks, targets.grid, targets.max_tokens) == ("cotracker", 25, 512)
    assert (targets.depth, targets.relation) == ("depth_anything", "vjepa2")


def test_the_papers_values_are_the_defaults_too():
    """So that a recipe that leaves a key out gets the paper's, or, under the preset `recipe`, wan14b's."""
    defaults, recipe = load(), load("recipe=wan14b")
    assert (defaults.lora, defaults.objective, defaults.optim) == (recipe.lora, recipe.objective, recipe.optim)


# Layers


def test_the_released_preset_lies_over_the_recipe_and_under_the_command_line():
    config = load("recipe=wan14b", "objective.preset=released")
    objective = config.objective
    assert (objective.k_gamma, objective.b_gamma, objective.lam) == (3.0, 0.5, 0.5)
    assert objective.gamma_per_loser
    assert (config.optim.schedule, config.optim.steps) == ("constant", 3000)
    assert len(config.lora.targets) == 10 and "ffn.net.2" in config.lora.targets
    assert (objective.noise, objective.timesteps, objective.timestep_shift) == ("independent", "uniform", 5.0)
    assert (objective.weighting, objective.group_factor, objective.score_floor) == ("bell", False, 0.2)
    assert (objective.alpha_min, objective.k_alpha, objective.beta) == (0.5, 5.0, 1000.0)  # the recipe's, untouched
    assert objective.preset == "released"

    config = load("recipe=wan14b", "objective.preset=released", "optim.steps=7", "objective.lam=0.25")
    assert (config.optim.steps, config.optim.schedule) == (7, "constant")
    assert (config.objective.lam, config.objective.b_gamma) == (0.25, 0.5)


def test_a_preset_named_in_a_recipe_is_applied_and_the_command_line_can_undo_it(tmp_path):
    mine = write(tmp_path / "mine.yaml", "objective: {preset: released, lam: 0.1}\noptim: {steps: 5}\n")
    assert load(f"recipe={mine}").objective.lam == 0.5
    assert load(f"recipe={mine}").optim.steps == 3000
    undone = load(f"recipe={mine}", "objective.preset=paper")
    assert undone.objective.lam == 0.1 and undone.optim.steps == 10_000


def test_a_recipe_is_told_which_of_its_own_values_its_preset_replaces(tmp_path, capsys):
    """Recipes that earlier versions saved name the preset paper, which stood for no preset there."""
    mine = write(tmp_path / "mine.yaml", "objective: {preset: paper, anchor: 1, beta: 7}\nself_score: {strength: 3}\n")
    assert load(f"recipe={mine}").objective.anchor == 0
    said = capsys.readouterr().err
    assert "objective.preset=paper replaces its own objective.anchor=1 by 0" in said
    assert "replaces its own self_score.strength=3 by 0" in said and "beta" not in said
    load(f"recipe={mine}", "objective.preset=recipe")
    assert capsys.readouterr().err == ""


def test_a_preset_of_other_commands_is_said(capsys):
    load("recipe=wan14b", "objective.preset=proprio")
    assert capsys.readouterr().err == "warning: objective.preset=proprio sets nothing that this command reads\n"


def test_the_preset_reaches_every_command(capsys):
    assert recipes.load(sft.Config, ["recipe=wan14b", "objective.preset=released"]).optim.schedule == "constant"
    build = recipes.load(config_class("data_pipeline.build"), ["recipe=wan14b", "objective.preset=released"])
    assert not hasattr(build, "objective") and capsys.readouterr().err == ""


def test_the_command_line_goes_over_the_recipe():
    arguments = ["recipe=tiny", "seed=7", "video.fps=12", "lora.targets=[attn1.to_q]", "validation.seeds=[8,9]"]
    config = load(*arguments, "--optim.lr=0.5", "backbone.compile=true", "sampler.guidance_low=2")
    assert config.seed == 7 and config.video.fps == 12.0 and isinstance(config.video.fps, float)
    assert config.lora.targets == ["attn1.to_q"] and config.lora.rank == 8
    assert config.validation.seeds == [8, 9] and config.optim.lr == 0.5
    assert config.backbone.compile is True and config.sampler.guidance_low == 2.0
    assert load("recipe=tiny", "sampler.guidance_low=null").sampler.guidance_low is None


def test_dry_run_and_other_flags():
    assert load("recipe=tiny", "--dry-run").dry_run is True
    assert load("--dry_run").dry_run is True
    assert load("--backbone.compile").backbone.compile is True


def test_no_arguments_means_the_command_lines(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gdpo.py", "recipe=tiny", "seed=5"])
    assert recipes.load(gdpo.Config).seed == 5


def test_paths_follow_the_output_folder():
    config = load("recipe=tiny")
    assert (config.train.groups, config.train.folder) == ("runs/tiny/groups", "runs/tiny/train")
    assert config.backbone.path == "runs/tiny/model"
    moved = load("recipe=tiny", "output=/data/run", "train.groups=${output}/other")
    assert (moved.train.groups, moved.train.folder) == ("/data/run/other", "/data/run/train")
    assert moved.backbone.path == "/data/run/model"


def test_a_list_may_refer_to_another_key():
    config = load("validation.prompts=[a ball]", "sampler.negative_prompt=rain", "lora.targets=${validation.prompts}")
    assert config.lora.targets == ["a ball"]


def test_a_recipe_may_be_a_file(tmp_path, monkeypatch):
    write(tmp_path / "mine.yml", "lora: {rank: 3}\n")
    monkeypatch.chdir(tmp_path)
    assert load("recipe=mine.yml").lora.rank == 3


# Saving


@pytest.mark.parametrize("name", recipes.available())
def test_the_saved_recipe_gives_the_same_config(name, tmp_path):
    config = load(f"recipe={name}", "optim.lr=3e-5", "sampler.guidance_low=2", 'validation.prompts=["a: b # c", "née"]')
    saved = write(tmp_path / "recipe.yaml", recipes.to_yaml(config))
    assert replace(load(f"recipe={saved}"), recipe=name) == config
    assert "${" not in saved.read_text(encoding="utf-8")


def test_the_saved_recipe_keeps_what_was_set_over_a_preset(tmp_path):
    config = load("recipe=wan14b", "objective.preset=released", "optim.steps=7", "lora.targets=[attn1.to_q]")
    write(tmp_path / "recipe.yaml", recipes.to_yaml(config))
    again = load(f"recipe={tmp_path / 'recipe.yaml'}")
    assert (again.lora, again.optim) == (config.lora, config.optim)
    assert replace(again.objective, preset="released") == config.objective
    assert "released" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")  # the file says where it came from


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=wan14"], r"recipe='wan14' is neither a recipe \(.*tiny.*\) nor a YAML file; did you mean 'wan14b'\?"),
        (["recipe=gone/mine.yaml"], "recipe='gone/mine.yaml' is neither a recipe"),
        (["optimm.lr=1"], r"the command line: unknown section 'optimm'; did you mean 'optim'\?"),
        (["sed=1"], r"the command line: unknown section 'sed'; did you mean 'seed'\?"),
        (["--dryrun"], r"unknown section 'dryrun'; did you mean 'dry_run'\?"),
        (["--dry-run=true"], r"unknown section 'dry-run'; did you mean 'dry_run'\?"),
        (["optim.learning=1"], "the command line: unknown key optim.learning"),
        (["lora.target=[a]"], r"the command line: unknown key lora.target; did you mean 'targets'\?"),
        (["zzz.q=1"], "unknown section 'zzz'; known: .*backbone.*optim"),
        (["lora.zzz=1"], "unknown key lora.zzz; known: rank, alpha, targets"),
        (["recipe=wan14b", "objective.preset=relaesed"], r"objective.preset='relaesed' .* did you mean 'released'\?"),
        (["optim.steps=many"], "the command line: optim.steps: .*'many'.*[Ii]nteger"),
        (["optim.steps=1.5"], "the command line: optim.steps: "),
        (["seed=x"], "the command line: seed: "),
        (["video.fps=fast"], "the command line: video.fps: .*'fast'.*[Ff]loat"),
        (["backbone.compile=perhaps"], "the command line: backbone.compile: .*'perhaps'"),
        (["validation.seeds=[9,x]"], r"the command line: validation.seeds.*: "),
        (["lora.targets=attn1.to_q"], r"lora.targets='attn1.to_q' must be a list: lora.targets=\[attn1.to_q\]"),
        (["validation.prompts=A ball"], r"validation.prompts='A ball' must be a list: validation.prompts=\[A ball\]"),
        (["backbone.loras=a.safetensors"], r"must be a list: backbone.loras=\[\{path: a.safetensors\}\]$"),
        (["backbone.loras=[a.safetensors]"], r"loras\[0\]='a.safetensors' must hold keys: backbone.loras=\[\{path: a"),
        (["backbone.loras=[{file: a}]"], r"unknown key backbone.loras\[0\].file; known: path, weight, expert"),
        (["optim.lr=null"], "the command line: optim.lr: "),
        (["optim=fast"], "the command line: section 'optim' must hold keys, found 'fast'"),
        (["objective=preset"], "the command line: section 'objective' must hold keys, found 'preset'"),
        (["train.groups=${outptu}/g"], "the command line: train.groups: .*outptu"),
        (["optim.lr"], r"argument 'optim.lr' is not of the form key=value \(or --flag\)"),
        (["-v"], "argument '-v' is not of the form key=value"),
    ],
)
def test_a_mistake_on_the_command_line_names_key_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optmi: {lr: 1}\n", r"mine\.yaml: unknown section 'optmi'; did you mean 'optim'\?"),
        ("optim: {stesp: 1}\n", r"mine\.yaml: unknown key optim.stesp; did you mean 'steps'\?"),
        ("optim: {steps: many}\n", r"mine\.yaml: optim.steps: .*'many'"),
        ("optim:\n", r"mine\.yaml: section 'optim' must hold keys, found None"),
        ("optim: 3\n", r"mine\.yaml: section 'optim' must hold keys, found 3"),
        ("lora: {targets: ffn.net.2}\n", r"mine\.yaml: lora.targets='ffn.net.2' must be a list"),
        ("- optim\n", r"mine\.yaml must hold sections"),
        ("optim: {lr: 1\nseed: 2\n", r"mine\.yaml is not valid YAML: .*line"),
        ("backbone: {path: '${nowhere}/x'}\n", r"recipe '.*mine\.yaml': backbone.path: .*nowhere"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(text, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(f"recipe={write(tmp_path / 'mine.yaml', text)}")


@dataclass
class Section:
    lr: float = 0.1


@dataclass
class Small:
    """An entry point that reads little."""

    recipe: str = ""
    seed: int = 0
    optim: Section = field(default_factory=Section)


def test_a_section_that_the_command_does_not_read_warns_on_the_command_line_only(capsys):
    config = recipes.load(Small, ["lora.rank=4", "output=x", "seed=1"])
    assert config == Small(seed=1)
    printed = capsys.readouterr().err.splitlines()
    assert printed == [
        "warning: lora.rank is not read by this command: ignored",
        "warning: output is not read by this command: ignored",
    ]


def test_a_key_of_another_commands_dataclass_is_an_error():
    with pytest.raises(ValueError, match=r"unknown key optim.steps; known: lr"):
        recipes.load(Small, ["recipe=tiny"])


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_sections_are_dataclasses_that_the_loader_knows(entry):
    for name, value in vars(config_class(entry)()).items():
        assert is_dataclass(value) == (name in recipes.SECTIONS)
