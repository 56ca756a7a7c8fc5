"""The planner benchmark: can a robot act on what the model imagines? WorldArena's action planner in a real simulator.

From what the camera sees and the instruction the model makes a clip of the recipe's length; an inverse dynamics model,
the shipped one or trained once on demonstrations, and shared by all models, decodes actions from its first frames
(`eval.robots.planning.HORIZON`); the simulator executes them; it looks again. A row is an episode: 1 where the task was
solved by the environment's own flag. All models get the same initial states, instructions and noise at each look, so
they are compared in pairs. What is reachable: `eval.experiments.planner.bounds`, from the same states.

Of the first episodes of each task clips are kept (SHOWN): what was imagined, at each look the frames whose actions were
executed; what the simulator showed at the same moments; and what the expert does from the same initial state. The page
episodes.html plays them side by side.

The inverse dynamics model sees true frames in training and decoded ones here, as any planner's does.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from eval.benchmarks import planner_page
from eval.benchmarks.base import Benchmark, Requirement, Row
from eval.benchmarks.robots import simulator
from eval.robots.demonstrations import Listed, check_video
from eval.robots.episodes import EpisodeProcess, processes
from eval.robots.inverse_dynamics import MOMENTS, Settings
from eval.robots.planning import (
    DECODED,
    EXPERT,
    GIVEN,
    HORIZON,
    SHIPPED,
    Film,
    Look,
    horizon_of,
    imagining,
    initial_states,
    inverse_dynamics,
    play,
)
from eval.robots.tasks import TASKS
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig, from_pixels, to_pixels
from train.files import seed_of, sha256
from train.sampling import sample_clips

CLIPS, STEPS = 100, 500  # of each task: demonstrations and training steps of the inverse dynamics model
SEED = 0  # of states, noise and training
SHOWN = 2  # episodes of each task of which clips are kept


@dataclass
class PlannerConfig:
    episodes: int = 20  # of each task
    tasks: list[str] = field(default_factory=lambda: list(TASKS))

    def __post_init__(self) -> None:
        if self.episodes < 1 or not self.tasks or not set(self.tasks) <= TASKS.keys():
            raise ValueError(f"run.planner: give episodes of 1 or more, and tasks out of {', '.join(TASKS)}")


class Planner(Benchmark):
    name = "planner"
    of_clips = False
    together = 8  # episodes that are imagined in one batch

    def __init__(self, settings: PlannerConfig, *more: Any):
        super().__init__(settings, *more)
        self.columns = self.figures = ("success", *settings.tasks)

    @property
    def recorded(self) -> dict[str, Any]:
        inverse = {"clips": CLIPS, "steps": STEPS, "horizon": HORIZON, "moments": MOMENTS}
        files = {"given": self.folder / "scoring" / GIVEN, "shipped": SHIPPED}
        inverse |= {name: sha256(path)[:16] for name, path in files.items() if path.exists()}
        return asdict(self.settings) | {"seed": SEED, "sampler": self.sampler.settings(), "inverse_dynamics": inverse}

    def requirements(self) -> list[Requirement]:
        return [simulator()]

    def check(self, shell: Backbone) -> None:
        if True not in shell.first_frame:
            raise ValueError(
                f"{type(shell).__name__} generates from text alone, but a planner imagines from what it sees: set"
                " backbone.family to wan22_ti2v, wan22_i2v, cosmos25 or hunyuan15_i2v"
            )
        check_video(self.model_video)
        shell.latent_shape(self.model_video.height, self.model_video.width, self.model_video.num_frames)

    def probe(self, backbone: Backbone, folder: Path, done: Set[str] = frozenset()) -> Iterator[Row]:
        """A row for every episode. Episodes are planned in batches by place among all, whatever is done of them."""
        tasks, video = self.settings.tasks, self.model_video
        settings, device = Settings(steps=STEPS * len(tasks)), str(backbone.device)
        clips = CLIPS * len(tasks)
        model, _ = inverse_dynamics(folder.parent, tasks, clips, settings, video, seed=SEED, device=device)
        negative = backbone.condition([self.sampler.negative_prompt])
        planner = imagining(
            lambda looks: self.imagine(backbone, negative, looks)[:, :DECODED], model, check_video(video)
        )
        states = initial_states(tasks, self.settings.episodes, SEED)
        batches = [states[start : start + self.together] for start in range(0, len(states), self.together)]
        with processes(self.together) as simulators, tqdm(total=len(states), desc=self.name, unit="episode") as bar:
            for batch in batches:
                if not done.issuperset(map(key_of, batch)):
                    films = {one: Film() for one in batch if one.index < SHOWN and key_of(one) not in done}
                    outcomes = play(batch, planner, video, simulators, films)
                    ended = [one for one, outcome in zip(batch, outcomes, strict=True) if isinstance(outcome, bool)]
                    clips = with_expert({one: films[one] for one in ended if one in films}, video, simulators)
                    for one, outcome in zip(batch, outcomes, strict=True):
                        if isinstance(outcome, bool):
                            values = {"success": outcome, one.task: outcome}
                            yield Row(key_of(one), SEED, values, clips=clips.get(one, {}))
                        else:
                            yield Row(key_of(one), SEED, error=f"{one.name}: the simulator failed: {outcome}")
                bar.update(len(batch))

    @torch.no_grad()
    def imagine(self, backbone: Backbone, negative: Conditioning, looks: Sequence[Look]) -> np.ndarray:
        """(B, T, H, W, 3) uint8: the clips that begin with what is seen."""
        video = self.model_video
        told = []
        for look in looks:
            seen = from_pixels(torch.from_numpy(look.frames))[None, :, 0]  # (1, 3, H, W)
            told.append(backbone.condition([look.listed.prompt], seen, num_frames=video.num_frames))
        conditioning, given = Conditioning.cat(told), {"negative": negative, "progress": False}
        seeds = [seed_of("planner", look.listed.name, look.step) for look in looks]
        latents = sample_clips(backbone, conditioning, seeds, video, self.sampler, **given)  # (B, C, F, H', W')
        return to_pixels(backbone.decode_latents(latents)).cpu().numpy()

    def page(self, folder: Path, scores: Sequence[Mapping[str, Any]], clips: Mapping[str, Path]) -> Path:
        shown = [one for one in initial_states(self.settings.tasks, self.settings.episodes, SEED) if one.index < SHOWN]
        prompts = {key_of(one): one.prompt for one in shown}
        path = folder / "episodes.html"
        planner_page.write(path, prompts, scores, clips, self.model_video, horizon_of(self.model_video))
        return path


def with_expert(
    films: Mapping[Listed, Film], video: VideoConfig, simulators: Sequence[EpisodeProcess]
) -> dict[Listed, dict[str, np.ndarray]]:
    """The clips of each film by name; `true` is what the expert does from the same state, until the task is solved."""
    true = {one: Film() for one in films}
    outcomes = play(list(true), EXPERT, video, simulators, true)
    clips = {}
    for (one, film), outcome in zip(films.items(), outcomes, strict=True):
        clips[one] = {"imagined": np.stack(film.imagined), "executed": np.stack(film.executed)}
        if isinstance(outcome, bool):
            clips[one]["true"] = np.stack(true[one].executed)
    return clips


def key_of(one: Listed) -> str:
    return f"{one.task}-{one.index:04d}"
