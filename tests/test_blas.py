"""Products of every library that is there against float64 NumPy; libraries that do not serve."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_package import run_python

import krul
from krul import _core, blas

torch = pytest.importorskip("torch")


def libraries():
    """Open everything that serves on this machine."""
    found = {}
    for path in blas.candidates():
        try:
            found[os.path.basename(path)] = _core.blas_open(path)
        except NotImplementedError:
            continue
    return found


LIBRARIES = libraries()


def expected(a, b, out, trans_a, trans_b, alpha, beta):
    """Return the product in float64, and how far float32 may be from it, term by term."""
    left, right = np.float64(a.T if trans_a else a), np.float64(b.T if trans_b else b)
    old = np.float64(out) if beta != 0 else np.zeros(out.shape)
    value = alpha * (left @ right) + beta * old
    size = abs(alpha) * (abs(left) @ abs(right)) + abs(beta * old)
    return value, (left.shape[1] + 4) * 2.0**-23 * size


def test_at_least_one_library_serves():
    assert LIBRARIES


@pytest.mark.parametrize("name", LIBRARIES)
@given(
    sizes=st.tuples(*[st.integers(0, 40)] * 3),
    trans=st.tuples(st.booleans(), st.booleans()),
    factors=st.tuples(st.sampled_from([1, 0, -0.5]), st.sampled_from([0, 1, 2.5])),
    gaps=st.tuples(*[st.integers(0, 3)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_product_is_numpys(name, sizes, trans, factors, gaps, seed):
    m, n, k = sizes
    random = np.random.default_rng(seed)

    def matrix(n_rows, n_columns, gap):
        wide = random.standard_normal((n_rows, n_columns + gap), np.float32)
        return wide, wide[:, :n_columns]

    _, a = matrix(*((k, m) if trans[0] else (m, k)), gaps[0])
    _, b = matrix(*((n, k) if trans[1] else (k, n)), gaps[1])
    wide, out = matrix(m, n, gaps[2])
    beside = wide[:, n:].copy()
    value, bound = expected(a, b, out, *trans, *factors)
    if factors[1] == 0:
        out[:] = np.nan
    _core.blas_sgemm(LIBRARIES[name], a, b, out, *trans, *factors)
    assert (abs(out - value) <= bound).all()
    assert (wide[:, n:] == beside).all()


@pytest.mark.parametrize("name", LIBRARIES)
def test_torch_tensors_and_large_sizes(name):
    random = np.random.default_rng(3)
    a, b = (random.standard_normal((300, 300), np.float32) for _ in range(2))
    out = torch.empty(300, 300)
    _core.blas_sgemm(LIBRARIES[name], torch.from_numpy(a), torch.from_numpy(b), out, trans_b=True)
    value, bound = expected(a, b, a, False, True, 1, 0)
    assert (abs(out.numpy() - value) <= bound).all()


@pytest.mark.parametrize("name", LIBRARIES)
def test_threads_do_not_disturb_each_other(name):
    random = np.random.default_rng(4)
    a = [random.standard_normal((64 + i, 100), np.float32) for i in range(4)]
    b = random.standard_normal((100, 90), np.float32)
    outs = [np.zeros((len(each), 90), np.float32) for each in a]
    wrong = []
    barrier = threading.Barrier(4)

    def work(index):
        barrier.wait()
        value, bound = expected(a[index], b, outs[index], False, False, 1, 0)
        for _ in range(50):
            outs[index][:] = np.nan
            _core.blas_sgemm(LIBRARIES[name], a[index], b, outs[index])
            if not (abs(outs[index] - value) <= bound).all():
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_processes_thread_counts_stay():
    before = torch.get_num_threads()
    for handle in LIBRARIES.values():
        out = np.zeros((2, 2), np.float32)
        _core.blas_sgemm(handle, out.copy(), out.copy(), out)
    assert torch.get_num_threads() == before


def test_sgemm_makes_the_output():
    a, b = np.float32([[1, 2, 3]]), np.float32([[1], [10], [100]])
    assert blas.sgemm(a, b).tolist() == [[321]]
    assert blas.sgemm(a, a, trans_a=True, alpha=2).tolist() == [[2, 4, 6], [4, 8, 12], [6, 12, 18]]
    out = np.float32([[1]])
    assert blas.sgemm(a, a, trans_b=True, out=out, beta=1) is out
    assert out.tolist() == [[15]]


ONE = np.ones((2, 2), np.float32)
REFUSED = [
    (lambda: blas.sgemm(ONE, np.ones((3, 2), np.float32)), krul.ShapeError, "op\\(b\\) \\(3, 2\\)"),
    (lambda: blas.sgemm(ONE, ONE, out=np.ones((2, 3), np.float32)), krul.ShapeError, "out is"),
    (lambda: blas.sgemm(ONE, ONE.astype(np.float16)), krul.DTypeError, "b is float16"),
    (lambda: blas.sgemm(ONE, ONE[0], out=ONE.copy()), krul.ShapeError, "b has 1 dimensions"),
    (lambda: blas.sgemm(ONE, ONE, out=ONE), ValueError, "out may share memory with a"),
    (lambda: blas.sgemm(np.ones((4, 2), np.float32).T, ONE), krul.ShapeError, "a"),
    (lambda: blas.sgemm(np.broadcast_to(ONE[:1], (3, 2)), ONE), krul.ShapeError, "lda is 0"),
    (lambda: blas.sgemm(ONE, ONE, beta=1), ValueError, "there is no out"),
    (lambda: _core.blas_sgemm(None, ONE, ONE, ONE.copy()), ValueError, "PyCapsule"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- the search ----------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """Forget what was found, before and after."""
    monkeypatch.setattr(blas, "_found", None)
    return monkeypatch


def test_environment_names_the_only_candidate(fresh):
    fresh.setenv("KRUL_BLAS", "libkrul-absent.so.9")
    assert blas.candidates() == ["libkrul-absent.so.9"]
    with pytest.raises(
        ValueError, match=r"KRUL_BLAS is 'libkrul-absent.so.9': .* cannot be loaded"
    ):
        blas.find()
    found = krul.backends()["blas"]
    assert found["chosen"] is None
    assert "cannot be loaded" in found["unusable"]["libkrul-absent.so.9"]


def test_a_library_without_products_is_refused(fresh):
    fresh.setenv("KRUL_BLAS", "libm.so.6")
    with pytest.raises(ValueError, match="no matrix product"):
        blas.find()


def test_none_is_an_error_with_the_reasons(fresh):
    fresh.delenv("KRUL_BLAS", raising=False)
    fresh.setattr(blas, "candidates", lambda: ["libkrul-absent.so.9", "libm.so.6"])
    with pytest.raises(NotImplementedError, match=r"cannot be loaded.*libm.so.6 has no matrix"):
        blas.find()


def test_torchs_library_is_used_once_torch_is_there(fresh):
    fresh.delenv("KRUL_BLAS", raising=False)
    found = krul.backends()["blas"]
    assert (
        found["chosen"] == "torch/lib/libtorch_cpu.so"
        or "torch/lib/libtorch_cpu.so" in found["unusable"]
    )
    assert blas.find() is blas.find()


def test_search_loads_no_torch():
    code = "import sys, krul; krul.backends(); sys.exit('torch' in sys.modules)"
    assert run_python(code) == 0


def test_torch_can_be_imported_after_its_library():
    code = (
        "import glob, importlib.util as u, os; from krul import _core; "
        "lib = os.path.join(u.find_spec('torch').submodule_search_locations[0], 'lib'); "
        "b = [_core.blas_open(p) for p in glob.glob(lib + '/libtorch_cpu.so') "
        "if os.environ.get('OMP_NUM_THREADS')]; import torch; "
        "assert (torch.ones(9, 9) @ torch.ones(9, 9) == 9).all()"
    )
    assert run_python(code) == 0
