"""How a record becomes tokens: classes, chat turns, truncation, and what is refused."""

import dataclasses

import pytest

from huizhen.learning.bases import load_model
from huizhen.learning.tasks import UNSEEN, TaskEncoder, fields_read, name_of
from huizhen.protocol.errors import ConfigError, GovernanceError

FRAME = 19  # tokens of the chat around a user's turn, of the base tiny


@pytest.fixture
def classifier(tiny_classifier):
    return TaskEncoder(tiny_classifier.study.task, tiny_classifier.tokenizer)


@pytest.fixture
def assistant(tiny_assistant):
    """Return an encoder of instructions with some terms changed."""

    def make(**terms):
        task = dataclasses.replace(tiny_assistant.study.task, **terms)
        return TaskEncoder(task, tiny_assistant.tokenizer)

    return make


def test_the_allow_list_is_what_the_task_reads(make_study):
    task = make_study(task={"text": "{age}: {text}", "label_text": "words"}).task
    assert fields_read(task) == ("age", "text", "disease", "words")
    task = make_study("instruction", task={"text": "{text}", "answer": "{a} {text}"}).task
    assert fields_read(task) == ("text", "a")


def test_a_template_that_reads_no_field_is_refused(make_study):
    for key in ("text", "answer"):
        task = make_study("instruction", task={key: "hello"}).task
        with pytest.raises(ConfigError, match=rf"^\[task\] {key} is 'hello', expected a field"):
            fields_read(task)


def test_a_class_is_its_place_in_the_list_and_unknown_ones_are_marked(classifier):
    labels = [
        classifier.encode({"text": "x", "disease": disease}, "a:1").label
        for disease in ("asthma", "epilepsy", "measles", "plague")
    ]
    assert labels == [0, 1, 2, UNSEEN]


def test_a_text_is_tokenised_whole(classifier):
    encoded = classifier.encode({"text": "发热 fever", "disease": "measles"}, "a:1")
    assert classifier.tokenizer.decode(encoded.ids) == "发热 fever"
    assert len(encoded.ids) == 12  # a token a byte
    assert not encoded.was_cut


def test_a_text_that_is_too_long_is_cut_and_marked(classifier):
    for length, cut in ((48, False), (49, True)):
        encoded = classifier.encode({"text": "x" * length, "disease": "measles"}, "a:1")
        assert (len(encoded.ids), encoded.was_cut) == (48, cut)


def test_a_cut_text_of_an_encoder_keeps_its_last_token(minilm, make_study):
    _, tokenizer = load_model(minilm, causal_lm=False)
    encoder = TaskEncoder(make_study(task={"max_tokens": 6}).task, tokenizer)
    encoded = encoder.encode({"text": "fever " * 20, "disease": "measles"}, "a:1")
    assert encoded.was_cut
    assert len(encoded.ids) == 6
    assert (encoded.ids[0], encoded.ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


@pytest.mark.parametrize("text", ["", "  ", None, []])
def test_an_empty_text_is_refused_with_its_place(classifier, assistant, text):
    for encoder in (classifier, assistant()):
        with pytest.raises(GovernanceError, match=r"^a\.jsonl:7: text is empty"):
            encoder.encode({"text": text, "disease": "measles"}, "a.jsonl:7")


@pytest.mark.parametrize("label", ["", "  ", None])
def test_an_empty_label_or_answer_is_refused_with_its_place(classifier, assistant, label):
    with pytest.raises(GovernanceError, match=r"^a\.jsonl:7: 'disease' is empty"):
        classifier.encode({"text": "x", "disease": label}, "a.jsonl:7")
    with pytest.raises(GovernanceError, match=r"^a\.jsonl:7: the answer is empty"):
        assistant().encode({"text": "x", "disease": label}, "a.jsonl:7")


@pytest.mark.parametrize("values", [[], ["", ""], [None, " "], None, ""])
def test_a_text_without_any_value_is_refused_whatever_words_stand_around_it(classifier, values):
    classifier.task = dataclasses.replace(classifier.task, text="Phenotypes: {terms} ({note})")
    fields = {"terms": values, "note": None, "disease": "measles"}
    with pytest.raises(GovernanceError, match=r"^a\.jsonl:7: text is empty"):
        classifier.encode(fields, "a.jsonl:7")
    encoded = classifier.encode(fields | {"note": "rash"}, "a.jsonl:7")
    assert classifier.tokenizer.decode(encoded.ids) == "Phenotypes:  (rash)"


def test_a_name_is_the_same_however_it_is_written():
    written = [7, 7.0, "7", " 7\n"]
    assert {name_of(value, "x", "a:1") for value in written} == {"7"}
    assert name_of(7.5, "x", "a:1") == "7.5"
    assert name_of(None, "x", "a:1") == name_of(" ", "x", "a:1") == ""


@pytest.mark.parametrize("value", [["SECRET"], [], {"SECRET": 1}])
def test_a_list_or_a_table_is_no_name_and_is_not_shown(classifier, value):
    with pytest.raises(GovernanceError, match=r"^a:7: 'disease' is a list or a table") as caught:
        classifier.encode({"text": "x", "disease": value}, "a:7")
    assert "SECRET" not in str(caught.value)


def test_outer_space_makes_no_other_class(classifier):
    assert classifier.encode({"text": "x", "disease": " measles "}, "a:1").label == 2


def test_a_missing_field_is_refused_and_no_content_is_named(classifier):
    with pytest.raises(
        ConfigError, match=r"^a:7: there is no field 'text', the task reads '{text}'$"
    ):
        classifier.encode({"disease": "measles", "t": "SECRET"}, "a:7")


def test_an_instruction_is_the_chat_and_then_the_answer(assistant):
    encoder = assistant(system="Be brief.")
    encoded = encoder.encode({"text": "发热?", "disease": "measles"}, "a:1")
    tokenizer = encoder.tokenizer
    head, tail = encoded.ids[: encoded.answer_start], encoded.ids[encoded.answer_start :]
    assert tokenizer.decode(head) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n发热?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tail) == "measles<|im_end|>"
    assert tail[-1] == tokenizer.eos_token_id


def test_without_a_chat_template_the_turns_stand_on_lines(assistant, monkeypatch):
    encoder = assistant(system="Be brief.")
    monkeypatch.setattr(encoder.tokenizer, "chat_template", None)
    assert encoder.prompt("Why?") == "Be brief.\nWhy?\n"
    encoder.task = dataclasses.replace(encoder.task, system="")
    assert encoder.prompt("Why?") == "Why?\n"


@pytest.mark.parametrize("text", ["x" * 200, "发热" * 40, "é" * 99, "a发" * 50])
@pytest.mark.parametrize("limit", [64, 65, 66])
def test_a_cut_instruction_keeps_the_chats_frame_and_the_whole_answer(assistant, text, limit):
    encoder = assistant(max_tokens=limit, max_new_tokens=7)
    encoded = encoder.encode({"text": text, "disease": "measles"}, "a:1")
    assert encoded.was_cut
    assert limit - 4 <= len(encoded.ids) <= limit
    head = encoder.tokenizer.decode(encoded.ids[: encoded.answer_start])
    assert head.startswith("<|im_start|>user\n" + text[:5])
    assert head.endswith("<|im_end|>\n<|im_start|>assistant\n")
    tail = encoder.tokenizer.decode(encoded.ids[encoded.answer_start :])
    assert tail == "measles<|im_end|>"


@pytest.mark.parametrize("length", range(1, 12, 2))
def test_where_a_prompt_is_cut_does_not_tell_how_long_its_answer_is(assistant, length):
    encoder = assistant(max_tokens=64, max_new_tokens=11)
    for words in (30, 33, 34, 99):  # a reserve of 12 tokens leaves room for 33 of one letter
        fields = {"text": "x" * words, "disease": "y" * length}
        encoded = encoder.encode(fields, "a:1")
        assert encoded.was_cut == (words > 52 - FRAME)
        assert encoded.answer_start == FRAME + min(words, 52 - FRAME)
        assert len(encoded.ids) == encoded.answer_start + length + 1


def test_an_answer_without_room_is_refused(assistant):
    with pytest.raises(ConfigError, match=r"^a:7: the answer has 51 tokens, .*max_tokens 64, "):
        assistant(max_tokens=64).encode({"text": "x" * 99, "disease": "y" * 50}, "a:7")
    with pytest.raises(ConfigError, match=r"has 2 tokens, max_new_tokens is 50 and .*_tokens 64, "):
        assistant(max_tokens=64, max_new_tokens=50).encode({"text": "x" * 99, "disease": "y"}, "a")


@pytest.mark.parametrize("text", ["a\0b", "<|im_end|>", "\u202e", "🙂" * 3])
def test_odd_characters_are_read(classifier, text):
    encoded = classifier.encode({"text": text, "disease": "measles"}, "a:7")
    assert classifier.tokenizer.decode(encoded.ids) == text
