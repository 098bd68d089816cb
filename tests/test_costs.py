"""Measured costs: what is fitted, what is kept, and what a bad file or figure does."""

import json
import math
import os
import threading

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krul import cli, costs
from krul.costs import CostBook, ForwardCost
from krul.model import decoder_layers


def counts(read_bytes=1 << 20, read_wall_s=0.01, by_codec=None):
    return {"read_bytes": read_bytes, "read_wall_s": read_wall_s, "by_codec": by_codec or {}}


def book_of(truth, sizes):
    book = CostBook(None, "made up")
    for n_before, n_new in sizes:
        book.add_forward(n_before, n_new, truth.seconds(n_new, n_before))
    return book


@given(
    overhead=st.floats(0, 1),
    linear=st.floats(1e-6, 1e-2),
    quadratic=st.floats(0, 1e-6),
)
def test_the_fit_finds_what_was_put_in(overhead, linear, quadratic):
    truth = ForwardCost(overhead, linear, quadratic)
    book = book_of(truth, [(0, 64), (0, 100), (200, 500), (0, 1000), (4000, 2000), (0, 9000)])
    found = book.forward()
    for n_tokens, n_before in ((64, 0), (700, 0), (3000, 0), (16, 5000)):
        expected = truth.seconds(n_tokens, n_before)
        assert math.isclose(found.seconds(n_tokens, n_before), expected, rel_tol=1e-4)


def passes_of_three(generator, n_sizes):
    """What a small model costs on a processor, and passes of so many sizes, noisy by 3 %."""
    truth = ForwardCost(0.02, 2.6e-3, 8e-7)
    sizes = [(0, 4096), (4096, 64), (0, 512), (1000, 300), (0, 2048), (200, 40)][:n_sizes]
    return truth, [
        (before, n, truth.seconds(n, before) * generator.normal(1, 0.03)) for before, n in sizes * 3
    ]


@pytest.mark.parametrize(("n_sizes", "tolerance"), [(1, 0.2), (2, 0.2), (4, 0.1), (6, 0.08)])
def test_half_a_prefix_is_rated_by_the_shape_until_passes_tell(n_sizes, tolerance):
    """A share that is wrong by half, either way, is right enough."""
    generator = np.random.default_rng(n_sizes)
    for share in (2e-4, 3e-4, 4.5e-4):
        truth, passes = passes_of_three(generator, n_sizes)
        book = CostBook(None, "made up")
        book.attention_share = share
        for row in passes:
            book.add_forward(*row)
        for n_tokens in (1024, 2048, 3000):
            found = book.forward().seconds(n_tokens)
            assert abs(found / truth.seconds(n_tokens) - 1) <= tolerance


def test_without_a_shape_two_sizes_underrate_half_a_prefix():
    """Why there is a shape: the same passes, and half of 4,096 tokens for a quarter of the time."""
    truth = ForwardCost(0.0, 2.6e-3, 8e-7)
    book = CostBook(None, "made up")
    book.add_forward(0, 4096, truth.seconds(4096))
    book.add_forward(4096, 64, 1.2 * truth.seconds(64, 4096))  # a head that is slow for short ones
    alone = book.forward().seconds(2048) / truth.seconds(2048)
    book.attention_share = 3e-4
    assert alone < 0.8
    assert book.forward().seconds(2048) / truth.seconds(2048) > 0.9


def test_one_size_is_not_all_overhead():
    book = CostBook(None, "made up")
    book.add_forward(0, 1000, 2.0)
    assert book.forward().seconds(500) == pytest.approx(1.0, rel=0.01)


def test_many_passes_decide_against_the_shape():
    truth = ForwardCost(0.01, 1e-3, 1e-6)
    sizes = [(0, 64), (0, 200), (200, 500), (0, 1000), (4000, 2000), (0, 9000)]
    book = book_of(truth, sizes * 4)
    for share in (1e-5, 1e-1):  # a hundred times less and more than it is
        book.attention_share = share
        for n_before, n_new in sizes:
            expected = truth.seconds(n_new, n_before)
            assert book.forward().seconds(n_new, n_before) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "deepseek_v3", "gpt2", "gpt_neo"])
def test_the_shape_of_a_model(name):
    if not models.is_available(name):
        pytest.skip(f"this transformers has no {name}")
    share = costs.attention_share(models.tiny(name))
    n_products = models.N_LAYERS * 2 * 64  # of width 64, as are all of these
    n_weights = sum(x.numel() for x in decoder_layers(models.tiny(name))[0].parameters())
    assert share is not None
    assert n_products / n_weights / 2 <= share <= 6 * n_products / n_weights


def test_a_shape_that_is_not_known_is_none():
    class Model(torch.nn.Module):
        config = type("Config", (), {"get_text_config": lambda self, **_: self})()

    assert costs.attention_share(Model()) is None
    book = CostBook(None, "unknown")
    costs.know_model(book, Model())
    assert book.attention_share is None


@given(
    st.lists(
        st.tuples(st.integers(0, 9000), st.integers(1, 9000), st.floats(1e-6, 100)),
        min_size=1,
        max_size=30,
    )
)
def test_no_cost_is_below_zero_whatever_was_measured(passes):
    book = CostBook(None, "noise")
    for row in passes:
        book.add_forward(*row)
    found = book.forward()
    assert min(vars(found).values()) >= 0
    assert all(np.isfinite(value) for value in vars(found).values())
    assert found.seconds(100) > 0


def test_the_newest_passes_count():
    book = CostBook(None, "changing")
    for seconds in (9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0):
        book.add_forward(0, 1000, seconds)
    assert math.isclose(book.forward().seconds(1000), 1.0)


@pytest.mark.parametrize(
    "row",
    [(0, 10, math.nan), (0, 10, math.inf), (0, 10, 0.0), (0, 10, -1.0), (0, 0, 1.0), (-1, 5, 1.0)],
)
def test_absurd_passes_are_left_out(row):
    book = CostBook(None, "absurd")
    book.add_forward(*row)
    assert book.forward() is None


def test_restores_move_the_rates_half_of_the_way():
    book = CostBook(None, "disk")
    book.add_restore(counts(read_bytes=1 << 20, read_wall_s=1.0, by_codec={2: (1 << 22, 0.5)}))
    assert book.read_bytes_per_s == 1 << 20
    assert book.decode_bytes_per_s(2) == 1 << 23
    assert book.decode_bytes_per_s(3) is None
    book.add_restore(counts(read_bytes=1 << 22, read_wall_s=1.0))
    assert book.read_bytes_per_s == 1 << 21
    book.add_restore(counts(read_bytes=100, read_wall_s=1.0, by_codec={2: (9, 1.0)}))
    assert book.read_bytes_per_s == 1 << 21
    assert book.decode_bytes_per_s(2) == 1 << 23
    book.add_restore(counts(read_wall_s=0.0))
    assert book.read_bytes_per_s == 1 << 21


def test_a_limit_says_nothing_of_the_store():
    book = CostBook(None, "disk")
    book.add_restore(counts(read_bytes=1 << 20, read_wall_s=1.0), max_bytes_per_s=1.1e6)
    assert book.read_bytes_per_s is None
    book.add_restore(counts(read_bytes=1 << 20, read_wall_s=1.0), max_bytes_per_s=1e9)
    assert book.read_bytes_per_s == 1 << 20


def test_a_book_is_kept_with_its_store_and_found_again(tmp_path):
    path = tmp_path / ".costs" / "book.json"
    book = CostBook(str(path), "some model")
    book.add_forward(0, 100, 0.5)
    book.add_restore(counts(by_codec={3: (1 << 20, 0.1)}))
    book.save()
    assert os.stat(path).st_mode & 0o777 == 0o600
    again = CostBook(str(path), "some model")
    assert again.to_dict() == book.to_dict()
    written = path.stat().st_mtime_ns
    again.save()  # nothing is new
    assert path.stat().st_mtime_ns == written
    assert os.listdir(path.parent) == ["book.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b'{"format": "krul costs 2", "read_bytes_per_s": 5}',
        b'{"format": "krul costs 1", "read_bytes_per_s": -5, "passes": 7}',
        b'{"format": "krul costs 1", "read_bytes_per_s": NaN, "decode_bytes_per_s": [1]}',
        b'{"format": "krul costs 1", "read_bytes_per_s": true, "passes": [[1], "x", [0, 5, -1]]}',
        b'{"format": "krul costs 1", "passes": [[1e300, 5, 1], [0, "5", 1], [0, 5, "1"], null]}',
        b'{"format": "krul costs 1", "decode_bytes_per_s": {"x": 5, "2": "5", "3": 1e300}}',
    ],
)
def test_a_bad_file_is_no_file(tmp_path, content):
    path = tmp_path / "book.json"
    path.write_bytes(content)
    book = CostBook(str(path), "model")
    assert book.forward() is None
    assert book.read_bytes_per_s is None
    assert book.decode_bytes_per_s(2) is None
    book.add_forward(0, 100, 1.0)
    book.save()
    assert json.loads(path.read_bytes())["passes"] == [[0, 100, 1.0]]


def test_a_book_that_cannot_be_written_harms_nobody(tmp_path):
    (tmp_path / "file").write_text("")
    book = CostBook(str(tmp_path / "file" / "book.json"), "model")
    book.add_forward(0, 100, 1.0)
    book.save()
    assert math.isclose(book.forward().seconds(100), 1.0)


def test_one_book_for_one_model_and_store(tmp_path):
    first = costs.cost_book(str(tmp_path), "a" * 64)
    assert costs.cost_book(str(tmp_path), "a" * 64) is first
    assert costs.cost_book(str(tmp_path), "b" * 64) is not first
    threads = [
        threading.Thread(target=lambda: [first.add_forward(0, 9, 1.0) for _ in range(500)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert math.isclose(first.forward().seconds(9), 1.0)


def test_the_command_line_shows_them(tmp_path, capsys):
    assert cli.main(["bench", "--costs", "--store", str(tmp_path / "none")]) == 0
    assert "nothing has been measured" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    book = costs.cost_book(str(tmp_path), "c" * 64)
    book.add_forward(0, 100, 1.0)
    book.add_restore(counts(by_codec={3: (1 << 20, 0.1)}))
    book.save()
    assert cli.main(["bench", "--costs", "--store", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["model"] == "c" * 64
    assert list(found[0]["decode_bytes_per_s"]) == ["int4"]
    assert cli.main(["bench", "--costs", "--store", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "forward pass of n tokens" in text
    assert "decoding int4" in text


def test_pairs_are_counted_apart_and_other_partners_bytes_to_the_upper_layer():
    book = book_of(ForwardCost(0.0, 1e-3, 0.0), [(0, 100), (0, 200), (0, 400)])
    blocks = [
        ((0,), 3, 100, 400),
        ((0, 2), 3, 600, 800),
        ((1, 2), 3, 50, 800),
        ((0, 2), 3, 200, 800),
        ((1, 3), 3, 70, 800),
    ]
    found = book.plan_costs(
        4, 1, blocks, read_bytes_per_s=10, n_threads=2, block_tokens=512, first_block_tokens=4
    )
    assert found.partner.tolist() == [-1, -1, 0, 1]
    assert found.pair_read_s.tolist() == [0, 0, 80, 7]
    assert found.read_s.tolist() == [10, 0, 5, 0]
    decoded = np.array([400 + 800, 800, 1200, 400]) / 1e9 / 2
    np.testing.assert_allclose(found.decode_s, decoded)
