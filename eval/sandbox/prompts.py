"""Prompts of the sandbox scenes, and the reader that gets scene, colours and direction back from a prompt."""

import re
from dataclasses import dataclass

from eval.sandbox.world import COLOUR_NAMES

# {colour} and {second}: of the first and second object; {direction}: where the (first) object moves at the start.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "projectile": (
        "a {colour} ball is thrown to the {direction} and bounces on a hard floor",
        "someone tosses a {colour} ball to the {direction}, it falls and bounces off the floor",
        "a {colour} ball flies to the {direction}, drops to the ground and bounces",
        "a bouncing {colour} ball moves to the {direction} above a plain floor",
    ),
    "collision": (
        "a {colour} ball rolls to the {direction} and hits a {state} {second} ball",
        "a {colour} ball rolling to the {direction} collides with a {state} {second} ball",
        "a collision on the floor: a {colour} ball moving to the {direction} bumps into a {state} {second} ball",
    ),
    "pendulum": (
        "a {colour} ball on a rod swings to the {direction} like a pendulum",
        "a pendulum with a {colour} bob is released and swings to the {direction}",
        "a {colour} pendulum starts at rest and swings to the {direction} and back",
    ),
    "ramp": (
        "a {colour} block slides down a ramp to the {direction}",
        "a {colour} block slides to the {direction} down a slope and slows down on the floor",
        "released on a ramp, a {colour} block slides down to the {direction} with friction",
    ),
    "occluder": (
        "a {colour} ball rolls to the {direction} and passes behind a dark panel",
        "a {colour} ball rolling to the {direction} disappears behind a dark panel and comes out again",
        "behind a dark panel passes a {colour} ball that rolls to the {direction}",
    ),
}
STATES = {"resting": "resting", "moving": "oncoming"}  # attribute of the second ball -> word in the prompt

_SCENE_WORDS = (  # the first that matches decides
    ("pendulum", r"pendulum|swings?\b|swinging"),
    ("ramp", r"\bramp|\bslope|\bincline|\bslid"),
    ("occluder", r"\bbehind\b|\boccluder|\bscreen\b"),
    ("collision", r"\bcolli|\bhits\b|\bbumps\b|\bstrikes\b"),
    ("projectile", r"\bbounc|\bthrow|\btoss|\bflies\b|\bfalls\b|\bdrops\b"),
)


@dataclass(frozen=True)
class Request:
    """What a prompt asks for; None where it does not say."""

    scene: str
    colour: str | None
    second_colour: str | None  # only of the collision scene
    direction: str | None  # left | right, of the first object at the start
    second_state: str | None  # resting | moving, only of the collision scene


def write_prompt(scene: str, attributes: dict[str, str], template: int) -> str:
    """The prompt of a clip with these attributes; `template` picks a paraphrase (modulo their number)."""
    choices = TEMPLATES[scene]
    return choices[template % len(choices)].format(
        colour=attributes["colour"],
        direction=attributes["direction"],
        second=attributes.get("second_colour", ""),
        state=STATES.get(attributes.get("second_state", ""), ""),
    )


def parse_prompt(prompt: str) -> Request:
    """Read scene, colours and direction from a prompt, also from free paraphrases.

    Raises ValueError when no scene is recognised.
    """
    text = prompt.lower()
    scene = next((name for name, words in _SCENE_WORDS if re.search(words, text)), None)
    if scene is None:
        raise ValueError(
            f"prompt {prompt!r} names none of the sandbox scenes {', '.join(TEMPLATES)}; "
            f"write it like {TEMPLATES['projectile'][0]!r}"
        )
    colours = [word for word in re.findall(r"[a-z]+", text) if word in COLOUR_NAMES]
    if scene == "collision" and len(set(colours)) < 2 and re.search(_SCENE_WORDS[-1][1], text):
        scene = "projectile"  # one ball that hits the floor
    direction = re.search(r"\b(?:to|toward|towards) (?:the )?(left|right)\b|\b(left|right)wards?\b", text)
    if direction is None:
        direction = re.search(r"(?<!from )(?<!from the )\b(left|right)\b()", text)
    state = None
    if scene == "collision":
        if re.search(r"\brest|\bstill\b|\bstation|\bwaiting\b", text):
            state = "resting"
        elif re.search(r"\boncoming\b|\bcoming\b|\bmoving\b.*\bmoving\b|\bother way\b|\beach other\b", text):
            state = "moving"
    return Request(
        scene=scene,
        colour=colours[0] if colours else None,
        second_colour=colours[1] if scene == "collision" and len(colours) > 1 else None,
        direction=next(group for group in direction.groups() if group) if direction else None,
        second_state=state,
    )
