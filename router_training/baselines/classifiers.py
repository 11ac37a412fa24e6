"""Routers that need no model: plain centroids, and classifiers from scikit-learn.

All see the n-grams that the server's router sees. A classifier has no notion of an adapter that
joins: it is trained again, with the newcomer's few prompts among the others' many.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mora_serve.router.features import NGrams
from router_training.evaluation.cases import FittingData, texts
from router_training.evaluation.metrics import Array
from router_training.evaluation.scored import Method, Scored, Scorer


def centroids(features: NGrams) -> Method:
    """The cosine with the mean features of an adapter's prompts, nothing fitted."""
    return lambda data: _Centroids(features, data)


def logistic_regression(features: NGrams, seed: int = 0) -> Method:
    """Multinomial logistic regression, classes weighted to the same mass."""

    def make() -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=10.0, max_iter=300, class_weight="balanced", random_state=seed)

    return lambda data: _Classifier(features, data, make)


def perceptron(features: NGrams, seed: int = 0) -> Method:
    """One hidden layer of 256; a newcomer's prompts are repeated up to the others' number."""

    def make() -> Any:
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((256,), max_iter=60, random_state=seed, n_iter_no_change=60)

    return lambda data: _Classifier(features, data, make, repeat=True)


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
    def __init__(
        self,
        features: NGrams,
        data: FittingData,
        make: Callable[[], Any],
        repeat: bool = False,
    ) -> None:
        self._features, self._data = features, data
        self._make, self._repeat = make, repeat

    def register(self, cards: Mapping[str, Sequence[str]]) -> Scorer:
        """Train from scratch on the fitting's prompts and, of other adapters, their cards'."""
        prompts = _training_prompts(self._data, cards)
        if self._repeat:
            most = max(map(len, prompts.values()))
            prompts = {
                n: (list(some) * -(-most // len(some)))[:most] for n, some in prompts.items()
            }
        names = tuple(prompts)
        rows = self._features.dense([text for some in prompts.values() for text in some])
        labels = np.repeat(np.arange(len(names)), [len(some) for some in prompts.values()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the chosen number of epochs is used up
            model = self._make().fit(rows, labels)

        def score(prompts: Sequence[str]) -> Scored:
            probability = model.predict_proba(self._features.dense(list(prompts)))
            return _always(names, probability, probability)

        return score


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
