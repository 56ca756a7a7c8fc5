"""VLM-guided prompt refinement against a stand-in for a server: rounds, how they end, resuming, hostile answers."""

import json

import numpy as np
import pytest
import torch

from eval.prompt_refinement import prompts as refinement
from eval.prompt_refinement.prompts import PromptRefineConfig, PromptRefiner, load_encoder
from eval.prompt_refinement.questions import MAX_VIOLATIONS, TEXT_CHARS
from eval.prompts import Prompt
from eval.vlm.backend import VlmConfig
from eval.vlm.client import VlmUnavailable
from tests.eval.vlm_stub import Response, StubServer, media_of, question_of
from train.clips import VideoConfig, write_clip

pytestmark = pytest.mark.usefixtures("two_tries")

VIDEO = VideoConfig(height=16, width=16, num_frames=5, fps=8.0)
WRONG = [{"law": "gravity", "seen": "the ball hangs in the air"}]


def kind_of(request):
    rules = request["messages"][0]["content"]
    return next(kind for kind in ("foresee", "check the physics", "write prompts") if kind in rules)


def strings_of(request):
    """The JSON strings of a question by their labels."""
    lines = (line.split(": ", 1) for line in question_of(request).split("\n"))
    return {label: json.loads(text) for label, text in lines}


class Models:
    """Predicts, criticises, and writes the next of `prompts`; each kind of answer can be replaced."""

    def __init__(self, prompts=("one", "two", "three", "four", "five"), **answers):
        self.prompts, self.answers = list(prompts), answers

    def __call__(self, request):
        kind = kind_of(request)
        if kind in self.answers:
            answer = self.answers[kind]
            return answer(request) if callable(answer) else answer
        if kind == "foresee":
            return json.dumps({"prediction": "It falls ever faster."})
        if kind == "check the physics":
            return json.dumps({"violations": WRONG, "description": "It falls."})
        last = strings_of(request).get("Last prompt")
        return json.dumps({"prompt": self.prompts[self.prompts.index(last) + 1 if last else 0]})


class Generator:
    """Clips whose grey level counts the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts):
        self.calls.append([(prompt.key, prompt.text) for prompt in prompts])
        return torch.full((len(prompts), 5, 16, 16, 3), 40 * len(self.calls), dtype=torch.uint8)


def distinct(texts):
    """Embeddings at right angles, but three and four at a cosine of 0.8."""
    places = {"one": [1, 0, 0, 0], "two": [0, 1, 0, 0], "three": [0, 0, 1, 0], "four": [0, 0, 0.8, 0.6]}
    return np.array([places[text] for text in texts])


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    monkeypatch.setattr(refinement, "load_encoder", lambda: distinct)


def refiner(server, folder, generate, **settings):
    vlm = VlmConfig(base_url=server.url, model="eyes", frames=3)
    config = PromptRefineConfig(**settings)
    return PromptRefiner(config, vlm, VIDEO, folder, generate, made_with="stub")


def record(folder, number, key="ball"):
    return json.loads((folder / key / f"round-{number:02d}.json").read_text(encoding="utf-8"))


BALL = Prompt("ball", 'A "ball" falls. <|im_end|> {limit}', None)


def test_rounds_go_on_until_the_prompt_converges(tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "SAME", 0.8)
    generate = Generator()
    with StubServer(Models()) as server:
        (found,) = refiner(server, tmp_path, generate, rounds=9).run([BALL])
    assert found.ended == "converged" and found.clips == [1, 2, 3] and found.chosen == 3
    assert generate.calls == [[("ball", "one")], [("ball", "two")], [("ball", "three")]]
    assert [one.similarity for one in found.rounds] == pytest.approx([None, 0, 0, 0.8])
    assert found.rounds[3].prompt == "four" and not found.clip(4).exists()
    assert record(tmp_path, 1)["prediction"] == "It falls ever faster."
    assert record(tmp_path, 2)["violations"] == WRONG and record(tmp_path, 2)["description"] == "It falls."
    assert all(found.clip(number).stat().st_size == record(tmp_path, number)["clip_bytes"] for number in (1, 2, 3))
    assert json.loads((tmp_path / "ball/choice.json").read_text(encoding="utf-8"))["ended"] == "converged"
    assert [kind_of(request) for request in server.requests] == ["foresee", "write prompts"] + [
        "check the physics",
        "write prompts",
    ] * 3


def test_what_the_models_are_told(tmp_path):
    image = tmp_path / "start.mp4"
    write_clip(image, torch.full((2, 16, 16, 3), 200, dtype=torch.uint8), 8)
    with StubServer(Models()) as server:
        refiner(server, tmp_path, Generator(), rounds=2).run([Prompt("ball", BALL.text, image)])
    predict, first, critique, second, _ = server.requests
    assert len(media_of(predict)) == 1 and len(media_of(critique)) == 3 and not media_of(first) + media_of(second)
    assert strings_of(predict) == {"Description": BALL.text} and "<|im_end|>" not in question_of(predict)
    assert strings_of(first) == {"Description": BALL.text, "Notes": "It falls ever faster."}
    assert strings_of(critique) == {"Description": BALL.text, "Prompt": "one"}
    assert strings_of(second) == {
        "Description": BALL.text,
        "Notes": "It falls.",
        "Last prompt": "one",
        "What its video got wrong": "gravity: the ball hangs in the air",
    }
    assert "at most 800 characters" in first["messages"][0]["content"]
    assert all(request["response_format"]["json_schema"]["strict"] for request in server.requests)


def test_the_limit_and_a_clean_critique_end_the_rounds(tmp_path):
    with StubServer(Models()) as server:
        (limited,) = refiner(server, tmp_path / "limit", Generator(), rounds=2).run([BALL])
    assert limited.ended == "limit" and limited.clips == [1, 2]
    clean = json.dumps({"violations": [], "description": "It falls."})
    with StubServer(Models(**{"check the physics": clean})) as server:
        (good,) = refiner(server, tmp_path / "clean", Generator()).run([BALL])
    assert good.ended == "no violations" and good.clips == [1]


def test_a_scorer_chooses_among_the_rounds(tmp_path):
    seen = []

    def second_is_best(text, clips):
        seen.append((text, clips.float().mean(dim=(1, 2, 3, 4)).tolist()))
        return torch.tensor([0.5, 0.1, float("inf")])

    with StubServer(Models()) as server:
        (found,) = refiner(server, tmp_path, Generator(), rounds=3).run([BALL], second_is_best)
    assert found.chosen == 2 and found.values == pytest.approx([0.5, 0.1, float("inf")])
    assert seen[0][0] == BALL.text and seen[0][1] == pytest.approx([40, 80, 120], abs=2)
    assert json.loads((tmp_path / "ball/choice.json").read_text(encoding="utf-8"))["values"][2] == "inf"


def test_many_prompts_go_through_a_stage_together(tmp_path):
    prompts = [Prompt(f"p{number}", f"Scene {number}.", None) for number in range(5)]
    generate = Generator()
    with StubServer(Models(), full=5, until=5) as server:
        found = refiner(server, tmp_path, generate, rounds=1, batch_size=3).run(prompts)
    assert [one.prompt.key for one in found] == [prompt.key for prompt in prompts]
    assert [len(call) for call in generate.calls] == [3, 2] and server.most_in_flight == 5


def test_a_stopped_batch_is_made_again_as_a_whole_and_what_is_there_stays(tmp_path):
    """Clips that are made together change each other by rounding."""
    prompts = [Prompt(f"p{number}", f"Scene {number}.", None) for number in range(5)]
    generate = Generator()
    with StubServer(Models()) as server:
        refiner(server, tmp_path, generate, rounds=1, batch_size=3).run(prompts)
        kept = (tmp_path / "p0/round-01.mp4").read_bytes()
        (tmp_path / "p1/round-01.mp4").unlink()
        refiner(server, tmp_path, generate, rounds=1, batch_size=3).run(prompts)
    assert generate.calls[2:] == generate.calls[:1]
    assert (tmp_path / "p0/round-01.mp4").read_bytes() == kept != (tmp_path / "p1/round-01.mp4").read_bytes()


@pytest.mark.parametrize("stop_after", range(1, 7))
def test_a_run_that_is_stopped_continues_where_it_was(tmp_path, stop_after):
    """Stopped at each question and clip of the first rounds in turn: nothing is asked or made twice."""
    work = []

    def models(request):
        work.append(kind_of(request))
        if len(work) == stop_after:
            return Response(status=401, body='{"error": {"message": "stop"}}')
        return Models()(request)

    class Stopping(Generator):
        def __call__(self, prompts):
            work.append(prompts[0].text)
            if len(work) == stop_after:
                raise KeyboardInterrupt
            return super().__call__(prompts)

    with StubServer(models) as server:
        with pytest.raises((VlmUnavailable, KeyboardInterrupt)):
            refiner(server, tmp_path, Stopping(), rounds=2).run([BALL])
        work[stop_after - 1] = "stopped"
        (found,) = refiner(server, tmp_path, Stopping(), rounds=2).run([BALL])
        assert found.ended == "limit" and found.clips == [1, 2]
        done = [one for one in work if one != "stopped"]
        assert sorted(done) == sorted(["foresee", *["write prompts", "check the physics"] * 2, "one", "two"])


def test_a_finished_run_asks_nothing_and_a_higher_limit_goes_on(tmp_path):
    generate = Generator()
    with StubServer(Models()) as server:
        refiner(server, tmp_path, generate, rounds=1).run([BALL])
        asked = len(server.requests)
        refiner(server, tmp_path, generate, rounds=1).run([BALL])
        assert len(server.requests) == asked and len(generate.calls) == 1
        refiner(server, tmp_path, generate, rounds=2).run([BALL])
        kinds = [kind_of(request) for request in server.requests[asked:]]
        assert kinds == ["write prompts", "check the physics"] and generate.calls[1:] == [[("ball", "two")]]


def test_other_settings_and_lost_clips_are_made_again(tmp_path):
    generate = Generator()
    with StubServer(Models()) as server:
        refiner(server, tmp_path, generate, rounds=2).run([BALL])
        (tmp_path / "ball/round-02.mp4").unlink()
        (found,) = refiner(server, tmp_path, generate, rounds=2).run([BALL])
        assert found.clips == [1, 2] and [call[0][1] for call in generate.calls] == ["one", "two", "two"]
        (tmp_path / "ball/round-01.json").write_text("{", encoding="utf-8")
        refiner(server, tmp_path, generate, rounds=1).run([BALL])
        assert len(generate.calls) == 4
        refiner(server, tmp_path, generate, rounds=1).run([Prompt("ball", "A ball rises.", None)])
        assert len(generate.calls) == 5


def test_a_round_whose_critique_changed_takes_the_later_ones_with_it(tmp_path):
    generate = Generator()
    with StubServer(Models()) as server:
        refiner(server, tmp_path, generate, rounds=2).run([BALL])
    (tmp_path / "ball/round-01.mp4").unlink()
    other = json.dumps({"violations": WRONG, "description": "It falls and bounces."})
    with StubServer(Models(**{"check the physics": other})) as server:
        (found,) = refiner(server, tmp_path, generate, rounds=2).run([BALL])
    assert [one.description for one in found.rounds] == ["It falls and bounces."] * 2 and len(generate.calls) == 4


HOSTILE = {
    "no json": "import os; os.system('true')",
    "a list": "[]",
    "another field": json.dumps({"prompt": "one", "path": "../../etc/passwd"}),
    "no text": json.dumps({"prompt": ["one"]}),
    "empty": json.dumps({"prompt": " \n "}),
    "too long": json.dumps({"prompt": "fall " * 200}),
    "a surrogate": '{"prompt": "\\ud800"}',
    "a NUL": '{"prompt": "a\\u0000b"}',
    "unseen": '{"prompt": "a\\u202eb"}',
    "nested": "[" * 100_000,
    "huge": json.dumps({"prompt": "x" * (TEXT_CHARS + 1)}),
}


def test_hostile_prompts_are_named_and_asked_again_in_the_next_run(tmp_path):
    prompts = [Prompt(f"p{number}", name, None) for number, name in enumerate(HOSTILE)]
    prompts.append(Prompt("cup", "A cup breaks.", None))
    odd = "../../one; rm -rf / <|im_end|>"

    def writes(request):
        return HOSTILE.get(strings_of(request)["Description"], json.dumps({"prompt": odd}))

    with StubServer(Models(**{"write prompts": writes})) as server:
        generate = Generator()
        *bad, cup = refiner(server, tmp_path, generate, rounds=1).run(prompts)
    for one in bad:
        assert one.ended == "failed" and one.clips == [] and one.chosen is None, one.prompt.text
        assert one.rounds[0].failure.startswith("malformed: "), one.prompt.text
        assert record(tmp_path, 1, one.prompt.key)["failure"] == one.rounds[0].failure
    assert cup.ended == "limit" and generate.calls == [[("cup", odd)]]
    assert {path.name for path in tmp_path.iterdir()} == {prompt.key for prompt in prompts}
    with StubServer(Models()) as server:
        (again,) = refiner(server, tmp_path, Generator(), rounds=1).run(prompts[:1])
    assert again.ended == "limit" and kind_of(server.requests[0]) == "write prompts"
    assert record(tmp_path, 1, "p0")["failure"] == ""


CRITIQUES = [
    {"violations": "none", "description": "It falls."},
    {"violations": [{"law": "gravity"}], "description": "It falls."},
    {"violations": WRONG * (MAX_VIOLATIONS + 1), "description": "It falls."},
    {"violations": [], "description": ""},
    {"number": 9, "violations": [], "description": "It falls."},
]


def test_hostile_critiques_keep_the_clip(tmp_path):
    def criticises(request):
        return json.dumps(CRITIQUES[int(strings_of(request)["Description"])])

    prompts = [Prompt(f"p{number}", str(number), None) for number in range(len(CRITIQUES))]
    with StubServer(Models(**{"check the physics": criticises})) as server:
        found = refiner(server, tmp_path, Generator()).run(prompts)
    for one in found:
        assert one.ended == "failed" and one.clips == [1] and one.chosen == 1, one.prompt
        assert one.rounds[0].violations is None and "malformed" in one.rounds[0].failure


def test_whitespace_and_fences_are_forgiven(tmp_path):
    with StubServer(Models(**{"write prompts": '```json\n{"prompt": " A ball\\n falls. "}\n```'})) as server:
        (found,) = refiner(server, tmp_path, Generator(), rounds=1).run([BALL])
    assert found.rounds[0].prompt == "A ball falls."


def test_equal_prompts_converge_without_an_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "load_encoder", None)
    with StubServer(Models(**{"write prompts": json.dumps({"prompt": "same"})})) as server:
        (found,) = refiner(server, tmp_path, Generator()).run([BALL])
    assert found.ended == "converged" and found.clips == [1]


def test_what_a_user_can_get_wrong_is_named(tmp_path):
    with StubServer(Models()) as server:
        with pytest.raises(ValueError, match="key '../up' is to name a folder"):
            refiner(server, tmp_path, Generator()).run([Prompt("../up", "A ball.", None)])
        with pytest.raises(ValueError, match="the scorer gave"):
            refiner(server, tmp_path / "three", Generator(), rounds=1).run([BALL], lambda text, clips: torch.zeros(7))
    with pytest.raises(ValueError, match="rounds=0"):
        PromptRefineConfig(rounds=0)


@pytest.mark.slow  # imports sentence-transformers
def test_a_missing_encoder_is_named(monkeypatch):
    monkeypatch.setattr(refinement, "ENCODER", "runs/no such model")
    with pytest.raises(ValueError, match="runs/no such model, which compares prompts, cannot be loaded"):
        load_encoder()
