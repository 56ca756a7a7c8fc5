"""Actions of prompts: the shipped list, matching with a stand-in encoder and a real tiny one."""

import hashlib
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from data_pipeline.config import ClusterConfig
from data_pipeline.stages import cluster
from data_pipeline.stages.cluster import (
    CHUNK,
    OTHER,
    ActionMatcher,
    bag_of_words,
    load_actions,
    match_settings,
    on_grid,
)
from eval.sandbox.prompts import TEMPLATES, write_prompt

STOP_WORDS = set("a an the to of on in is it and or its by with at from off".split())
SCENES = {
    "projectile": "ball_bounce",
    "collision": "ball_collision",
    "pendulum": "pendulum_swing",
    "ramp": "ramp_slide",
    "occluder": "pass_behind",
}


def bag_encoder(texts, width=4096):
    """Counts of word stems, hashed to signed places: (N, width) float32."""
    vectors = np.zeros((len(texts), width), np.float32)
    for vector, text in zip(vectors, texts, strict=True):
        for word in re.findall(r"[a-z]+", text.lower()):
            if word not in STOP_WORDS:
                code = int.from_bytes(hashlib.sha256(word[:4].encode()).digest()[:4], "big")
                vector[code % width] += 1 if code >> 31 else -1
    return vectors


def matcher(encoder=bag_encoder, **settings):
    return ActionMatcher(ClusterConfig(**settings), "cpu", encoder)


def own_list(folder, text):
    path = folder / "actions.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- the list --------------------------------------------------------------------------------------------------------


def test_the_shipped_list_is_large_and_balanced():
    actions = load_actions()
    sizes = Counter(action.category for action in actions)
    assert len(actions) >= 150 and 12 <= len(sizes) <= 18
    assert min(sizes.values()) >= 8 and max(sizes.values()) <= len(actions) / 6
    assert all(3 <= len(action.phrase.split()) <= 14 for action in actions)
    assert all(action.phrase == " ".join(action.phrase.split()) for action in actions)
    assert set(SCENES) == set(TEMPLATES) and set(SCENES.values()) <= {action.name for action in actions}


@pytest.mark.parametrize(
    "form",
    [str, str.casefold, lambda text: re.sub(r"[\W_]+", "", text.casefold()), bag_of_words],
    ids=["as written", "without case", "without spaces and punctuation", "as a bag of words"],
)
def test_no_name_and_no_phrase_comes_twice(form):
    for texts in ([action.name for action in load_actions()], [action.phrase for action in load_actions()]):
        forms = [form(text) for text in texts]
        assert [text for text, own in zip(texts, forms, strict=True) if forms.count(own) > 1] == []


def test_phrases_differ_in_more_than_articles():
    bags = [tuple(word for word in bag_of_words(a.phrase) if word not in STOP_WORDS) for a in load_actions()]
    assert len(set(bags)) == len(bags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no actions"),
        ("- a\n", "must hold categories"),
        ("falling: {drop: an apple falls\n", "not valid YAML: .*line"),
        ("falling: {}\n", "'falling' must hold actions"),
        ("falling: an apple falls\n", "'falling' must hold actions.*'an apple falls'"),
        ("Falling things: {drop: an apple falls}\n", "category 'Falling things' must be a name"),
        ("falling: {3: an apple falls}\n", "action 3 must be a name"),
        ("falling: {drop: }\n", "'drop' needs a phrase in words, found None"),
        ("falling: {drop: '...'}\n", "'drop' needs a phrase in words"),
        ("falling: {drop: 7}\n", "'drop' needs a phrase in words, found 7"),
        ("falling: {drop: it falls, drop: it drops}\n", "duplicate key drop"),
        ("a: {drop: it falls}\nb: {drop: it drops}\n", "'drop' comes twice"),
        ("a: {drop: it falls}\nb: {fall: 'Falls, it!'}\n", "'drop' and 'fall' have the same words"),
        ("a: {other: it falls}\n", "'other' comes twice or is 'other'"),
        ("other: {drop: it falls}\n", "category 'other' is for what matches no action"),
    ],
)
def test_a_list_of_another_form_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"(?s)actions.yaml.*{message}"):
        load_actions(own_list(tmp_path, text))


def test_a_list_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"pipeline\.cluster\.actions: there is no file nowhere\.yaml"):
        ActionMatcher(ClusterConfig(actions="nowhere.yaml"), "cpu", bag_encoder)


def test_the_settings_see_actions_and_their_order_but_no_layout(tmp_path):
    def settings(text):
        return match_settings(ClusterConfig(model="a/b", actions=str(own_list(tmp_path, text)) if text else ""))

    first = settings("a: {x: it falls, y: it rolls}\n")
    assert first == settings("# mine\na:\n  x: it falls\n  y: 'it rolls '\n")
    assert first != settings("a: {y: it rolls, x: it falls}\n")  # decides between equals
    assert first != settings("b: {x: it falls, y: it rolls}\n") and first != settings("")
    assert {name: first[name] for name in first if name != "actions"} == {"model": "a/b", "threshold": 0.3}
    assert json.loads(json.dumps(first)) == first


# ---- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", SCENES)
def test_prompts_of_the_sandbox_match_their_scenes(scene):
    prompts = [
        write_prompt(scene, {"colour": colour, "direction": side, "second_colour": "blue", "second_state": state}, i)
        for i in range(len(TEMPLATES[scene]))
        for colour in ("red", "green")
        for side in ("left", "right")
        for state in ("resting", "moving")
    ]
    found = matcher().match(prompts)
    assert set(found["action"]) == {SCENES[scene]}
    assert len(set(found["category"])) == 1 and found["action_score"].min() > 0.3


def test_a_phrase_matches_itself():
    chosen = matcher()
    found = chosen.match([action.phrase for action in chosen.actions])
    assert found["action"] == [action.name for action in chosen.actions]
    assert found["category"] == [action.category for action in chosen.actions]
    assert (found["action_score"] == 1).all()


def test_scores_are_cosines_to_four_decimals(tmp_path):
    """By hand: (3, 4) against (1, 0) and (1, 1): 3/5 = .6 and 7/(5 sqrt 2) = .98995; (-2, 0): -1 and -.70711."""
    vectors = {"east": (10, 0), "both": (1, 1), "p": (3, 4), "q": (-2, 0), "zero": (0, 0)}
    path = own_list(tmp_path, "a: {one: east}\nb: {two: both}\n")
    chosen = matcher(lambda texts: np.array([vectors[text] for text in texts], np.float32), actions=str(path))
    found = chosen.match(["p", "q", "zero"])
    assert found["action"] == ["two", OTHER, OTHER] and found["category"] == ["b", OTHER, OTHER]
    assert found["action_score"].tolist() == [0.9899, -0.7071, 0.0]  # kept also where the action is `other`


def test_scores_agree_with_a_plain_reference():
    rng = np.random.default_rng(0)
    vectors = {}

    def encoder(texts):
        return np.stack([vectors.setdefault(text, rng.standard_normal(48)) for text in texts])

    chosen = matcher(encoder, threshold=-1)
    prompts = [f"prompt {i}" for i in range(300)]
    found = chosen.match(prompts)
    for prompt, action, score in zip(prompts, found["action"], found["action_score"], strict=True):
        cosines = {
            a.name: np.dot(vectors[prompt], vectors[a.phrase])
            / np.linalg.norm(vectors[prompt])
            / np.linalg.norm(vectors[a.phrase])
            for a in chosen.actions
        }
        assert abs(score - max(cosines.values())) < 0.5e-4 + 1e-6
        assert cosines[action] > max(cosines.values()) - 1.1e-4


def test_the_first_of_the_list_wins_a_tie_and_the_threshold_itself_is_enough(tmp_path):
    vectors = {"x": (1, 0), "y": (1, 1e-4), "z": (0, 1), "p": (3, 4)}
    path = own_list(tmp_path, "a: {b: y, a: x}\n")

    def encoder(texts):
        return torch.tensor([vectors[text] for text in texts])

    found = matcher(encoder, actions=str(path), threshold=0.6).match(["x", "y", "p"])
    assert found["action"] == ["b", "b", "b"]  # .99999 and 1 read equal
    assert found["action_score"].tolist() == [1, 1, 0.6001]
    found = matcher(encoder, actions=str(path), threshold=0.6002).match(["p"])
    assert found["action"] == [OTHER] and found["action_score"].tolist() == [0.6001]


def test_the_grid_makes_products_exact_in_any_order():
    rng = np.random.default_rng(1)
    one, two = on_grid(rng.standard_normal((40, 384))), on_grid(rng.standard_normal((50, 384)))
    order = rng.permutation(384)
    whole = one @ two.T
    assert (whole == one[:, order] @ two[:, order].T).all()
    assert all(
        (whole[i] == [sum(a * b for a, b in zip(one[i], row, strict=True)) for row in two]).all() for i in (0, 7)
    )
    assert np.abs(np.linalg.norm(one, axis=1) - 1).max() < 1e-5


def test_results_do_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(2)
    words = " ".join(action.phrase for action in load_actions()).split()
    prompts = [" ".join(rng.choice(words, size=rng.integers(1, 12))) for _ in range(150)]
    chosen = matcher()
    whole = chosen.match(prompts)
    for size in (1, 7, 133):
        parts = [chosen.match(prompts[first : first + size]) for first in range(0, len(prompts), size)]
        assert [name for part in parts for name in part["action"]] == whole["action"]
        assert (np.concatenate([part["action_score"] for part in parts]) == whole["action_score"]).all()


def test_equal_prompts_are_encoded_once_and_calls_are_bounded():
    calls = []

    def encoder(texts):
        calls.append(list(texts))
        return bag_encoder(texts, 16)

    prompts = [f"{i % (CHUNK + 5)} ball" for i in range(2 * CHUNK)]
    found = matcher(encoder).match(prompts)
    assert len(found["action"]) == len(found["category"]) == len(found["action_score"]) == len(prompts)
    assert sorted(map(len, calls)) == [5, len(load_actions()), CHUNK]
    assert matcher().match([])["action"] == [] and len(matcher().match([])["action_score"]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_refused_with_its_prompt(value):
    def encoder(texts):
        vectors = bag_encoder(texts)
        vectors[[number for number, text in enumerate(texts) if text == "broken"], 3] = value
        return vectors

    with pytest.raises(ValueError, match="not finite for 'broken'"):
        matcher(encoder).match(["a ball", "broken"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, r"threshold=1.5 is no cosine"),
        ({"threshold": float("nan")}, r"threshold=nan is no cosine"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"pipeline.cluster.{message}"):
        matcher(**settings)


@pytest.mark.parametrize("model", ["", "no such folder"])
def test_a_model_is_needed(model):
    with pytest.raises(ValueError, match=r"pipeline\.cluster\.model.*folder"):
        ActionMatcher(ClusterConfig(model=model), "cpu")


# ---- a real sentence transformer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random one-layer BERT with mean pooling and the words of the phrases, as a sentence-transformers folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("sentence")
    words = sorted({word for action in load_actions() for word in bag_of_words(action.phrase)})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), "utf-8")
    config = BertConfig(
        vocab_size=len(words) + 5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(folder / "model"))
    return folder / "model"


def copy_of(model, folder):
    for path in model.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def test_a_real_model_matches_and_batches_do_not_matter(tiny_model, monkeypatch):
    prompts = [action.phrase for action in load_actions()][::3] + ["a pendulum swings", "", "word " * 20_000]
    found = ActionMatcher(ClusterConfig(model=str(tiny_model)), torch.device("cpu")).match(prompts)
    assert found["action"][:-3] == [action.name for action in load_actions()][::3]
    assert (found["action_score"][:-3] > 0.9999 - 1e-9).all() and np.isfinite(found["action_score"]).all()
    monkeypatch.setattr(cluster, "BATCH", 3)
    alone = ActionMatcher(ClusterConfig(model=str(tiny_model)), "cpu").match(prompts)
    assert alone["action"][:-3] == found["action"][:-3]
    assert np.abs(alone["action_score"] - found["action_score"]).max() <= 1.01e-4


def test_a_model_of_another_kind_is_refused(tiny_model, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = copy_of(tiny_model, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for folder in (empty, pickled):
        chosen = ActionMatcher(ClusterConfig(model=str(folder)), "cpu")
        with pytest.raises(ValueError, match=r"pipeline\.cluster\.model=.*cannot be loaded.*safetensors"):
            chosen.match(["a ball"])


def test_code_of_a_model_is_not_run(tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "own")
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    modules[0]["type"] = "own_code.Own"
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    ran = tmp_path / "ran"
    (folder / "own_code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n", "utf-8")
    with pytest.raises(ValueError, match=r"pipeline\.cluster\.model=.*cannot be loaded"):
        ActionMatcher(ClusterConfig(model=str(folder)), "cpu").match(["a ball"])
    assert not ran.exists()


def test_a_missing_package_is_named(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="needs the package sentence-transformers, .*pip install"):
        ActionMatcher(ClusterConfig(model=str(tiny_model)), "cpu").match(["a ball"])
