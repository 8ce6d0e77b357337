"""What the task files here name: documents from local JSON lines, shots from the same group, TyDiQA's metrics.

lm-eval imports this module when it loads one of the files; nothing else of the package needs lm-eval.
"""

from __future__ import annotations

import itertools
import os
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from trim_lightning.errors import UserError
from trim_lightning.evaluation.harness.tasks import DATA_VARIABLE
from trim_lightning.evaluation.options import correct_option, option_responses
from trim_lightning.files.json_files import load_json
from trim_lightning.records.fields import clean_text, scalar_text

_SPLITS = ("train", "test")
_END_OF_PLAIN_ANSWER = "\n\n"  # what separates the shots of a prompt without a chat template

Document = dict[str, Any]


class LocalTask(ConfigurableTask):
    """An lm-eval task over local records.

    Where its file names a ``group_field``, the shots of a prompt come from the record's own group, as MMLU and BBH
    ask for. Without a chat template a blank line ends an answer, since nothing else would.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = {name: value for name, value in config.items() if name != "class"}
        super().__init__(config=settings)
        self.group_field: str | None = settings["dataset_kwargs"].get("group_field")
        self.file: str = settings["dataset_kwargs"]["file"]
        self._shots: dict[str, list[Document]] = {}
        for document in self.dataset["train"]:
            self._shots.setdefault(self.group_of(document), []).append(document)

    def group_of(self, document: Mapping[str, Any]) -> str:
        """The document's group, or the empty text if the task has no groups."""
        return str(document[self.group_field]) if self.group_field else ""

    def available_shots(self) -> int:
        """Examples that every test document can have as shots."""
        return min(len(self._shots.get(group, [])) for group in {self.group_of(item) for item in self.eval_docs})

    def fewshot_context(self, doc: Document, num_fewshot: int = 0, **options: Any) -> Any:
        """The prompt of a document, with shots from its group."""
        self.sampler.replace_df(self._shots.get(self.group_of(doc), []))
        return super().fewshot_context(doc, num_fewshot=num_fewshot, **options)

    def construct_requests(self, doc: Document, ctx: Any, **options: Any) -> Any:
        """The requests of a document; see `ConfigurableTask`."""
        with_template = options.get("apply_chat_template", False)
        requests = super().construct_requests(doc, ctx, **options)
        if self.OUTPUT_TYPE == "generate_until" and not with_template:
            requests.args[1]["until"] = [*requests.args[1]["until"], _END_OF_PLAIN_ANSWER]
        return requests


def load(
    *, file: str, kind: str, data_dir: str | None = None, group_field: str | None = None, **metadata: Any
) -> dict[str, Dataset]:
    """Read ``<file>.test.jsonl`` and, if it is there, ``<file>.train.jsonl``.

    The records of different groups take turns, so that the first N of them cover the groups evenly.

    Args:
        file: The name's first part, e.g. ``gsm8k``.
        kind: What a record is: ``answer`` (prompt, response, answer), ``options`` (also choices) or ``passage``
            (context, question, answers).
        data_dir: The folder; None takes the environment variable TRIM_DATA_DIR.
        group_field: Field that divides the records into groups.
        **metadata: Whatever else lm-eval hands over.

    Raises:
        UserError: if there is no folder or test file, or a record does not fit.
    """
    folder = data_dir or os.environ.get(DATA_VARIABLE)
    if not folder:
        raise UserError(
            f"evaluation.tasks: trim_{file} reads {file}.test.jsonl: set evaluation.data_dir (or {DATA_VARIABLE}) "
            "to its folder"
        )
    paths = {split: Path(folder).expanduser() / f"{file}.{split}.jsonl" for split in _SPLITS}
    if not paths["test"].is_file():
        raise UserError(f"evaluation.data_dir={folder}: there is no {paths['test'].name} for trim_{file}")
    read = _KINDS[kind]
    documents = {
        split: [read(record, place, group_field) for place, record in _lines(path)] if path.is_file() else []
        for split, path in paths.items()
    }
    if not documents["test"]:
        raise UserError(f"evaluation.data_dir={folder}: {paths['test'].name} is empty")
    if group_field:
        documents = {split: _take_turns(rows, group_field) for split, rows in documents.items()}
    test = Dataset.from_list(documents["test"])
    columns = {name: [document[name] for document in documents["train"]] for name in test.features}
    train = Dataset.from_dict(columns, features=test.features)  # from_list takes no empty list with features
    return {"test": test, "train": train}


def _take_turns(documents: Iterable[Document], field: str) -> list[Document]:
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document[field], []).append(document)
    rounds = itertools.zip_longest(*groups.values())
    return [document for turn in rounds for document in turn if document is not None]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            record = load_json(line)
        except ValueError as error:
            raise UserError(f"{place} is not valid JSON ({error}): mend or delete that line") from None
        if not isinstance(record, dict):
            raise UserError(f"{place} is not a JSON object: mend or delete that line")
        yield place, record


def _field(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if value is None or isinstance(value, list | dict):
        raise UserError(f"{place}: field {name} is missing or not a text; mend or delete that line")
    return clean_text(scalar_text(value))


def _answer(record: Mapping[str, Any], place: str, group_field: str | None) -> Document:
    names = ["prompt", "response", "answer", *([group_field] if group_field else [])]
    document: Document = {name: _field(record, name, place) for name in names}
    document["id"] = scalar_text(record.get("id", place))
    return document


def _options(record: Mapping[str, Any], place: str, group_field: str | None) -> Document:
    document = _answer(record, place, group_field)
    options = option_responses(record, document["response"])
    correct = None if options is None else correct_option(record)
    if options is None or correct is None:
        raise UserError(f"{place}: choices must be two or more texts, and answer the letter or text of one of them")
    return {**document, "options": [clean_text(option) for option in options], "correct": correct}


def _passage(record: Mapping[str, Any], place: str, group_field: str | None) -> Document:
    names = ["context", "question", *([group_field] if group_field else [])]
    document: Document = {name: _field(record, name, place) for name in names}
    answers = record.get("answers")
    if isinstance(answers, dict):  # the layout of the data set's publishers: texts beside their places
        answers = answers.get("text")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{place}: field answers must be a list of one or more texts")
    document["answers"] = [clean_text(answer) for answer in answers]
    document["answer"] = document["answers"][0]  # what a shot shows
    document["id"] = scalar_text(record.get("id", place))
    return document


_KINDS: dict[str, Callable[[Mapping[str, Any], str, str | None], Document]] = {
    "answer": _answer,
    "options": _options,
    "passage": _passage,
}

_PUNCTUATION = {code: None for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("P")}
_PUNCTUATION |= {ord(mark): None for mark in string.punctuation}
_ARTICLES = {"english": {"a", "an", "the"}, "en": {"a", "an", "the"}}


def answer_words(text: str, language: str) -> list[str]:
    """Words that count when answers are compared: lower case, no punctuation, no articles.

    As in SQuAD's evaluation, with two additions of ours for other languages: punctuation is what Unicode calls so,
    and articles are dropped in English alone, where they are articles.
    """
    words = text.lower().translate(_PUNCTUATION).split()
    articles = _ARTICLES.get(language.lower(), set())
    return [word for word in words if word not in articles]


def passage_scores(prediction: str, answers: Sequence[str], language: str) -> dict[str, float]:
    """SQuAD's exact match and word F1 of an answer, each the best over the gold answers.

    Args:
        prediction: The predicted span.
        answers: Gold answers, at least one.
        language: Name or code of the language.

    Returns:
        ``exact_match`` (0 or 1) and ``f1`` in [0, 1].
    """
    said = answer_words(prediction, language)
    pairs = [(said, answer_words(answer, language)) for answer in answers]
    return {
        "exact_match": float(any(left == right for left, right in pairs)),
        "f1": max(_f1(left, right) for left, right in pairs),
    }


def _f1(said: Sequence[str], gold: Sequence[str]) -> float:
    if not said or not gold:
        return float(list(said) == list(gold))
    shared = sum((Counter(said) & Counter(gold)).values())
    return 2 * shared / (len(said) + len(gold))


def judge_passage(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score a generated answer, which is its first line that is not blank."""
    first = next((line.strip() for line in results[0].splitlines() if line.strip()), "")
    return passage_scores(first, doc["answers"], doc["language"])
