"""Routers that need no model: plain centroids, and classifiers from scikit-learn.

All see the n-grams that the server's router sees. A classifier sees all its prompts too: those for
one adapter, those for two, which have two labels, and those for none, which have no label. It has
no notion of an adapter that joins: it is trained again, with the newcomer's few prompts, repeated
up to the others' number, among theirs.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mora_serve.router.features import NGrams
from router_training.evaluation.cases import Case, FittingData, texts
from router_training.evaluation.metrics import Array
from router_training.evaluation.scored import Method, Scored, Scorer


def centroids(features: NGrams) -> Method:
    """The cosine with the mean features of an adapter's prompts, nothing fitted."""
    return lambda data: _Centroids(features, data)


def logistic_regression(features: NGrams, seed: int = 0) -> Method:
    """One logistic regression an adapter: its prompts, weighted to the same mass, against all."""

    def make() -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier

        one = LogisticRegression(C=10.0, max_iter=300, class_weight="balanced", random_state=seed)
        return OneVsRestClassifier(one)

    return lambda data: _Classifier(features, data, make)


def perceptron(features: NGrams, seed: int = 0) -> Method:
    """One hidden layer of 256, an output an adapter."""

    def make() -> Any:
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((256,), max_iter=60, random_state=seed, n_iter_no_change=60)

    return lambda data: _Classifier(features, data, make)


class _Centroids:
    def __init__(self, features: NGrams, data: FittingData) -> None:
        self._features, self._data = features, data

    def register(self, cards: Mapping[str, Sequence[str]]) -> Scorer:
        """Adapters that the fitting has seen keep the mean of all its prompts."""
        prompts = _training_prompts(self._data, cards)
        means = [self._features.dense(list(some)).mean(0) for some in prompts.values()]
        keys = np.stack(means).astype(np.float64)
        keys /= np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
        names = tuple(prompts)

        def score(prompts: Sequence[str]) -> Scored:
            return _always(names, self._features.dense(list(prompts)) @ keys.T, None)

        return score


class _Classifier:
    def __init__(self, features: NGrams, data: FittingData, make: Callable[[], Any]) -> None:
        self._features, self._data, self._make = features, data, make

    def register(self, cards: Mapping[str, Sequence[str]]) -> Scorer:
        """Train from scratch on the fitting's prompts and, of other adapters, their cards'."""
        names = tuple(cards)
        labelled = _labelled(self._data, cards)
        labels = np.array([[name in case.adapters for name in names] for case in labelled], np.intp)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the chosen number of epochs is used up
            model = self._make().fit(self._rows(texts(labelled)), labels)

        def score(prompts: Sequence[str]) -> Scored:
            probability = model.predict_proba(self._rows(prompts))
            return _always(names, probability, probability)

        return score

    def _rows(self, prompts: Sequence[str]) -> Any:
        """Most n-grams are in no one prompt: sparse [n, D]."""
        from scipy.sparse import csr_matrix

        return csr_matrix(self._features.dense(list(prompts)))


def _labelled(data: FittingData, cards: Mapping[str, Sequence[str]]) -> list[Case]:
    """All prompts of the fitting, and the cards' of other adapters, each as often as the prompts
    of any adapter."""
    own = _training_prompts(data, cards)
    most = max(map(len, own.values()))
    singles = [
        Case(prompt, (name,))
        for name, prompts in own.items()
        for prompt in itertools.islice(itertools.cycle(prompts), most)
    ]
    pairs = [case for case in data.pairs if set(case.adapters) <= set(own)]
    return [*singles, *pairs, *(Case(prompt) for prompt in (*data.near, *data.far))]


def _training_prompts(
    data: FittingData, cards: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    return {
        name: texts(data.examples[name]) if name in data.examples else prompts
        for name, prompts in cards.items()
    }


def _always(names: tuple[str, ...], ranking: Array, probability: Array | None) -> Scored:
    """One adapter for every prompt: a method that cannot abstain. Its best score stands for how
    sure it is."""
    best = ranking.argmax(1)
    chosen = tuple((names[i],) for i in best)
    return Scored(names, ranking, probability, ranking.max(1), chosen)
