"""Which part of each layer to recompute while the rest is loaded: a pure function of costs.

A restore can be loaded, recomputed from the token ids, or both at once (Krul, arXiv 2507.08045,
section 4.3): the model runs over the first tokens while the channel brings the others. `plan`
predicts how long each way takes until the first new token, and chooses; what it knows of time is
written at "restore plan" in ``csrc/krul.h``.

No split is faster than `Plan.bound_s`. With equal linear layers that is the harmonic time, ``1 / (1
/ recompute_s + 1 / load_s)``, and without a prompt a plan reaches it to within one multiple of
`granularity`, for then no layer is needed before the last. Otherwise a plan may lie behind by what
pipelining costs: an early layer that the prompt's pass waits for, overhead that a short prefix pays
in full, blocks that can only be read whole, and, where layers differ, a dear layer above a cheap
one, which cannot be recomputed alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import _core
from .errors import ShapeError

__all__ = ["SHAPES", "Costs", "Plan", "Step", "plan", "predict"]

# In the order of krul_restore_shape.
SHAPES = ("auto", "load", "recompute", "uniform", "pyramid", "step")

# In the order of krul_restore_action.
_ACTIONS = ("recompute", "load", "prompt")

# In the order that the binding takes.
_PER_LAYER = (
    "linear_s_per_token",
    "quadratic_s_per_token2",
    "overhead_s",
    "read_s",
    "decode_s",
    "pair_read_s",
)


@dataclass(frozen=True, eq=False)
class Costs:
    """What a restore is made of, in seconds; every array may be one number for all layers.

    Parameters
    ----------
    n_layers : int
        Decoder layers.
    linear_s_per_token, quadratic_s_per_token2 : array_like
        A layer's forward pass over the first n tokens takes ``linear * n + quadratic * n**2``.
    overhead_s : array_like
        What a layer takes in a pass however few the tokens.
    read_s : array_like
        Reading all of a layer's history from the store.
    decode_s : array_like
        Decoding all of a layer's history.
    latency_s : float
        Before the first load.
    decode_on_compute : bool
        Whether decoding takes the processors that the model runs on, as on a CPU; otherwise it
        overlaps reading and the longer of both counts.
    block_tokens, first_block_tokens : int
        Tokens of a stored block, which can only be read whole, and of the first one where that
        differs; 0: any token can be read alone, and the first block is like the others.
    partner : array_like of int
        For each layer the lower one that it shares blocks with, or -1.
    pair_read_s : array_like
        For a layer with a partner: reading all of the blocks that both share, which `read_s` of
        neither has. They are read once, with the lower layer as far as that needs them.

    Raises
    ------
    krul.ShapeError
        An array is neither one number nor `n_layers` numbers.
    ValueError
        A partner is no layer number; whether it is a lower layer is looked at by `plan`.

    Examples
    --------
    >>> costs = Costs(n_layers=2, linear_s_per_token=1e-4, read_s=[0.02, 0.03])
    >>> costs.linear_s_per_token.tolist()
    [0.0001, 0.0001]
    >>> Costs(n_layers=2, read_s=[1, 2, 3])
    Traceback (most recent call last):
        ...
    krul.errors.ShapeError: read_s is (3,) but n_layers is 2
    """

    n_layers: int
    linear_s_per_token: Any = 0.0
    quadratic_s_per_token2: Any = 0.0
    overhead_s: Any = 0.0
    read_s: Any = 0.0
    decode_s: Any = 0.0
    latency_s: float = 0.0
    decode_on_compute: bool = False
    block_tokens: int = 0
    first_block_tokens: int = 0
    partner: Any = -1
    pair_read_s: Any = 0.0

    def __post_init__(self) -> None:
        """Spread single numbers over the layers; nobody can change them afterwards."""
        for name in _PER_LAYER:
            given = np.asarray(getattr(self, name), np.float64)
            if given.shape not in ((), (self.n_layers,)):
                raise ShapeError(f"{name} is {given.shape} but n_layers is {self.n_layers}")
            object.__setattr__(self, name, np.broadcast_to(given.copy(), (self.n_layers,)))
        partner = np.asarray(self.partner)
        if partner.shape not in ((), (self.n_layers,)):
            raise ShapeError(f"partner is {partner.shape} but n_layers is {self.n_layers}")
        if not np.can_cast(partner.dtype, np.int64) or (np.abs(partner) >= 1 << 31).any():
            raise ValueError(f"partner is {partner.tolist()} but must be numbers of layers or -1")
        partner = np.broadcast_to(partner.astype(np.int32), (self.n_layers,))
        object.__setattr__(self, "partner", partner)

    @classmethod
    def from_rates(
        cls,
        n_layers: int,
        n_tokens: int,
        recompute_s_per_token: float,
        load_s_per_token: float,
        *,
        quadratic_share: float = 0.0,
        **more: Any,
    ) -> Costs:
        """Return the costs of a model with equal layers from how fast the whole of it goes.

        Parameters
        ----------
        n_layers, n_tokens : int
            Layers, and the tokens of history at which the rates were measured.
        recompute_s_per_token : float
            Seconds per token to recompute all layers of those tokens.
        load_s_per_token : float
            Seconds per token to load them.
        quadratic_share : float
            Part of recomputing that grows with the square of the tokens.
        **more
            Other fields of `Costs`.

        Returns
        -------
        Costs
            ``recompute_s_per_token * n_tokens`` and ``load_s_per_token * n_tokens`` over all
            layers.

        Examples
        --------
        >>> costs = Costs.from_rates(4, 1000, recompute_s_per_token=0.004, load_s_per_token=0.002)
        >>> float(costs.read_s.sum()), float(costs.linear_s_per_token.sum())
        (2.0, 0.004)
        """
        per_layer = recompute_s_per_token / n_layers
        return cls(
            n_layers,
            linear_s_per_token=per_layer * (1 - quadratic_share),
            quadratic_s_per_token2=per_layer * quadratic_share / max(n_tokens, 1),
            read_s=load_s_per_token * n_tokens / n_layers,
            **more,
        )

    def _to_core(self) -> tuple[np.ndarray, np.ndarray, float, bool, int, int]:
        """Return what the binding takes."""
        return (
            np.stack([getattr(self, name) for name in _PER_LAYER]),
            self.partner,
            self.latency_s,
            self.decode_on_compute,
            self.block_tokens,
            self.first_block_tokens,
        )


class Step(NamedTuple):
    """One thing to do, with the time that is predicted for it.

    Attributes
    ----------
    action : str
        ``"recompute"``, ``"load"`` or ``"prompt"``: the prompt's own pass over a layer.
    layer : int
        Which layer.
    token_start, token_end : int
        Which of its tokens, counted from the start of the conversation.
    start_s, end_s : float
        When, in seconds from the start of the restore.
    deadline_s : float
        The latest end that, alone, would not delay the first token.
    """

    action: str
    layer: int
    token_start: int
    token_end: int
    start_s: float
    end_s: float
    deadline_s: float


@dataclass(frozen=True)
class Plan:
    """How much of each layer to recompute, and what that is predicted to take.

    Attributes
    ----------
    shape : str
        The shape of the plan, one of :data:`SHAPES` but ``"auto"``.
    n_recomputed_by_layer : tuple of int
        Tokens of each layer that are recomputed, from the first; the rest is loaded.
    predicted_s, load_s, recompute_s : float
        Seconds until the first new token: of this plan, of loading all, of recomputing all.
    bound_s : float
        No plan of any shape is faster.
    reason : str
        Why this plan, in words.
    n_tokens, n_prompt_tokens : int
        What was planned for.
    costs : Costs
        And with.
    """

    shape: str
    n_recomputed_by_layer: tuple[int, ...]
    predicted_s: float
    load_s: float
    recompute_s: float
    bound_s: float
    reason: str
    n_tokens: int
    n_prompt_tokens: int
    costs: Costs = field(repr=False, compare=False)

    def steps(self) -> list[Step]:
        """Return what to do in the order of predicted start, with the predicted times.

        Loads come in layer order, and no step before one that it needs. Where decoding takes the
        model's processors, its time lies between the last recomputed layer and the prompt's pass.

        Examples
        --------
        >>> costs = Costs(n_layers=2, linear_s_per_token=1.0, read_s=10.0)
        >>> for step in plan(costs, n_tokens=4, n_prompt_tokens=1).steps():
        ...     print(*step)
        recompute 0 0 3 0.0 3.0 3.0
        load 0 3 4 0.0 2.5 6.0
        load 1 3 4 2.5 5.0 7.0
        recompute 1 0 3 3.0 6.0 6.0
        prompt 0 4 5 6.0 7.0 7.0
        prompt 1 4 5 7.0 8.0 8.0
        """
        found = _core.restore_plan_steps(
            self.costs._to_core(),
            self.n_tokens,
            self.n_prompt_tokens,
            np.array(self.n_recomputed_by_layer, np.int64),
        )
        return [Step(_ACTIONS[step[0]], *step[1:]) for step in found]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields but `costs` as plain JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name != "costs"
        }


def plan(
    costs: Costs,
    n_tokens: int,
    n_prompt_tokens: int,
    *,
    shape: str = "auto",
    granularity: int = 1,
    n_required: Any = None,
    n_recomputable: int | None = None,
) -> Plan:
    """Choose how much of each layer to recompute.

    Parameters
    ----------
    costs : Costs
        What reading, decoding and computing take.
    n_tokens : int
        Tokens of history.
    n_prompt_tokens : int
        New tokens that the model runs over after it; 0 plans for the history alone.
    shape : str
        ``"load"`` recomputes nothing but `n_required`, ``"recompute"`` all that may be (but no part
        of a block that is read nevertheless), ``"uniform"`` as many tokens in every layer,
        ``"pyramid"`` fewer the deeper the layer, ``"step"`` one number in the first layers and a
        smaller one in the rest; ``"auto"`` takes the best of these.
    granularity : int
        Numbers of recomputed tokens are multiples of it, or all.
    n_required : array_like, optional
        Tokens of each layer that are not stored; may not grow with depth. Default: none.
    n_recomputable : int, optional
        Most tokens that may be recomputed, 0 where the model does not allow it. Default: all.

    Returns
    -------
    Plan
        With ``"auto"`` never predicted slower than loading or recomputing all, and loading unless
        another plan is faster by one part in 10**9.

    Raises
    ------
    krul.ShapeError
        `n_required` has not as many numbers as there are layers.
    ValueError
        A count or a cost is out of range; the message names it, the layer and the value.

    Examples
    --------
    A fast channel: nothing is recomputed. A stalled one: everything is.

    >>> costs = Costs.from_rates(4, 1000, recompute_s_per_token=0.004, load_s_per_token=0.0001)
    >>> plan(costs, 1000, 50, granularity=100).shape
    'load'
    >>> costs = Costs.from_rates(4, 1000, recompute_s_per_token=0.004, load_s_per_token=1e6)
    >>> plan(costs, 1000, 50, granularity=100).shape
    'recompute'

    Between them both at once takes about half of the time.

    >>> costs = Costs.from_rates(4, 1000, recompute_s_per_token=0.004, load_s_per_token=0.004)
    >>> both = plan(costs, 1000, 0, granularity=100)
    >>> both.n_recomputed_by_layer, both.predicted_s
    ((500, 500, 500, 500), 2.0)
    >>> both.reason
    'uniform: 50 % is recomputed in 2 s; loading all takes 4 s, recomputing all 4 s'
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r} but must be one of {', '.join(SHAPES)}")
    number, n_recomputed, predicted_s, load_s, recompute_s, bound_s = _core.restore_plan_choose(
        costs._to_core(),
        n_tokens,
        n_prompt_tokens,
        granularity,
        None if n_required is None else np.asarray(n_required, np.int64),
        n_tokens if n_recomputable is None else n_recomputable,
        SHAPES.index(shape),
    )
    share = float(n_recomputed.sum()) / max(n_tokens * costs.n_layers, 1)
    return Plan(
        SHAPES[number],
        tuple(n_recomputed.tolist()),
        predicted_s,
        load_s,
        recompute_s,
        bound_s,
        f"{SHAPES[number]}: {100 * share:.3g} % is recomputed in {predicted_s:.3g} s; "
        f"loading all takes {load_s:.3g} s, recomputing all {recompute_s:.3g} s",
        n_tokens,
        n_prompt_tokens,
        costs,
    )


def predict(costs: Costs, n_tokens: int, n_prompt_tokens: int, n_recomputed_by_layer: Any) -> float:
    """Return the predicted seconds until the first new token for a plan of one's own.

    Parameters
    ----------
    costs : Costs
        What reading, decoding and computing take.
    n_tokens, n_prompt_tokens : int
        Tokens of history, and new ones.
    n_recomputed_by_layer : array_like
        Tokens of each layer that are recomputed; may not grow with depth.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    krul.ShapeError
        `n_recomputed_by_layer` has not as many numbers as there are layers.
    ValueError
        A count or a cost is out of range.

    Examples
    --------
    >>> costs = Costs(n_layers=2, linear_s_per_token=1.0, read_s=4.0)
    >>> predict(costs, 4, 0, [4, 2])
    6.0
    """
    n_recomputed = np.asarray(n_recomputed_by_layer, np.int64)
    return _core.restore_plan_predict(costs._to_core(), n_tokens, n_prompt_tokens, n_recomputed)
