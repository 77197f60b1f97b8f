"""Tasks: how the fields of a record become tokens, and what is asked of the model.

``classification`` reads a text and names one of a public list of classes. ``instruction`` reads a
user's turn and writes the assistant's; only the tokens of the answer enter the loss. ``tabular``
and ``survival`` read numbers (``learning/tabular.py``, ``learning/survival.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from huizhen.learning.template import fields_of, render
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.protocol.study_terms import TaskTerms

UNSEEN = -1  # the class of a record whose label the study does not list


@dataclass(frozen=True, slots=True)
class Encoded:
    """One record as the model reads it."""

    ids: NDArray[Any]
    # tokens of the text, or of prompt and answer, int64; of a tabular task the scaled features,
    # float32; of a survival task the time after them
    label: int
    # index into the study's labels; 0 for an instruction
    answer_start: int
    # of an instruction: the first token of the answer; 0 otherwise
    was_cut: bool
    # the text had more tokens than max_tokens, or a feature lay outside its range


class Encoder(Protocol):
    """What turns records into examples, for one study."""

    def encode(self, fields: Mapping[str, Any], where: str) -> Encoded:
        """Return one record as the model reads it; ``where`` is its place, for errors."""


def fields_read(task: TaskTerms) -> tuple[str, ...]:
    """Return every field of a record that the task reads: the allow-list of de-identification.

    Raises:
        ConfigError: a template does not parse, or reads no field.
    """
    names = [*_fields_of("text", task.text), *sorted(task.features)]
    names += _fields_of("answer", task.answer or "")
    names += [name for name in (task.label, task.label_text, task.time) if name]
    return tuple(dict.fromkeys(names))


def name_of(value: Any, field: str, where: str) -> str:
    """Return the name of a class, site or group that a field's value is; empty for no value.

    A whole number is one name however it is written, 7 or 7.0: a column with gaps makes 7.0 of 7.

    Raises:
        GovernanceError: the value is a list or a table.
    """
    if isinstance(value, list | dict):
        raise GovernanceError(
            f"{where}: {field!r} is a list or a table, expected a name: mend the export"
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def class_of(fields: Mapping[str, Any], name: str, index: Mapping[str, int], where: str) -> int:
    """Return the number of a record's class, ``UNSEEN`` for one that the study does not list.

    Args:
        fields: the record's fields.
        name: of the field that holds the class.
        index: the number of each class.
        where: the record's place in its file, for errors.

    Raises:
        GovernanceError: the label is empty, a list or a table.
    """
    label = name_of(fields.get(name), name, where)
    if not label:
        raise GovernanceError(
            f"{where}: {name!r} is empty, a classification needs a label: "
            "fill the field or remove the record"
        )
    return index.get(label, UNSEEN)


class TaskEncoder:
    """Encodes records for one study and one tokenizer."""

    def __init__(self, task: TaskTerms, tokenizer: Any) -> None:
        """Prepare; ``tokenizer`` is a Hugging Face tokenizer."""
        self.task = task
        self.tokenizer = tokenizer
        self._index = {label: i for i, label in enumerate(task.labels)}

    def encode(self, fields: Mapping[str, Any], where: str) -> Encoded:
        """Return one record as tokens.

        Args:
            fields: the record's fields, de-identified.
            where: the record's place in its file, for errors.

        Raises:
            ConfigError: a field of the template is missing.
            GovernanceError: the text or the answer is empty.
        """
        text = self._render(self.task.text, fields, where)
        if not text:
            raise GovernanceError(
                f"{where}: text is empty, the task reads {self.task.text!r}: "
                "fill the field or remove the record"
            )
        if self.task.kind == "classification":
            return self._classification(text, fields, where)
        return self._instruction(text, fields, where)

    def prompt(self, text: str) -> str:
        """Return what the model reads before it answers, in its own chat format if it has one."""
        if not self.tokenizer.chat_template:
            return f"{self.task.system}\n{text}\n".lstrip()
        turns = [{"role": "user", "content": text}]
        if self.task.system:
            turns.insert(0, {"role": "system", "content": self.task.system})
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )

    def answer(self, fields: Mapping[str, Any], where: str) -> str:
        """Return the expected answer of an instruction."""
        return self._render(self.task.answer or "", fields, where)

    def _render(self, template: str, fields: Mapping[str, Any], where: str) -> str:
        try:
            return render(template, fields)
        except KeyError as error:
            raise ConfigError(
                f"{where}: there is no field {error.args[0]!r}, the task reads {template!r}"
            ) from error

    def _classification(self, text: str, fields: Mapping[str, Any], where: str) -> Encoded:
        ids = self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        limit = self.task.max_tokens
        if len(ids) > limit:
            end = [ids[-1]] if ids[-1] == self.tokenizer.sep_token_id else []
            kept = [*ids[: limit - len(end)], *end]
        else:
            kept = ids
        number = class_of(fields, self.task.label or "", self._index, where)
        return Encoded(np.asarray(kept, np.int64), number, 0, len(ids) > limit)

    def _instruction(self, text: str, fields: Mapping[str, Any], where: str) -> Encoded:
        answer = self.answer(fields, where)
        if not answer:
            raise GovernanceError(
                f"{where}: the answer is empty, the task writes {self.task.answer!r}: "
                "fill the field or remove the record"
            )
        tail = self._tokens(answer)
        if self.tokenizer.eos_token_id is not None:
            tail = [*tail, self.tokenizer.eos_token_id]
        # where a prompt is cut must not tell how long the expected answer is
        reserve = max(len(tail), self.task.max_new_tokens + 1)
        room = self.task.max_tokens - reserve
        head = self._tokens(self.prompt(text))
        cut = len(head) > room
        if cut:
            words = self._tokens(text)
            frame = len(head) - len(words)
            if room - frame < 1:
                raise ConfigError(
                    f"{where}: the answer has {len(tail)} tokens, max_new_tokens is "
                    f"{self.task.max_new_tokens} and [task] max_tokens {self.task.max_tokens}, "
                    "nothing of the text would be read: raise max_tokens"
                )
            # a cut inside a character decodes to U+FFFD, which may take more tokens than it had
            text = self.tokenizer.decode(words[: room - frame]).rstrip("\ufffd")
            head = self._tokens(self.prompt(text))[:room]
        return Encoded(np.asarray([*head, *tail], np.int64), 0, len(head), cut)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _fields_of(key: str, template: str) -> tuple[str, ...]:
    names = fields_of(template, f"[task] {key}")
    if template and not names:
        raise ConfigError(
            f"[task] {key} is {template!r}, expected a field of the record in braces: name one"
        )
    return names
