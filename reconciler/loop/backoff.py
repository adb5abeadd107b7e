"""How long a failed call waits for its next try."""

from __future__ import annotations

from tenacity import RetryCallState, Retrying, wait_random_exponential

_BACKOFF = wait_random_exponential(multiplier=0.5, max=60)


def backoff(attempts: int) -> float:
    """Seconds before the next try after `attempts` vain ones: exponential with full jitter."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = attempts
    return _BACKOFF(state)
