"""Prompts to clips on a tiny random Wan: base and tuned, resume, two ranks, image-to-video, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval import clips, generate
from eval import config as own_config
from eval import maker as making
from eval.prompts import make_key, slug
from train import checkpoint
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, read_clip, to_pixels, write_clip
from train.lora_switch import LoraConfig, LoraSwitch
from train.sampling import SamplerConfig, sample_clips

ROOT = Path(__file__).parents[2]
VIDEO = VideoConfig(64, 64, 5, 8.0)
PROMPTS = ["A red ball falls, and it bounces!", "A blue block slides"]
KEYS = ["000-a-red-ball-falls-and-it-bounces", "001-a-blue-block-slides"]
FILES = [f"{key}-{seed}" for key in KEYS for seed in (0, 7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_pipeline("wan21", tmp_path_factory.mktemp("wan21"))


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("lora"), model, scale=0.3)


def backbone_config(model: Path, family: str = "wan21", **more) -> BackboneConfig:
    return BackboneConfig(family, str(model), architecture="tiny", dtype="float32", text_length=32, **more)


def write_lora(folder: Path, model: Path, *, scale: float, family: str = "wan21", expert: str = "high_noise") -> Path:
    """A training folder with one checkpoint, whose rank, alpha and targets are no recipe's."""
    backbone = load_backbone(backbone_config(model, family, expert=expert), "cpu", parts=("expert",))
    switch = LoraSwitch(backbone.transformer, LoraConfig(rank=3, alpha=6.0, targets=["attn1.to_q", "attn2.to_v"]))
    generator = torch.Generator().manual_seed(5)
    for name, weight in switch.weights.items():
        if "lora_B" in name:
            weight.data.normal_(std=scale, generator=generator) if scale else weight.data.zero_()
    metadata = checkpoint.weights_metadata(switch, fingerprint=backbone.fingerprint, expert=backbone.expert)
    optimizer = torch.optim.AdamW(switch.parameters())
    step = folder / "checkpoints"
    state = {"samples_seen": 1, "skipped": 0, "seed": 0}
    checkpoint.save(step, 4, switch=switch, optimizer=optimizer, state=state, metadata=metadata, keep=1)
    return folder


def arguments(model: Path, output: Path, *more: str, prompts: list[str] | None = PROMPTS) -> list[str]:
    return [
        f"output={output}",
        f"backbone.path={model}",
        "backbone.architecture=tiny",
        "backbone.dtype=float32",
        "backbone.text_length=32",
        "video.height=64",
        "video.width=64",
        "video.num_frames=5",
        "video.fps=8",
        "sampler.steps=2",
        "sampler.guidance=2",
        *([f"generate.prompts={json.dumps(prompts)}", "generate.seeds=[0,7]"] if prompts is not None else []),
        *more,
    ]


@pytest.fixture(scope="module")
def made(model, lora, tmp_path_factory):
    """A finished run of two prompts and two seeds. Tests copy it before they change it."""
    output = tmp_path_factory.mktemp("made")
    generate.main(arguments(model, output, f"generate.lora={lora}"))
    return output


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when any weights are loaded."""
    real = load_backbone

    def shell_only(config, device, *, parts=("all",)):
        assert set(parts) <= {"tokenizer"}, "weights were loaded"
        return real(config, device, parts=parts)

    for module in (own_config, making):
        monkeypatch.setattr(module, "load_backbone", shell_only)


def files(output: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every clip."""
    folder = output / "clips"
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*.mp4"))
    }


def contents(output: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in files(output).items()}


def remade(before: dict, after: dict) -> set[str]:
    return {name for name in after if name not in before or after[name][1] != before[name][1]}


def manifest(output: Path, name: str = "manifest.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / "clips" / name).read_text(encoding="utf-8").splitlines()]


def test_every_clip_is_there_and_decodes(made):
    names = [f"{which}/{file}.mp4" for which in ("base", "side_by_side", "tuned") for file in FILES]
    assert sorted(files(made)) == sorted(names)
    folder = made / "clips"
    for file in FILES:
        base, tuned = (read_clip(folder / which / f"{file}.mp4", VIDEO) for which in ("base", "tuned"))
        assert base.shape == (5, 64, 64, 3)
        assert (base.float() - tuned.float()).abs().mean() > 2
        both = read_clip(folder / "side_by_side" / f"{file}.mp4", VideoConfig(78, 128, 5, 8.0))  # caption of 14 pixels
        assert both[:, :14].float().std() > 10  # white on black
        assert (both[:, 14:, :64].float() - base.float()).abs().mean() < 6  # encoded twice
        assert (both[:, 14:, 64:].float() - tuned.float()).abs().mean() < 6
        with pytest.raises(ValueError, match="too short"):
            read_clip(folder / "base" / f"{file}.mp4", VideoConfig(64, 64, 7, 8.0))  # a sixth would be the fifth, held
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size == (6 * 64, 8 * (64 + 18))
    assert len(set(contents(made).values())) == len(names)
    assert not list(made.rglob("*.tmp"))


def test_the_manifest_says_how_each_clip_was_made(made, model, lora):
    records = manifest(made)
    assert [(r["path"], r["which"], r["seed"]) for r in records] == [
        (f"{which}/{file}.mp4", which, int(file.split("-")[-1])) for file in FILES for which in ("base", "tuned")
    ]
    file = checkpoint.find_lora(lora)[0]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    for record in records:
        tuned = record["which"] == "tuned"
        assert record["prompt"] == PROMPTS[int(record["key"][:3])]
        assert record["lora_sha256"] == (sha256 if tuned else None) and record.get("lora") == (
            str(file) if tuned else None
        )
        assert record["backbone"] == checkpoint.find_lora(lora)[1]["fingerprint"]
        assert (record["sampler"]["steps"], record["sampler"]["guidance"], record["seconds"] > 0) == (2, 2.0, True)
        assert record["bytes"] == (made / "clips" / record["path"]).stat().st_size
        sidecar = (made / "clips" / record["path"]).with_suffix(".json")
        assert json.loads(sidecar.read_text(encoding="utf-8")) == record


def test_a_clip_is_what_the_backbone_samples_from_its_seed(made, model):
    backbone = load_backbone(backbone_config(model), "cpu")
    video, sampler = VideoConfig(64, 64, 5, 8.0), SamplerConfig(steps=2, guidance=2.0)
    latents = sample_clips(backbone, backbone.condition([PROMPTS[1]]), [7], video, sampler, progress=False)
    write_clip(made.parent / "expected.mp4", to_pixels(backbone.decode_latents(latents))[0], 8)
    assert (made.parent / "expected.mp4").read_bytes() == contents(made)[f"base/{FILES[3]}.mp4"]


def test_a_zero_lora_changes_nothing(model, tmp_path):
    zero = write_lora(tmp_path / "zero", model, scale=0)
    generate.main(arguments(model, tmp_path, f"generate.lora={checkpoint.find_lora(zero)[0]}", prompts=PROMPTS[:1]))
    clips = contents(tmp_path)
    assert len(clips) == 6
    for file in FILES[:2]:
        assert clips[f"tuned/{file}.mp4"] == clips[f"base/{file}.mp4"]


def test_base_alone_and_batches_give_the_same_bytes(made, model, tmp_path, capsys):
    generate.main(arguments(model, tmp_path, "generate.batch_size=3"))
    base = {name: data for name, data in contents(made).items() if name.startswith("base/")}
    frames = {name: read_clip(tmp_path / "clips" / name, VIDEO).float() for name in contents(tmp_path)}
    assert set(frames) == set(base)
    for name, clip in frames.items():  # another batch rounds otherwise
        assert (clip - read_clip(made / "clips" / name, VIDEO).float()).abs().mean() < 0.1
    assert [record["which"] for record in manifest(tmp_path)] == ["base"] * 4
    assert capsys.readouterr().out.splitlines()[-1] == f"clip      {tmp_path / 'clips' / 'base' / FILES[0]}.mp4"


def test_a_second_run_makes_nothing(copied, model, lora, no_weights, capsys):
    before, records = files(copied), manifest(copied)
    generate.main(arguments(model, copied, f"generate.lora={lora}"))
    assert files(copied) == before and manifest(copied) == records
    folder = copied / "clips"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("clips     8, of which 0 made now; ") and printed[0].endswith(" s per clip")
    assert printed[1:] == [
        f"sheet     {folder / 'sheet.png'}",
        f"manifest  {folder / 'manifest.jsonl'}",
        f"compare   {folder / 'side_by_side' / FILES[0]}.mp4",
    ]


def test_only_what_is_missing_or_not_whole_is_made_again(copied, model, lora):
    before, folder = files(copied), copied / "clips"
    (folder / "tuned" / f"{FILES[1]}.mp4").unlink()
    (folder / "base" / f"{FILES[2]}.json").unlink()  # as a kill between clip and sidecar leaves it
    cut = folder / "base" / f"{FILES[3]}.mp4"
    cut.write_bytes(cut.read_bytes()[:-9])
    (folder / "side_by_side" / f"{FILES[0]}.json").write_text("{", encoding="utf-8")
    generate.main(arguments(model, copied, f"generate.lora={lora}"))
    after = files(copied)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    places = {f"tuned/{FILES[1]}", f"base/{FILES[2]}", f"base/{FILES[3]}", f"side_by_side/{FILES[0]}"}
    assert remade(before, after) == {f"{place}.mp4" for place in places}


@pytest.mark.slow
def test_a_run_killed_between_clip_and_sidecar_leaves_no_lie(copied, model, monkeypatch):
    """New frames must not stand beside the sidecar of the old settings."""

    def killed(path, text):
        raise KeyboardInterrupt

    before = contents(copied)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clips, "write_text", killed)
        generate.main(arguments(model, copied, "sampler.steps=3"))
    first = f"base/{FILES[0]}.mp4"
    assert contents(copied)[first] != before[first]
    generate.main(arguments(model, copied))  # the old settings again
    assert contents(copied) == before


@pytest.mark.slow
def test_another_sampler_makes_all_again_and_says_so(copied, model, lora, capsys):
    before = files(copied)
    generate.main(arguments(model, copied, f"generate.lora={lora}", "sampler.steps=3"))
    after = files(copied)
    assert remade(before, after) == set(before)
    assert all(after[name][0] != before[name][0] for name in before)
    printed = capsys.readouterr().out
    assert "8 clips in" in printed and "made again" in printed and "(other: sampler)" in printed
    assert {record["sampler"]["steps"] for record in manifest(copied)} == {3}


@pytest.mark.slow
def test_another_lora_under_its_own_name_shares_the_base_clips(copied, model, tmp_path):
    before = files(copied)
    other = write_lora(tmp_path / "other", model, scale=0.1)
    generate.main(arguments(model, copied, f"generate.lora={other}", "generate.name=weak"))
    after = files(copied)
    assert remade(before, after) == {f"{which}/{file}.mp4" for which in ("weak", "side_by_side-weak") for file in FILES}
    assert [record["which"] for record in manifest(copied, "manifest-weak.jsonl")] == ["base", "weak"] * 4
    assert (copied / "clips" / "sheet-weak.png").exists()
    assert all(after[f"weak/{file}.mp4"][0] != after[f"tuned/{file}.mp4"][0] for file in FILES)


def test_the_tuned_clips_alone(made, model, lora, tmp_path):
    generate.main(arguments(model, tmp_path, f"generate.lora={lora}", "generate.base=false"))
    assert contents(tmp_path) == {name: data for name, data in contents(made).items() if name.startswith("tuned/")}


def test_a_dry_run_counts_and_loads_nothing(copied, model, lora, no_weights, capsys):
    (copied / "clips" / "tuned" / f"{FILES[1]}.mp4").unlink()
    before = files(copied)
    generate.main(arguments(model, copied, f"generate.lora={lora}", "sampler.guidance=2", "--dry-run"))
    assert files(copied) == before
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["jobs"] == "4 = 2 prompts x 2 seeds, on 1 rank"
    assert lines["clips"] == "8: 7 done, 1 to do"
    assert lines["network"] == "passes  4, 4 per clip (2 steps)"
    assert lines["LoRA"].endswith("(rank 3, alpha 6, for transformer)")
    assert lines["tokens"] == "32 per network pass"  # 2 latent frames of 4 x 4 patches


def test_a_dry_run_without_the_model(tmp_path, capsys):
    """The recipe's model need not be here: shapes come from the family's table, and nothing is downloaded."""
    generate.main(["recipe=wan14b", f"output={tmp_path}", "--dry-run"])
    printed = capsys.readouterr().out
    assert "8: 0 done, 8 to do" in printed and "32760 per network pass" in printed and "not here yet" in printed
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return write_tiny_pipeline("wan22_i2v", tmp_path_factory.mktemp("wan22_i2v"))


def image_arguments(model: Path, output: Path, *more: str) -> list[str]:
    picture = output / "first.png"
    if not picture.exists():
        Image.new("RGB", (100, 80), (200, 40, 40)).save(picture)
    more = ("backbone.family=wan22_i2v", f"generate.images=['{picture}']", "generate.seeds=[0]", *more)
    return arguments(model, output, *more, prompts=PROMPTS[:1])


@pytest.mark.slow
def test_the_lora_goes_to_the_expert_it_was_trained_on(image_model, tmp_path):
    """One step, at t = 1, is the high-noise expert's alone; of two the second, at t = .75, is the low-noise one's.

    backbone.expert says which one training would take, and must not matter here.
    """
    names = {}
    for expert, steps in (("high_noise", 1), ("low_noise", 1), ("low_noise", 2)):
        lora = write_lora(tmp_path / expert, image_model, scale=0.3, family="wan22_i2v", expert=expert)
        settings = [f"generate.lora={lora}", f"sampler.steps={steps}", "backbone.expert=low_noise", "sampler.shift=3"]
        generate.main(image_arguments(image_model, tmp_path, *settings))
        clips = contents(tmp_path)
        names[expert, steps] = clips[f"base/{FILES[0]}.mp4"] == clips[f"tuned/{FILES[0]}.mp4"]
    assert names == {("high_noise", 1): False, ("low_noise", 1): True, ("low_noise", 2): False}


@pytest.mark.slow
def test_another_picture_under_the_same_name_counts(image_model, tmp_path, capsys):
    args = image_arguments(image_model, tmp_path, "sampler.steps=1")
    generate.main(args)
    before = files(tmp_path)
    assert [record["image"] for record in manifest(tmp_path)] == [str(tmp_path / "first.png")]
    Image.new("RGB", (100, 80), (20, 40, 200)).save(tmp_path / "first.png")
    generate.main(args)
    assert remade(before, files(tmp_path)) == set(before)
    assert "(other: image_sha256)" in capsys.readouterr().out


def test_image_and_text_to_video_begins_with_its_image(tmp_path):
    model = write_tiny_pipeline("wan22_ti2v", tmp_path / "model")
    for number, colour in enumerate(((250, 10, 10), (10, 10, 250))):
        still = torch.tensor(colour, dtype=torch.uint8).expand(9, 80, 96, 3)
        write_clip(tmp_path / "list" / f"{number}.mp4", still, 8)
    listing = tmp_path / "list" / "prompts.csv"
    listing.write_text("prompt,image,key\na ball,0.mp4,Red One\na ball,1.mp4,\n", encoding="utf-8")
    args = ["backbone.family=wan22_ti2v", f"generate.prompts_file={listing}", "seed=3", "generate.batch_size=2"]
    generate.main(arguments(model, tmp_path, *args, prompts=None))
    assert sorted(files(tmp_path)) == ["base/001-a-ball-3.mp4", "base/red-one-3.mp4"]
    red, blue = (
        read_clip(tmp_path / "clips" / name, VIDEO) for name in ("base/red-one-3.mp4", "base/001-a-ball-3.mp4")
    )
    assert not torch.equal(red, blue)  # same prompt and noise, another image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["generate.prompts=[]"], "holds no prompts"),
        (["generate.prompts=['a', ' ']"], "prompt 2 is empty"),
        (["generate.images=['a.png']"], "1 files for 2 prompts"),
        (["generate.images=['a.png', 'b.png']"], "backbone.family=wan21 generates from text alone"),
        (["generate.seeds=[1,1]"], r"generate.seeds=\[1, 1\]: 1 is"),
        (["generate.seeds=[-1]"], "-1 is negative"),
        (["generate.batch_size=0"], "generate.batch_size=0"),
        (["generate.lora=nowhere"], "LoRA nowhere does not exist"),
        (["generate.name=../x"], "generate.name='../x'"),
        (["generate.name=base"], "generate.name='base'"),
        (["generate.base=false"], "nothing to make"),
        (["video.height=72"], "height=72 is no multiple of 16"),
        (["video.num_frames=6"], "num_frames=6 .* use 5"),
        (["sampler.steps=0"], "steps=0"),
        (["backbone.random_weights=true"], "makes clips of noise"),
        (["backbone.family=wan22_i2v"], "backbone.family=wan22_i2v does not fit"),
        (["generate.prompt=['a']"], "did you mean 'prompts'"),
    ],
)
def test_bad_settings_are_refused_before_any_weights_are_loaded(change, message, model, tmp_path, no_weights):
    with pytest.raises(ValueError, match=message):
        generate.main(arguments(model, tmp_path, *change))
    assert not list(tmp_path.iterdir())


def test_images_are_checked_before_any_weights_are_loaded(image_model, tmp_path, no_weights):
    args = arguments(image_model, tmp_path, "backbone.family=wan22_i2v")
    with pytest.raises(ValueError, match="needs an image for each prompt"):
        generate.main(args)
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(ValueError, match="none.png: missing"):
        generate.main([*args, f"generate.images=['{tmp_path}/none.png','{tmp_path}/text.png']"])
    with pytest.raises(ValueError, match="text.png: truncated"):
        generate.main([*args, f"generate.images=['{tmp_path}/text.png','{tmp_path}/none.png']"])


def test_a_lora_of_another_backbone_or_none_of_ours_is_refused(lora, tmp_path, no_weights):
    other = write_tiny_pipeline("wan21", tmp_path / "other", seed=1)
    trained_on = checkpoint.find_lora(lora)[1]["fingerprint"]
    with pytest.raises(ValueError, match=f"trained on backbone {trained_on}.* is wan21-"):
        generate.main(arguments(other, tmp_path, f"generate.lora={lora}"))
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"keys that nothing here reads \(a\)"):
        generate.main(arguments(other, tmp_path, f"generate.lora={tmp_path / 'foreign.safetensors'}"))


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ("A red ball", "003-a-red-ball"),
        ("../../etc/passwd; rm -rf ~", "003-etc-passwd-rm-rf"),
        ("Ça tombe à l'eau", "003-ca-tombe-a-l-eau"),
        ("一个球落下", "003"),
        ("\0\n\\..\\C:", "003-c"),
        ("word " * 30, "003-word-word-word-word-word-word-word-w"),
        ("abcdefghij" * 3 + "abcde -z", "003-" + "abcdefghij" * 3 + "abcde"),  # no hyphen at the end
    ],
)
def test_keys_are_safe_file_names(prompt, key):
    assert make_key(3, prompt) == key and len(key) <= 40
    assert slug(key) == key


@pytest.mark.slow  # two processes that import everything
def test_two_ranks_make_what_one_makes(made, model, lora, tmp_path):
    (tmp_path / "clips").mkdir()
    shutil.copytree(made / "clips" / "base", tmp_path / "clips" / "base")
    (tmp_path / "clips" / "base" / f"{FILES[0]}.mp4").unlink()  # uneven shares
    # Not accelerate launch: without a GPU that starts one process, whatever it is asked for.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "eval.generate", *arguments(model, tmp_path, f"generate.lora={lora}")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes)
    try:
        printed, errors = run.communicate(timeout=600)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)  # the ranks too
    assert run.returncode == 0, errors
    assert "8, of which 5 made now" in printed and printed.count("manifest  ") == 1
    assert "clips: 100%" in errors and "3/3" in errors and "5/5" not in errors  # the main process's share
    assert contents(tmp_path) == contents(made)
    timeless = [[{**record, "seconds": 0} for record in manifest(output)] for output in (tmp_path, made)]
    assert timeless[0] == timeless[1]
    assert (tmp_path / "clips" / "sheet.png").read_bytes() == (made / "clips" / "sheet.png").read_bytes()
