"""What must type-check, and what must not: `make lint` runs mypy on this file; nobody runs it.

An ignored line that does type-check is an error too (``warn_unused_ignores``).
"""

from typing import Any

import krul


def good(model: Any) -> dict[str, Any]:
    """Use the surface as the documentation says."""
    settings = krul.Settings(codec="int4", max_kl=0.02, estimator_rows="all")
    with krul.Store("memory:", max_bytes=1 << 30) as store:
        with store.open("chat", model, settings=settings) as cache:
            report: krul.SaveReport = cache.save()
            n_kept: int = cache.align(cache.token_ids)
            restored: krul.RestoreReport = cache.restore()
        tokens = [info.n_tokens + n_kept for info in store.list()]
        problems: list[krul.Problem] = store.verify()
    handle = krul.attach(model)
    handle.detach()
    profile = krul.Profile.fit(model, None, ["text"], rank="full")
    profile.save("profile")
    if (layer := krul.Profile.load("profile").layers[0]) is not None:
        n_kept += layer.width
    return {**report.to_dict(), **restored.to_dict(), "tokens": tokens, "problems": problems}


def bad(model: Any, store: krul.Store) -> None:
    """Make the mistakes that a checker should find."""
    krul.Settings(max_kl="small")  # type: ignore[arg-type]
    krul.Settings(codecs="int4")  # type: ignore[call-arg]
    store.open(42, model)  # type: ignore[arg-type]
    store.list().n_tokens  # type: ignore[attr-defined]  # noqa: B018
    krul.Profile.fit(model, None, ["text"], ranks=3)  # type: ignore[call-arg]
    krul.backends().chosen  # type: ignore[attr-defined]  # noqa: B018
