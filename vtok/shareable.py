"""What of a run's settings others may read: exports, their cards and trackers are told no key that an address holds."""

from __future__ import annotations

import re
from typing import Any


def shareable(value: Any) -> Any:
    """Plain values for others to read: in their texts `pipe:` commands, and users, passwords and queries in addresses
    (presigned ones carry a key there), are ***."""
    if isinstance(value, dict):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"pipe:.*", "pipe:***", value, flags=re.DOTALL)
    value = re.sub(r"(\w://)[^/\s?#]*@", r"\1***@", value)
    return re.sub(r"(\w://[^\s?]*\?)\S*", r"\1***", value)
