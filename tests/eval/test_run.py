"""`eval/run.py`: base and tuned on the sandbox benchmark with a tiny random pipeline; its page; what a kill leaves."""

import html
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eval import benchmarks, run
from eval import maker as making
from eval.benchmarks import sandbox
from eval.benchmarks.base import Benchmark, Published, Requirement, Row, Task
from eval.benchmarks.vlm_rows import AskedBenchmark, judge_requirement, judge_rows
from eval.report import tables as report
from eval.report.rows import RowFile, identity, scoring_settings
from eval.vlm.client import jpeg_frames
from tests.eval.vlm_stub import StubServer
from train import checkpoint, export
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, read_clip
from train.full_parameters import FullParameters
from train.lora_switch import LoraConfig, LoraSwitch
from train.sampling import SamplerConfig, sample_clips

ROOT = Path(__file__).parents[2]
VIDEO = VideoConfig(32, 32, 17, 8.0)
# One clip at a time: in another batch, as after a stop, it rounds otherwise.
COMMON = [
    "recipe=tiny",
    "video.height=32",
    "video.width=32",
    "run.sandbox.clips=5",
    "run.batch_size=1",
    "sampler.steps=2",
    "sampler.guidance=1.0",
]


@dataclass
class Made:
    folder: Path
    results: dict

    def arguments(self, *more: str) -> list[str]:
        model = f"backbone.path={self.model}"
        return [*COMMON, f"output={self.folder}", model, f"run.lora={self.model.parent / 'lora.safetensors'}", *more]

    def run(self, *more: str) -> dict:
        return run.main(self.arguments(*more))

    @property
    def eval(self) -> Path:
        return self.folder / "eval"

    model: Path = Path()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_tiny_pipeline("wan21", folder / "model")
    config = BackboneConfig(path=str(folder / "model"), dtype="float32", text_length=64)
    backbone = load_backbone(config, "cpu", parts=("transformer",))
    switch = LoraSwitch(backbone.transformer, LoraConfig(rank=2, alpha=4.0))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(weight.shape, generator=generator) * 0.3 for name, weight in switch.weights.items()}
    metadata = checkpoint.weights_metadata(switch, fingerprint=backbone.fingerprint, expert=backbone.expert)
    save_file(state, folder / "lora.safetensors", metadata=metadata)
    made = Made(folder, {}, folder / "model")
    made.results = made.run()
    return made


@pytest.fixture
def copied(tuned, tmp_path):
    shutil.copytree(tuned.eval, tmp_path / "eval")
    return Made(tmp_path, tuned.results, tuned.model)


def times(folder: Path) -> dict[str, int]:
    return {path.name + path.parent.name: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}


def clip_times(made: Made) -> dict[str, int]:
    return times(made.eval / "sandbox" / "clips")


def row_lines(made: Made, model: str) -> list[dict]:
    return [json.loads(line) for line in (made.eval / "sandbox" / f"rows-{model}.jsonl").read_text().splitlines()]


def fresh(results: dict) -> dict:
    """Without what differs from run to run."""
    kept = {name: value for name, value in results.items() if name not in ("date", "compute", "settings")}
    kept["benchmarks"] = {
        name: {key: value for key, value in found.items() if key != "compute"}
        for name, found in results["benchmarks"].items()
    }
    return kept


def same_figures(results: dict, expected: dict) -> bool:
    """To rounding, which another batch of the judge changes."""
    models, others = (found["benchmarks"]["sandbox"]["models"] for found in (results, expected))
    return all(
        (one["clips"], one["missing"]) == (others[model]["clips"], others[model]["missing"])
        and one["figures"]["physical"]["mean"] == pytest.approx(others[model]["figures"]["physical"]["mean"], abs=1e-5)
        for model, one in models.items()
    )


@pytest.fixture
def no_sampling(monkeypatch):
    monkeypatch.setattr(making.Maker, "make", lambda *_: pytest.fail("sampled again"))


def test_results_say_what_the_rows_say(tuned):
    results, found = tuned.results, tuned.results["benchmarks"]["sandbox"]
    scores = [json.loads(line) for line in (tuned.eval / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert json.loads((tuned.eval / "results.json").read_text(encoding="utf-8")) == results
    assert [score["model"] for score in scores] == ["true"] * 5 + ["base"] * 5 + ["tuned"] * 5
    physical = {
        model: np.array([score["values"]["physical"] for score in scores if score["model"] == model])
        for model in ("true", "base", "tuned")
    }
    for model, values in physical.items():
        figure = found["models"][model]["figures"]["physical"]
        assert figure["mean"] == pytest.approx(values.mean()) and (figure["clips"], figure["missing"]) == (5, 0)
    gain = found["gains"]["tuned"]["figures"]["physical"]
    assert gain["mean"] == pytest.approx((physical["tuned"] - physical["base"]).mean())
    assert found["models"]["true"]["figures"]["physical"]["mean"] > 0.9  # the judge knows true clips
    assert all(score["motion"] > 0 for score in scores if score["model"] != "true")
    assert results["lora"]["sha256"] == making.sha256(tuned.model.parent / "lora.safetensors")
    assert found["compute"]["tuned"]["clips_made"] == 5 and found["compute"]["tuned"]["passes"] == 10


def test_pictures_and_clips(tuned):
    folder = tuned.eval / "sandbox"
    for name in sorted(path.name for path in (folder / "clips" / "base").glob("*.mp4")):
        base, changed = (read_clip(folder / "clips" / model / name, VIDEO) for model in ("base", "tuned"))
        assert not torch.equal(base, changed)
    assert len(list((folder / "clips").rglob("*.mp4"))) == 10
    assert (folder / "sheet.png").stat().st_size > 1000
    read_clip(folder / "comparison.mp4", VideoConfig(46, 96, 5 * 17, 8.0))  # raises unless all frames are there


def test_clips_are_kept_without_loss(tuned):
    """What is scored are the pixels that were sampled."""
    backbone = load_backbone(BackboneConfig(path=str(tuned.model), dtype="float32", text_length=64), "cpu")
    score = json.loads((tuned.eval / "scores.jsonl").read_text(encoding="utf-8").splitlines()[6])
    assert (score["model"], score["clip"]) == ("base", 1)
    sampler = SamplerConfig("euler", steps=2, guidance=1.0, shift=3.0)
    latents = sample_clips(backbone, backbone.condition([score["prompt"]]), [1], VIDEO, sampler, progress=False)
    expected = making.to_pixels(backbone.decode_latents(latents))[0]
    clip = read_clip(tuned.eval / "sandbox" / "clips" / "base" / f"{score['key']}-0.mp4", VIDEO)
    assert torch.equal(clip, expected)


def test_the_pages_numbers_are_those_of_the_results(tuned):
    page = html.unescape((tuned.eval / "report.html").read_text(encoding="utf-8"))
    found = json.loads((tuned.eval / "results.json").read_text(encoding="utf-8"))["benchmarks"]["sandbox"]
    for figure in found["figures"]:
        shown = [report.show(found["models"][model]["figures"][figure]) for model in ("true", "base", "tuned")]
        gain = found["gains"]["tuned"]
        shown += [report.show(gain["figures"][figure], sign=True), f"p {report.show_p(gain['figures'][figure]['p'])}"]
        for third in gain["motion"]["strata"].values():
            shown += [report.show(third["base"][figure]), report.show(third["gain"][figure], sign=True)]
        shown += [report.show(one.get(figure)) for one in found["models"]["base"]["categories"].values()]
        assert [text for text in shown if f">{text}</td>" not in page] == []
    assert all(f">{report.show(value)}</td>" in page for value in found["compute"]["tuned"].values())


def test_the_page_needs_no_network_and_the_markdown_has_the_same_numbers(tuned):
    page = (tuned.eval / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("data:video/mp4;base64,") == 5 and "<svg" in page
    gain = tuned.results["benchmarks"]["sandbox"]["gains"]["tuned"]["figures"]["physical"]
    assert report.show(gain, sign=True) in (tuned.eval / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_full_weights_are_compared_with_their_base(tuned, tmp_path):
    config = BackboneConfig(path=str(tuned.model), dtype="float32", text_length=64)
    backbone = load_backbone(config, "cpu", parts=("transformer",))
    switch = FullParameters(backbone.transformer)
    metadata = checkpoint.weights_metadata(switch, fingerprint=backbone.fingerprint, expert=backbone.expert)
    generator = torch.Generator().manual_seed(0)
    state = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in switch.state_dict().items()}
    save_file(state, tmp_path / "transformer.safetensors", metadata=metadata)
    shutil.copytree(tuned.eval / "sandbox" / "clips" / "base", tmp_path / "eval" / "sandbox" / "clips" / "base")
    full = run.main([*COMMON, f"backbone.path={tuned.model}", f"output={tmp_path}", f"run.lora={tmp_path}"])
    models = full["benchmarks"]["sandbox"]["models"]
    assert models["base"] == tuned.results["benchmarks"]["sandbox"]["models"]["base"]
    assert full["compute"]["made_now"] == 5
    assert models["tuned"] != tuned.results["benchmarks"]["sandbox"]["models"]["tuned"]


def test_a_second_run_makes_and_scores_nothing(copied, no_sampling, monkeypatch):
    before = {path: path.read_bytes() for path in copied.eval.rglob("rows-*.jsonl")}
    monkeypatch.setattr(sandbox.Sandbox, "score", lambda *_: pytest.fail("scored again"))
    seen = clip_times(copied)
    again = copied.run()
    assert fresh(again) == fresh(copied.results) and clip_times(copied) == seen
    assert {path: path.read_bytes() for path in copied.eval.rglob("rows-*.jsonl")} == before


def test_another_sampler_is_sampled_anew(copied, monkeypatch):
    monkeypatch.setattr(making, "sample_clips", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("sampled")))
    with pytest.raises(RuntimeError, match="sampled"):
        copied.run("sampler.steps=3")


@pytest.mark.slow
def test_a_search_stands_beside_both_models(copied):
    search = ["run.search=best_of_n", "search.num_candidates=2", "search.chosen_by=most_motion"]
    results = copied.run(*search)["benchmarks"]["sandbox"]
    assert list(results["models"]) == ["true", "base", "tuned", "base-best_of_n", "tuned-best_of_n"]
    assert set(results["gains"]) == {"tuned", "base-best_of_n", "tuned-best_of_n"}
    sidecars = sorted((copied.eval / "sandbox" / "clips" / "tuned-best_of_n").glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sidecars]
    assert len(found) == 5 and {one["search"]["passes"] for one in found} == {4}
    assert all(one["seed"] == one["search"]["seeds"][0] for one in found)
    before = times(copied.eval / "sandbox" / "clips")
    copied.run(*search, "search.batch_size=2", "search.refine.updates=3")  # what no clip depends on
    assert times(copied.eval / "sandbox" / "clips") == before


@pytest.mark.slow
def test_several_seeds_are_clips_of_one_prompt(copied):
    before = clip_times(copied)
    results = copied.run("run.seeds=[0,1]")
    after = clip_times(copied)
    assert len(after) == 20 and {name: after[name] for name in before} == before
    found = results["benchmarks"]["sandbox"]
    assert found["prompts"] == 5 and found["models"]["base"]["figures"]["physical"]["clips"] == 10
    assert found["models"]["true"]["clips"] == 5 and found["gains"]["tuned"]["figures"]["physical"]["clips"] == 10


@pytest.mark.slow
def test_a_stop_while_sampling_or_scoring_loses_nothing(copied, monkeypatch):
    shutil.rmtree(copied.eval)
    real_make, real_score = making.Maker.make, sandbox.Sandbox.score
    made = []

    def make(self, model, requests):
        if len(made) == 7:
            raise KeyboardInterrupt
        real_make(self, model, requests)
        made.append(model.name)

    def score(self, samples, folder):
        for number, row in enumerate(real_score(self, samples, folder)):
            if number == 3 and samples[0].path.parent.name == "tuned":
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(making.Maker, "make", make)
        copied.run()
    first = clip_times(copied)
    assert len(first) == 7
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sandbox.Sandbox, "score", score)
        copied.run()
    second = clip_times(copied)
    assert len(second) == 10 and {name: second[name] for name in first} == first
    path = copied.eval / "sandbox" / "rows-tuned.jsonl"
    kept = path.read_bytes()
    assert kept.count(b"\n") == 3
    path.write_bytes(kept + b'{"key": "torn')  # as a kill in the middle of a line leaves it
    again = copied.run()
    assert clip_times(copied) == second and path.read_bytes().startswith(kept)
    assert len({row["key"] for row in row_lines(copied, "tuned")}) == len(row_lines(copied, "tuned")) == 5
    assert same_figures(again, copied.results)


@pytest.mark.slow
def test_a_damaged_clip_is_named_and_counted_until_it_is_made_again(copied, capsys):
    victim = sorted((copied.eval / "sandbox" / "clips" / "tuned").glob("*.mp4"))[2]
    victim.write_bytes(b"\0" * victim.stat().st_size)  # its sidecar does not notice
    rows = copied.eval / "sandbox" / "rows-tuned.jsonl"
    rows.unlink()
    found = copied.run()["benchmarks"]["sandbox"]
    (error,) = found["models"]["tuned"]["errors"]
    assert f"{error['key']}-{error['seed']}" == victim.stem and str(victim) in error["error"]
    assert [found["models"]["tuned"]["figures"]["physical"][name] for name in ("clips", "missing")] == [4, 1]
    assert [found["gains"]["tuned"]["figures"]["physical"][name] for name in ("clips", "missing")] == [4, 1]
    assert victim.stem in capsys.readouterr().out
    assert all(str(victim) in (copied.eval / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    victim.unlink()
    again = copied.run()
    assert same_figures(again, copied.results)
    assert not any(row["error"] for row in row_lines(copied, "tuned")) and len(row_lines(copied, "tuned")) == 5


# Other benchmarks


@dataclass
class Nothing:
    folder: str = ""
    strict: bool = False


class Absent(Benchmark):
    name, columns, figures = "absent", ("score",), ("score",)

    def requirements(self):
        there = bool(self.settings.folder)
        return [
            Requirement("the data", "MIT", f"run.absent.folder={self.settings.folder}", there, "get it from a shop")
        ]

    def prompts(self):
        return [Task(f"k{number}", "a red ball falls", "ab"[number % 2]) for number in range(3)]

    def score(self, samples, folder):
        yield Row.of(samples[0], {"score": float("nan")})
        raise RuntimeError("the judge crashed")


class Asked(Absent):
    name, of_clips, figures = "asked", False, ("score",)
    published = (Published("Another <model>", {"score": 0.625}, "A paper, Table 1"),)

    def requirements(self):
        return []

    def probe(self, backbone, folder, done):
        weight = sum(float(p.detach().abs().sum()) for p in backbone.transformer.parameters() if p.shape[-1] == 1)
        hidden = torch.zeros(1, *backbone.latent_shape(32, 32, 5))
        moved = backbone.velocity(hidden, torch.tensor([0.5]), backbone.condition(["a"])).abs().mean().item()
        yield from (Row(f"k{number}", 0, {"score": moved + number + 0 * weight}) for number in range(2))


class Judged(AskedBenchmark):
    """The probability of a yes, by a vision-language model."""

    name, columns, figures = "judged", ("score",), ("score",)

    def requirements(self):
        return [judge_requirement(self.vlm, "none")]

    def prompts(self):
        return [Task("k0", "a red ball falls")]

    def score(self, samples, folder):
        async def judge(vlm, sample, frames):
            return {"score": await vlm.yes_probability(frames, "Does it fall?")}

        yield from judge_rows(
            self.vlm, samples, self.model_video, folder, lambda task, clip: jpeg_frames(clip, 2, 32), judge
        )


@pytest.fixture
def more(monkeypatch):
    """Three further benchmarks."""

    @dataclass
    class More(run.RunConfig):
        absent: Nothing = run.field(default_factory=Nothing)
        asked: Nothing = run.field(default_factory=Nothing)
        judged: Nothing = run.field(default_factory=Nothing)

    @dataclass
    class Config(run.Config):
        run: More = run.field(default_factory=More)

    monkeypatch.setattr(run, "Config", Config)
    for name, kind in (("absent", Absent), ("asked", Asked), ("judged", Judged)):
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, kind)


def test_what_is_not_there_is_left_out_with_a_word(copied, more, capsys):
    results = copied.run("benchmarks=[absent,sandbox]")
    problem = "the data not found at run.absent.folder=: get it from a shop"
    assert results["benchmarks"]["absent"]["problem"] == problem
    assert fresh(results)["benchmarks"]["sandbox"] == fresh(copied.results)["benchmarks"]["sandbox"]
    assert f"absent is left out: {problem}" in capsys.readouterr().out
    assert all(problem in (copied.eval / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))


def test_a_run_of_nothing_ends_with_an_error(copied, more):
    with pytest.raises(ValueError, match="no benchmark ran: absent: the data not found"):
        copied.run("benchmarks=[absent]")


def test_a_benchmark_that_fails_does_not_take_the_others_with_it(copied, more, capsys):
    results = copied.run("benchmarks=[absent,asked]", f"run.absent.folder={copied.folder}")
    absent = results["benchmarks"]["absent"]
    assert absent["problem"] == "RuntimeError: the judge crashed" and absent["models"]["base"]["missing"] == 3
    errors = [error["error"] for error in absent["models"]["base"]["errors"]]
    assert errors[0] == "score of k0-0 is no finite number" and "not scored" in errors[1]
    asked = results["benchmarks"]["asked"]
    assert asked["problem"] == "" and asked["models"]["tuned"]["clips"] == 2


def test_a_benchmark_may_ask_the_backbone_itself_with_the_lora_off_and_on(copied, more, monkeypatch):
    results = copied.run("benchmarks=[asked]")
    found = results["benchmarks"]["asked"]["models"]
    assert found["base"]["clips"] == found["tuned"]["clips"] == 2
    assert found["base"]["figures"]["score"]["mean"] != found["tuned"]["figures"]["score"]["mean"]
    page, text = ((copied.eval / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    marked = page[page.index('<tr class="published">') :].partition("</tr>")[0]
    assert "Another &lt;model&gt; (published: A paper, Table 1)" in marked and "0.625" in marked
    assert "| *Another <model> (published: A paper, Table 1)* | *0.625* |" in text
    monkeypatch.setattr(Asked, "probe", lambda *_: pytest.fail("asked again"))
    assert copied.run("benchmarks=[asked]")["benchmarks"]["asked"]["models"] == found


def test_the_list_needs_no_model(more, capsys):
    assert run.main(["--list"]) is None
    printed = capsys.readouterr().out
    assert "sandbox: needs nothing" in printed
    assert "absent\n  [missing] the data (MIT)\n      run.absent.folder=\n      get it from a shop" in printed


def test_a_dry_run_counts(copied, no_sampling, capsys):
    copied.run("run.seeds=[0,1]", "--dry-run")
    expected = "sandbox: 5 prompts x 2 seeds, clips of base, tuned: 20, of which 10 are to be made, 2 steps each"
    assert expected in capsys.readouterr().out


def test_a_dry_run_without_the_model(tmp_path, capsys):
    """As eval/generate.py's: the family's table serves, and nothing is downloaded."""
    run.main(["recipe=wan14b", f"output={tmp_path}", "benchmarks=[likephys,vbench]", "--dry-run"])
    printed = capsys.readouterr().out
    assert "likephys: asks base itself" in printed and "vbench: left out" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_export_gives_the_clips_of_its_training_folder(tuned, tmp_path):
    exported = export.to_comfyui(tuned.model.parent / "lora.safetensors", tmp_path / "comfy.safetensors")
    results = tuned.run(f"run.lora={exported}", f"output={tmp_path / 'out'}")
    assert results["lora"]["shape"] == "rank 2" and results["lora"]["path"] == str(exported)
    ours, theirs = (sorted((folder / "eval").rglob("tuned/*.mp4")) for folder in (tuned.folder, tmp_path / "out"))
    assert ours and [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def test_half_a_lora_is_refused(tuned, tmp_path):
    state = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 4)}
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"run.lora=.*half.safetensors: LoRA .* without its B \(up\): the file is not"):
        tuned.run(f"run.lora={tmp_path / 'half.safetensors'}", f"output={tmp_path / 'other'}")


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_credentials_in_an_address_are_used_and_stand_in_no_file(copied, more, capsys):
    with StubServer() as server:
        address = server.url.replace("http://", "http://ann:SECRET@")
        found = copied.run(
            "benchmarks=[sandbox,judged,physics_iq,pai_bench]",
            f"vlm.base_url={address}?token=SECRET",
            "vlm.model=stub",
        )
        assert found["benchmarks"]["judged"]["models"]["base"]["figures"]["score"]["mean"] > 0
        assert all("authorization: basic" in head.lower() for head in server.headers)
    files = written(copied.eval)
    assert {"results.json", "report.html", "report.md", "recipe.yaml", "scores.jsonl"} <= set(files)
    assert not [name for name, data in files.items() if b"SECRET" in data or b"ann:" in data]
    saved = files["recipe.yaml"].decode()
    assert f"base_url: {server.url.replace('http://', 'http://***@')}?***" in saved
    dead = copied.run("benchmarks=[sandbox,judged]", f"vlm.base_url={address}", "vlm.model=other")
    assert "no connection" in dead["benchmarks"]["judged"]["problem"]
    out, error = capsys.readouterr()
    assert "SECRET" not in out + error + "".join(data.decode("latin1") for data in written(copied.eval).values())


def test_a_second_run_in_a_folder_is_refused_with_one_sentence(copied):
    holder = f"from train.files import lock\nwith lock({str(copied.eval)!r}): print(flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", holder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=rf"{copied.eval} is in use by process {process.pid} on .*: wait for it"):
            copied.run()
        process.kill()
    assert fresh(copied.run()) == fresh(copied.results)  # the lock went with the process


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("benchmarks=[]", "benchmarks="),
        ("benchmarks=[sandbx]", "'sandbx'"),
        ("run.seeds=[1,1]", "distinct"),
        ("run.seeds=[-1]", "negative"),
        ("run.batch_size=0", "run.batch_size=0"),
        ("sampler.steps=0", "steps=0"),
        ("run.lora=nowhere", "nowhere does not exist"),
    ],
)
def test_bad_settings_are_refused(tuned, change, message):
    with pytest.raises(ValueError, match=message):
        tuned.run(change)


def test_a_batch_is_fixed_by_place_whatever_is_finished(tmp_path):
    def request(number, frames=2, searched=False):
        settings = {"number": number} | ({"strategy": "best_of_n"} if searched else {})
        clip = making.Clip("base", tmp_path / f"{number}.mp4", settings, lossless=True)
        return making.Request(clip, None, 0, VideoConfig(16, 16, frames, 8.0))

    requests = [request(number) for number in range(5)] + [request(5, frames=3)]
    whole = [requests[:2], requests[2:4], requests[4:5], requests[5:]]
    assert making.batches(requests, 2) == whole
    for number in (0, 1, 3):
        frames, facts = torch.zeros(2, 16, 16, 3, dtype=torch.uint8), {"seconds": 1.0, "passes": 2}
        requests[number].clip.write(frames, 8.0, facts)
    assert making.batches(requests, 2) == whole[1:]
    searched = [request(number, searched=True) for number in range(5)]  # samples its clips one by one
    searched[1].clip.write(frames, 8.0, facts)
    assert making.batches(searched, 2) == [[searched[0], searched[2]], searched[3:]]


@pytest.fixture(scope="module")
def together(tuned, tmp_path_factory):
    """Ten clips, four sampled together."""
    made = Made(tmp_path_factory.mktemp("together"), {}, tuned.model)
    made.results = made.run("run.batch_size=4")
    return made


@pytest.mark.slow
def test_a_clip_does_not_depend_on_which_ones_were_finished(together, tmp_path, monkeypatch):
    made = Made(tmp_path, {}, together.model)
    shutil.copytree(together.eval, made.eval)
    clips = sorted((made.eval / "sandbox" / "clips" / "base").glob("*.mp4"))
    for clip in clips[1:3]:  # of the first batch of four
        clip.with_suffix(".json").unlink()
        clip.unlink()
    lines = (made.eval / "sandbox" / "rows-base.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (made.eval / "sandbox" / "rows-base.jsonl").write_text("".join([lines[0], *lines[3:]]), encoding="utf-8")
    asked = []
    score = sandbox.Sandbox.score
    monkeypatch.setattr(
        sandbox.Sandbox, "score", lambda self, samples, folder: asked.append(samples) or score(self, samples, folder)
    )
    kept = {path: path.stat().st_mtime_ns for path in clips if path.exists()}
    again = made.run("run.batch_size=4")
    assert again["compute"]["made_now"] == 2 and {path: path.stat().st_mtime_ns for path in kept} == kept
    ours, theirs = (
        {path.relative_to(one.eval): path.read_bytes() for path in one.eval.rglob("clips/**/*.mp4")}
        for one in (made, together)
    )
    assert ours == theirs and len(ours) == 10
    assert fresh(again) == fresh(together.results)
    assert [len(samples) for samples in asked] == [5]  # all that are judged together, to give two rows


def test_held_out_scenes_differ_from_those_of_other_seeds():
    found = []
    for seed in (0, 0, 1):
        listed = sandbox.Sandbox(sandbox.SandboxConfig(clips=5, seed=seed), VIDEO).listed
        found.append(([clip.prompt for clip in listed], sandbox.simulate_listed(listed, seed, VIDEO)))
    (first, frames), (again, same), (_, others) = found
    assert first == again and torch.equal(frames, same)
    assert not torch.equal(frames, others)


FACTS = {"motion": None, "seconds": 1.0}


def test_rows_of_other_settings_stay_and_are_not_seen(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path) as rows:
        rows.append("one", Row("a", 0, {"score": 1.0}), FACTS)
        rows.append("other", Row("a", 0, error="damaged"), FACTS)
    with RowFile(path) as rows:
        assert rows.find("one", "a", 0)["values"] == {"score": 1.0} and rows.find("one", "a", 1) is None
        rows.append("other", Row("a", 0, {"score": 2.0}), FACTS)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    with RowFile(path) as rows:
        assert [row["values"] for row in rows.every("other")] == [{"score": 2.0}]


def test_where_data_lies_does_not_tell_rows_apart():
    given = {"folder": "/a", "vlm": {"model": "m", "batch_size": 4}, "split": "all"}
    assert scoring_settings(given) == {"vlm": {"model": "m"}, "split": "all"}
    moved = {"folder": "/b", "vlm": {"model": "m", "batch_size": 8}, "split": "all"}
    assert identity("clip", given) == identity("clip", moved) != identity("clip", {**given, "split": "hard"})


@pytest.mark.parametrize("damage", [b'{"key": "to', b"\xff\xfe\n", b'{"key": "a"}\n', b"\n"])
def test_damaged_lines_of_rows_are_dropped(tmp_path, damage):
    path = tmp_path / "rows.jsonl"
    with RowFile(path) as rows:
        rows.append("one", Row("a", 0, {"score": 1.0}), FACTS)
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    with RowFile(path) as rows:
        assert path.read_bytes() == whole
        rows.append("one", Row("b", 0, {"score": 1.0}), FACTS)
    assert path.read_bytes().startswith(whole) and len(path.read_bytes().splitlines()) == 2


@pytest.mark.slow  # two processes that import everything
def test_two_ranks_make_what_one_makes(tuned, tmp_path):
    made = Made(tmp_path, {}, tuned.model)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "eval.run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *made.arguments()], cwd=ROOT, env=environment, check=True, capture_output=True)
    results = json.loads((made.eval / "results.json").read_text(encoding="utf-8"))
    assert results["compute"]["ranks"] == 2 and fresh(results) == fresh(tuned.results)
    ours, theirs = ({path.name: path.read_bytes() for path in one.eval.rglob("tuned/*.mp4")} for one in (made, tuned))
    assert ours == theirs and len(ours) == 5


@pytest.mark.slow  # processes that import everything
def test_a_run_killed_anywhere_goes_on_where_it_was(tuned, tmp_path):
    made = Made(tmp_path, {}, tuned.model)
    command = [sys.executable, "-m", "eval.run", *made.arguments("run.sandbox.clips=40", "run.batch_size=1")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    clips, rows = made.eval / "sandbox" / "clips", made.eval / "sandbox" / "rows-base.jsonl"

    def kill_when(ready) -> None:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        started = time.monotonic()
        while not ready() and process.poll() is None and time.monotonic() - started < 600:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert ready()

    kill_when(lambda: len(list(clips.rglob("*.json"))) >= 20)
    whole = {path.with_suffix(".mp4") for path in clips.rglob("*.json")}
    first = {path: path.stat().st_mtime_ns for path in whole}
    kill_when(lambda: rows.exists() and rows.stat().st_size > 0)
    second = {path: path.stat().st_mtime_ns for path in clips.rglob("*.mp4")}
    kept = rows.read_bytes().rpartition(b"\n")[0]
    assert len(second) == 80 and {path: second[path] for path in first} == first
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in clips.rglob("*.mp4")} == second
    assert rows.read_bytes().startswith(kept)
    for model in ("true", "base", "tuned"):
        lines = row_lines(made, model)
        assert len({(row["key"], row["seed"]) for row in lines}) == len(lines) == 40


@pytest.mark.slow  # processes that import everything
def test_killed_at_random_moments_with_four_clips_a_batch_it_gives_the_same_figures(tuned, tmp_path):
    """PHYSALIGN_KILLS: how many moments, 2 by default."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(made: Made) -> subprocess.Popen:
        command = [sys.executable, "-m", "eval.run", *made.arguments("run.sandbox.clips=10", "run.batch_size=4")]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    def outcome(made: Made) -> tuple[dict, dict, list]:
        results = json.loads((made.eval / "results.json").read_text(encoding="utf-8"))
        clips = {path.relative_to(made.eval): path.read_bytes() for path in made.eval.rglob("clips/*/*.mp4")}
        return fresh(results), clips, (made.eval / "scores.jsonl").read_text(encoding="utf-8").splitlines()

    whole, started = Made(tmp_path / "whole", {}, tuned.model), time.monotonic()
    assert start(whole).wait() == 0
    seconds, expected = time.monotonic() - started, outcome(whole)
    assert len(expected[1]) == 20
    generator, left, chains = random.Random(0), int(os.environ.get("PHYSALIGN_KILLS", "2")), 0
    while left:
        made, chains = Made(tmp_path / f"chain-{chains}", {}, tuned.model), chains + 1
        process = start(made)
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(seconds / 4, seconds) if left else None)
            if process.poll() is None:
                process.kill()
                process.wait()
                left -= 1
                process = start(made)
        assert process.returncode == 0 and outcome(made) == expected, chains
