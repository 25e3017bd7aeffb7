from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.scripted_cloud import KEY, Cloud


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    served = Cloud()
    yield served
    served.close()


@pytest.fixture
def cloud_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-secret-123")
