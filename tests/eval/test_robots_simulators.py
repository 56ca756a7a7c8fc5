"""Simulator processes: one that crashes, hangs or refuses costs its demonstration. Stand-ins answer, not Meta-World."""

import sys
import time
from dataclasses import fields

import pytest

from eval.robots.demonstrations import Demonstration, list_demonstrations
from eval.robots.simulators import SimulatorError, Simulators
from eval.robots.tasks import OBJECT_COLOURS, TASKS, parse_prompt, write_prompt
from train.clips import VideoConfig

VIDEO = VideoConfig(height=8, width=8, num_frames=2, fps=20)
# Number 1 ends its process, number 2 never answers, number 3 is refused; the others get their number in every array.
STAND_IN = f"""
import io, json, os, struct, sys, time
import numpy as np
for line in sys.stdin:
    index = json.loads(line)["listed"]["index"]
    if index == 1:
        os._exit(7)
    if index == 2:
        time.sleep(60)
    made = {{"error": np.array("no")}} if index == 3 else dict.fromkeys({[one.name for one in fields(Demonstration)]!r})
    message = io.BytesIO()
    np.savez(message, **{{name: np.array(index) if value is None else value for name, value in made.items()}})
    sys.stdout.buffer.write(struct.pack("<Q", message.tell()) + message.getvalue())
    sys.stdout.buffer.flush()
"""


@pytest.fixture
def simulators():
    made = Simulators(2, command=(sys.executable, "-c", STAND_IN), timeout=3.0)
    yield made
    made.close()


@pytest.mark.slow
def test_a_crash_a_hang_and_a_refusal_cost_one_demonstration_each(simulators):
    listed = list_demonstrations(["push"], "pool", 0, range(6))
    reasons = {1: "status 7", 2: "not done after 3 s", 3: "no"}
    for number, one in enumerate(listed):
        if number in reasons:
            with pytest.raises(SimulatorError, match=reasons[number]):
                simulators.get(one, VIDEO, then=listed[number + 1 :])
        else:
            assert int(simulators.get(one, VIDEO, then=listed[number + 1 :]).frames) == number


def test_what_follows_is_made_meanwhile(simulators):
    first, second = list_demonstrations(["push", "reach"], "pool", 0, (8, 10))
    simulators.get(first, VIDEO, then=[second])
    time.sleep(0.5)
    started = time.monotonic()
    assert int(simulators.get(second, VIDEO).actions) == 5
    assert time.monotonic() - started < 0.4


def test_a_stream_is_the_same_however_much_is_asked_for():
    every = list_demonstrations(list(TASKS), "train", 3, range(40))
    assert list_demonstrations(list(TASKS), "train", 3, [25, 7]) == [every[25], every[7]]
    assert {one.task for one in every} == set(TASKS) and len({one.name for one in every}) == 40
    assert [one.prompt for one in list_demonstrations(list(TASKS), "heldout", 3, range(40))] != [
        one.prompt for one in every
    ]
    assert all(parse_prompt(one.prompt) == (one.task, one.colour) for one in every)


def test_instructions_are_told_apart():
    texts = {
        write_prompt(task, colour, wording)
        for task in TASKS
        for colour in OBJECT_COLOURS
        for wording in range(len(TASKS[task].wordings))
    }
    assert len(texts) == len(OBJECT_COLOURS) * sum(len(task.wordings) for task in TASKS.values())
    assert all(len(task.wordings) >= 3 for task in TASKS.values())
    with pytest.raises(ValueError, match="no instruction"):
        parse_prompt("a red ball rolls")
