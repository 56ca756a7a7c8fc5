"""`train/tools/inspect_targets.py`: pictures with and without a checkpoint, that show what is in the group."""

import numpy as np
import pytest
import torch
from PIL import Image

from train import sft
from train.groups import GroupSet
from train.tools import inspect_targets

TERMS = ("physics.trajectory=1", "physics.relational=1")


def size(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


@pytest.mark.slow
def test_pictures_of_targets_and_of_a_checkpoint(tiny_targets, tmp_path, monkeypatch):
    tiny_targets.train(tmp_path, *TERMS, "optim.steps=1", entry=sft)
    image = tmp_path / "targets.png"
    arguments = tiny_targets.arguments(tmp_path)
    inspect_targets.main([*arguments, "inspect.key=group-000003"])
    targets = size(image)
    saved = [f"recipe={tmp_path / 'train' / 'recipe.yaml'}", f"inspect.checkpoint={tmp_path / 'train'}"]
    inspect_targets.main(saved)
    assert size(image)[0] == targets[0] and size(image)[1] > targets[1]  # one more row
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(ValueError, match="physics section that it was trained with"):
        inspect_targets.main([*arguments, f"inspect.checkpoint={tmp_path / 'train'}"])
    with pytest.raises(ValueError, match="inspect.key='nobody': no group .* the first is 'group-000000'"):
        inspect_targets.main([*arguments, "inspect.key=nobody"])


def test_a_group_without_targets_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="group 'group-000000' has no physics targets"):
        inspect_targets.main(tiny.arguments(tmp_path))


def test_tracks_are_drawn_where_they_are(tiny_targets):
    """A point at (0.25, 0.75) of a frame of 40 x 80 pixels lies at column 19.5, row 29.5; hidden, nowhere."""
    group = GroupSet(tiny_targets.groups)[0]
    figure = inspect_targets.draw(group, torch.zeros(17, 40, 80, 3, dtype=torch.uint8), {})
    axis = figure.axes[0]
    axis.clear()
    tracks, visible = torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]], [[1, 1]]]), torch.tensor([[True], [True], [False]])
    inspect_targets.draw_paths(axis, tracks, visible, torch.tensor([True]), torch.Size((3, 40, 80, 3)))
    x, y = axis.lines[0].get_data()
    assert np.array_equal(x, [19.5, 39.5, np.nan], equal_nan=True)
    assert np.array_equal(y, [29.5, 19.5, np.nan], equal_nan=True)
