"""Scores and losses of an adapter, one record at a time and in batches."""

import pytest
import torch

from huizhen.client.evaluation import answer_loss, classify


def test_scores_are_those_of_each_record_alone(tiny_classifier, make_site, rows, randomised):
    randomised(tiny_classifier)
    examples = make_site(tiny_classifier, rows)
    scores = classify(tiny_classifier, examples)
    assert scores.shape == (len(rows), 3)
    for i in range(len(rows)):
        alone = tiny_classifier.logits(examples.batch([i]))[0]
        assert scores[i] == pytest.approx(alone.numpy(), abs=1e-5)


def test_the_loss_is_over_all_tokens_of_the_answers(tiny_assistant, make_site, rows, randomised):
    randomised(tiny_assistant)
    examples = make_site(tiny_assistant, rows)
    found = answer_loss(tiny_assistant, examples)
    lengths = [len(disease.encode()) + 1 for _, _, disease in rows]  # a token a byte, and the end
    assert found.tokens == sum(lengths)
    total = 0.0
    with torch.no_grad():
        for i, length in enumerate(lengths):
            losses, _ = tiny_assistant.losses(examples.batch([i]))
            total += float(losses[0]) * length
    assert found.total == pytest.approx(total, rel=1e-5)
