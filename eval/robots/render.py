"""Pictures of the robots' world, and the truth about each pixel: its depth, what it shows, and where its point goes.

MuJoCo draws on the CPU, without shadows. Lengths are metres; image points are (x, y), each in [0, 1] inside the frame.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from eval.robots.world import World

LOOK_AT, DISTANCE, AZIMUTH, ELEVATION = (0.0, 0.64, 0.13), 1.05, 140.0, -35.0  # the camera; m and degrees
FIELD_OF_VIEW = 45.0  # degrees, from top to bottom
BACKGROUND, HAND, ARM, GOAL, OBJECT = range(5)  # what a pixel shows; ARM is all of the robot but the hand
DEPTH_TOLERANCE = 0.015  # m that a point may lie behind what its pixel shows and still be seen


@contextmanager
def camera(world: World, height: int, width: int) -> Iterator["Camera"]:
    """Draws moments of `world`; its context is freed in the end."""
    model, mujoco = world.model, world.mujoco
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    model.vis.global_.fovy = FIELD_OF_VIEW
    with mujoco.Renderer(model, height, width) as renderer:
        yield Camera(world, renderer)


class Camera:
    def __init__(self, world: World, renderer):
        self.world, self.mujoco, self.renderer = world, world.mujoco, renderer
        self.view = self.mujoco.MjvCamera()
        self.view.lookat[:], self.view.distance = LOOK_AT, DISTANCE
        self.view.azimuth, self.view.elevation = AZIMUTH, ELEVATION
        site = self.mujoco.mjtObj.mjOBJ_SITE
        self._kinds = np.full((self.mujoco.mjtObj.mjNOBJECT.value + 1, max(world.model.ngeom, world.model.nsite)), 0)
        geoms = self._kinds[self.mujoco.mjtObj.mjOBJ_GEOM.value]
        geoms[world.robot_geoms], geoms[world.hand_geoms], geoms[world.object_geoms] = ARM, HAND, OBJECT
        self._kinds[site.value] = GOAL  # the only site that is drawn

    def frame(self, places: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 of geoms at `places` (G, 3), turned and maybe stretched by `turns` (G, 3, 3)."""
        data, scene, flags = self.world.env.data, self.renderer.scene, self.mujoco.mjtRndFlag
        data.geom_xpos[:], data.geom_xmat[:] = places, turns.reshape(len(turns), 9)
        if self.world.goal is not None:
            data.site("goal").xpos[:] = self.world.goal
        self.renderer.update_scene(data, self.view)
        for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX):
            scene.flags[flag] = 0
        return self.renderer.render()

    def truth(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the last frame: depth (H, W) float32 along the camera's axis, layers (H, W) uint8, and the number of the
        geom (H, W) int16 that each pixel shows, -1 for none."""
        self.renderer.enable_depth_rendering()
        depth = self.renderer.render()
        self.renderer.enable_segmentation_rendering()
        number, kind = np.moveaxis(self.renderer.render(), -1, 0)  # -1, -1 where nothing is
        self.renderer.disable_segmentation_rendering()
        layers = self._kinds[kind, number].astype(np.uint8)
        is_geom = kind == self.mujoco.mjtObj.mjOBJ_GEOM.value
        return depth, layers, np.where(is_geom, number, -1).astype(np.int16)


# ---- geometry --------------------------------------------------------------------------------------------------------


def _axes() -> tuple[np.ndarray, np.ndarray]:
    """The camera's place (3,), and right, up and forward as rows (3, 3)."""
    azimuth, elevation = np.radians([AZIMUTH, ELEVATION])
    forward = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    right = np.array([np.sin(azimuth), -np.cos(azimuth), 0])
    return np.array(LOOK_AT) - DISTANCE * forward, np.stack([right, np.cross(right, forward), forward])


def project(points: np.ndarray, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """World points (..., 3) as image points (..., 2) and depths (...). aspect: width / height of the frame."""
    place, axes = _axes()
    right, up, depth = np.moveaxis((points - place) @ axes.T, -1, 0)
    scale = 0.5 / (np.tan(np.radians(FIELD_OF_VIEW) / 2) * depth)
    return np.stack([0.5 + right * scale / aspect, 0.5 - up * scale], axis=-1), depth


def unproject(points: np.ndarray, depth: np.ndarray, aspect: float) -> np.ndarray:
    """World points (..., 3) of image points (..., 2) at depths (...): the inverse of `project`."""
    place, axes = _axes()
    half = np.tan(np.radians(FIELD_OF_VIEW) / 2)
    right, up = (points[..., 0] - 0.5) * 2 * half * aspect * depth, (0.5 - points[..., 1]) * 2 * half * depth
    return place + np.stack([right, up, depth], axis=-1) @ axes


def look_up(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values of the pixels of (H, W) that image points (..., 2) lie in; outside, of the nearest pixel."""
    height, width = image.shape
    column = np.clip((points[..., 0] * width).astype(int), 0, width - 1)
    row = np.clip((points[..., 1] * height).astype(int), 0, height - 1)
    return image[row, column]


def follow(
    queries: np.ndarray, geoms: np.ndarray, depth: np.ndarray, layers: np.ndarray, places: np.ndarray, turns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the points that are seen at `queries` (N, 2) in frame 0 go, each fixed to the geom that its pixel shows.

    geoms (H, W) of frame 0; depth and layers (T, H, W); places (T, G, 3) and turns (T, G, 3, 3). Returns tracks
    (T, N, 2) float32 in [0, 1], and visible (T, N) bool: in the frame, in a pixel of the same layer, and not farther
    than that or a neighbouring pixel by more than DEPTH_TOLERANCE (a surface at a flat angle has all of these depths).
    A point that leaves the frame is invisible and stays at its edge; background and the goal's mark do not move.
    """
    height, width = geoms.shape
    aspect = width / height
    belongs = look_up(geoms, queries)  # (N,)
    start = unproject(queries, look_up(depth[0], queries), aspect)  # (N, 3)
    local = np.einsum("nji,nj->ni", turns[0, belongs], start - places[0, belongs])
    moved = places[:, belongs] + np.einsum("tnij,nj->tni", turns[:, belongs], local)  # (T, N, 3)
    moved = np.where((belongs >= 0)[None, :, None], moved, start[None])
    tracks, distance = project(moved, aspect)
    inside = ((tracks >= 0) & (tracks <= 1)).all(axis=-1)
    pixel = np.array([1 / width, 1 / height])
    around = [pixel * (x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    seen = np.stack([[look_up(d, p + shift) for shift in around] for d, p in zip(depth, tracks, strict=True)])
    same = np.stack([look_up(one, p) for one, p in zip(layers, tracks, strict=True)]) == look_up(layers[0], queries)
    visible = inside & same & (distance <= seen.max(axis=1) + DEPTH_TOLERANCE)
    return np.clip(tracks, 0, 1).astype(np.float32), visible
