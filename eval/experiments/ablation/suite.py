"""What a suite is made of: the world in which it is measured, and its rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eval.robots.planning import GIVEN

WORLD_MODEL = "{world_model}"  # in arguments: the folder of the suite's own world model
START = "{start}"  # the training folder of the row that another one starts from
Sections = Mapping[str, Mapping[str, Any]]  # of a recipe


@dataclass(frozen=True)
class Column:
    """A score in the rows of eval.run."""

    benchmark: str
    lower_is_better: bool = False
    repeated: bool = False  # every seed has the same prompts or episodes: intervals draw an episode with all its seeds


@dataclass(frozen=True)
class World:
    recipe: str
    columns: Mapping[str, Column]
    compared: tuple[str, ...]  # columns of which differences are shown
    evaluation: tuple[str, ...]  # arguments of eval.run, with {clips}, {episodes} and {seed}
    clips: int  # held-out prompts per seed, unless the command line says otherwise
    on_gpu: Mapping[str, tuple[str, ...]]  # by command: arguments that change its speed alone
    may_fail: bool = False  # a clip or an episode of the simulator; it is left out, and counted
    # Module and arguments of the training of WORLD_MODEL, before all builds; {recordings}: where clips of it may be
    world_model: tuple[str, ...] = ()
    given: tuple[tuple[str, str], ...] = ()  # (benchmark, a file in the model's folder that it scores with)
    search: tuple[str, ...] = ()  # arguments of eval.run for rows that search

    @property
    def benchmarks(self) -> list[str]:
        """The first one measures clips."""
        return list(dict.fromkeys(column.benchmark for column in self.columns.values()))


SANDBOX = World(
    recipe="sandbox",
    columns={name: Column("sandbox") for name in ("physical", "semantic")},
    compared=("physical",),
    evaluation=("run.sandbox.clips={clips}", "run.sandbox.seed={seed}", "run.seeds=[{seed}]"),
    clips=512,
    # A unit of the recipe has 32 groups, and clips are sampled together within one.
    on_gpu={
        "data_pipeline.build": ("pipeline.batch_size=128", "pipeline.encode_batch=32"),
        "eval.run": ("run.batch_size=128",),
    },
)
NUM_CANDIDATES = 8
ROBOTS = World(
    recipe="robots",
    columns={
        "physical": Column("robots"),
        "semantic": Column("robots"),
        "gripper_error": Column("robots", lower_is_better=True),
        "object_error": Column("robots", lower_is_better=True),
        "success": Column("planner", repeated=True),
    },
    compared=("physical", "object_error", "success"),
    evaluation=(
        "run.robots.clips={clips}",
        "run.robots.seed={seed}",
        "run.planner.episodes={episodes}",
        "run.seeds=[{seed}]",
    ),
    clips=128,
    on_gpu=SANDBOX.on_gpu,
    may_fail=True,
    world_model=(
        "eval.experiments.world_model.training",
        "--world=robots",
        f"--output={WORLD_MODEL}",
        "--recordings={recordings}",
    ),
    given=(("planner", GIVEN),),
    search=(
        "run.search=best_of_n",
        f"search.num_candidates={NUM_CANDIDATES}",
        f"search.batch_size={NUM_CANDIDATES}",
        # As the sandbox's, but for the stride: clips are twice as long.
        *("search.residuals.first=0.4", "search.residuals.last=0.7", "search.residuals.shift=1"),
        *("search.surprise.window=16", "search.surprise.context=4", "search.surprise.stride=4"),
        *("search.surprise.axis=token", f"search.surprise.path={WORLD_MODEL}"),
    ),
)
WORLDS = {world.recipe: world for world in (SANDBOX, ROBOTS)}


@dataclass(frozen=True)
class Row:
    name: str  # of its folders
    label: str  # in the table
    trainer: str  # module; empty: nothing is trained
    overrides: tuple[str, ...] = ()
    paper: tuple[tuple[str, str], ...] = ()  # (table, its row) in PAPER
    groups: str = "groups"  # a key of GROUPS
    sweep: tuple[str, float] | None = None  # (key, value)
    against: str = "sft"  # the row that it is compared with
    passes: float | None = None  # network passes per prompt, for its losers
    start: str = ""  # the row whose training folder stands for {start} in the overrides
    base: tuple[str, ...] = ()  # overrides of the evaluation too: of the frozen network
    search: str = ""  # a scorer: nothing is trained, of several clips of the row `start` this one chooses

    @property
    def model(self) -> str:
        """Its name among those of eval.run."""
        return "tuned-best_of_n" if self.search else "tuned" if self.trainer else "base"


@dataclass(frozen=True)
class Suite:
    rows: dict[str, Row]  # by name, in the table's order
    defaults: dict[str, float]  # of the keys that are swept: where the row `middle` stands
    middle: str
    world: World = field(default=SANDBOX)
