"""Prompts to clips: the base model's beside the tuned model's, from the same noise.

    accelerate launch eval/generate.py recipe=wan14b generate.lora=runs/wan14b/train
    python -m eval.generate recipe=wan14b generate.lora=runs/wan14b/train --dry-run      # print the numbers and stop

    <folder>/base/<key>-<seed>.mp4           and a sidecar, <key>-<seed>.json, with the settings it was made with
    <folder>/tuned/<key>-<seed>.mp4          likewise; the folder's name is generate.name
    <folder>/side_by_side/<key>-<seed>.mp4   base | tuned, labelled
    <folder>/sheet.png                       a row of frames for every clip
    <folder>/manifest.jsonl                  written last, a line for every base and tuned clip

A clip whose sidecar shows the same settings is kept, so a run that was stopped continues when run again, and several
LoRAs compared in one folder, each with a generate.name of its own, share the base clips (under another name than
"tuned" it is side_by_side-<name>, sheet-<name>.png and manifest-<name>.jsonl). Each rank holds a whole model and makes
its share of what is missing. A clip depends on its own prompt and seed; which clips are sampled together
(generate.batch_size) changes it by rounding at most.

    ... generate.search=best_of_n search.num_candidates=16 generate.refine=proprio

searches and refines instead: each clip is then the best of several candidates, in folders whose names end with the
strategy's (base-best_of_n-proprio, ...), and its sidecar holds the candidates' seeds and scores, passes and seconds.
"""

import json
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

import recipes
from eval.clips import Clip, warn_of_outdated
from eval.config import ClipsConfig
from eval.loras import Lora, read_lora
from eval.maker import (
    BASE,
    TUNED,
    Model,
    Request,
    batches,
    build_request,
    first_frames,
    image_problem,
    make_clips,
    warn_of_cut_prompts,
)
from eval.prompts import Prompt, PromptsConfig, read_prompts
from eval.search import searcher
from train import entry
from train.backbones import BACKBONES
from train.backbones.base import Backbone
from train.clips import THUMBNAIL, VideoConfig, contact_sheet, read_clip, side_by_side
from train.files import lock, write_text
from train.parallel import any_rank
from train.sampling import sampling_passes

COMPARISON = "side_by_side"
SHEET_COLUMNS = 6  # frames of a clip on the contact sheet


@dataclass
class GenerateConfig(PromptsConfig):
    seeds: list[int] = field(default_factory=list)  # of the noise, one clip per prompt and seed; none: `seed` alone
    # LoRA file of any tool, checkpoint folder or training folder; {high_noise: one, low_noise: one} for the two experts
    # of A14B; empty: base clips only
    lora: Any = ""
    name: str = TUNED  # of the LoRA's clips: their folder and label
    base: bool = True  # also make the base model's clips, and with a LoRA the side-by-side clips
    folder: str = "${output}/clips"  # everything goes here
    batch_size: int = 1  # clips sampled together, per GPU; with a search: search.batch_size
    search: str = ""  # best_of_n | race | prune: the best of search.num_candidates; see eval.search.searcher
    refine: str = ""  # proprio | guidance: of the chosen one's noise, or of every candidate


@dataclass
class Config(ClipsConfig):
    seed: int = 0  # of the initial noise where generate.seeds is empty
    generate: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass(frozen=True)
class Work:
    """All clips of the prompts with their seeds, finished or not."""

    requests: dict[str, list[Request]]  # by model: base, tuned, or both in this order; by prompt, then by seed
    comparisons: list[Clip]  # of both models side by side, in the same order; none where there is one model
    backbone: Backbone | None  # without weights: its shapes and its fingerprint
    lora: Lora | None

    @property
    def pairs(self) -> list[tuple[Request, ...]]:
        """The models' requests of one prompt and seed."""
        return list(zip(*self.requests.values(), strict=True))

    def missing(self) -> list[Request]:
        return [one for requests in self.requests.values() for one in requests if not one.clip.is_finished()]


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(Config, argv)
    with entry.launched("generation") as accelerator:
        if not config.dry_run:
            generate(config, accelerator)
        elif accelerator.is_main_process:
            print(plan(config, prepare(config), world=accelerator.num_processes))


def generate(config: Config, accelerator: Accelerator) -> None:
    """Make on all ranks what is missing, then write contact sheet and manifest.

    Raises ValueError as `prepare` does, and where another run holds the folder.
    """
    settings = config.generate
    work = prepare(config) if accelerator.is_main_process else Work({}, [], None, None)
    with lock(settings.folder) if accelerator.is_main_process else nullcontext():
        made = len(work.missing())
        todo = [batch for requests in work.requests.values() for batch in batches(requests, settings.batch_size)]
        todo, lora = broadcast_object_list([todo, work.lora])
        make_clips(config, models(config, lora), todo, lora, accelerator)
        any_rank(False, accelerator.device)  # an all-reduce, so all are done; accelerate's own waiting skips CPU ranks
        found = zip(work.comparisons, work.pairs, strict=False)
        (unfinished,) = broadcast_object_list([[(clip, pair) for clip, pair in found if not clip.is_finished()]])
        for clip, pair in unfinished[accelerator.process_index :: accelerator.num_processes]:
            compare(clip, pair, config.video)
        any_rank(False, accelerator.device)
        if accelerator.is_main_process:
            conclude(config, work, made=made)


# What there is to do


def prepare(config: Config) -> Work:
    """Check the settings and find out what is finished; loads no weights.

    Raises ValueError for everything that a user can have got wrong, so that nothing fails after hours of sampling:
    prompts, images, seeds, the video's size, the LoRA and its backbone.
    """
    settings, video = config.generate, config.video
    check(config)
    prompts = read_prompts(settings, "generate", config.backbone.prefix_frames)
    here, shell = config.is_here, config.shell()
    shell.latent_shape(video.height, video.width, video.num_frames)
    _check_images(config, prompts)
    lora = read_lora(settings.lora, shell, key="generate.lora", check=here)
    if here:
        warn_of_cut_prompts(config.backbone, prompts)
    folder, seeds = Path(settings.folder), settings.seeds or [config.seed]
    places = [(prompt, seed, f"{prompt.key}-{seed}.mp4") for prompt in prompts for seed in seeds]
    requests = {
        model.name: [
            build_request(config, shell.fingerprint, model, folder / model.name / file, prompt, seed, video)
            for prompt, seed, file in places
        ]
        for model in models(config, lora)
    }
    work, which = Work(requests, [], shell, lora), COMPARISON + _suffix(config)
    if len(requests) == 2:
        for pair, (_, _, file) in zip(work.pairs, places, strict=True):
            digests = {request.clip.which: request.clip.digest for request in pair}
            work.comparisons.append(Clip(which, folder / which / file, {"clips": digests}))
    warn_of_outdated((request.clip for request in work.missing()), folder)
    return work


def models(config: Config, lora: Lora | None) -> list[Model]:
    """Base, tuned, or both in this order; with a strategy's name behind their own."""
    found = ([Model(BASE)] if config.generate.base else []) + ([Model(config.generate.name, lora)] if lora else [])
    return [config.searching(model, "generate") for model in found]


def check(config: Config) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    settings = config.generate
    config.check("generate")
    if not (settings.base or settings.lora):
        raise ValueError("generate.base=false and no generate.lora: there is nothing to make; set one of them")
    name = settings.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name.lower() == BASE or name.startswith(COMPARISON):
        raise ValueError(
            f"generate.name={name!r} cannot name a folder of clips: use letters, digits, _ and -, and neither"
            f" {BASE} nor {COMPARISON}"
        )
    seeds = settings.seeds or [config.seed]
    if bad := [seed for seed in seeds if not 0 <= seed < 2**63] + [s for s in set(seeds) if seeds.count(s) > 1]:
        raise ValueError(f"generate.seeds={seeds}: {bad[0]} is negative, too large or there twice; give distinct seeds")


def _check_images(config: Config, prompts: Sequence[Prompt]) -> None:
    """Whether the family takes images, or needs them, and whether they can be read."""
    if problem := image_problem(config.backbone, prompts):
        remedy = "; images are named in generate.images, or in the column image of generate.prompts_file"
        raise ValueError(problem + remedy)
    for prompt in prompts:
        if prompt.image:
            BACKBONES[config.backbone.family].check_prefix(
                prompt.frames, "backbone.prefix_frames", config.video.num_frames
            )
            first_frames(prompt, config.video)


def _suffix(config: Config) -> str:
    name = config.generate.name
    return ("" if name == TUNED else f"-{name}") + config.method("generate").suffix


def plan(config: Config, work: Work, *, world: int) -> str:
    """The lines of a dry run for `world` ranks."""
    shell, video, sampler, lora = work.backbone, config.video, config.sampler, work.lora
    clips, todo, jobs = sum(map(len, work.requests.values())), len(work.missing()), [pair[0] for pair in work.pairs]
    passes = sampling_passes(shell, sampler)
    size = (video.height, video.width, video.num_frames)
    lines = {
        "backbone": shell.fingerprint if config.is_here else "not here yet",
        "LoRA": f"{lora.path} ({lora.describe()}, for {lora.expert})" if lora else "none: base clips only",
        "video": f"{video.num_frames} frames of {video.height}x{video.width} at {video.fps:g} fps",
        "tokens": f"{shell.num_tokens(*size)} per network pass",
        "jobs": f"{len(jobs)} = {len({job.prompt.key for job in jobs})} prompts x"
        f" {len({job.seed for job in jobs})} seeds, on {world} rank{'s' if world > 1 else ''}",
        "clips": f"{clips}: {clips - todo} done, {todo} to do",
        "network passes": f"{todo * passes}, {passes} per clip ({sampler.steps} steps)",
        "search": searcher.describe(config.method("generate"), config.search),
        "folder": config.generate.folder,
    }
    return "\n".join(f"{name:<16}{value}" for name, value in lines.items())


# What came of it


def compare(comparison: Clip, pair: Sequence[Request], video: VideoConfig) -> None:
    """The side-by-side clip, from the files: the same whether they were made just now or in an earlier run."""
    started = time.perf_counter()
    both = side_by_side([read_clip(one.clip.path, video) for one in pair], [one.clip.which for one in pair])
    facts = {"key": pair[0].prompt.key, "prompt": pair[0].prompt.text, "seed": pair[0].seed, "passes": 0}
    comparison.write(both, video.fps, facts | {"seconds": round(time.perf_counter() - started, 3)})


def conclude(config: Config, work: Work, *, made: int) -> None:
    """Contact sheet and manifest of all clips, from the files; on the main process, when all ranks are done."""
    settings, video = config.generate, config.video
    folder, suffix = Path(settings.folder), _suffix(config)
    # The sheet's frames alone, at its size: a long list of clips must not have to fit into memory.
    width = min(video.width, THUMBNAIL)
    small = VideoConfig(round(video.height * width / video.width), width, num_frames=1, fps=video.fps)
    if video.num_frames > 1:
        rate = video.fps * (SHEET_COLUMNS - 1) / (video.num_frames - 1)  # from the first frame to the last
        small = replace(small, num_frames=SHEET_COLUMNS, fps=rate)
    rows, records = [], []
    for request in (one for pair in work.pairs for one in pair):
        clip, record = request.clip, request.clip.record()
        assert record is not None and record["digest"] == clip.digest, clip.path
        records.append(record)
        rows.append((f"{clip.which}: {request.prompt.text[:60]} (seed {request.seed})", read_clip(clip.path, small)))
    sheet, manifest = folder / f"sheet{suffix}.png", folder / f"manifest{suffix}.jsonl"
    write_text(folder / f"recipe{suffix}.yaml", recipes.to_yaml(config))
    contact_sheet(sheet, rows, columns=SHEET_COLUMNS)
    write_text(manifest, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    seconds = sum(record["seconds"] for record in records) / len(records)
    example = (work.comparisons or [work.pairs[0][0].clip])[0]
    print(f"clips     {len(records)}, of which {made} made now; {seconds:.1f} s per clip")
    print(f"sheet     {sheet}\nmanifest  {manifest}")
    print(f"{'compare' if work.comparisons else 'clip':<10}{example.path}")


if __name__ == "__main__":
    entry.run(main)
