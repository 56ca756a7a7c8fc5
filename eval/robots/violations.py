"""What can be planted into a demonstration, to see whether a judge finds it."""

import numpy as np

from eval.robots.world import World

# What severity 1 means. Severity s in (0, 1] scales it linearly.
VIOLATIONS: dict[str, str] = {
    "vanish": "from a random moment on the object has lost the share s of its size",
    "vanish_hand": "from a random moment on the hand has lost the share s of its size",
    "teleport": "at a random moment the object jumps by 0.2 s m sideways",
    "untouched": "the object glides 0.2 s m sideways in the third of the clip in which the hand is farthest from it",
    "stretch": "from a random moment on the object grows to 1 + s times its length, over a third of the clip",
    "ignore": "the object follows only the share 1 - s of its motion: hand and tools pass through it",
}


def plant(
    kind: str, severity: float, places: np.ndarray, turns: np.ndarray, world: World, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Places (T, G, 3) and turns (T, G, 3, 3) of the geoms with the violation. `turns` may then scale as well."""
    if kind not in VIOLATIONS:
        raise ValueError(f"violation {kind!r} is unknown; choose one of {', '.join(VIOLATIONS)}")
    num_frames = len(places)
    geoms = world.hand_geoms if kind == "vanish_hand" else world.object_geoms
    own, turned = places[:, geoms].copy(), turns[:, geoms].copy()
    middle = own.mean(axis=1, keepdims=True)  # (T, 1, 3)
    begin = random.integers(num_frames // 4, num_frames * 3 // 5)
    third = max(1, num_frames // 3)
    since = np.arange(num_frames) - begin
    angle = random.uniform(0, 2 * np.pi)
    sideways = 0.2 * severity * np.array([np.cos(angle), np.sin(angle), 0])
    if kind in ("vanish", "vanish_hand", "stretch"):
        if kind == "stretch":
            scale = np.ones((num_frames, 3))
            scale[:, random.integers(3)] += severity * np.clip(since / third, 0, 1)
        else:
            scale = np.where(since > 0, 1 - severity, 1.0)[:, None] * np.ones(3)
        own = middle + (own - middle) * scale[:, None]
        turned = scale[:, None, :, None] * turned
    elif kind == "teleport":
        own += (since > 0)[:, None, None] * sideways
    elif kind == "untouched":
        hand = places[:, world.hand_geoms].mean(axis=1)
        distance = np.convolve(np.linalg.norm(hand - middle[:, 0], axis=-1), np.ones(third), "valid")
        own += np.clip((np.arange(num_frames) - distance.argmax()) / third, 0, 1)[:, None, None] * sideways
    else:  # ignore
        own = own[:1] + (1 - severity) * (own - own[:1])
        turned = turned[:1] + (1 - severity) * (turned - turned[:1])
    places, turns = places.copy(), turns.copy()
    places[:, geoms], turns[:, geoms] = own, turned
    return places, turns
