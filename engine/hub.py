"""Is the hub there? Asked once, with a short timeout: left alone, its client retries for 20 seconds."""

import contextlib
import os
import threading
from functools import cache


@cache
def reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers. HF_HUB_OFFLINE=1 says no without asking."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        with contextlib.suppress(Exception):  # any failure of the network stack means the same here: not reachable
            get_session().head(constants.ENDPOINT, timeout=timeout)
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # the look-up of a name obeys no timeout
    asking.start()
    asking.join(timeout + 1)
    return answered.is_set()
