"""VideoCon-Physics, the judge of VideoPhy (Bansal et al., 2024, arXiv 2406.03520), in the user's own installation.

The judge is a video language model that is asked two questions; a score is p(Yes) / (p(Yes) + p(No)): does the video
entail the description (semantic adherence, SA), does it follow the physical laws (physical commonsense, PC). Scores are
probabilities and are used as they are; the paper's own binary labels are SA, PC >= 0.5.

A call runs two programs of the checkout:

    utils/prepare_data.py                  captions -> the two questions, in the words that the weights were trained on
    videocon/.../entailment_inference.py   questions -> videopath, question, score: no header, one row per question

The README runs the second one once for each question. Both questions stand in one table here, so that the weights
are loaded once per call. That still takes a minute or more: give many clips per call.

The tool cuts a question at 256 tokens, 65 of them the video, and then reads its answer from the middle of the caption:
a caption that may be too long is refused. Judge the short prompt, not one that was rewritten for the generator.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from eval.judges.external_tool import Tool, ToolError, write_table
from eval.judges.scores import Scores, refuse_caption, unit_score

NAME = "videocon_physics"
PREPARE = "utils/prepare_data.py"
INFERENCE = "videocon/training/pipeline_video/entailment_inference.py"
HEADER = ["videopath", "caption"]
TABLES = {"semantic": "sa_testing.csv", "physical": "physics_testing.csv"}  # as PREPARE calls them
PROGRAMS = (PREPARE, INFERENCE)
RESERVED = ("<|video|>", "<image>", "AI: ", "\nHuman: ")  # where the tool splits a question into turns and media
BATCH_SIZE = 16  # questions that the tool answers at once, 32 frames of 224x224 each
CAPTION_TOKENS = 120  # what 256 leave beside 65 for the video and about 65 for the question's own words


def make_scores(found: dict[str, list[float]]) -> Scores:
    return Scores(*(torch.tensor(found[name], dtype=torch.float32) for name in ("semantic", "physical")))


def rate_files(
    tool: Tool, paths: Mapping[int, str], prompts: Sequence[str], folder: Path
) -> tuple[dict[str, dict[int, float]], dict[int, str]]:
    """Scores of clips that lie in files: name of TABLES -> clip number -> [0, 1]; clip number -> why it has none.

    paths: clip number -> absolute path; prompts: of all clips, by number, none that `refuse` refuses. `folder` is new
    and takes the tables and the log. A clip without one of the scores may still have the other. Raises ToolError.
    """
    failures: dict[int, str] = {}
    questions = _questions(tool, folder, paths, prompts, failures)
    return _answers(tool, folder, questions, failures), failures


def refuse(prompt: str) -> str | None:
    """Why the tool cannot be asked about a caption, None if it can.

    Tokens are estimated from above, as the tokenizer is not here: three ASCII letters or spaces a token (English has
    about four), one token for any other ASCII character and for every byte beyond.
    """
    if reason := refuse_caption(prompt, RESERVED):
        return reason
    plain = sum(letter.isascii() and (letter.isalpha() or letter == " ") for letter in prompt)
    tokens = plain // 3 + len(prompt.encode()) - plain
    if tokens > CAPTION_TOKENS:
        return f"its prompt may take {tokens} tokens, of which the tool has room for {CAPTION_TOKENS}; shorten it"
    return None


def _questions(
    tool: Tool, folder: Path, paths: Mapping[int, str], prompts: Sequence[str], failures: dict[int, str]
) -> dict[tuple[str, str], tuple[str, int]]:
    """The tool's own wording of every question: (video path, question) -> (name of the score, clip number)."""
    write_table(folder / "captions.csv", HEADER, [[path, prompts[clip]] for clip, path in paths.items()])
    tool.run(PREPARE, ["--input_csv", str(folder / "captions.csv"), "--output_folder", str(folder)], folder)
    questions = {}
    for name, file in TABLES.items():
        header, *rows = tool.read_table(folder / file, PREPARE, folder) or [[]]
        if header != HEADER or [row[0] for row in rows] != list(paths.values()) or {len(row) for row in rows} != {2}:
            raise ToolError(f"{NAME}: {PREPARE} wrote {file}, but not with a row of {', '.join(HEADER)} for each clip")
        for clip, (path, question) in zip(paths, rows, strict=True):
            if name == "semantic" and prompts[clip] not in question:  # "NA" and "1.0" are no text to the tool's reader
                failures[clip] = f"the tool did not read its prompt as text; its question is {question[-60:]!r}"
            questions[path, question] = name, clip
    return {question: place for question, place in questions.items() if place[1] not in failures}


def _answers(
    tool: Tool, folder: Path, questions: dict[tuple[str, str], tuple[str, int]], failures: dict[int, str]
) -> dict[str, dict[int, float]]:
    """Name of the score -> clip number -> score; clips without a valid one go to `failures`."""
    found: dict[str, dict[int, float]] = {name: {} for name in TABLES}
    if not questions:
        return found
    asked, answered = folder / "questions.csv", folder / "answers.csv"
    write_table(asked, HEADER, list(questions))
    arguments = ["--input_csv", str(asked), "--output_csv", str(answered), "--checkpoint", str(tool.checkpoint)]
    tool.run(INFERENCE, [*arguments, "--batch_size", str(BATCH_SIZE)], folder)
    seen = set()
    for row in tool.read_table(answered, INFERENCE, folder):
        question = tuple(row[:2])
        if len(row) != 3 or question not in questions or question in seen:
            raise ToolError(f"{NAME}: {INFERENCE} wrote a row that answers no open question: {row!r:.200}")
        seen.add(question)
        name, clip = questions[question]
        try:
            found[name][clip] = unit_score(row[2])
        except ValueError as error:
            failures[clip] = f"its {name} score {error}"
    for question in questions.keys() - seen:
        name, clip = questions[question]
        failures.setdefault(clip, f"the tool wrote no {name} score for it")
    return found
