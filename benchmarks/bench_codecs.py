"""What each codec costs in quality and saves in bytes, on three kinds of real text, 1k and 3k.

The model computes in float32 and its K/V are kept as bfloat16; after N tokens they are encoded and
decoded block by block, as a save and a restore would; then 128 further tokens are scored over the
decoded cache and over the exact one. The first 4 tokens stay exact and are counted. Sharing is
measured with the paper's pairs, chosen for the very text from observed attention, and with fixed
adjacent pairs, at the same number of pairs.

    python -m benchmarks.bench_codecs [--json FILE] [--quick] [--texts python|debian]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import krul
from krul import _core
from krul.compressor import CODECS, token_runs
from krul.demo_model import load

from . import harness, texts

LENGTHS = (1024, 3072)
N_SCORED = 128
N_PAIRS = 7
KEEP_FIRST = 4
N_THREADS = 2
SINGLE = ("exact", "int8", "int4")
SHARED = ("share", "share+int8", "share+int4")

COLUMNS = [
    ("n_tokens", "history", ",d"),
    ("text", "text", ""),
    ("codec", "codec", ""),
    ("n_pairs", "pairs", "d"),
    ("ratio_bf16", "x smaller than bf16", ".2f"),
    ("mean_kl", "mean KL, nats", ".4f"),
    ("max_kl", "max KL, nats", ".3f"),
    ("top1", "top-1", ".3f"),
]

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
Pairs = tuple[tuple[int, int], ...]


@dataclass
class Coded:
    """A cache as it comes back, and what it took meanwhile."""

    layers: KeysAndValues
    n_bytes: int


def code(layers: KeysAndValues, codec: str, pairs: Pairs = ()) -> Coded:
    """Encode and decode a whole cache; layers without a partner take the codec's single form."""
    partner = dict(pairs)
    uppers = set(partner.values())
    single = {"share": "exact", "share+int8": "int8", "share+int4": "int4"}.get(codec, codec)
    back = [tuple(torch.empty_like(t) for t in layer) for layer in layers]
    encode, where = [], []
    for lower, kv in ((layer, kv) for layer in range(len(layers)) for kv in (0, 1)):
        if lower in uppers:
            continue
        n_tokens = layers[lower][kv].shape[2]
        bytes_per_token = layers[lower][kv][:, :, 0].nbytes
        for start, end in token_runs(0, n_tokens, bytes_per_token, KEEP_FIRST):
            together = (lower, partner[lower]) if lower in partner else (lower,)
            groups = [together] if end > KEEP_FIRST else [(layer,) for layer in together]
            for group in groups:
                used = codec if len(group) == 2 else single
                number = CODECS["exact" if end <= KEEP_FIRST else used]
                encode.append((number, kv, tuple(layers[x][kv][:, :, start:end] for x in group)))
                where.append(tuple(back[x][kv][:, :, start:end] for x in group))
    blocks = _core.encode_blocks(encode, N_THREADS)
    jobs = [
        (used, kv, payload, outs)
        for (payload, used, _, _), (_, kv, _), outs in zip(blocks, encode, where, strict=True)
    ]
    _core.decode_blocks(jobs, N_THREADS)
    return Coded(back, sum(len(payload) for payload, *_ in blocks))


class Bench:
    """The model in float32 and the rows."""

    def __init__(self) -> None:
        self.tokenizer, self.model = load(torch.float32)
        self.rows: list[dict[str, Any]] = []

    def scored_logits(self, layers: KeysAndValues, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the last 128 tokens over a cache of those before."""
        cache = transformers.DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(layers):
            cache.update(keys.float(), values.float(), index)
        with torch.no_grad():
            out = self.model(ids[:, -N_SCORED:], past_key_values=cache, use_cache=True)
        return out.logits[0].log_softmax(-1)

    def read(self, ids: torch.Tensor) -> tuple[KeysAndValues, Pairs]:
        """Read a history under krul's eyes: its K/V, and the pairs by the paper's rule."""
        ratio = 1 - N_PAIRS / self.model.config.num_hidden_layers
        settings = krul.Settings(codec="share", share_ratio=ratio, guard_tokens=0)
        with (
            tempfile.TemporaryDirectory(prefix="krul-bench-") as folder,
            krul.Store(folder) as store,
            store.open("text", self.model, settings=settings) as cache,
        ):
            with torch.no_grad():
                self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            layers = [(x.keys.bfloat16(), x.values.bfloat16()) for x in cache.layers]
            report = cache.save()
        harness.check(
            len(report.pairs) == N_PAIRS, f"{len(report.pairs)} pairs chosen, not {N_PAIRS}"
        )
        return layers, report.pairs

    def add(
        self, about: dict[str, Any], coded: Coded, expected: torch.Tensor, got: torch.Tensor
    ) -> None:
        """Add the row of one codec on one text."""
        divergence = (expected.exp() * (expected - got)).sum(-1)
        bf16_bytes = sum(2 * t.numel() for layer in coded.layers for t in layer)
        self.rows.append(
            {
                **about,
                "stored_bytes": coded.n_bytes,
                "ratio_bf16": bf16_bytes / coded.n_bytes,
                "mean_kl": float(divergence.mean()),
                "max_kl": float(divergence.max()),
                "top1": float((expected.argmax(-1) == got.argmax(-1)).float().mean()),
            }
        )

    def one_text(self, kind: str, words: str, n_tokens: int) -> None:
        """Measure every codec on one text."""
        ids = self.tokenizer(words, return_tensors="pt").input_ids[:, : n_tokens + N_SCORED]
        harness.check(ids.shape[1] == n_tokens + N_SCORED, f"{kind} has only {ids.shape[1]} tokens")
        layers, paper = self.read(ids[:, :n_tokens])
        n_layers = len(layers)
        found = krul.selector.fixed_pairs([0] * n_layers, N_PAIRS)
        fixed = tuple((int(lower), int(upper)) for lower, upper in found)
        expected = self.scored_logits(layers, ids)
        about = {"n_tokens": n_tokens, "text": kind}

        for codec in SINGLE:
            coded = code(layers, codec)
            got = self.scored_logits(coded.layers, ids)
            self.add({**about, "codec": codec}, coded, expected, got)
            if codec == "exact":
                same = all(
                    torch.equal(a.view(torch.int16), b.view(torch.int16))
                    for layer, again in zip(layers, coded.layers, strict=True)
                    for a, b in zip(layer, again, strict=True)
                )
                harness.check(same, f"exact is not exact on {kind} at {n_tokens} tokens")
                harness.check(self.rows[-1]["mean_kl"] == 0.0, "exact changed the logits")
        for codec in SHARED:
            for pairs, which in ((paper, "paper's pairs"), (fixed, "fixed pairs")):
                coded = code(layers, codec, pairs)
                got = self.scored_logits(coded.layers, ids)
                self.add(
                    {
                        **about,
                        "codec": f"{codec}, {which}",
                        "n_pairs": len(pairs),
                        "pairs": [list(pair) for pair in pairs],
                    },
                    coded,
                    expected,
                    got,
                )

    def add_means(self) -> None:
        """Add, for each length and codec, the mean over the texts."""
        keys = list(dict.fromkeys((row["n_tokens"], row["codec"]) for row in self.rows))
        for n_tokens, codec in keys:
            group = [r for r in self.rows if (r["n_tokens"], r["codec"]) == (n_tokens, codec)]
            mean = {
                name: statistics.fmean(row[name] for row in group)
                for name in ("ratio_bf16", "mean_kl", "top1")
            }
            largest = max(row["max_kl"] for row in group)
            about = {"n_tokens": n_tokens, "text": "mean", "codec": codec, "max_kl": largest}
            self.rows.append({**about, "n_pairs": group[0].get("n_pairs"), **mean})


def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--texts", choices=texts.SOURCES, default="python")
    options = parser.parse_args()
    bench = Bench()
    lengths = LENGTHS[:1] if options.quick else LENGTHS
    digests = []
    for kind in texts.KINDS:
        words = texts.text(kind, options.texts)
        digests.append(f"{kind} {texts.digest(words)}...")
        for n_tokens in lengths:
            print(f"{kind}, {n_tokens:,} tokens ...", file=sys.stderr, flush=True)
            bench.one_text(kind, words, n_tokens)
    bench.rows.sort(key=lambda row: row["n_tokens"])
    bench.add_means()
    notes = [
        f"SmolLM2-135M-Instruct in float32, K/V kept as bfloat16; {N_SCORED} tokens scored after "
        f"the history; first {KEEP_FIRST} tokens exact. Bytes are those of the blocks; the max of "
        "a mean row is the largest of all.",
        f"Texts ({options.texts}), by SHA-256: {', '.join(digests)}.",
        f"Sharing pairs {N_PAIRS} of {bench.model.config.num_hidden_layers} layers; the others are "
        "coded exact, int8 and int4.",
    ]
    harness.finish(
        "codecs", bench.rows, COLUMNS, notes=notes, is_quick=options.quick, path=options.json
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
