"""The browser of group sets: summary, damage, gallery. The groups are of a tiny pipeline, their texts are hostile."""

import json
import os
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import av
import pytest
import torch

from data_pipeline import browse, gallery
from tests.chromium import Chromium, is_installed
from tests.conftest import TEXT_SHAPE
from tests.synthetic_groups import synthetic_group
from train import groups as shards
from train.backbones.base import Backbone
from train.backbones.loading import fingerprint
from train.groups import Loser, ShardWriter, write_index
from train.teachers.points import pack

LATENT_SHAPE, FRAMES, SIDE, FPS = (16, 3, 4, 4), 9, 32, 4.0  # small clips that last two seconds
OWN = "document.title='owned'"
HOSTILE = f'</script><script>{OWN}</script> <img src=x onerror="{OWN}"> "q" \u202eRTL\u200f'
ACTIONS = ["falling", '"><b onmouseover=alert(1)>', "rolling\x1b[31m", "falling"]
KEPT_AT = (0.25, 0.5)  # where the only kept point rests, x and y


def make_groups(tiny_pipeline):
    """Four groups with 0, 1, 2 and 3 losers; the second has tracks, the third hostile text."""
    made = []
    for number in range(4):
        group = synthetic_group(
            number,
            num_losers=number,
            latent_shape=LATENT_SHAPE,
            text_shape=TEXT_SHAPE,
            fingerprint=fingerprint("wan21", tiny_pipeline),
            seed=0,
        )
        losers = [Loser(loser.seed, 0.25, 0.95) for loser in group.losers_info]
        made.append(replace(group, action=ACTIONS[number], physics_richness=0.1 * number, losers_info=losers))
    made[3] = replace(made[3], physics_richness=None, losers_info=[Loser(n, 0.5, 0.05) for n in range(3)])
    made[2] = replace(made[2], prompt=HOSTILE, source="../../x<y> at 0.0 s")
    tracks = torch.rand(FRAMES, 3, 2, generator=torch.Generator().manual_seed(0))
    tracks[:, 0] = torch.tensor(KEPT_AT)
    extra = {
        "tracks": pack(tracks),
        "visible": torch.ones(FRAMES, 3).bool(),
        "keep": torch.tensor([True, False, False]),
    }
    made[1] = replace(made[1], extra=extra)
    return made


def write_groups(folder, groups, video=None):
    for shard in range(0, len(groups), 2):
        with ShardWriter(folder, f"unit-{shard:05d}") as writer:
            for group in groups[shard : shard + 2]:
                writer.write(group)
    video = video or {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "fps": FPS}
    return write_index(folder, fingerprint=groups[0].fingerprint, video=video)


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    write_groups(tmp_path / "groups", make_groups(tiny_pipeline))
    return tmp_path / "groups"


@pytest.fixture(scope="module")
def made(tiny_pipeline, tmp_path_factory):
    """A finished gallery; tests only look at it."""
    place = tmp_path_factory.mktemp("gallery")
    write_groups(place / "groups", make_groups(tiny_pipeline))
    run(place / "groups", "--html", place / "html", "--model", tiny_pipeline)
    return place / "html"


def run(*arguments):
    """The exit status: 0 where main returns."""
    try:
        browse.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def index_of(folder):
    return json.loads((folder / "index.json").read_bytes())


# ---- summary and check -----------------------------------------------------------------------------------------------


def test_prints_schema_counts_and_histograms(folder, tiny_pipeline, capsys):
    assert run(folder) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fingerprint", fingerprint("wan21", tiny_pipeline)] in lines
    assert ["latent", "shape", "(16,", "3,", "4,", "4)", "bfloat16"] in lines
    assert ["groups", "4"] in lines and ["shards", "2"] in lines
    assert ["losers", "bfloat16", "(0..3,", "16,", "3,", "4,", "4),", "4", "groups"] in lines
    assert ["extra.tracks", "uint16", "(9,", "3,", "2),", "1", "groups"] in lines
    assert ["extra.keep", "bool", "(3),", "1", "groups"] in lines
    falling = next(line for line in lines if line[0:1] == ["falling"])
    assert falling == ["falling", 40 * "#", "2"]
    losers = lines.index(["losers", "per", "group"])
    assert [line[0] for line in lines[losers + 1 : losers + 5]] == ["0", "1", "2", "3"]
    physical = lines.index("physical score: 6 values, mean 0.500".split())
    assert [line[-1] for line in lines[physical + 1 : physical + 11]] == list("3000000003")
    assert "physics richness: 3 values, mean 0.100".split() in lines
    assert "all 4 groups match their checksums".split() in lines


def test_bytes_a_group_are_those_of_the_index(folder, capsys):
    run(folder)
    sizes = [sample["bytes"] for shard in index_of(folder)["shards"] for sample in shard["samples"]]
    assert f"bytes per group {sum(sizes) / 4:.0f}\n" in capsys.readouterr().out


def test_control_and_direction_characters_do_not_reach_the_terminal(folder, capsys):
    run(folder)
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"rolling\x1b[31m" in out
    assert browse.plain("a\u202eb\ud800é") == "a\\u202eb\\ud800é"


def test_sizes_that_differ_are_shown_as_a_range():
    assert browse._shapes([(3, 2), (1, 2)]) == "(1..3, 2)"
    assert browse._shapes([(3, 2), (4,)]) == "(3, 2) or (4,)"


def test_rare_actions_share_a_line():
    facts = [browse.Facts(f"action {n}", [], None, {}) for n in range(browse.ACTIONS + 5) for _ in range(n + 1)]
    text = browse.summarize(facts)
    assert "(5 more)" in text and text.count("action ") == browse.ACTIONS
    assert sum(int(line.split()[-1]) for line in text.split("\n\n")[1].splitlines()[1:]) == len(facts)


def test_names_the_damaged_sample_and_shows_the_others(folder, tmp_path, tiny_pipeline, capsys):
    sample = index_of(folder)["shards"][1]["samples"][0]
    flip(folder / "unit-00002.tar", sample["offset"] + sample["bytes"] // 2)
    assert run(folder, "--html", tmp_path / "html", "--model", tiny_pipeline) == 1
    out, err = capsys.readouterr()
    assert "unit-00002.tar is damaged: group 'group-000002'" in err and "run the build again" in err
    assert "group-000003" not in err and "match their checksums" not in out
    assert "3 groups" in out  # of each tensor
    assert not (tmp_path / "html" / "index.html").exists()


def test_finds_damage_behind_the_samples(folder, capsys):
    shard = index_of(folder)["shards"][0]
    flip(folder / shard["file"], shard["bytes"] - 5)
    assert run(folder) == 1
    assert "unit-00000.tar differs from its checksum outside its samples" in capsys.readouterr().err


def test_names_every_shard_that_is_missing_or_cut(folder, capsys):
    (folder / "unit-00000.tar").unlink()
    os.truncate(folder / "unit-00002.tar", 1000)
    assert run(folder) == 1
    err = capsys.readouterr().err
    assert "unit-00000.tar is missing" in err and "unit-00002.tar is 1000 bytes long" in err


def test_no_index(tmp_path, capsys):
    assert run(tmp_path) == 1
    assert "no index.json" in capsys.readouterr().err


def test_a_foreign_shard_with_an_unsafe_key_is_refused(tiny_pipeline, tmp_path, monkeypatch, capsys):
    groups = make_groups(tiny_pipeline)
    groups[0] = replace(groups[0], key="../escape")
    groups[3] = replace(groups[3], prompt=None)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "check_group", lambda group: None)
        write_groups(tmp_path / "groups", groups)
    assert run(tmp_path / "groups", "--html", tmp_path / "html", "--model", tiny_pipeline) == 1
    err = capsys.readouterr().err
    assert "group '../escape' at offset 0 of" in err
    assert "group 'group-000003' at offset" in err and "prompt: Input should be a valid string" in err
    assert not list(tmp_path.rglob("*.mp4"))


# ---- options ---------------------------------------------------------------------------------------------------------


def test_refuses_the_model_of_other_groups(folder, tiny_pipeline, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    config = json.loads((other / "vae" / "config.json").read_text(encoding="utf-8"))
    config["latents_mean"][0] += 1
    (other / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run(folder, "--html", tmp_path / "html", "--model", other) == 2
    err = capsys.readouterr().err
    assert fingerprint("wan21", tiny_pipeline) in err and fingerprint("wan21", other) in err
    assert not (tmp_path / "html").exists()


def test_refuses_a_model_without_a_vae(folder, tiny_pipeline, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    for weights in (other / "vae").glob("*.safetensors"):
        weights.unlink()
    assert run(folder, "--html", tmp_path / "html", "--model", other) == 2
    assert "no safetensors weights for the component vae" in capsys.readouterr().err
    assert run(folder, "--html", tmp_path / "html", "--model", tmp_path / "nowhere") == 2
    assert "is no folder" in capsys.readouterr().err


def test_refuses_groups_of_random_weights_and_an_index_without_fps(tiny_pipeline, tmp_path, capsys):
    groups = [replace(group, fingerprint="wan21-random-14B") for group in make_groups(tiny_pipeline)]
    write_groups(tmp_path / "random", groups)
    assert run(tmp_path / "random", "--html", tmp_path / "html", "--model", tiny_pipeline) == 2
    assert "wan21-random-14B, which is no pipeline" in capsys.readouterr().err
    write_groups(tmp_path / "groups", make_groups(tiny_pipeline), {"height": SIDE, "width": SIDE, "num_frames": FRAMES})
    assert run(tmp_path / "groups", "--html", tmp_path / "html", "--model", tiny_pipeline) == 2
    assert "lacks video.fps" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--html x", "--model x", "--html x --model y --count 0"])
def test_refuses_options_that_do_not_fit(folder, options, capsys):
    assert run(folder, *options.split()) == 2
    assert "--html and --model go together" in (err := capsys.readouterr().err) or "--count 0" in err


def test_a_gallery_that_cannot_be_written_stops_early(folder, tiny_pipeline, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(folder, "--html", tmp_path / "file" / "html", "--model", tiny_pipeline) == 2
    out, err = capsys.readouterr()
    assert "Not a directory" in err and "latent shape" not in out


def test_a_larger_choice_contains_a_smaller():
    few, more = gallery.choose(100, 10, seed=3), gallery.choose(100, 30, seed=3)
    assert len(few) == 10 and set(few) < set(more) and few == sorted(few)
    assert gallery.choose(100, 10, seed=4) != few and gallery.choose(5, 24, seed=0) == [0, 1, 2, 3, 4]


# ---- gallery ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements with their attributes, and the text of those with a class of interest."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self._open = [], {"prompt": [], "action": []}, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open = dict(attributes).get("class")

    def handle_data(self, data):
        if self._open in self.texts:
            self.texts[self._open].append(data)
        self._open = None

    def find(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_holds_every_group_with_its_text_as_text(made):
    page = Page(made / "index.html")
    assert [article["id"] for article in page.find("article")] == [f"group-group-{n:06d}" for n in range(4)]
    assert page.texts["prompt"][2] == HOSTILE
    assert page.texts["action"] == ACTIONS
    assert [article["data-action"] for article in page.find("article")] == ACTIONS
    assert [option["value"] for option in page.find("option")[1:4]] == sorted({f"={action}" for action in ACTIONS})
    assert len(page.find("script")) == 1 and not page.find("img") and not page.find("b")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "src" not in page.find("script")[0] and not page.find("link")
    text = (made / "index.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "default-src 'none'" in text


def test_the_page_has_scores_to_sort_by_and_none_where_there_are_none(made):
    articles = Page(made / "index.html").find("article")
    assert [float(article.get("data-physical", -1)) for article in articles] == pytest.approx([-1, 0.95, 0.95, 0.05])
    assert ["data-richness" in article for article in articles] == [True, True, True, False]


def test_every_clip_is_an_h264_file_beside_the_page_with_all_frames(made):
    clips = Page(made / "index.html").find("video")
    names = [clip["data-plain"] for clip in clips] + [clip["data-tracks"] for clip in clips if "data-tracks" in clip]
    assert len(names) == len(set(names)) == 4 + (0 + 1 + 2 + 3) + 1
    assert {path.name for path in (made / "clips").iterdir()} == {name.removeprefix("clips/") for name in names}
    for name in names:
        with av.open(str(made / name)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == FPS and sum(1 for _ in container.decode(video=0)) == FRAMES


def test_clips_of_the_same_group_are_not_decoded_again(folder, tiny_pipeline, tmp_path, monkeypatch):
    options = ["--html", tmp_path / "html", "--model", tiny_pipeline]
    decoded, decode = [], Backbone.decode_latents

    def watched(self, latents, **options):
        decoded.append(len(latents))
        return decode(self, latents, **options)

    monkeypatch.setattr(Backbone, "decode_latents", watched)
    assert run(folder, *options, "--count", 2) == 0
    first = len(decoded)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "html" / "clips").iterdir()}
    assert run(folder, *options) == 0
    assert len(decoded) == 10 > first  # four winners and six losers in all, each once
    assert run(folder, *options) == 0 and len(decoded) == 10
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())

    next((tmp_path / "html" / "clips").glob("*-tracks.mp4")).unlink()
    assert run(folder, *options) == 0 and len(decoded) == 11

    groups = make_groups(tiny_pipeline)
    groups[3] = replace(groups[3], winner=-groups[3].winner)  # another group of the same key: all of its clips are new
    write_groups(folder, groups)
    assert run(folder, *options) == 0 and len(decoded) == 15


def test_a_lone_surrogate_in_a_text_does_not_stop_the_page(folder, tmp_path):
    groups = shards.GroupSet(folder)
    card = gallery._card(replace(groups[0], prompt="a \ud800 b"), {"winner": "clips/x.mp4"})
    gallery.write_page(tmp_path / "index.html", groups, [card])
    assert "a &#55296; b" in (tmp_path / "index.html").read_text(encoding="utf-8")


# ---- tracks ----------------------------------------------------------------------------------------------------------


def test_points_are_drawn_where_the_tracks_say():
    frames = torch.full((3, 256, 512, 3), 200, dtype=torch.uint8)
    # Kept and moving, another one, a hidden one, one outside, one that is no number.
    tracks = torch.tensor([[0.5, 0.5], [0.1, 0.2], [0.8, 0.8], [1.2, 0.5], [float("nan"), 0.5]]).repeat(3, 1, 1)
    tracks[:, 0, 0] = torch.tensor([0.25, 0.5, 0.75])
    visible = torch.ones(3, 5, dtype=torch.bool)
    visible[:, 2] = False
    drawn = gallery.draw_tracks(frames, tracks, visible, torch.tensor([True, False, True, True, True]))
    assert drawn.shape == frames.shape and drawn.dtype == torch.uint8
    changed = (drawn != frames).any(dim=3).nonzero()  # (time, row, column)
    for number, column in enumerate((128, 256, 384)):
        assert drawn[number, 128, column].tolist() == list(gallery.KEPT)
        assert drawn[number, 51, 51].tolist() == list(gallery.OTHER)
        mine = changed[changed[:, 0] == number]
        other = mine[mine[:, 1] < 60]
        assert (other[:, 1:] - 51).abs().max() <= 3
        kept = mine[mine[:, 1] >= 60]
        assert (kept[:, 1] - 128).abs().max() <= 4  # nothing at the hidden, outside or broken points
        assert kept[:, 2].min() >= 128 - 5 and (kept[:, 2] - column).max() <= 5
    assert drawn[2, 128, 200].tolist() == list(gallery.KEPT)  # the tail


def test_a_tail_is_short_and_breaks_where_the_point_was_hidden():
    frames = torch.zeros(20, 256, 256, 3, dtype=torch.uint8)
    tracks = torch.full((20, 1, 2), 0.5)
    tracks[:, 0, 0] = torch.linspace(0.1, 0.9, 20)
    visible, keep = torch.ones(20, 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    step = 256 * 0.8 / 19

    def length(clip, time):
        columns = (clip[time] == torch.tensor(gallery.KEPT)).all(dim=2).nonzero()[:, 1]
        return (columns.max() - columns.min()).item()

    whole = gallery.draw_tracks(frames, tracks, visible, keep)
    assert length(whole, 19) == pytest.approx(gallery.TAIL * step, abs=5)
    visible[15] = False
    broken = gallery.draw_tracks(frames, tracks, visible, keep)
    assert length(broken, 19) == pytest.approx(3 * step, abs=5)
    assert broken[15].max() == 0


def test_low_clips_are_enlarged_pixel_by_pixel_for_their_tracks():
    frames = torch.randint(0, 255, (2, 64, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, 0, dtype=torch.bool)
    drawn = gallery.draw_tracks(frames, torch.zeros(2, 0, 2), nothing, nothing[0])
    assert drawn.shape == (2, 256, 192, 3)
    assert torch.equal(drawn[:, ::4, ::4], frames) and torch.equal(drawn[:, 3::4, 3::4], frames)


def test_the_written_clip_shows_the_kept_point(made):
    with av.open(str(next((made / "clips").glob("group-000001-*-tracks.mp4")))) as container:
        for frame in container.decode(video=0):
            pixels = frame.to_ndarray(format="rgb24")
            assert pixels.shape == (256, 256, 3)
            assert is_kept(pixels[128, 64])


def is_kept(pixel):
    """Whether an RGB pixel is the kept points' yellow, as far as a compressed clip has it."""
    red, green, blue = pixel
    return min(red, green) > 150 and blue < 110


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tracks", lambda extra: {**extra, "tracks": extra["tracks"][:5]}),
        ("tracks", lambda extra: {**extra, "tracks": extra["keep"]}),
        ("tracks", lambda extra: {**extra, "tracks": extra["tracks"].to(torch.float32)}),
        ("visible", lambda extra: {name: extra[name] for name in ("tracks", "keep")}),
        ("keep", lambda extra: {**extra, "keep": extra["keep"][:2]}),
    ],
)
def test_tracks_that_do_not_fit_the_clip_are_named(tiny_pipeline, name, change):
    group = make_groups(tiny_pipeline)[1]
    with pytest.raises(ValueError, match=f"group 'group-000001': extra '{name}' is .* build"):
        gallery.tracks_of(replace(group, extra=change(group.extra)), FRAMES)


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chromium(tmp_path):
    if not is_installed():
        pytest.skip("needs chromium and chromedriver")
    browser = Chromium(tmp_path / "browser")
    yield browser
    browser.close()


CLIPS = """return [...document.querySelectorAll('video')].map((clip) => ({
    source: clip.getAttribute('src'), width: clip.videoWidth, time: clip.currentTime, paused: clip.paused,
    error: clip.error && clip.error.message}))"""
VISIBLE = (
    "return [...document.querySelectorAll('article:not([hidden])')].map((article) => article.id.slice(-1)).join('')"
)


@pytest.mark.slow
def test_the_page_works_in_a_browser(made, chromium, tmp_path):
    copied = tmp_path / "copied"  # the folder can go anywhere
    shutil.copytree(made, copied)
    chromium.open((copied / "index.html").as_uri())

    def clips():
        found = chromium.run(CLIPS)
        assert not any(clip["error"] for clip in found)
        return found

    def playing():
        return [clip for clip in clips() if not clip["paused"] and clip["width"] > 0]

    # Clips near the screen play, again and again, and the hostile prompt has run nothing.
    chromium.wait(lambda: any(clip["time"] > 1 for clip in playing()))
    chromium.wait(lambda: any(clip["time"] < 0.5 for clip in playing()))
    chromium.wait(lambda: any(clip["time"] > 1 for clip in playing()))
    assert chromium.run("return document.title").endswith(": preference groups")
    assert any(clip["source"] is None for clip in clips())  # far down

    # Space pauses all; the tracks are on the screen where they belong, and T takes them away.
    chromium.press(" ")
    chromium.wait(lambda: not playing())
    rectangle = chromium.run(
        "const clip = document.querySelector('[data-tracks]'); clip.scrollIntoView({block: 'center'});"
        "const box = clip.getBoundingClientRect();"
        "return [box.x + 2, box.y + 2, box.width - 4, box.height - 4]"  # within its border
    )
    x, y = (round(rectangle[axis] + KEPT_AT[axis] * rectangle[axis + 2]) for axis in (0, 1))
    chromium.wait(lambda: is_kept(chromium.screenshot()[y, x]))
    assert not playing()
    chromium.press("t")
    chromium.wait(lambda: not is_kept(chromium.screenshot()[y, x]))
    chromium.press(" ")
    chromium.wait(lambda: any(clip["time"] > 1 for clip in playing()))

    # The last group comes into view, the first ones are let go.
    chromium.run("scrollTo(0, document.body.scrollHeight)")
    chromium.wait(lambda: clips()[-1]["width"] > 0 and not clips()[-1]["paused"])
    chromium.wait(lambda: clips()[0]["source"] is None)

    # Filter and order.
    assert chromium.run(VISIBLE) == "0123"
    chromium.enter("search", "OWNED q")
    assert chromium.run(VISIBLE) == "2"
    chromium.enter("search", "")
    chromium.enter("action", "=falling")
    assert chromium.run(VISIBLE) == "03"
    chromium.enter("action", "=" + ACTIONS[1])
    assert chromium.run(VISIBLE) == "1"
    chromium.enter("action", "")
    chromium.enter("sort", "physical 1")
    assert chromium.run(VISIBLE) == "3120"
    chromium.enter("sort", "richness -1")
    assert chromium.run(VISIBLE) == "2103"
