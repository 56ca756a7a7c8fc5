"""Prompts from files: what is taken, what is refused, and in which words."""

from pathlib import Path

import pytest

from eval import generate
from eval.prompts import PromptsConfig, read_prompts
from train.backbones.tiny import write_tiny_pipeline


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.txt",
            "\ufeffa ball falls \r\n\n  a cube, too\n",
            [("000-a-ball-falls", "a ball falls"), ("001-a-cube-too", "a cube, too")],
        ),
        ("a.csv", 'prompt,image\n"one, two",\n', [("000-one-two", "one, two")]),
        ("b.csv", "Prompt ,KEY,,\nx,a,,\n,,,\nnan,b,,\n", [("a", "x"), ("b", "nan")]),
        ("b.txt", "# balls\na ball\n", [("000-a-ball", "a ball")]),
        ("a.jsonl", '{"prompt": "x", "key": "K_1"}\n\n{"prompt": "球"}\n', [("k-1", "x"), ("001", "球")]),
    ],
)
def test_prompt_files(name, text, expected, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    prompts = read_prompts(PromptsConfig(prompts_file=str(path)), "generate")
    assert [(prompt.key, prompt.text) for prompt in prompts] == expected
    assert all(prompt.image is None for prompt in prompts)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "promt,image\na,b\n", r"no column 'prompt'.*did you mean 'prompt' by 'promt'"),
        ("a.csv", 'prompt\n"a\n', "is not valid CSV near line 2"),
        ("a.csv", "prompt,key\na,b,c\n", "prompt 1: 3 fields for 2 columns: quote fields that hold a comma"),
        ("a.csv", "prompt,key\nx,a b\ny,A-B\n", "prompt 2: key 'A-B' is that of prompt 1 already, both as 'a-b'"),
        ("a.csv", "prompt,key\nx,球\n", "key '球' has no letter a-z and no digit"),
        ("a.csv", "prompt,key\nx,a\n  ,b\n", "prompt 2 is empty"),
        ("a.csv", "prompt,image\nx,\ny,b.png\n", "1 prompts have no image, the first is 000-x"),
        ("a.csv", "", "holds no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "prompt 2: not a JSON object: Expecting value"),
        ("a.jsonl", '["x"]\n', "holds JSON over several lines"),
        ("a.jsonl", '{\n"prompt": "x"\n}\n', "holds JSON over several lines"),
        ("a.jsonl", '{"prompt": ["x"]}\n', "prompt must be text"),
        ("a.jsonl", '{"prompt": NaN}\n', "prompt 1: prompt must be text in quotes, not nan"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": true}\n', "prompt 2: prompt must be text in quotes, not True"),
        ("a.jsonl", '{"prompt": 12}\n', "prompt must be text in quotes, not 12"),
        ("a.jsonl", '{"prompt": "x", "image": 1}\n', "image must be text in quotes, not 1"),
        ("a.csv", "prompt,image\nx,https://x.org/a.png\n", "a.png is an address: only local files are read"),
        ("a.csv", "prompt;image\nx;\n", "separated by semicolons: save it with commas"),
        ("a.csv", '"prompt"\t"image"\n"x"\t""\n', "separated by tabs: save it with commas"),
        ("a.csv", "prompt,image\nx,\n".encode("utf-16"), "is UTF-16.*: save it as UTF-8"),
        ("a.csv", "caption\nx\n", "rename the column 'caption' to 'prompt'"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "prompt reads .*: save it as UTF-8"),
        ("a.jsonl", '{"text": "x"}\n', "no column 'prompt'.*rename the column 'text' to 'prompt'"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.txt", None, "cannot be read"),
        ("a.txt", b"\xff\xfe\xfa", "is UTF-16, or no text: save it as UTF-8"),
        ("a.txt", b"a b\xe4ll\n", "prompt 1: prompt reads .*: save it as UTF-8"),
        ("a.yaml", "x", "unknown format '.yaml': use a .txt with a prompt a line"),
        ("a.json", "[]", "unknown format '.json': write one JSON object a line and name it .jsonl"),
    ],
)
def test_bad_prompt_files(name, text, message, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(PromptsConfig(prompts_file=str(path)), "generate")
    assert str(path) in str(caught.value)


def test_prompts_that_the_text_encoder_cuts_are_named_before_a_clip_is_made(tmp_path, capsys):
    model = write_tiny_pipeline("wan21", tmp_path / "model")
    settings = [f"backbone.path={model}", "backbone.architecture=tiny", "backbone.text_length=16", "dry_run=true"]
    settings += ["video.height=64", "video.width=64", "video.num_frames=9", f"generate.folder={tmp_path / 'clips'}"]
    generate.main([*settings, f"generate.prompts=['a ball', '{'9' * 30}', '{'8' * 30}']"])
    line = "warning: 2 prompts are longer than the 16 tokens that the text encoder reads, and cut there; the first is"
    assert f"{line} prompt 001-{'9' * 30}\n" in capsys.readouterr().out
    generate.main([*settings, "generate.prompts=['a ball']"])
    assert "warning" not in capsys.readouterr().out


def test_comments_are_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("# balls\na ball\n#a cube\n", encoding="utf-8")
    read_prompts(PromptsConfig(prompts_file=str(tmp_path / "a.txt")), "generate")
    assert "a.txt: 2 lines that begin with # are comments" in capsys.readouterr().out


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").write_text("prompt,image\nx,~/b.png\n", encoding="utf-8")
    (prompt,) = read_prompts(PromptsConfig(prompts_file="~/a.csv"), "generate")
    assert prompt.image == Path(tmp_path, "b.png")
