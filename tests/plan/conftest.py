from __future__ import annotations

from tests.engine.conftest import no_pictures  # noqa: F401
