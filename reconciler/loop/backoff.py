"""How long a failed call waits for its next try."""

from __future__ import annotations

from tenacity import RetryCallState, Retrying, wait_random_exponential
from tenacity.wait import wait_base

_NOBODY = Retrying()  # a state must belong to somebody
_BACKOFF = wait_random_exponential(multiplier=0.5, max=60)


def backoff(attempts: int, wait: wait_base = _BACKOFF) -> float:
    """Seconds before the next try after `attempts` vain ones: exponential with full jitter, unless `wait` says otherwise."""
    state = RetryCallState(_NOBODY, None, (), {})
    state.attempt_number = attempts
    return wait(state)
