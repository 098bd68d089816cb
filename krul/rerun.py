"""The arguments of a forward pass that runs the history along with its own tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

__all__ = ["with_history"]

# What is changed or stays right as it is.
_UNDERSTOOD = frozenset(
    (
        "input_ids",
        "attention_mask",
        "position_ids",
        "cache_position",
        "logits_to_keep",
        "past_key_values",
        "use_cache",
        "return_dict",
    )
)

History = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def with_history(
    named: dict[str, Any], history: History, accepted: Collection[str]
) -> dict[str, Any] | None:
    """Return the arguments of a pass over history and new tokens that gives the same output.

    Parameters
    ----------
    named : dict
        The arguments of a pass over the new tokens alone, by name; stays as it is.
    history : tuple of torch.Tensor
        Ids [n_rows, n_tokens], mask (None: all ones) and positions (None: 0, 1, 2, ...), as the
        cached tokens were fed.
    accepted : collection of str
        The names that the model's forward knows.

    Returns
    -------
    dict or None
        None where the output would not be the same, or where nobody can tell: an argument is not
        known here, gradients are wanted, or mask and positions do not continue the history's.

    Examples
    --------
    >>> new, past = torch.tensor([[5, 6]]), torch.tensor([[1, 2, 3]])
    >>> with torch.no_grad():
    ...     changed = with_history({"input_ids": new}, (past, None, None), ["logits_to_keep"])
    >>> changed["input_ids"].tolist(), changed["logits_to_keep"]
    ([[1, 2, 3, 5, 6]], 2)
    """
    ids = named.get("input_ids")
    past = history[0]
    if ids is None or past.shape[0] != ids.shape[0] or torch.is_grad_enabled():
        return None
    for name, value in named.items():
        if name not in _UNDERSTOOD and not (value is None or value is False):
            return None
    n_past, n_new = past.shape[1], ids.shape[1]
    n_kept = named.get("logits_to_keep")
    if "logits_to_keep" not in accepted or not (n_kept is None or type(n_kept) is int):
        return None
    if n_kept is not None and n_kept < 0:
        return None
    positions = _positions(named.get("position_ids"), history[2], n_past, n_new)
    if positions is False or not _is_continued(named.get("attention_mask"), history[1], past):
        return None
    changed = dict(named)
    changed["input_ids"] = torch.cat([past.to(device=ids.device, dtype=ids.dtype), ids], dim=1)
    changed["logits_to_keep"] = min(n_kept or n_new, n_new)
    if positions is not None:
        changed["position_ids"] = positions
    at = named.get("cache_position")
    if at is not None:
        plain = torch.arange(n_past + n_new, device="cpu")
        if not (torch.is_tensor(at) and torch.equal(at.cpu(), plain[n_past:].to(at.dtype))):
            return None
        changed["cache_position"] = plain.to(device=at.device, dtype=at.dtype)
    return changed


def _is_continued(
    given: torch.Tensor | None, known: torch.Tensor | None, past: torch.Tensor
) -> bool:
    """Whether a mask of all tokens says of the history what was said when it was fed."""
    if given is None:
        return known is None or bool((known != 0).all())
    if not torch.is_tensor(given) or given.dim() != 2 or given.shape[0] != past.shape[0]:
        return False
    before = given[:, : past.shape[1]].cpu() != 0
    return bool(before.all()) if known is None else torch.equal(before, known.cpu() != 0)


def _positions(
    given: torch.Tensor | None, known: torch.Tensor | None, n_past: int, n_new: int
) -> torch.Tensor | bool | None:
    """Return positions of all tokens; None where the model finds them itself, False if unclear."""
    plain = torch.arange(n_past, device="cpu")[None]
    if given is None:
        is_plain = known is None or torch.equal(known.cpu(), plain.expand(known.shape))
        return None if is_plain else False
    before = plain if known is None else known
    if given.dim() != 2 or before.dim() != 2 or given.shape[1] != n_new:
        return False
    n_rows = max(given.shape[0], before.shape[0])
    if any(rows.shape[0] not in (1, n_rows) for rows in (given, before)):
        return False
    before = before.to(device=given.device, dtype=given.dtype)
    return torch.cat([before.expand(n_rows, n_past), given.expand(n_rows, n_new)], dim=1)
