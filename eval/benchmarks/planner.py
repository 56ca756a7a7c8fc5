"""The planner benchmark: can a robot act on what the model imagines? WorldArena's action planner in a real simulator.

From what the camera sees and the instruction the model makes a clip of the recipe's length; an inverse dynamics model,
the shipped one or trained once on demonstrations, and shared by all models, decodes actions from its first frames
(`eval.robots.planning.HORIZON`); the simulator executes them; it looks again. A row is an episode: 1 where the task was
solved by the environment's own flag. All models get the same initial states, instructions and noise at each look, so
they are compared in pairs. What is reachable: `eval.experiments.planner.bounds`, from the same states.

The inverse dynamics model sees true frames in training and decoded ones here, as any planner's does.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from eval.benchmarks.base import Benchmark, Requirement, Row
from eval.benchmarks.robots import simulator
from eval.robots.demonstrations import Listed, check_video
from eval.robots.episodes import processes
from eval.robots.inverse_dynamics import MOMENTS, Settings
from eval.robots.planning import DECODED, HORIZON, SHIPPED, Look, imagining, initial_states, inverse_dynamics, play
from eval.robots.tasks import TASKS
from train.backbones.base import Backbone, Conditioning
from train.clips import from_pixels, to_pixels
from train.files import seed_of, sha256
from train.sampling import sample_clips

CLIPS, STEPS = 100, 500  # of each task: demonstrations and training steps of the inverse dynamics model
SEED = 0  # of states, noise and training


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
        if SHIPPED.exists():
            inverse["shipped"] = sha256(SHIPPED)[:16]
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
                    for one, outcome in zip(batch, play(batch, planner, video, simulators), strict=True):
                        if isinstance(outcome, bool):
                            yield Row(key_of(one), SEED, {"success": outcome, one.task: outcome})
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


def key_of(one: Listed) -> str:
    return f"{one.task}-{one.index:04d}"
