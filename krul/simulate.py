"""How long the first token takes on machines that are not here: a made-up clock, the real restore.

`simulate` runs one of several ways to bring a history back on a machine that is described by a few
rates. The steps are taken by the C code that carries out every restore, on a device whose reads and
decoders only move a clock; the model's layers are the caller's share of that clock. So order,
waiting and the sharing of the link are those of a real restore, and only the durations are
assumptions. What is not simulated: processors that slow each other down, a store whose speed
changes, and the time that Python takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _core
from .plan import Costs, Plan, plan

__all__ = ["HARDWARE", "LINKS", "METHODS", "MODELS", "Event", "Scenario", "Simulation", "simulate"]

#: Ways to bring a history back; see `simulate`.
METHODS = (
    "recompute",
    "load",
    "load overlapped",
    "fixed pairs",
    "two-ended",
    "hidden states",
    "krul",
)

_BYTES_PER_VALUE = 2
_BF16 = 3
_BLOCK = _core.store_constants()["ENTRY_BLOCK"]

# What MiniCache's pairs leave of the bytes when half of the layers are paired.
_FIXED_PAIRS_KEPT = 0.75


class _Model(NamedTuple):
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int


class _Hardware(NamedTuple):
    flops: float  # dense 16-bit operations per second that a prefill reaches
    overhead_s: float  # per layer and pass
    decode_bytes_per_s: float  # of one decoder thread or stream, counted in decoded bytes
    n_threads: int
    is_cpu: bool  # the decoder takes the model's processors


#: Shapes of models, from their published configurations.
MODELS = {
    "llama-7b": _Model(32, 4096, 32, 32, 128, 11008),
    "qwen1.5-7b": _Model(32, 4096, 32, 32, 128, 11008),
    "llama-3.1-8b": _Model(32, 4096, 32, 8, 128, 14336),
    "qwen2.5-72b": _Model(80, 8192, 64, 8, 128, 29568),
    "smollm2-135m": _Model(30, 576, 9, 3, 64, 1536),
}

#: Rates assumed for a machine: about half of the published peak for the accelerators.
HARDWARE = {
    "2-core cpu": _Hardware(80e9, 1e-4, 5e9, 2, True),
    "a100": _Hardware(150e12, 2e-5, 300e9, 2, False),
    "h200": _Hardware(450e12, 2e-5, 900e9, 2, False),
}

#: Rates and latencies assumed for the way to the store: bytes per second, seconds.
LINKS = {
    "pcie4": (24e9, 1e-5),
    "pcie5": (50e9, 1e-5),
    "nvme": (6e9, 1e-4),
    "100gbit": (11e9, 2e-4),
    "10gbit": (1.1e9, 2e-4),
}


@dataclass(frozen=True)
class Scenario:
    """A model on a machine beside a store, as rates; times are of one layer.

    Attributes
    ----------
    n_layers : int
    linear_s_per_token, quadratic_s_per_token2, overhead_s : float
        A layer takes ``overhead + linear * n + quadratic * n^2`` for the first n tokens.
    kv_bytes_per_token : float
        K and V as 16-bit numbers.
    hidden_bytes_per_token, projection_s_per_token : float
        Hidden states, and making K and V of them; for ``"hidden states"``.
    read_bytes_per_s, read_latency_s : float
        Of the store's link, which all threads share.
    decode_bytes_per_s : float
        Of one thread, counted in decoded bytes.
    n_threads : int
    decode_on_compute : bool
        Decoding takes the model's processors.
    """

    n_layers: int
    linear_s_per_token: float
    kv_bytes_per_token: float
    read_bytes_per_s: float
    quadratic_s_per_token2: float = 0.0
    overhead_s: float = 0.0
    hidden_bytes_per_token: float = 0.0
    projection_s_per_token: float = 0.0
    read_latency_s: float = 0.0
    decode_bytes_per_s: float = 1e15
    n_threads: int = 1
    decode_on_compute: bool = False

    @classmethod
    def of(cls, hardware: str, link: str, model: str) -> Scenario:
        """Return a named machine with a named link, running a model of a named shape.

        Parameters
        ----------
        hardware, link, model : str
            Keys of :data:`HARDWARE`, :data:`LINKS` and :data:`MODELS`.

        Raises
        ------
        ValueError
            No such name.

        Examples
        --------
        >>> Scenario.of("h200", "pcie5", "llama-3.1-8b").kv_bytes_per_token
        4096.0
        """
        for name, value, known in (
            ("hardware", hardware, HARDWARE),
            ("link", link, LINKS),
            ("model", model, MODELS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r} but must be one of {', '.join(known)}")
        machine, shape = HARDWARE[hardware], MODELS[model]
        query_dim, kv_dim = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        weights = shape.hidden_size * (2 * query_dim + 2 * kv_dim + 3 * shape.intermediate_size)
        read_bytes_per_s, read_latency_s = LINKS[link]
        return cls(
            n_layers=shape.n_layers,
            linear_s_per_token=2 * weights / machine.flops,
            # A causal token attends to half of the tokens on average, twice 2 operations each.
            quadratic_s_per_token2=2 * query_dim / machine.flops,
            overhead_s=machine.overhead_s,
            kv_bytes_per_token=2.0 * kv_dim * _BYTES_PER_VALUE,
            hidden_bytes_per_token=float(shape.hidden_size * _BYTES_PER_VALUE),
            projection_s_per_token=4 * shape.hidden_size * kv_dim / machine.flops,
            read_bytes_per_s=read_bytes_per_s,
            read_latency_s=read_latency_s,
            decode_bytes_per_s=machine.decode_bytes_per_s,
            n_threads=machine.n_threads,
            decode_on_compute=machine.is_cpu,
        )

    @classmethod
    def from_ratio(
        cls, x: float, n_layers: int = 32, recompute_s_per_token: float = 1e-3
    ) -> Scenario:
        """Return one where recomputing takes `x` times as long as loading what is uncompressed.

        Linear costs, nothing else: what the paper's formulas assume.

        Examples
        --------
        >>> scenario = Scenario.from_ratio(2.0)
        >>> n_bytes = scenario.kv_bytes_per_token
        >>> round(scenario.linear_s_per_token * scenario.read_bytes_per_s / n_bytes, 6)
        2.0
        """
        linear = recompute_s_per_token / n_layers
        return cls(n_layers, linear, 4096.0, read_bytes_per_s=4096.0 * x / linear)

    def costs(self, n_tokens: int, kept: float, block_tokens: int = 0) -> Costs:
        """Return what a plan is made from, where `kept` of the uncompressed bytes are stored."""
        n_bytes = self.kv_bytes_per_token * n_tokens
        return Costs(
            self.n_layers,
            linear_s_per_token=self.linear_s_per_token,
            quadratic_s_per_token2=self.quadratic_s_per_token2,
            overhead_s=self.overhead_s,
            read_s=n_bytes * kept / self.read_bytes_per_s,
            decode_s=0.0 if kept == 1 else n_bytes / self.decode_bytes_per_s / self.n_threads,
            latency_s=self.read_latency_s,
            decode_on_compute=self.decode_on_compute,
            block_tokens=block_tokens,
        )

    def layer_s(self, n_tokens: int, n_before: int = 0) -> float:
        """Return what one layer takes for `n_tokens` tokens after `n_before` others."""
        if n_tokens == 0:
            return 0.0
        squares = float((n_before + n_tokens) ** 2 - n_before**2)
        return (
            self.overhead_s
            + self.linear_s_per_token * n_tokens
            + self.quadratic_s_per_token2 * squares
        )


class Event(NamedTuple):
    """What took time: recompute, load, decode, project or prompt; worker -1 is the model."""

    action: str
    layer: int
    worker: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found.

    Attributes
    ----------
    method : str
    first_token_s : float
        From the start of the restore until the new prompt has run.
    loaded_bytes : int
    n_recomputed_by_layer : tuple of int
    plan : Plan or None
        For the methods that plan.
    events : tuple of Event
        By start.
    """

    method: str
    first_token_s: float
    loaded_bytes: int
    n_recomputed_by_layer: tuple[int, ...]
    plan: Plan | None
    events: tuple[Event, ...]


def simulate(
    scenario: Scenario,
    n_tokens: int,
    n_prompt_tokens: int,
    method: str = "krul",
    *,
    ratio: float = 1.45,
    shape: str = "auto",
    block_tokens: int = 128,
) -> Simulation:
    """Bring a history back on a machine that is made up.

    Parameters
    ----------
    scenario : Scenario
    n_tokens, n_prompt_tokens : int
        History, and new tokens.
    method : str
        ``"recompute"``: no store. ``"load"``: all uncompressed, then the prompt. ``"load
        overlapped"``: the same, each layer of the prompt waiting for its own. ``"fixed pairs"``:
        that with three quarters of the bytes, as pairs of adjacent layers leave (MiniCache).
        ``"two-ended"``: uncompressed; first tokens recomputed in all layers alike while the last
        ones are loaded (Cake). ``"hidden states"``: one hidden state per token and layer is loaded
        and K and V are made from it (HCache). ``"krul"``: compressed `ratio` times, planned.
    ratio : float
        Uncompressed bytes by stored ones, for ``"krul"``.
    shape : str
        Of the plan, for ``"krul"``.
    block_tokens : int
        Tokens of a stored block, and the step of what is recomputed.

    Returns
    -------
    Simulation

    Raises
    ------
    ValueError
        No such method, or a number out of range.

    Notes
    -----
    Costs milliseconds. The bound of any split is ``1 / T = 1 / recompute + ratio / load``.

    Examples
    --------
    The paper's figures follow from two numbers: loading is 1.13 times as fast as recomputing and
    compression makes it 1.45 times faster.

    >>> scenario = Scenario.from_ratio(1.13)
    >>> krul = simulate(scenario, 4096, 0, block_tokens=1).first_token_s
    >>> for method in ("recompute", "load", "fixed pairs"):
    ...     print(method, round(simulate(scenario, 4096, 0, method).first_token_s / krul, 2))
    recompute 2.64
    load 2.33
    fixed pairs 1.75
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r} but must be one of {', '.join(METHODS)}")
    if method == "hidden states" and scenario.hidden_bytes_per_token == 0:
        raise ValueError("hidden_bytes_per_token is 0 but must be above it for 'hidden states'")
    if not 1 <= ratio < float("inf"):
        raise ValueError(f"ratio is {ratio} but must be at least 1")
    if block_tokens < 1:
        raise ValueError(f"block_tokens is {block_tokens} but must be at least 1")
    kept = {"fixed pairs": _FIXED_PAIRS_KEPT, "krul": 1 / ratio}.get(method, 1.0)
    how = {"recompute": "recompute", "two-ended": "uniform", "krul": shape}.get(method, "load")
    chosen = plan(
        scenario.costs(n_tokens, kept, block_tokens),
        n_tokens,
        n_prompt_tokens,
        shape=how,
        granularity=block_tokens,
    )
    run = _Run(scenario, n_tokens, n_prompt_tokens, method, kept, block_tokens)
    return run.carry_out(chosen, is_planned=how not in ("recompute", "load"))


class _Run:
    """One restore on a made-up machine."""

    def __init__(
        self,
        scenario: Scenario,
        n_tokens: int,
        n_prompt_tokens: int,
        method: str,
        kept: float,
        block_tokens: int,
    ) -> None:
        self.scenario, self.method = scenario, method
        self.n_tokens, self.n_prompt_tokens = n_tokens, n_prompt_tokens
        self.block_tokens = block_tokens
        self.bytes_per_token = scenario.kv_bytes_per_token * kept
        # What is not coded needs no decoder; on a CPU decoding is the model's own time, see below.
        self.decode_s = 0.0
        if kept < 1:
            self.decode_s = scenario.kv_bytes_per_token / scenario.decode_bytes_per_s
        if method == "hidden states":
            self.bytes_per_token = scenario.hidden_bytes_per_token
        self.events: list[Event] = []
        self.now_s = 0.0

    def _steps(self, n_by_layer: tuple[int, ...]) -> list[tuple[int, None, Any, tuple[bool]]]:
        values = max(1, round(self.scenario.kv_bytes_per_token / _BYTES_PER_VALUE))
        steps: list[tuple[int, None, Any, tuple[bool]]] = []
        for layer, n in enumerate(n_by_layer):
            first = n - n % self.block_tokens if n < self.n_tokens else self.n_tokens
            for start in range(first, self.n_tokens, self.block_tokens):
                n_here = min(self.block_tokens, self.n_tokens - start)
                n_bytes = max(1, round(n_here * self.bytes_per_token))
                entry = (_BLOCK, 1, 0, _BF16, layer, -1, 1, 1, values, start, n_here, 0, n_bytes, 0)
                steps.append((-1, None, entry, (True,)))
        return steps

    def carry_out(self, chosen: Plan, is_planned: bool) -> Simulation:
        """Take every step, in the order of a real restore."""
        scenario, n_by_layer = self.scenario, chosen.n_recomputed_by_layer
        steps = self._steps(n_by_layer)
        overlaps = self.decode_s > 0 and not scenario.decode_on_compute
        restore = _core.Restore(
            steps,
            scenario.n_layers,
            scenario.n_threads,
            machine=(
                scenario.read_bytes_per_s,
                scenario.read_latency_s,
                scenario.kv_bytes_per_token / self.decode_s if overlaps else 1e30,
            ),
        )
        self.restore = restore
        for layer, n in enumerate(n_by_layer):
            self._spend("recompute", layer, scenario.layer_s(n))
        if self.decode_s > 0 and not overlaps:
            n_decoded = sum(entry[10] for _, _, entry, _ in steps)
            self._spend("decode", 0, n_decoded * self.decode_s / scenario.n_threads)
        if self.method == "load":
            for layer in range(scenario.n_layers):
                restore.wait(layer)
        for layer in range(scenario.n_layers):
            restore.wait(layer)
            if self.method == "hidden states":
                self._spend("project", layer, scenario.projection_s_per_token * self.n_tokens)
            self._spend("prompt", layer, scenario.layer_s(self.n_prompt_tokens, self.n_tokens))
        first_token_s = restore.advance(0.0)
        for (_, _, entry, _), (worker, begin_s, read_s, turn_s, end_s) in zip(
            steps, restore.trace().tolist(), strict=True
        ):
            self.events.append(Event("load", entry[4], int(worker), begin_s, read_s))
            if end_s > turn_s:
                self.events.append(Event("decode", entry[4], int(worker), turn_s, end_s))
        restore.close()
        return Simulation(
            method=self.method,
            first_token_s=first_token_s,
            loaded_bytes=sum(entry[12] for _, _, entry, _ in steps),
            n_recomputed_by_layer=n_by_layer,
            plan=chosen if is_planned else None,
            events=tuple(sorted(self.events, key=lambda event: event.start_s)),
        )

    def _spend(self, action: str, layer: int, seconds: float) -> None:
        """Let the model's processors work."""
        start_s = self.restore.advance(0.0)
        end_s = self.restore.advance(seconds)
        if seconds > 0:
            self.events.append(Event(action, layer, -1, start_s, end_s))
