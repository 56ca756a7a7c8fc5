"""`eval.prompt_refinement.run` on a tiny pipeline with a stand-in for the model: rounds, choice, resume."""

import json

import pytest

from eval.prompt_refinement import run
from tests.eval.vlm_stub import StubServer
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, read_clip


def answer(request):
    """Predicts, finds a violation once, and writes two prompts."""
    rules, asked = (message["content"] for message in request["messages"])
    asked = asked if isinstance(asked, str) else json.dumps(asked)
    if "foresee" in rules:
        return json.dumps({"prediction": "It falls."})
    if "check the physics" in rules:
        wrong = [] if "faster" in asked else [{"law": "gravity", "seen": "it hangs"}]
        return json.dumps({"violations": wrong, "description": "It falls."})
    return json.dumps({"prompt": "A ball falls faster" if "Last prompt" in asked else "A ball falls"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_pipeline("wan21", tmp_path_factory.mktemp("wan21"))


def arguments(model, output, url, *more):
    return [
        "recipe=tiny",
        f"output={output}",
        f"backbone.path={model}",
        "video.num_frames=5",
        "sampler.steps=2",
        "sampler.guidance=1.0",
        'refine_prompts.prompts=["A red ball drops"]',
        f"vlm.base_url={url}",
        "vlm.model=eyes",
        *more,
    ]


def test_rounds_are_kept_searched_chosen_from_and_resumed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.prompt_refinement.prompts.similarity", lambda a, b: float(a == b))
    search = ["refine_prompts.search=best_of_n", "search.num_candidates=2", "search.chosen_by=most_motion"]
    search += ["search.residuals.levels=1", "search.residuals.draws=1"]
    with StubServer(answer) as server:
        common = arguments(model, tmp_path, server.url, *search)
        (found,) = run.main([*common, "refine_prompts.chosen_by=residual_per_motion"])
        asked = len(server.requests)
        folder = tmp_path / "refined_prompts"
        assert found["ended"] == "no violations" and found["clips"] == [1, 2] and len(found["values"]) == 2
        assert found["chosen"] == found["clips"][found["values"].index(min(found["values"]))]
        assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == [found]
        for number, prompt in enumerate(("A ball falls", "A ball falls faster"), start=1):
            place = folder / found["key"] / f"round-{number:02d}.json"
            assert json.loads(place.read_text(encoding="utf-8"))["prompt"] == prompt
        read_clip(folder / found["clip"], VideoConfig(64, 64, 5, 8.0))  # raises unless it is all there
        monkeypatch.setattr(run.Generator, "__call__", None)  # nothing is made or asked again
        (again,) = run.main(common)
        assert again["chosen"] == 2 and again["clips"] == [1, 2] and len(server.requests) == asked


def test_dry_run_and_what_is_refused(model, tmp_path, capsys):
    common = arguments(model, tmp_path, "http://localhost:1/v1")
    assert run.main([*common, "refine_prompts.search=race", "--dry-run"]) is None
    assert "1 prompts, at most 4 clips" in capsys.readouterr().out and not list(tmp_path.iterdir())
    for wrong in ("chosen_by=nobody", "search=best", "prompts=[]"):
        with pytest.raises(ValueError, match=f"refine_prompts.{wrong.split('=')[0]}"):
            run.main([*common, f"refine_prompts.{wrong}"])
