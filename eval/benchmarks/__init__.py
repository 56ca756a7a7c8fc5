"""Benchmarks by name. A new one is a file with a settings dataclass and a `Benchmark`, a field and a line here."""

from dataclasses import dataclass, field

from eval.benchmarks.base import Benchmark, DataConfig
from eval.benchmarks.likephys import LikePhys, LikePhysConfig
from eval.benchmarks.phygenbench import PhyGenBench
from eval.benchmarks.physics_iq import PhysicsIQ, PhysicsIQConfig
from eval.benchmarks.planner import Planner, PlannerConfig
from eval.benchmarks.r_bench import RBench, RBenchConfig
from eval.benchmarks.robots import Robots, RobotsConfig
from eval.benchmarks.sandbox import Sandbox, SandboxConfig
from eval.benchmarks.vbench import VBench, VBenchConfig
from eval.benchmarks.videophy import VideoPhy
from eval.benchmarks.videophy2 import VideoPhy2, VideoPhy2Config
from eval.benchmarks.vqa import EzsBench, PaiBench


@dataclass
class BenchmarkSettings:
    """One field per benchmark, of its name."""

    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    robots: RobotsConfig = field(default_factory=RobotsConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    physics_iq: PhysicsIQConfig = field(default_factory=PhysicsIQConfig)
    videophy: DataConfig = field(default_factory=DataConfig)
    videophy2: VideoPhy2Config = field(default_factory=VideoPhy2Config)
    phygenbench: DataConfig = field(default_factory=DataConfig)
    pai_bench: DataConfig = field(default_factory=DataConfig)
    ezs_bench: DataConfig = field(default_factory=DataConfig)
    r_bench: RBenchConfig = field(default_factory=RBenchConfig)
    vbench: VBenchConfig = field(default_factory=VBenchConfig)
    likephys: LikePhysConfig = field(default_factory=LikePhysConfig)


BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind
    for kind in (
        *(Sandbox, Robots, Planner, PhysicsIQ, VideoPhy, VideoPhy2),
        *(PhyGenBench, PaiBench, EzsBench, RBench, VBench, LikePhys),
    )
}
