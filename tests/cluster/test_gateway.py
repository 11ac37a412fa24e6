"""Which replica a gateway goes by at its start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mora_serve.cluster.wire import Description, ReplicaLost
from mora_serve.errors import ConfigError

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'mora-serve[ray]'")

from mora_serve.cluster import gateway  # imports ray
from mora_serve.cluster.gateway import described

NEW = Description("b", "new", "nf4", "bf16", "cpu", 64, 8, "bf16")
OLD = replace(NEW, fingerprint="old")


class Replicas:
    def __init__(self, *answers: Description | None) -> None:
        self.answers = list(answers)

    async def describe(self) -> Description:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise ReplicaLost
        return answer


async def test_it_waits_for_a_replica_with_its_base(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gateway, "LOOK_SECONDS", 0.0)
    assert await described(Replicas(OLD, None, OLD, NEW), "new") == NEW


async def test_replicas_that_stay_with_another_base_are_an_error():
    with pytest.raises(ConfigError) as e:
        await described(Replicas(OLD), "new", seconds=0.01)
    assert e.value.field == "base.model"
    assert "old" in e.value.message
    assert "new" in e.value.message
