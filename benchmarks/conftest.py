"""What pytest-benchmark saves about the machine: this project's record instead of its host's name."""

from __future__ import annotations

from typing import Any

import record


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(record.circumstances())
