"""R-Bench's questions to a vision-language model, in the official words, and what their answers are worth.

What comes from where stands in `r_bench`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Task
from eval.benchmarks.official_prompts import Prompt, prompts
from eval.benchmarks.vlm_rows import ask, read_object
from eval.vlm.backend import Malformed, Question, Reply
from eval.vlm.client import Vlm

MANIPULATION = ("robotic manipulator", "manipulated object")


@dataclass(frozen=True)
class TaskRule:
    decisive: tuple[str, str]  # aspects of the answer
    fields: tuple[str, ...]  # of a prompt


TASKS = {
    "common_manipulation": TaskRule(("action_execution", "task_completion"), MANIPULATION),
    "spatial_relationship": TaskRule(
        ("spatial_relation_accuracy", "manipulation_feasibility"), (*MANIPULATION, "Spatial Relationship")
    ),
    "multi-entity_collaboration": TaskRule(
        ("action_coordination", "task_completion"), ("manipulated object", "entity1", "entity2")
    ),
    "long-horizon_planning": TaskRule(("action_execution", "event_completion_ratio"), (*MANIPULATION, "event_list")),
    "visual_reasoning": TaskRule(("action_execution", "visual_reasoning_accuracy"), MANIPULATION),
}
EMBODIMENTS = dict.fromkeys(("single_arm", "dual_arm", "quad", "humanoid"), MANIPULATION)  # with fields of a prompt
STABILITY = "eval/4_embodiments/1_robot_subject_stability.py"
PLAUSIBILITY = "eval/4_embodiments/2_physical_plausibility.py"
ADHERENCE = "eval/4_embodiments/3_task_adherence_consistency.py"
SCRIPTS = (STABILITY, PLAUSIBILITY, ADHERENCE, *(f"eval/5_tasks/{task}.py" for task in TASKS))

LETTERS = "ABCDE"  # from no change to the most
# Stability of robot and object, by their letters in the alphabet's order, 15 to 1; of the robot alone.
PAIRS = dict(zip("AA AB BB AC BC AD BD AE BE CC CD DD CE DE EE".split(), range(15, 0, -1), strict=True))
SINGLES = {"A": 15, "B": 11, "C": 7, "D": 4, "E": 1}
PENALTIES = {"A": 0.0, "B": 0.2, "C": 0.4, "D": 0.6, "E": 0.8}
STILL, NEARLY_STILL = 0.05, 0.1  # amplitudes below which a clip counts as a still picture, or nearly
STILL_PENALTY = 0.1  # more for the former
SMOOTHNESS_SHARE = 0.2  # of visual quality


class Wording:
    """The official questions, filled for a task. ValueError for a clone without them."""

    def __init__(self, checkout: Path, remedy: str):
        def text(script: str, name: str) -> list[Prompt]:
            return prompts(checkout / script, name, remedy)

        self.tasks = {task: text(f"eval/5_tasks/{task}.py", "create_prompt")[0] for task in TASKS}
        self.chain = text("eval/5_tasks/visual_reasoning.py", "create_question_chain")[0]
        self._relation = text("eval/5_tasks/spatial_relationship.py", "spatial_text")[-1]
        self.plausibility = text(PLAUSIBILITY, "create_prompt")[0]
        self.adherence = text(ADHERENCE, "create_prompt")[0]
        self.object = text(STABILITY, "Q2")[0]
        robots, worst = text(STABILITY, "Q1"), text(STABILITY, "analyze_phrase")
        if len(robots) < 2 or len(worst) < 4:
            raise ValueError(f"{checkout / STABILITY} is another version than the one meant: {remedy}")
        self._with_hand, self._without_hand = robots[:2]
        self._worst = worst[:4]  # what E means for a gripper or arm, for a hand, for a robot, for anything else

    def robot(self, phrase: str) -> str:
        def has(word: str) -> bool:
            return bool(re.search(rf"\b{word}s?\b", phrase.lower()))

        kinds = (has("gripper") or has("arm"), has("hand"), has("robot"), True)
        worst = self._worst[kinds.index(True)].fill({"phrase_1": phrase})
        question = self._with_hand if has("gripper") or has("hand") else self._without_hand
        return question.fill({"phrase_1": phrase, "E1": worst})

    def blanks(self, task: Task) -> dict[str, str]:
        """What fills the questions about a task, as far as its facts go, but for the answers to the chain."""
        facts = task.facts
        found = {"view": facts["view"], "description": facts["prompt"]}
        names = {"_".join(name.split()): name for name in (*MANIPULATION, "entity1", "entity2")}
        found |= {blank: facts[name] for blank, name in names.items() if name in facts}
        if "event_list" in facts:
            events = "\n".join(f"{number}) {event}" for number, event in enumerate(facts["event_list"], start=1))
            found |= {"events_formatted": events, "len(events_formatted)": len(events)}  # letters, not events, as there
        if "Spatial Relationship" in facts:
            relation = facts["Spatial Relationship"]
            parts = {"spatial": "spatial", "obj1": "object1", "obj2": "object2"}
            parts = {blank: str(relation.get(name, "")) for blank, name in parts.items()}
            found |= {**parts, "spatial_text": self._relation.fill(parts)}
        return {blank: str(value) for blank, value in found.items()}


async def rate_task(vlm: Vlm, task: Task, picture: bytes, wording: Wording) -> float:
    """Score of a task, 0 to 1. Raises NoAnswer."""
    blanks = wording.blanks(task)
    if task.category == "visual_reasoning":
        chain = wording.chain.fill({"prompt": task.facts["prompt"]})
        blanks["questions"] = await ask(vlm, "chain of questions", Question(chain), words)
    question = Question(wording.tasks[task.category].fill(blanks), frames=(picture,))
    first, second = TASKS[task.category].decisive

    def score(reply: Reply) -> float:
        answer = read_object(reply)
        marks = [mark(answer.get(name), name, reply) for name in (first, second, "total")]
        return task_score(*marks)

    return await ask(vlm, task.category, question, score)


def task_score(first: float, second: float, total: float) -> float:
    """0 to 1 of two aspects' marks and the model's own total, up to 5."""
    return (max(min((first + second) / 2, total), 1) - 1) / 4


async def rate_embodiment(
    vlm: Vlm, task: Task, pictures: Sequence[bytes], wording: Wording, motion: tuple[float, float] | None
) -> dict[str, float]:
    """Sub-metrics of an embodiment, 0 to 1. Raises NoAnswer.

    pictures: six frames; the first frame beside a later one. motion: smoothness and amplitude, None: not measured.
    """
    six, pair = pictures
    found = {}
    for name, prompt in {"plausibility": wording.plausibility, "adherence": wording.adherence}.items():
        question = Question(prompt.fill(wording.blanks(task)), frames=(six,))
        score = await ask(vlm, name, question, lambda reply: mark(read_object(reply), "the answer", reply, 1))
        found[name] = (score - 1) / 4
    robot, thing = (str(task.facts[name]) for name in MANIPULATION)
    letters = await ask(vlm, "stability of the robot", Question(wording.robot(robot), frames=(pair,)), letter)
    if thing.strip().lower() not in ("none", ""):
        letters += await ask(
            vlm, "stability of the object", Question(wording.object.fill({"phrase_2": thing}), frames=(pair,)), letter
        )
    found["stability"] = stability(letters)
    found["task_completion"] = (found["plausibility"] + found["adherence"]) / 2
    found["visual_quality"] = visual_quality(found["stability"], letters, motion)
    return found


def stability(letters: str) -> float:
    """0 to 1 of the robot's letter, or of the robot's and the object's."""
    return ((PAIRS["".join(sorted(letters))] if len(letters) == 2 else SINGLES[letters]) - 1) / 14


def visual_quality(stable: float, letters: str, motion: tuple[float, float] | None) -> float:
    """0 to 1 of stability in [0, 1], its letters, and smoothness and amplitude in [0, 1] where they are known."""
    robot, *thing = (PENALTIES[one] for one in letters)
    change = (robot + thing[0]) / 2 if robot and thing and thing[0] else robot
    if motion is None:
        return max(stable - change, 0.0)
    smoothness, amplitude = (min(max(value, 0.0), 1.0) for value in motion)
    base = (1 - SMOOTHNESS_SHARE) * stable + SMOOTHNESS_SHARE * smoothness
    return max(base - still_penalty(amplitude) - change, 0.0)


def still_penalty(amplitude: float) -> float:
    if amplitude >= NEARLY_STILL:
        return 0.0
    return NEARLY_STILL - amplitude + (STILL_PENALTY if amplitude < STILL else 0.0)


def mark(value: Any, name: str, reply: Reply, least: float = 0.0) -> float:
    """The number under `score`, from `least` to 5."""
    try:
        number = float(value["score"])
    except (TypeError, KeyError, ValueError) as error:
        raise Malformed(f"the answer has no number for the score of {name!r}", reply.text) from error
    if not (math.isfinite(number) and least <= number <= 5):
        raise Malformed(f"the score of {name!r} is {number:g}, not {least:g} to 5", reply.text)
    return number


def letter(reply: Reply) -> str:
    """The letter under `adjust`, which the model chooses after explaining its first one."""
    found = str(read_object(reply).get("adjust", "")).strip().upper()
    if len(found) != 1 or found not in LETTERS:
        raise Malformed(f"the answer's adjust is {found[:20]!r}, not a letter from A to E", reply.text)
    return found


def words(reply: Reply) -> str:
    if not reply.text.strip():
        raise Malformed("the answer is empty", reply.text)
    return reply.text.strip()
