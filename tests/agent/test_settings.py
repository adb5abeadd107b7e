"""What the agent's flags may say."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from agent.settings import AgentSettings


def test_labels_are_read_as_the_command_line_spells_them() -> None:
    assert AgentSettings.model_validate({"labels": "zone=a, disk=ssd,"}).labels == {"zone": "a", "disk": "ssd"}
    for bad in ("zone", "zone=a,rack", "=a", "a b=c"):
        with pytest.raises(ValidationError, match="labels"):
            AgentSettings.model_validate({"labels": bad})
