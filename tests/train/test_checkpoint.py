"""`train/checkpoint.py`: whole or not at all, whatever happens to process or disk; and what it refuses to load."""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from train import checkpoint, files, weight_files
from train.lora_switch import LoraConfig, LoraSwitch
from train.optimizer import OptimConfig, build_optimizer

BACKBONE = "wan21-0123456789ab"
FILES = {LoraSwitch.file, checkpoint.OPTIMIZER_FILE, checkpoint.STATE_FILE}


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn1, self.attn2 = Attention(width), Attention(width)


class Run:
    """Adapters of a small network, an optimizer that has made a step, and `save` as the trainer calls it."""

    def __init__(self, folder, *, rank=2, alpha=2.0, target="attn1.to_q", width=16, keep=3):
        network = nn.Module()
        network.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.network, self.folder, self.keep = network, Path(folder), keep
        self.switch = LoraSwitch(network, LoraConfig(rank=rank, alpha=alpha, targets=[target]))
        self.optimizer = build_optimizer(OptimConfig(), self.switch.parameters())
        self.metadata = checkpoint.weights_metadata(self.switch, fingerprint=BACKBONE, expert="transformer")
        self.learn(0)

    def learn(self, seed):
        """One optimizer step on seeded gradients."""
        generator = torch.Generator().manual_seed(seed)
        for weight in self.switch.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        self.optimizer.step()

    def save(self, step):
        state = {"samples_seen": 8 * step, "skipped": 0, "seed": 0}
        state |= {"groups": {"folder": "groups", "digest": "0" * 64}, "settings": {"optim.lr": 1e-5}}
        return checkpoint.save(
            self.folder,
            step,
            switch=self.switch,
            optimizer=self.optimizer,
            state=state,
            metadata=self.metadata,
            keep=self.keep,
        )

    def load(self, path):
        options = {"switch": self.switch, "optimizer": self.optimizer}
        return checkpoint.load(path, **options, fingerprint=BACKBONE, expert="transformer")

    def names(self):
        return sorted(path.name for path in self.folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path)
    run.learn(1)
    path = run.save(5)
    assert path == tmp_path / "step_00000005" and {file.name for file in path.iterdir()} == FILES
    assert other.load(path)["step"] == 5 and other.load(path)["samples_seen"] == 40
    for one, two in ((run, other), (other, run)):
        (
            one.learn(2),
            two.learn(2),
        )  # both go on alike only when weights and both moments and the step count are the same
        for name, weight in one.switch.state_dict().items():
            assert torch.equal(weight, two.switch.state_dict()[name])


def test_no_base_weights_and_nothing_pickled(tmp_path):
    run = Run(tmp_path, width=64)
    path = run.save(1)
    adapters = sum(weight.numel() for weight in run.switch.parameters())
    assert load_file(path / LoraSwitch.file).keys() == run.switch.weights.keys()
    moments = load_file(path / checkpoint.OPTIMIZER_FILE)
    assert {name.rsplit(".", 1)[0] for name in moments} == run.switch.weights.keys()
    assert {name.rsplit(".", 1)[1] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    total = sum(file.stat().st_size for file in path.iterdir())
    assert total < 3 * 4 * adapters + 6500  # weights and two moments in float32, and headers
    assert total < 4 * sum(p.numel() for p in run.network.parameters())
    metadata = checkpoint.find_lora(path)[1]
    assert metadata["rank"] == "2" and metadata["alpha"] == "2.0" and metadata["fingerprint"] == BACKBONE
    assert json.loads(metadata["targets"]) == ["attn1.to_q"] and metadata["expert"] == "transformer"


# ---- whole or not at all ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Passes every `except Exception`, so nothing is tidied up: the disk looks as after SIGKILL."""


CALLS = (
    (weight_files, "save_file"),
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (Path, "write_bytes"),
    (Path, "mkdir"),
    (shutil, "rmtree"),
)


@contextmanager
def failing(monkeypatch, at, error):
    """The `at`-th call that changes the disk fails half done: a file cut, a folder half deleted, else not begun. The
    dead tidy nothing up."""
    count = 0
    unlink = Path.unlink

    def wrap(name, original):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count != at:
                return original(*args, **options)
            if name in ("save_file", "write_bytes"):
                original(*args, **options)
                file = args[1] if name == "save_file" else args[0]
                os.truncate(file, file.stat().st_size // 2)
            if name == "rmtree" and (found := sorted(args[0].glob("*"))):
                found[0].unlink()
            raise error

        return call

    def unlink_alive(path, **options):
        if count < at or not isinstance(error, Killed):
            unlink(path, **options)

    with monkeypatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, wrap(name, getattr(owner, name)))
        patch.setattr(Path, "unlink", unlink_alive)
        yield


@pytest.mark.parametrize("moment", range(1, 21))
def test_killed_at_any_moment_of_a_save(tmp_path, monkeypatch, moment):
    run = Run(tmp_path, keep=2)
    run.save(1), run.save(2)
    kept = {path: path.read_bytes() for path in (tmp_path / "step_00000002").iterdir()}
    run.learn(3)
    finished = False
    try:
        with failing(monkeypatch, moment, Killed()):
            run.save(3)
        finished = True
    except Killed:
        pass
    assert finished == (moment > 18)  # seventeen calls write it, one deletes the oldest
    assert {path: path.read_bytes() for path in kept} == kept
    for path in sorted(tmp_path.glob("step_*"))[1:]:  # only the oldest may be half deleted
        checkpoint.check_whole(path)
    newest = checkpoint.latest(tmp_path)
    assert newest.name in ("step_00000002", "step_00000003")
    other = Run(tmp_path, keep=2)
    with files.lock(tmp_path):  # the run that goes on tidies up
        assert other.load(newest)["step"] == int(newest.name[-8:])
        other.learn(3), other.save(3), other.save(4)
    assert other.names() == [files.LOCK, "step_00000003", "step_00000004"]


@pytest.mark.parametrize("moment", range(2, 17))  # from the first folder to the renaming
def test_an_error_in_a_save_names_the_path_and_leaves_nothing(tmp_path, monkeypatch, moment):
    run = Run(tmp_path)
    run.save(1)
    error = OSError(errno.EIO, "Input/output error")
    with (
        failing(monkeypatch, moment, error),
        pytest.raises(ValueError, match="step_00000002.*Input/output error.*resumes from.*step_00000001"),
    ):
        run.save(2)
    assert run.names() == ["step_00000001"]
    run.load(checkpoint.latest(tmp_path))


def test_equal_contents_are_equal_bytes_that_all_may_read(tmp_path):
    """safetensors orders metadata at random, and gives its files to their owner alone."""
    one, other = Run(tmp_path / "one").save(1), Run(tmp_path / "other").save(1)
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes()
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE((one / name).stat().st_mode) == 0o666 & ~umask


@contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes: a write then fails (EFBIG) as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_system_refuses(tmp_path):
    run = Run(tmp_path, rank=256, width=256)  # 1 MiB of adapters, 2 MiB of moments
    run.save(1)
    with (
        largest_file(1_500_000),
        pytest.raises(ValueError, match=r"step_00000002 could not be written.*File too large.*3\.0 MiB"),
    ):
        run.save(2)
    assert run.names() == ["step_00000001"] and checkpoint.latest(tmp_path) == tmp_path / "step_00000001"


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_training_on_a_full_disk_stops_and_goes_on_where_there_is_space(tiny, tmp_path, small_disk):
    """Checkpoints of 0.3 MiB, three kept and one being written, on a disk of 1 MiB; ENOSPC is the kernel's."""
    run = ("optim.steps=5", "train.checkpoint_every=1", "train.keep_checkpoints=3")
    with pytest.raises(ValueError) as caught:
        tiny.train(small_disk, *run)
    message = str(caught.value)
    folder = small_disk / "train" / "checkpoints"
    assert f"{folder}/step_00000004 could not be written" in message and "No space left on device" in message
    assert "resumes from the last whole checkpoint (step_00000003)" in message
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step in (1, 2, 3)]
    assert checkpoint.latest(folder).name == "step_00000003"
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    tiny.train(small_disk, *run)
    tiny.train(tmp_path / "elsewhere", *run)
    assert tiny.metrics(small_disk) == tiny.metrics(tmp_path / "elsewhere")
    one, other = (
        tiny.weights(at / "train" / "checkpoints" / "step_00000005") for at in (small_disk, tmp_path / "elsewhere")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- which checkpoint ------------------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    run = Run(tmp_path, keep=2)
    for step in (1, 2, 10, 11):
        run.save(step)
    assert run.names() == ["step_00000010", "step_00000011"]
    assert checkpoint.latest(tmp_path).name == "step_00000011"
    assert checkpoint.latest(tmp_path / "nothing") is None


def cut(path):
    file = path / LoraSwitch.file
    os.truncate(file, file.stat().st_size - 1)


def flip(path):
    file = path / checkpoint.OPTIMIZER_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def spoil_state(path):
    (path / checkpoint.STATE_FILE).write_text('{"step": 3, "fil', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "lora.safetensors is damaged"),
        (flip, "optimizer.safetensors is damaged"),
        (spoil_state, ".*state.json is damaged .*EOF"),
        (lambda path: (path / checkpoint.STATE_FILE).unlink(), ".*state.json cannot be read .No such file"),
        (lambda path: (path / LoraSwitch.file).unlink(), "lora.safetensors is missing"),
    ],
)
def test_a_damaged_newest_is_passed_over(tmp_path, damage, said):
    run = Run(tmp_path)
    run.save(2), run.save(3)
    damage(tmp_path / "step_00000003")
    with pytest.warns(UserWarning, match=f"step_00000003 is passed over: {said}"):
        assert checkpoint.latest(tmp_path).name == "step_00000002"
    damage(tmp_path / "step_00000002")
    with pytest.warns(UserWarning):
        assert checkpoint.latest(tmp_path) is None


def rewrite(path, change, *, sign=True):
    """Change the state of checkpoint `path`; `sign`: with the digest that a real writer would give it."""
    state = json.loads((path / checkpoint.STATE_FILE).read_text(encoding="utf-8"))
    state.pop("digest", None)
    change(state)
    state |= {"digest": files.digest(state)} if sign else {}
    (path / checkpoint.STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.update(samples_seen="24"), "samples_seen: Input should be a valid integer"),
        (lambda state: state.update(samples_seen=-24), "samples_seen: .*greater than or equal to 0"),
        (lambda state: state.update(skipped=None), "skipped: Input should be a valid integer"),
        (lambda state: state.update(files=[1]), "files: Input should be an object"),
        (lambda state: state.update(settings={"optim.lr": [1]}), "settings"),
        (lambda state: state.pop("seed"), "seed: Field required"),
        (lambda state: state.update(step=4), "state.json is of step 4"),
        (lambda state: state["files"].update({"../../x": {"bytes": 1, "sha256": ""}}), "lists other files"),
        (lambda state: state["files"].pop(checkpoint.OPTIMIZER_FILE), "lists other files"),
    ],
)
def test_a_state_that_cannot_be_is_passed_over(tmp_path, change, said):
    run = Run(tmp_path)
    run.save(2), run.save(3)
    rewrite(tmp_path / "step_00000003", change)
    with pytest.warns(UserWarning, match=f"step_00000003 is passed over: .*{said}"):
        assert checkpoint.latest(tmp_path).name == "step_00000002"


def test_a_changed_counter_is_passed_over_and_an_earlier_versions_state_is_not(tmp_path):
    run = Run(tmp_path)
    run.save(2), run.save(3)
    rewrite(tmp_path / "step_00000003", lambda state: state.update(samples_seen=25), sign=False)
    with pytest.warns(UserWarning, match="step_00000003 is passed over: state.json is not as it was written"):
        assert checkpoint.latest(tmp_path).name == "step_00000002"
    rewrite(tmp_path / "step_00000003", lambda state: (state.pop("groups"), state.pop("settings")), sign=False)
    assert checkpoint.latest(tmp_path).name == "step_00000003"


@pytest.mark.parametrize("metadata", [{"rank": "2000000000"}, {"rank": "two"}, {"alpha": "inf"}, {"targets": "7"}])
def test_a_lora_that_says_another_shape_than_it_has_is_damaged(tmp_path, metadata):
    """Nothing is allocated by what it says: two thousand million ranks would be 256 GiB here."""
    run = Run(tmp_path)
    run.save(2)
    run.metadata |= metadata
    path = run.save(3)
    with pytest.warns(UserWarning, match="step_00000003 is passed over: LoRA .* is damaged: its"):
        assert checkpoint.latest(tmp_path).name == "step_00000002"
    (field,) = metadata
    with pytest.raises(ValueError, match=rf"LoRA .*lora\.safetensors is damaged: its .*{field}") as caught:
        checkpoint.attach_trained(path, {"transformer": run.network}, fingerprint=BACKBONE)
    assert "\n" not in str(caught.value)


def test_a_lora_in_a_checkpoint_that_a_user_names_has_its_checksum_checked(tmp_path):
    """Its last byte belongs to a weight: the file itself looks whole."""
    path = Run(tmp_path).save(1)
    data = bytearray((path / LoraSwitch.file).read_bytes())
    data[-1] ^= 1
    (path / LoraSwitch.file).write_bytes(data)
    for named in (path, path / LoraSwitch.file):
        with pytest.raises(ValueError, match="is damaged: its checksum is not that in state.json; use another"):
            checkpoint.attach_trained(named, {"transformer": Run(tmp_path).network}, fingerprint=BACKBONE)


def test_a_lora_of_another_network_is_refused_before_adapters_are_made(tmp_path):
    path = Run(tmp_path).save(1)
    network = Run(tmp_path, target="attn2.to_q", width=32).network
    with pytest.raises(ValueError, match=r"LoRA .*shape \(2, 16\), this recipe needs \(2, 32\)"):
        checkpoint.attach_trained(path, {"transformer": network}, fingerprint=BACKBONE)
    assert all(type(block.attn1.to_q) is nn.Linear for block in network.blocks)


def spoil_name(tensors, name):
    tensors["odd.weight"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, name: tensors.pop(name), "other tensors than pairs of lora_A and lora_B"),
        (spoil_name, "other tensors than pairs of lora_A and lora_B"),
        (lambda tensors, name: tensors.clear(), "other tensors than pairs"),
        (lambda tensors, name: tensors.update({name: torch.zeros(3, 16)}), r"say rank 2, but .* has shape \(3, 16\)"),
        (lambda tensors, name: tensors.update({name: torch.zeros(2)}), r"say rank 2, but .* has shape \(2,\)"),
        (lambda tensors, name: tensors[name].fill_(torch.nan), "is no finite float tensor"),
        (lambda tensors, name: tensors.update({name: torch.zeros(2, 16).int()}), "is no finite float tensor"),
    ],
)
def test_damaged_adapters_are_named(tmp_path, change, said):
    run, name = Run(tmp_path), "blocks.0.attn1.to_q.lora_A.weight"
    tensors, path = run.switch.state_dict(), tmp_path / "mine.safetensors"
    change(tensors, name)
    save_file(tensors, path, metadata=run.metadata)
    with pytest.raises(ValueError, match=rf"{path}.*{said}"):
        checkpoint.load_weights(checkpoint.find_lora(path)[0], run.switch, fingerprint=BACKBONE, expert="transformer")


@pytest.mark.parametrize(
    "change",
    [
        lambda moments, name: moments.pop(f"{name}.step"),
        lambda moments, name: moments.update({f"{name}.exp_avg": torch.zeros(3)}),
        lambda moments, name: moments.update({f"{name}.step": torch.zeros(2)}),
        lambda moments, name: moments.update({f"{name}.exp_avg_sq": torch.zeros(2, 16, dtype=torch.int32)}),
        lambda moments, name: moments.update({"blocks.7.exp_avg": torch.zeros(3)}),
    ],
)
def test_moments_of_other_weights_are_refused(tmp_path, change):
    run = Run(tmp_path)
    path = run.save(3)
    moments = load_file(path / checkpoint.OPTIMIZER_FILE)
    change(moments, "blocks.0.attn1.to_q.lora_A.weight")
    save_file(moments, path / checkpoint.OPTIMIZER_FILE)
    said = "does not hold the moments of this run's weights .first: blocks.*delete .*step_00000003"
    with pytest.raises(ValueError, match=said):
        run.load(path)


def test_going_back_behind_a_damaged_one_loses_no_new_checkpoint(tmp_path):
    """Step 9 is damaged, so the run began anew: what it saves then counts as newest, not the ruin."""
    run = Run(tmp_path, keep=1)
    run.save(9)
    cut(tmp_path / "step_00000009")
    run.save(5)
    with pytest.warns(UserWarning, match="step_00000009"):
        assert checkpoint.latest(tmp_path).name == "step_00000005"
    run.save(9)
    assert run.names() == ["step_00000009"] and checkpoint.latest(tmp_path).name == "step_00000009"


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rank": 4}, "has rank 2, the recipe says lora.rank=4.*Set lora.rank=2"),
        ({"alpha": 8.0}, "has alpha 2.0, the recipe says lora.alpha=8.0.*Set lora.alpha=2.0"),
        ({"target": "attn2.to_q"}, "adapters for other layers: 4 of this recipe's are missing.*lora.targets"),
        ({"width": 32}, r"has shape \(2, 16\), this recipe needs \(2, 32\)"),
    ],
)
def test_adapters_of_another_shape_are_refused(tmp_path, other, said):
    path, run = Run(tmp_path).save(1), Run(tmp_path, **other)
    before = run.switch.state_dict()
    with pytest.raises(ValueError, match=said):
        run.load(path)
    assert all(torch.equal(weight, before[name]) for name, weight in run.switch.state_dict().items())


def test_adapters_of_another_backbone_are_refused(tmp_path):
    run = Run(tmp_path)
    path = run.save(1)
    with pytest.raises(ValueError, match=f"trained on backbone {BACKBONE}, this backbone is wan21-random-14B"):
        options = {"switch": run.switch, "optimizer": run.optimizer, "expert": "transformer"}
        checkpoint.load(path, **options, fingerprint="wan21-random-14B")


def test_adapters_of_the_other_expert_are_refused(tmp_path):
    run = Run(tmp_path)
    run.metadata["expert"] = "high_noise"
    path = run.save(1)
    said = "trained on the expert high_noise, this run trains low_noise: set backbone.expert=high_noise, or give each"
    with pytest.raises(ValueError, match=said):
        options = {"switch": run.switch, "optimizer": run.optimizer, "fingerprint": BACKBONE}
        checkpoint.load(path, **options, expert="low_noise")


def test_what_is_no_lora_of_ours_is_refused(tmp_path):
    run = Run(tmp_path)
    garbage, foreign = tmp_path / "garbage.safetensors", tmp_path / "foreign.safetensors"
    garbage.write_bytes(b"not a safetensors file")
    save_file({"a": torch.zeros(1)}, foreign)
    for path, said in (
        (garbage, "cannot be read"),
        (foreign, "carries no physalign metadata"),
        (tmp_path / "missing.safetensors", "does not exist"),
        (tmp_path, "no checkpoint in"),
    ):
        with pytest.raises(ValueError, match=said):
            checkpoint.load_weights(
                checkpoint.find_lora(path)[0], run.switch, fingerprint=BACKBONE, expert="transformer"
            )


def test_a_lora_is_found_by_file_checkpoint_or_run(tmp_path):
    run = Run(tmp_path / "checkpoints")
    run.save(1)
    file = run.save(2) / LoraSwitch.file
    for path in (file, file.parent, tmp_path / "checkpoints", tmp_path, str(tmp_path)):
        assert checkpoint.find_lora(path)[0] == file
