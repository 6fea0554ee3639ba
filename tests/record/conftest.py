"""The recorder is compared with plain gradients bit by bit where that is possible; what the store rounds is tested in tests/store."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def exact_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradloc.store.tables.rounded", lambda values: values)
