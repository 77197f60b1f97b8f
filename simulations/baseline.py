"""What needs no federation to beat: TF-IDF and logistic regression, pooled and site by site.

Settings (scikit-learn): ``TfidfVectorizer`` with its defaults, except that a token is a word of two
or more letters, digits or underscores, or one Chinese character, and ``LogisticRegression(C=10)``
(multinomial, L2, lbfgs to convergence). Each hospital alone also has only its own vocabulary and
document frequencies; all are tested on the same test set.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from huizhen.client.records.record import Record
from huizhen.learning.template import nearest
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.simulations.experiment import SimulationTerms
from huizhen.simulations.hpo import ancestors, read_ontology

WORD = r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]{2,}"
HPO_ID = re.compile(r"HP:\d{7}")
Metrics = dict[str, float]


def tfidf_baseline(
    train_texts: Sequence[str],
    train_labels: Sequence[str],
    train_sites: Sequence[str],
    test_texts: Sequence[str],
    test_labels: Sequence[str],
) -> dict[str, Any]:
    """Return ``{"pooled": metrics, "local": {site: metrics}}``, all on the whole test set.

    Metrics are ``top1``, ``top3`` and ``macro_f1`` (mean over the labels of the test set). A test
    label that the training texts do not have is an error for that model, as it would be in use.

    Raises:
        ConfigError: no texts, or texts, labels and sites of different numbers.
    """
    if not (len(train_texts) == len(train_labels) == len(train_sites) > 0):
        raise ConfigError(
            f"{len(train_texts)} training texts, {len(train_labels)} labels and "
            f"{len(train_sites)} sites: need one of each per record"
        )
    if not (len(test_texts) == len(test_labels) > 0):
        raise ConfigError(
            f"{len(test_texts)} test texts and {len(test_labels)} labels: "
            "need one of each per record"
        )
    sites = np.array([str(s) for s in train_sites])
    texts, labels = np.array(train_texts, object), np.array(train_labels, object)

    def score(chosen: np.ndarray[Any, Any]) -> Metrics:
        ranked = _rank(list(texts[chosen]), list(labels[chosen]), test_texts)
        return _metrics(ranked, test_labels)

    return {
        "pooled": score(np.full(len(sites), True)),
        "local": {str(site): score(sites == site) for site in np.unique(sites)},
    }


def check_ancestors(records: Sequence[Record], terms: SimulationTerms) -> None:
    """Refuse a field ``ancestors`` that ``with_ancestors`` may not or cannot read.

    Raises:
        ConfigError: no record has the field.
        GovernanceError: the sites' policy withholds it, or a record has something else in it than
            text, HPO ids or pairs of id and label.
    """
    field = terms.ancestors or ""
    listed = terms.allowed_fields is None or field in terms.allowed_fields
    if not listed or field == terms.patient:
        raise GovernanceError(
            f"[simulation] ancestors reads the field {field!r}, the policy of the sites does not "
            "let it: name another field"
        )
    known = {name for record in records for name in record.fields}
    if field not in known:
        raise ConfigError(
            f"[simulation] ancestors reads the field {field!r}, no record has it"
            f"{nearest(field, known)}"
        )
    for record in records:
        value = record.fields.get(field)
        if not (value is None or isinstance(value, str) or _are_terms(value)):
            raise GovernanceError(
                f"{record.place}: {field!r} holds no HPO terms, ancestors expects text, a list of "
                "ids or a list of pairs of id and label: mend the export or name another field"
            )


def with_ancestors(records: Iterable[Mapping[str, Any]], field: str = "observed") -> list[str]:
    """Return each record's HPO terms as text, followed by all of the terms above them.

    A term is one token, ``HP_0001250``. The terms noted stand twice, among themselves and among
    what is implied, and so weigh more than what only follows from them. Where a record has no HPO
    ids in ``field``, its text stays as it is.

    Args:
        records: with HPO ids, pairs of id and label, or text (with or without ids) in ``field``.
        field: whose value is meant.

    Returns:
        One text per record, for ``tfidf_baseline``.
    """
    ontology = read_ontology()
    texts = []
    for record in records:
        value = record.get(field) or ()
        if isinstance(value, str):
            terms = HPO_ID.findall(value)
            if not terms:
                texts.append(value)
                continue
        else:
            terms = [v if isinstance(v, str) else v[0] for v in value]
        noted = [ontology.current.get(t, t) for t in terms]
        implied = set(noted).union(*(ancestors(t) for t in noted))
        texts.append(" ".join(t.replace(":", "_") for t in [*noted, *sorted(implied)]))
    return texts


def _are_terms(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(term, str) or (isinstance(term, list) and term and isinstance(term[0], str))
        for term in value
    )


def _rank(
    train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str]
) -> np.ndarray[Any, Any]:
    """Return the labels for each test text, likeliest first, shape (texts, labels)."""
    names, counts = np.unique(np.array(train_labels, str), return_counts=True)
    if len(names) == 1:
        return np.tile(names, (len(test_texts), 1))
    vectorizer = TfidfVectorizer(token_pattern=WORD)
    if not any(map(vectorizer.build_analyzer(), train_texts)):  # not one word: the commonest label
        return np.tile(names[np.argsort(-counts, kind="stable")], (len(test_texts), 1))
    model = LogisticRegression(C=10.0, max_iter=5000)
    model.fit(vectorizer.fit_transform(train_texts), np.array(train_labels, str))
    scores = model.predict_proba(vectorizer.transform(test_texts))
    return np.asarray(model.classes_[np.argsort(-scores, axis=1, kind="stable")])


def _metrics(ranked: np.ndarray[Any, Any], test_labels: Sequence[str]) -> Metrics:
    truth = np.array(test_labels, str)
    right = ranked == truth[:, None]
    return {
        "top1": float(right[:, 0].mean()),
        "top3": float(right[:, :3].any(axis=1).mean()),
        "macro_f1": float(
            f1_score(
                truth, ranked[:, 0], labels=np.unique(truth), average="macro", zero_division=0.0
            )
        ),
    }
