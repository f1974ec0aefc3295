"""Is the hub there? Asked once, with a short timeout: left alone, its client retries for 20 seconds."""

import os
from functools import cache


@cache
def reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers. HF_HUB_OFFLINE=1 says no without asking."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # any failure of the network stack means the same here: not reachable
        return False
    return True
