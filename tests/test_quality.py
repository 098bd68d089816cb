"""The quality benchmark: codecs of others count what they keep, and answers are judged rightly."""

import math
import zlib

import numpy as np
import pytest
import torch

from benchmarks import baselines, bench_quality, chats, harness, retrieval, texts

N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM = 2, 4, 2, 64
WIDTH = N_KV_HEADS * HEAD_DIM
SINKS_BYTES = 2 * 2 * N_LAYERS * WIDTH * baselines.KEEP_FIRST


def make_history(n_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    # Few directions carry most, and later layers resemble the first, as in a real model.
    mix = torch.linalg.qr(draw(WIDTH, WIDTH))[0] * torch.logspace(0.5, -2, WIDTH)
    common = draw(n_tokens, WIDTH) @ mix.T
    angles = torch.arange(n_tokens)[:, None] * torch.logspace(0, -3, HEAD_DIM // 2)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    layers = []
    for _ in range(N_LAYERS):
        k, v = (
            baselines.heads(common + 0.1 * draw(n_tokens, WIDTH), HEAD_DIM)[None] for _ in (0, 1)
        )
        layers.append((baselines.rotate(k, cos, sin).bfloat16(), v.bfloat16()))
    queries = [draw(n_tokens, N_HEADS * HEAD_DIM) for _ in range(N_LAYERS)]
    return baselines.History(torch.zeros(1, n_tokens), layers, cos, sin, (), queries)


@pytest.fixture(scope="module")
def basis():
    return baselines.fit_basis([make_history(400, seed) for seed in (1, 2, 3)])


def error(history, restored):
    pairs = zip(history.layers, restored.layers, strict=True)
    both = [(a.double(), b.double()) for x, y in pairs for a, b in zip(x, y, strict=True)]
    return sum(float(((a - b) ** 2).sum()) for a, b in both) / sum(
        float((a**2).sum()) for a, _ in both
    )


def quantised_reference(x, bits, group):
    """Groups along the last axis, one at a time, in float64 NumPy."""
    out = np.empty_like(x)
    n_groups = 0
    for row, result in zip(x.reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1]), strict=True):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low, scale = (
                float(torch.tensor(float(y)).bfloat16())
                for y in (part.min(), max((part.max() - part.min()) / (2**bits - 1), 1e-8))
            )
            numbers = np.clip(np.round((part - low) / scale), 0, 2**bits - 1)
            result[start : start + group] = numbers * scale + low
            n_groups += 1
    return out, -(-x.size * bits // 8) + 4 * n_groups


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n_tokens", "group"), [(64, 64), (65, 64), (63, 32), (1, 32)])
def test_integers_are_those_of_the_reference(bits, n_tokens, group):
    x = torch.randn(1, 2, n_tokens, 64, generator=torch.Generator().manual_seed(bits))
    for axis in (2, 3):
        got = baselines.quantise(x, axis, bits, group)
        last = x.double().movedim(axis, -1).contiguous().numpy()
        expected, n_bytes = quantised_reference(last, bits, group)
        assert got.n_bytes == n_bytes
        back = got.values.double().movedim(axis, -1).numpy()
        # A value halfway between two integers may round either way in float32: one scale apart.
        differs = np.abs(back - expected) > 1e-5
        assert differs.mean() < 0.001
        assert np.abs(back - expected).max() <= np.ptp(last) / (2**bits - 1) * 1.01 + 1e-5


@pytest.mark.parametrize(("bits", "group", "rate"), [(4, 64, 4.5), (4, 32, 5.0), (2, 32, 3.0)])
def test_rate_of_integers_is_exact(bits, group, rate):
    history = make_history(baselines.KEEP_FIRST + 256)
    restored = baselines.grouped_integers(bits, group).roundtrip(history)
    n_values = 2 * N_LAYERS * WIDTH * 256
    assert restored.stored_bytes == n_values * rate / 8 + SINKS_BYTES
    for before, after in zip(history.layers, restored.layers, strict=True):
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, :, : baselines.KEEP_FIRST], b[:, :, : baselines.KEEP_FIRST])
            assert not torch.equal(a, b)


def test_more_bits_are_nearer():
    history = make_history(200)
    for make in (lambda b: baselines.grouped_integers(b, 64), baselines.quanto_like):
        errors = [error(history, make(bits).roundtrip(history)) for bits in (2, 3, 4, 8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-4


def test_received_attention_is_that_of_the_reference():
    history = make_history(70)
    keys = history.layers[0][0][0].double().numpy()
    q = baselines.heads(history.queries[0], HEAD_DIM)
    q = baselines.rotate(q, history.cos, history.sin).double().numpy()
    expected = np.zeros((N_KV_HEADS, 70))
    for head in range(N_HEADS):
        kv_head = head // (N_HEADS // N_KV_HEADS)
        for row in range(70):
            logits = keys[kv_head, : row + 1] @ q[head, row] / math.sqrt(HEAD_DIM)
            weights = np.exp(logits - logits.max())
            expected[kv_head, : row + 1] += weights / weights.sum()
    for n_rows in (1, 32, 70, 256):
        got = baselines.received_attention(
            torch.from_numpy(q).float(), torch.from_numpy(keys).float(), n_rows
        )
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(history.attention[0].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [2, 4, 8, 12])
def test_eviction_keeps_exactly_the_budget(ratio):
    history = make_history(240)
    restored = baselines.heavy_hitters(ratio).roundtrip(history)
    n_kept = 240 // ratio
    assert restored.stored_bytes == history.bf16_bytes // ratio
    for layer, ((keys, values), (k, v)) in enumerate(
        zip(history.layers, restored.layers, strict=True)
    ):
        assert k.shape == v.shape == (1, N_KV_HEADS, n_kept, HEAD_DIM)
        for head in range(N_KV_HEADS):
            found = (k[0, head][:, None] == keys[0, head][None]).all(-1)
            kept = found.float().argmax(1)
            assert found.any(1).all()
            assert kept.tolist() == sorted(set(kept.tolist()))
            assert torch.equal(v[0, head], values[0, head][kept])
            assert set(range(baselines.KEEP_FIRST)) <= set(kept.tolist())
            assert set(range(240 - n_kept // 2, 240)) <= set(kept.tolist())
            middle = [t for t in kept.tolist() if 4 <= t < 240 - n_kept // 2]
            others = sorted(set(range(4, 240 - n_kept // 2)) - set(middle))
            mass = history.attention[layer][head]
            assert not middle or mass[middle].min() >= mass[others].max()


def test_eviction_says_what_it_lacks():
    history = make_history(20)
    history.queries = []
    with pytest.raises(ValueError, match="queries has 0 layers but layers has 2"):
        baselines.heavy_hitters(4).roundtrip(history)


def test_bits_are_allocated_as_well_as_by_trying_everything():
    generator = np.random.default_rng(0)
    for budget in (0, 1, 4, 7, 12):
        errors = np.sort(generator.random((4, 4)), axis=1)[:, ::-1].copy()
        got = baselines.allocate(errors, budget)
        best = min(
            sum(errors[g, b] for g, b in enumerate(bits))
            for bits in np.ndindex(4, 4, 4, 4)
            if sum(bits) <= budget
        )
        assert got.sum() <= budget
        assert sum(errors[g, b] for g, b in enumerate(got)) == pytest.approx(best, abs=1e-12)


def test_moments_are_those_of_all_vectors_together():
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, 12, generator=generator) + 5 for n in (7, 100, 1)]
    moments = baselines.Moments(12)
    for part in parts:
        moments.add(part)
    every = torch.cat(parts).double().numpy()
    np.testing.assert_allclose(moments.mean().numpy(), every.mean(0), rtol=1e-5)
    expected = np.cov(every.T, bias=True)
    np.testing.assert_allclose(moments.covariance().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_leading_eigenvectors_span_what_the_largest_ones_span():
    generator = np.random.default_rng(1)
    directions = np.linalg.qr(generator.normal(size=(200, 200)))[0]
    matrix = directions * np.logspace(2, -4, 200) @ directions.T
    got = baselines.leading_eigenvectors(torch.from_numpy(matrix).float(), 20).double().numpy()
    np.testing.assert_allclose(got.T @ got, np.eye(20), atol=1e-4)
    kept = np.trace(got.T @ matrix @ got)
    assert kept == pytest.approx(np.logspace(2, -4, 200)[:20].sum(), rel=1e-4)


def test_rotation_is_undone():
    x = torch.randn(3, 50, HEAD_DIM)
    history = make_history(50)
    back = baselines.unrotate(
        baselines.rotate(x, history.cos, history.sin), history.cos, history.sin
    )
    torch.testing.assert_close(back, x)


def test_transform_coding_is_exact_where_it_says_and_near_elsewhere(basis):
    history = make_history(700, seed=9)
    first, last = baselines.KEEP_FIRST, baselines.KEEP_LAST
    errors, sizes = [], []
    for bits in (0.5, 1.0, 2.0, 4.0):
        restored = baselines.transform_coding(lambda: basis, bits).roundtrip(history)
        errors.append(error(history, restored))
        sizes.append(restored.stored_bytes)
        for before, after in zip(history.layers, restored.layers, strict=True):
            for a, b in zip(before, after, strict=True):
                assert torch.equal(a[:, :, :first], b[:, :, :first])
                assert torch.equal(a[:, :, -last:], b[:, :, -last:])
                assert not torch.equal(a, b)
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[-1] < 0.01


def test_transform_coding_counts_its_bytes(basis):
    """Exact tokens, a step for each group used, and never more than the packed integers."""
    n_tokens = 700
    n_coded = n_tokens - baselines.KEEP_FIRST - baselines.KEEP_LAST
    history = make_history(n_tokens, seed=9)
    exact = 2 * 2 * N_LAYERS * WIDTH * (n_tokens - n_coded)
    n_groups = sum(len(x) for x in basis.errors)
    budget = round(1.0 * 2 * N_LAYERS * WIDTH / baselines.GROUP)
    bits = baselines.allocate(np.concatenate(basis.errors), budget)
    restored = baselines.transform_coding(lambda: basis, 1.0).roundtrip(history)
    packed = bits.sum() * baselines.GROUP * n_coded / 8
    headers = math.ceil(n_groups / 2) + 2 * np.count_nonzero(bits)
    assert exact + headers < restored.stored_bytes <= exact + headers + math.ceil(packed)
    assert exact + headers < restored.about["ideal_bytes"] < restored.stored_bytes + 64 * n_groups


def test_deflated_bytes_can_be_inflated_from_what_was_counted():
    numbers = np.minimum(np.random.default_rng(0).geometric(0.7, (900, 16)), 8).astype(np.uint8)
    coded = zlib.compress(np.ascontiguousarray(numbers.T).tobytes(), 9)
    assert baselines.deflated_bytes(numbers, 4) <= len(coded) * 1.1
    assert baselines.deflated_bytes(numbers, 4) > baselines.entropy_bytes(numbers) * 0.9
    noise = np.random.default_rng(0).integers(0, 8, (900, 16)).astype(np.uint8)
    assert baselines.deflated_bytes(noise, 3) == 900 * 16 * 3 / 8  # packed, as nothing helps


def test_entropy_is_that_of_the_counts():
    numbers = np.array([[0, 5], [0, 6], [1, 7], [1, 8]])
    assert baselines.entropy_bytes(numbers) == 4 / 8 + 1.5 * 2 + 8 / 8 + 1.5 * 4


def test_one_step_is_finer_with_a_smaller_step(basis):
    history = make_history(300, seed=5)
    found = [
        baselines.one_step_transform(lambda: basis, step).roundtrip(history)
        for step in (2.0, 1.0, 0.3)
    ]
    errors = [error(history, restored) for restored in found]
    assert errors == sorted(errors, reverse=True)
    sizes = [restored.stored_bytes for restored in found]
    assert sizes == sorted(sizes)
    assert sizes[0] > SINKS_BYTES


def test_a_basis_is_read_back_as_it_was_fitted(basis, tmp_path):
    calls = []

    def histories():
        calls.append(1)
        return [make_history(400, seed) for seed in (1, 2, 3)]

    baselines.load_basis("what", histories, folder=tmp_path)
    again = baselines.load_basis("what", histories, folder=tmp_path)
    baselines.load_basis("something else", histories, folder=tmp_path)
    assert len(calls) == 2
    for kv in (0, 1):
        assert torch.equal(again.vectors[kv], basis.vectors[kv])
        np.testing.assert_array_equal(again.errors[kv], basis.errors[kv])


@pytest.mark.parametrize("n_pairs", [0, 1])
def test_sharing_takes_the_closest_pairs(n_pairs):
    history = make_history(100)
    history.pairs = ((0, 1),)
    codec = bench_quality.krul_sharing("share", n_pairs, is_fixed=False)
    restored = codec.roundtrip(history)
    assert restored.about["pairs"] == [[0, 1]][:n_pairs]
    assert (error(history, restored) > 0) == (n_pairs > 0)


def test_scores_of_equal_logits_are_zero():
    logits = torch.randn(20, 50).log_softmax(-1)
    ids = torch.arange(20)
    got = bench_quality.scores(logits, logits.clone(), ids)
    assert got["mean_kl"] == got["max_kl"] == got["nll_change"] == got["perplexity_percent"] == 0
    assert got["top1"] == 1


def test_scores_are_those_of_the_reference():
    generator = np.random.default_rng(2)
    p, q = (generator.dirichlet(np.ones(30), 16) for _ in (0, 1))
    ids = generator.integers(0, 30, 16)
    got = bench_quality.scores(
        torch.from_numpy(p).log(), torch.from_numpy(q).log(), torch.from_numpy(ids)
    )
    divergence = (p * np.log(p / q)).sum(1)
    rows = np.arange(15)
    lost = np.log(p[rows, ids[1:]] / q[rows, ids[1:]]).mean()
    assert got["mean_kl"] == pytest.approx(divergence.mean())
    assert got["max_kl"] == pytest.approx(divergence.max())
    assert got["top1"] == np.mean(p.argmax(1) == q.argmax(1))
    assert got["perplexity_percent"] == pytest.approx(100 * (np.exp(lost) - 1))


def words_as_ids(words):
    return list(words.encode())


@pytest.mark.parametrize("task", retrieval.TASKS)
def test_a_trial_has_its_answer_in_its_history_and_is_the_same_again(task):
    haystack = list(b"nothing at all. ") * 1000
    seen = set()
    for number in range(6):
        trial = retrieval.make(task, number, words_as_ids, haystack)
        assert trial == retrieval.make(task, number, words_as_ids, haystack)
        history, answer = bytes(trial.history), bytes(trial.answer)
        assert answer in history
        assert answer not in bytes(trial.question)
        lengths = retrieval.NEEDLE_TOKENS if task == "needle" else retrieval.OTHER_TOKENS
        wanted = lengths[number % len(lengths)]
        assert wanted - 64 < len(history) <= wanted
        seen.add(answer)
    assert len(seen) == 6


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task is 'sing' but must be one of needle, keys, copy"):
        retrieval.make("sing", 0, words_as_ids, [0] * 5000)
    with pytest.raises(ValueError, match="haystack has 10 tokens but more than"):
        retrieval.make("needle", 0, words_as_ids, [0] * 10)


def test_an_unknown_topic_is_refused():
    with pytest.raises(ValueError, match="topic is 'x' but must be one of bread"):
        chats.generate(None, None, "x", 10)


@pytest.mark.skipif(
    any(not texts._is_installed(name) for name in texts._PACKAGES),
    reason="the held-out prose needs packages that are not installed",
)
def test_no_text_is_fitted_to_and_measured_on():
    held_out = "\n".join(texts.held_out_texts().values())
    lines = {line.strip() for line in held_out.splitlines() if len(line.strip()) > 60}
    found = texts.calibration_texts()
    assert len(found) >= 13
    assert found == texts.calibration_texts()
    for text in found:
        assert len(text) == texts._OTHER_TEXT_CHARACTERS
        assert not [line for line in text.splitlines() if line.strip() in lines]
    assert not set(texts._TOPICS) & set(texts._OTHER_TOPICS)
    assert not set(texts._MODULES) & set(texts._OTHER_MODULES)
    assert not set(texts._PACKAGES) & set(texts._OTHER_PACKAGES)


def part(codec, section="text", **more):
    row = {"section": section, "codec": codec, "family": codec, "n_tokens": 1024, "seconds": 1.0}
    row |= {"stored_bytes": 100, "ratio_bf16": 4.0, "mean_kl": 0.1, "max_kl": 1.0, "top1": 0.9}
    return row | {"nll_change": 0.0} | more


def test_means_add_bytes_and_keep_the_largest():
    rows = bench_quality.means(
        [
            part("x"),
            part("x", stored_bytes=400, ratio_bf16=1.0, max_kl=3.0, mean_kl=0.3),
            part("x", section="retrieval", task="needle", is_right=True),
            part("x", section="retrieval", task="needle", is_right=False, n_tokens=2048),
            part("x", section="retrieval", task="copy", is_right=True),
        ]
    )
    text, asked = rows
    assert text["n"] == 2
    assert text["ratio_bf16"] == pytest.approx(800 / 500)
    assert (text["mean_kl"], text["max_kl"]) == (pytest.approx(0.2), 3.0)
    assert (asked["needle"], asked["keys"], asked["copy"]) == (0.5, None, 1.0)
    assert asked["score"] == pytest.approx(2 / 3)
    harness.table({"columns": bench_quality.COLUMNS, "rows": rows})


def test_parts_are_kept_and_forgotten(tmp_path):
    path = tmp_path / "parts.jsonl"
    parts = bench_quality.Parts(path)
    parts.add("a", {"value": 1})
    parts.add("b", {"value": 2})
    parts.add("a", {"value": 3})
    again = bench_quality.Parts(path)
    assert {key: row["value"] for key, row in again.found.items()} == {"a": 3, "b": 2}
    assert not bench_quality.Parts(path, is_fresh=True).found


def test_codecs_are_chosen_by_words():
    every = bench_quality.codecs(lambda: None, lambda: None)
    names = [codec.name for codec in every]
    assert len(set(names)) == len(names)
    assert set(bench_quality.NOT_ASKED) <= set(names)
    found = bench_quality.chosen(every, "h2o, krul: int4")
    assert {codec.family for codec in found} == {"H2O", "krul"}
    assert bench_quality.chosen(every, None) == every
    with pytest.raises(ValueError, match="--codecs names 'zip' but no codec's name has it"):
        bench_quality.chosen(every, "h2o,zip")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return bench_quality.Bench(bench_quality.Parts(tmp_path_factory.mktemp("parts") / "x.jsonl"))


@pytest.mark.model
def test_uncompressed_scores_are_perfect_and_kept(bench):
    bench.codecs = bench_quality.chosen(
        bench_quality.codecs(bench.basis, bench.profile),
        "uncompressed,krul: int4,groups of 64: 2,h2o: 1/4",
    )
    ids = torch.tensor([bench.encode(texts.text("manual")[:3000])])
    bench.one_history("text", "manual", ids, 256)
    rows = {row["codec"]: row for row in bench.parts.found.values()}
    assert rows["uncompressed"]["mean_kl"] == rows["uncompressed"]["max_kl"] == 0
    assert rows["uncompressed"]["ratio_bf16"] == rows["uncompressed"]["top1"] == 1
    assert 0 < rows["krul: int4"]["mean_kl"] < rows["integers in groups of 64: 2 bits"]["mean_kl"]
    assert rows["H2O: 1/4 kept"]["ratio_bf16"] == 4
    before = dict(bench.parts.found)
    bench.one_history("text", "manual", ids, 256)
    assert bench.parts.found == before


@pytest.mark.model
def test_judged_answers_are_what_generate_says(bench):
    """Being right token by token in one pass is being right when generated greedily."""
    haystack = bench.encode(texts.text("manual")[:12_000])
    judged = []
    for task in retrieval.TASKS:
        trial = retrieval.make(task, 0, bench.encode, haystack)
        history = bench.read(torch.tensor([trial.history]))
        judged.append(bench.answers(history.layers, trial))
        ids = torch.tensor([trial.history + trial.question])
        n = len(trial.answer)
        out = bench.model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
        assert judged[-1] == (out[0, ids.shape[1] :].tolist() == trial.answer)
    assert any(judged)


@pytest.mark.model
def test_a_chat_is_sampled_again_alike_and_read_from_disk(bench, tmp_path):
    ids = chats.chat(bench.tokenizer, bench.model, "bread", 90, tmp_path)
    assert ids.shape == (1, 90)
    words = bench.tokenizer.decode(ids[0])
    assert chats.TOPICS["bread"][0] in words
    assert chats.generate(bench.tokenizer, bench.model, "bread", 60) == ids[0, :60].tolist()
    assert torch.equal(chats.chat(None, None, "bread", 90, tmp_path), ids)


@pytest.mark.model
def test_a_run_stops_when_its_time_is_up(bench):
    bench.deadline = -math.inf
    with pytest.raises(bench_quality.OutOfTimeError):
        bench.text([256])
    bench.deadline = math.inf
