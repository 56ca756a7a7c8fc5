"""The cache of the reference's errors: the same run to the bit, without the reference's passes."""

import json

import pytest

from train import sft
from train.backbones.base import Backbone

STEPS = ("optim.steps=4", "train.checkpoint_every=9")


@pytest.fixture
def passes(monkeypatch):
    """Counts the network's passes."""
    count, network = [], Backbone._network

    def counted(self, *arguments):
        count.append(1)
        return network(self, *arguments)

    monkeypatch.setattr(Backbone, "_network", counted)
    return count


@pytest.mark.parametrize(
    "more",
    [
        ("objective.loss=bound", "self_score.strength=3", "self_score.every=2"),
        pytest.param(("objective.loss=plackett_luce",), marks=pytest.mark.slow),
        pytest.param(("objective.loss=bound", "train.pairs_per_pass=2", "optim.batch_size=4"), marks=pytest.mark.slow),
    ],
)
def test_a_later_run_is_the_same_to_the_bit_without_the_references_passes(tiny, tmp_path, passes, more):
    other = (*STEPS, *more, "objective.beta=300", "objective.anchor=7", "optim.lr=1e-4", "lora.rank=2")
    tiny.train(tmp_path / "plain", *other)
    plain = len(passes)
    cache = f"train.reference_cache={tmp_path / 'cache'}"
    tiny.train(tmp_path / "first", *STEPS, *more, cache)
    passes.clear()
    tiny.train(tmp_path / "second", *other, cache)
    assert tiny.metrics(tmp_path / "second") == tiny.metrics(tmp_path / "plain")
    batch = 4 if "optim.batch_size=4" in more else tiny.config(tmp_path, *other).optim.batch_size
    clips = 2 if "objective.loss=bound" in more else 5
    alone = "train.pairs_per_pass=2" not in more
    assert plain - len(passes) == 4 * (batch * clips if alone else batch // 2)  # of 4 steps

    passes.clear()  # what is not there yet is computed and added
    tiny.train(tmp_path / "longer", *other, "optim.steps=5", cache)
    tiny.train(tmp_path / "whole", *other, "optim.steps=5")
    assert tiny.metrics(tmp_path / "longer") == tiny.metrics(tmp_path / "whole")


def test_a_torn_record_is_left_out(tiny, tmp_path):
    cache = f"train.reference_cache={tmp_path / 'cache'}"
    tiny.train(tmp_path / "first", *STEPS, cache)
    (path,) = (tmp_path / "cache").glob("errors-*.bin")
    path.write_bytes(path.read_bytes()[:-3])
    tiny.train(tmp_path / "second", *STEPS, cache)
    assert tiny.metrics(tmp_path / "second") == tiny.metrics(tmp_path / "first")
    assert len(list((tmp_path / "cache").glob("errors-*.bin"))) == 2  # the last step was made again


def test_errors_of_other_settings_are_refused_by_name(tiny, tmp_path):
    cache = f"train.reference_cache={tmp_path / 'cache'}"
    tiny.train(tmp_path / "first", *STEPS, cache)
    independent = ("objective.noise=independent", "objective.noise=shared .here independent")
    for change, said in (independent, ("seed=5", "seed=0 .here 5")):
        with pytest.raises(ValueError, match=f"train.reference_cache=.*{said}.*: name another folder"):
            tiny.train(tmp_path / "second", *STEPS, cache, change)
    settings = json.loads((tmp_path / "cache" / "settings.json").read_text(encoding="utf-8"))
    assert "optim.batch_size" in settings and "objective.beta" not in settings


def test_a_folder_that_is_no_cache_is_named(tiny, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "settings.json").write_text("{", encoding="utf-8")
    for path, said in ((folder, "settings.json is damaged.*delete the folder"), (tmp_path / "file", "is a file")):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=said):
            tiny.train(tmp_path / "run", *STEPS, f"train.reference_cache={path}")


def test_supervised_training_has_no_reference(tiny, tmp_path):
    arguments = tiny.arguments(tmp_path, *STEPS, f"train.reference_cache={tmp_path / 'cache'}")
    with pytest.raises(ValueError, match="supervised training has no reference; leave it out"):
        sft.main(arguments)


def test_steps_that_a_resumed_run_began_with_are_read_too(tiny, tmp_path, passes):
    tiny.train(tmp_path / "first", "optim.steps=2", "optim.schedule=constant")
    cache = f"train.reference_cache={tmp_path / 'cache'}"
    tiny.train(tmp_path / "first", "optim.steps=4", "optim.schedule=constant", cache)  # its third and fourth step
    passes.clear()
    tiny.train(tmp_path / "plain", *STEPS)
    plain = len(passes)
    passes.clear()
    tiny.train(tmp_path / "second", *STEPS, cache)
    assert tiny.metrics(tmp_path / "second") == tiny.metrics(tmp_path / "plain")
    assert plain - len(passes) == 2 * 2 * 2  # of two steps of two groups, two clips each
