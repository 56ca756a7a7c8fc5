"""The robot's tasks: which Meta-World environment each is, what moves in it, and how it is asked for.

Nothing here needs Meta-World. A new task is an entry of _TASKS.
"""

from dataclasses import dataclass

from eval.sandbox.world import COLOURS

# The robot's colours, which no object has: segmentation by hue tells hand, arm, goal and object apart.
HAND, ARM, GOAL = "blue", "cyan", "green"
OBJECT_COLOURS = tuple(name for name in COLOURS if name not in (HAND, ARM, GOAL))


@dataclass(frozen=True)
class Task:
    body: str  # the MuJoCo body that the robot is to move; it and its children are drawn in the object's colour
    wordings: tuple[str, ...]  # of the instruction; {colour}: the object's

    @property
    def shows_goal(self) -> bool:
        """Whether a green mark shows where to; every wording of such a task names it."""
        return GOAL in self.wordings[0]


# By Meta-World's name of the environment: the body, and the wordings.
_TASKS: dict[str, tuple[str, ...]] = {
    "reach": (
        "obj",
        "the robot moves its gripper to the green mark and leaves the {colour} puck alone",
        "move the hand to the green mark beside the {colour} puck",
        "a robot arm reaches for the green mark, the {colour} puck stays where it is",
    ),
    "push": (
        "obj",
        "the robot pushes the {colour} puck to the green mark",
        "push the {colour} puck over the table to the green mark",
        "a robot arm slides the {colour} puck onto the green mark",
    ),
    "pick-place": (
        "obj",
        "the robot picks up the {colour} puck and lifts it to the green mark",
        "grasp the {colour} puck and carry it to the green mark",
        "a robot arm takes the {colour} puck and holds it at the green mark",
    ),
    "drawer-open": (
        "drawer_link",
        "the robot opens the {colour} drawer",
        "pull the {colour} drawer open by its handle",
        "a robot arm hooks the handle and pulls out the {colour} drawer",
    ),
    "drawer-close": (
        "drawer_link",
        "the robot closes the {colour} drawer",
        "push the open {colour} drawer shut",
        "a robot arm shuts the {colour} drawer",
    ),
    "button-press": (
        "button",
        "the robot presses the {colour} button",
        "push the {colour} button into its box",
        "a robot arm presses the {colour} button on the box",
    ),
    "door-open": (
        "door_link",
        "the robot opens the {colour} door",
        "pull the {colour} door open by its handle",
        "a robot arm takes the handle and swings the {colour} door open",
    ),
    "window-open": (
        "windowb_a",
        "the robot slides the {colour} window open",
        "open the {colour} window by its handle",
        "a robot arm pushes the {colour} window aside",
    ),
    "faucet-open": (
        "faucet_link2",
        "the robot opens the {colour} faucet",
        "turn the {colour} faucet's handle to open it",
        "a robot arm turns on the {colour} faucet",
    ),
    "handle-press": (
        "handle_link",
        "the robot presses the {colour} handle down",
        "push the {colour} handle down",
        "a robot arm presses down the {colour} handle",
    ),
}
TASKS = {name: Task(body, tuple(wordings)) for name, (body, *wordings) in _TASKS.items()}


def write_prompt(task: str, colour: str, wording: int) -> str:
    """The instruction; `wording` picks one (modulo their number)."""
    choices = TASKS[task].wordings
    return choices[wording % len(choices)].format(colour=colour)


_PROMPTS = {
    write_prompt(task, colour, wording): (task, colour)
    for task in TASKS
    for colour in OBJECT_COLOURS
    for wording in range(len(TASKS[task].wordings))
}


def parse_prompt(prompt: str) -> tuple[str, str]:
    """Task and colour of an instruction that `write_prompt` wrote. Raises ValueError for any other."""
    found = _PROMPTS.get(prompt.strip().lower())
    if found is None:
        like = next(iter(_PROMPTS))
        raise ValueError(f"prompt {prompt!r} is no instruction of the robots' tasks: write it like {like!r}")
    return found
