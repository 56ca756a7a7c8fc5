"""Did it help? Clips of base and tuned model on benchmarks' prompts, scored, and one report of it all.

    accelerate launch eval/run.py recipe=sandbox benchmarks=[sandbox] run.lora=runs/sandbox/train
    python -m eval.run --list                                  # every benchmark, and what it needs
    python -m eval.run recipe=sandbox run.lora=… --dry-run     # what would be made

    <folder>/<benchmark>/clips/<model>/<key>-<seed>.mp4   a clip, its sidecar (.json) says what it was made from
    <folder>/<benchmark>/rows-<model>.jsonl               one row per clip (or episode), written as it is scored
    <folder>/<benchmark>/comparison.mp4, sheet.png        true | base | tuned, for the first prompts
    <folder>/planner/episodes.html, sheet.png             imagined | executed | true, for the first episodes
    <folder>/<benchmark>/official/<model>                 with run.layout: clips as the official code reads them
    <folder>/scores.jsonl                                 every clip of every model: what the results were made from
    <folder>/results.json, report.html, report.md         figures with intervals; the reports show those numbers

Models: `true` are a benchmark's own references, `base` and `tuned` get the same prompts and the same initial noise, so
their difference is tested in pairs. With `run.search` or `run.refine` (`eval.search.searcher`) there are as well
`base-best_of_n`, `tuned-best_of_n` and the like, whose first candidate has that noise; what they cost is in the
sidecars. Kill it at any moment and run it again: whole clips and rows are kept. Whatever cannot be scored (a damaged
clip, an answer that never came) is a row with an error: counted, named in the report, tried again by the next run. A
benchmark whose data or models are not there is left out with a word on what to get; the rest runs. All ranks make
clips; the main process scores.
"""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

import recipes
from eval.benchmarks import BENCHMARKS, BenchmarkSettings
from eval.benchmarks.base import Benchmark, Sample, Task
from eval.clips import warn_of_outdated
from eval.config import ClipsConfig
from eval.loras import Lora, attach, read_lora
from eval.maker import (
    BASE,
    TUNED,
    Model,
    batches,
    build_request,
    first_frames,
    image_problem,
    make_clips,
    warn_of_cut_prompts,
)
from eval.prompts import Prompt
from eval.report import page, tables
from eval.report.results import TRUE, summarise
from eval.report.rows import identity, scoring_settings
from eval.scoring import Plan, Probe, compare_clips, probe, score, unprobed
from train import entry
from train.backbones import load_backbone
from train.backbones.base import Backbone
from train.clips import VideoConfig, write_clip
from train.files import atomic, lock, sha256, write_text
from train.parallel import any_rank

SEED_STRIDE = 2**32  # between the noise of one seed's prompts and the next seed's


@dataclass
class RunConfig(BenchmarkSettings):
    # LoRA file of any tool, checkpoint folder or training folder (of full weights too), or for the two experts of A14B
    # {high_noise: one, low_noise: one}; empty: the base model alone
    lora: Any = ""
    folder: str = "${output}/eval"  # everything goes here
    seeds: list[int] = field(default_factory=lambda: [0])  # one clip per prompt and seed, from noise of its own
    batch_size: int = 16  # clips in a network pass, per GPU
    search: str = ""  # best_of_n | race | prune: both models' clips searched as well; see eval.search.searcher
    refine: str = ""  # proprio | guidance, likewise
    layout: bool = False  # also lay the clips out as each benchmark's official code reads them


@dataclass
class Config(ClipsConfig):
    run: RunConfig = field(default_factory=RunConfig)
    benchmarks: list[str] = field(default_factory=list)  # names of eval.benchmarks.BENCHMARKS
    list: bool = False  # print every benchmark with what it needs and stop


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config = recipes.load(Config, argv)
    if config.list:
        print(listing(config))
        return None
    check(config)
    results = None
    with entry.launched("evaluation") as accelerator:
        if not config.dry_run:
            with lock(config.run.folder) if accelerator.is_main_process else nullcontext():
                results = run(config, accelerator)
        elif accelerator.is_main_process:
            lora, plans = prepare(config)
            print(overview(config, lora, plans))
    return results


def check(config: Config) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    settings = config.run
    if not config.benchmarks:
        raise ValueError(f"benchmarks=[] names none: use any of {', '.join(BENCHMARKS)}; see --list")
    if unknown := [name for name in config.benchmarks if name not in BENCHMARKS]:
        raise ValueError(f"benchmarks names {unknown[0]!r}: use any of {', '.join(BENCHMARKS)}; see --list")
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise ValueError(f"run.seeds={settings.seeds}: give one or more distinct seeds")
    if bad := [seed for seed in settings.seeds if not 0 <= seed < 2**30]:
        raise ValueError(f"run.seeds={settings.seeds}: {bad[0]} is negative or too large")
    config.check("run")


def build(config: Config, name: str) -> Benchmark:
    own, run = getattr(config.run, name), config.run
    more = (config.vlm, config.raters, config.sampler, run.batch_size, Path(run.folder) / name)
    return BENCHMARKS[name](own, config.video, *more)


def listing(config: Config) -> str:
    """Every benchmark and what it needs, found or not."""
    lines = []
    for name in BENCHMARKS:
        try:
            needed = build(config, name).requirements()
        except ValueError as error:
            lines += [name, f"  cannot run: {error}"]
            continue
        lines.append(name + ("" if needed else ": needs nothing"))
        for requirement in needed:
            mark = "found" if requirement.found else "missing"
            lines.append(f"  [{mark}] {requirement.what} ({requirement.licence})")
            lines.append(f"      {requirement.where}")
            lines += [] if requirement.found else [f"      {requirement.remedy}"]
    return "\n".join(lines)


def run(config: Config, accelerator: Accelerator) -> dict[str, Any] | None:
    """Make on all ranks what is missing, then score and report on the main process; returns the results there."""
    started, main = time.perf_counter(), accelerator.is_main_process
    lora, plans = prepare(config) if main else (None, [])
    missing = sum(len(plan.unfinished()) for plan in plans)
    wanted = [requests for plan in plans for requests in plan.requests.values()]
    todo = [batch for requests in wanted for batch in batches(requests, config.run.batch_size)]
    probes = [one for plan in plans for one in unprobed(plan, models(lora))]
    lora, todo, probes = broadcast_object_list([lora, todo, probes])
    rank, world = accelerator.process_index, accelerator.num_processes
    make_clips(config, makers(config, lora), todo, lora, accelerator, decode_batch=config.run.batch_size)
    run_probes(config, probes[rank::world], lora, accelerator.device)
    any_rank(False, accelerator.device)  # an all-reduce, so all are done; accelerate's own waiting skips CPU ranks
    if not main:
        return None
    scores = [line for plan in plans if not plan.problem for line in score(plan)]
    if config.run.layout:
        for plan in plans:
            for model, samples in plan.samples.items():
                plan.benchmark.layout(samples, plan.folder / "official" / model)
    compute = {"device": device_name(accelerator.device), "ranks": world, "made_now": missing}
    compute["seconds"] = round(time.perf_counter() - started, 1)
    results = conclude(config, lora, plans, scores, compute)
    if not scores:
        problems = "; ".join(f"{plan.benchmark.name}: {plan.problem}" for plan in plans)
        raise ValueError(f"no benchmark ran: {problems}")
    return results


# What there is to do


def models(lora: Lora | None) -> list[Model]:
    """Base and tuned, in the report's order."""
    return [Model(BASE)] + ([Model(TUNED, lora)] if lora else [])


def makers(config: Config, lora: Lora | None) -> list[Model]:
    """Those that make clips: base and tuned, and where a search is configured both once more with it behind them."""
    plain = models(lora)
    return plain + [config.searching(model, "run") for model in plain if config.method("run")]


def prepare(config: Config) -> tuple[Lora | None, list[Plan]]:
    """Check what can be checked without weights, and find out what each benchmark asks for.

    Raises ValueError for a backbone or LoRA that is not there. What a single benchmark lacks is its plan's problem.
    """
    shell = config.shell()
    lora = read_lora(config.run.lora, shell, key="run.lora", check=config.is_here)
    plans = []
    for name in dict.fromkeys(config.benchmarks):
        benchmark = build(config, name)
        plan = Plan(benchmark, benchmark.folder)
        plans.append(plan)
        try:
            with TemporaryDirectory() if config.dry_run else nullcontext("") as scratch:
                fill(config, plan, lora, shell, scratch)
        except ValueError as error:
            plan.problem = str(error)
        if plan.problem:
            print(f"{name} is left out: {plan.problem}")
    return lora, plans


def fill(config: Config, plan: Plan, lora: Lora | None, shell: Backbone, scratch: str) -> None:
    """The plan's tasks, requests and samples. Raises ValueError with the problem where it cannot run.

    scratch: of a dry run, a folder that takes in the prompts' pictures, for the run's own is not touched; else empty.
    """
    benchmark = plan.benchmark
    if missing := [needed for needed in benchmark.requirements() if not needed.found]:
        raise ValueError("; ".join(f"{needed.what} not found at {needed.where}: {needed.remedy}" for needed in missing))
    if not benchmark.of_clips:
        benchmark.check(shell)
        asked = [shell.fingerprint, config.backbone.dtype, config.backbone.text_length, asdict(config.video)]
        for model in models(lora):
            own = [*asked, model.lora.sha256 if model.lora else None, "rows with clusters"]
            plan.identities[model.name] = identity(own, plan.benchmark.recorded)
        return
    plan.tasks = benchmark.prompts()
    video = benchmark.video(config.video)
    shell.latent_shape(video.height, video.width, video.num_frames)
    folder, prompts = plan.folder, {}
    inputs = Path(scratch or folder / "inputs")
    for task in plan.tasks:
        try:
            prompts[task.key] = make_prompt(benchmark, task, video, inputs)
        except ValueError as error:
            plan.refused[task.key] = str(error)
    if problem := image_problem(config.backbone, list(prompts.values())):
        raise ValueError(problem)
    if config.is_here:
        warn_of_cut_prompts(config.backbone, list(prompts.values()))
    if not scratch and (references := benchmark.references(folder / "references")):
        plan.samples[TRUE] = references
    for model in makers(config, lora):
        plan.requests[model.name], plan.samples[model.name] = [], []
        for number, task in enumerate(plan.tasks):
            for seed in config.run.seeds:
                path = folder / "clips" / model.name / f"{task.key}-{seed}.mp4"
                plan.samples[model.name].append(Sample(task, seed, path))
                if task.key in prompts:
                    noise = seed * SEED_STRIDE + number  # each prompt has noise of its own: clips are independent draws
                    made = (model, path, prompts[task.key], noise, video)
                    request = build_request(config, shell.fingerprint, *made, lossless=benchmark.lossless)
                    plan.requests[model.name].append(request)
    if config.is_here:
        warn_of_outdated((request.clip for request in plan.unfinished()), folder)


def make_prompt(benchmark: Benchmark, task: Task, video: VideoConfig, folder: Path) -> Prompt:
    """The prompt with the picture that it starts from; ValueError where that cannot be read."""
    if task.image is None:
        return Prompt(task.key, task.text, None)
    if benchmark.prefix_frames:
        return _prefix_prompt(benchmark, task, video, folder)
    shown = benchmark.shown(task)
    if shown is None:
        prompt = Prompt(task.key, task.text, task.image)
        first_frames(prompt, video)
        return prompt
    path = folder / f"{task.key}.png"
    with atomic(path) as aside:
        Image.fromarray(shown[0]).save(aside, "PNG")
    return Prompt(task.key, task.text, path)


def _prefix_prompt(benchmark: Benchmark, task: Task, video: VideoConfig, folder: Path) -> Prompt:
    """The prompt with the clip that it continues, written without loss where there is none of its source."""
    frames = benchmark.prefix_frames
    source = sha256(task.image)[:12]
    path = folder / f"{task.key}-{source}-{video.width}x{video.height}x{frames}-{video.fps:g}fps.mp4"
    if not path.exists():
        write_clip(path, torch.from_numpy(benchmark.shown(task)), video.fps, lossless=True)
    return Prompt(task.key, task.text, path, frames)


def overview(config: Config, lora: Lora | None, plans: Sequence[Plan]) -> str:
    """The lines of a dry run."""
    names, asked = (", ".join(model.name for model in of) for of in (makers(config, lora), models(lora)))
    lines = []
    for plan in plans:
        clips = sum(len(requests) for requests in plan.requests.values())
        lines.append(
            f"{plan.benchmark.name}: {len(plan.tasks)} prompts x {len(config.run.seeds)} seeds, clips of {names}:"
            f" {clips}, of which {len(plan.unfinished())} are to be made, {config.sampler.steps} steps each"
            if not plan.problem and plan.benchmark.of_clips
            else f"{plan.benchmark.name}: {'left out' if plan.problem else f'asks {asked} itself'}"
        )
    return "\n".join(lines)


# Making and scoring


def run_probes(config: Config, probes: Sequence[Probe], lora: Lora | None, device: torch.device) -> None:
    """Let benchmarks ask the backbone itself, on this rank alone."""
    if not probes:
        return
    backbone = load_backbone(config.backbone, device)
    switch = attach(lora, backbone) if lora else None
    for one in probes:
        benchmark = build(config, one.benchmark)
        with switch.reference() if switch and one.model.lora is None else nullcontext():
            probe(benchmark, backbone, one, Path(config.run.folder) / one.benchmark)


# What came of it


def conclude(
    config: Config, lora: Lora | None, plans: Sequence[Plan], scores: list[dict[str, Any]], compute: dict[str, Any]
) -> dict[str, Any]:
    """Write scores, results, pictures and reports, and print the table; returns the results."""
    folder = Path(config.run.folder)
    found: dict[str, Any] = {
        "recipe": config.recipe,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backbone": load_backbone(config.backbone, "cpu", parts=()).fingerprint,
        "lora": lora and {name: getattr(lora, name) for name in ("path", "sha256", "expert", "shape")},
        "seeds": config.run.seeds,
        "compute": compute,
        "settings": recipes.redacted(asdict(config)),
        "benchmarks": {plan.benchmark.name: of_benchmark(config, plan, scores) for plan in plans},
    }
    write_text(folder / "scores.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in scores))
    write_text(folder / "results.json", json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    write_text(folder / "recipe.yaml", recipes.to_yaml(config))
    comparisons = {}
    for plan in plans:
        if not plan.problem and plan.samples:
            comparisons[plan.benchmark.name] = compare_clips(plan, plan.benchmark.video(config.video))
    write_text(folder / "report.html", page.html(found, comparisons))
    write_text(folder / "report.md", tables.markdown(found))
    print(tables.text(found))
    print(f"seconds     {compute['seconds']:.0f}\nresults     {folder / 'results.json'}")
    print(f"report      {folder / 'report.html'}")
    for plan in plans:
        if plan.benchmark.name in comparisons:
            print(f"comparison  {plan.folder / 'comparison.mp4'}")
        if path := found["benchmarks"][plan.benchmark.name].get("page"):
            print(f"page        {folder / path}")
    return found


def of_benchmark(config: Config, plan: Plan, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One benchmark's part of the results; writes its page, where it has one."""
    benchmark = plan.benchmark
    own = [line for line in scores if line["benchmark"] == benchmark.name]
    page = plan.page(own) if own else None
    return {
        "problem": plan.problem,
        "requirements": [asdict(needed) for needed in benchmark.requirements()],
        "settings": recipes.redacted(scoring_settings(plan.benchmark.recorded)),
        "prompts": len({line["key"] for line in own}),
        "clusters": len({line["cluster"] for line in own}),  # of prompts that intervals draw together
        "video": asdict(benchmark.video(config.video)),
        "figures": list(benchmark.figures),
        "lower_is_better": list(benchmark.lower_is_better),
        "published": [asdict(one) for one in benchmark.published],
        "compute": {name: plan.cost(name) for name in plan.seconds},
        **({"page": page.relative_to(config.run.folder).as_posix()} if page else {}),
        **summarise(benchmark, own, BASE),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


if __name__ == "__main__":
    entry.run(main)
