"""Benchmarks by name. A new one is a file with a settings dataclass and a `Benchmark`, a field and a line here."""

from dataclasses import dataclass, field

from eval.benchmarks.base import Benchmark
from eval.benchmarks.sandbox import Sandbox, SandboxConfig


@dataclass
class BenchmarkSettings:
    """One field a benchmark, of its name."""

    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


BENCHMARKS: dict[str, type[Benchmark]] = {
    "sandbox": Sandbox,
}
