/* py_restore_plan.c - restore plans as tuples, from costs that are one array and a few numbers. */
#include "py_krul.h"

enum { N_COST_ROWS = 6 }; /* linear, quadratic, overhead, read, decode, pair_read */

/* Costs with the arrays that they borrow from. */
typedef struct borrowed_costs {
    krul_restore_costs costs;
    PyArrayObject *seconds; /* owned: N_COST_ROWS x n_layers */
    PyArrayObject *partner; /* owned: n_layers */
    PyArrayObject *n_tokens; /* owned: n_layers, or NULL */
} borrowed_costs;

static void
release_costs(borrowed_costs *borrowed)
{
    Py_CLEAR(borrowed->seconds);
    Py_CLEAR(borrowed->partner);
    Py_CLEAR(borrowed->n_tokens);
}

/* Borrow what `tuple` and `n_by_layer` (NULL: nothing) hold; the caller adds the other numbers.
 * Returns 0, or -1 with an exception; release_costs is right in either case. */
static int
borrow_costs(py_krul_state *state, PyObject *tuple, PyObject *n_by_layer, const char *name,
             borrowed_costs *out)
{
    PyObject *seconds, *partner;
    int decode_on_compute;
    long long block_tokens, first_block_tokens;
    krul_restore_costs *costs = &out->costs;
    if (!PyArg_ParseTuple(tuple, "OOdpLL:costs", &seconds, &partner, &costs->latency_s,
                          &decode_on_compute, &block_tokens, &first_block_tokens)) {
        return -1;
    }
    out->seconds = (PyArrayObject *)PyArray_FROMANY(seconds, NPY_DOUBLE, 2, 2, NPY_ARRAY_CARRAY_RO);
    out->partner = (PyArrayObject *)PyArray_FROMANY(partner, NPY_INT32, 1, 1, NPY_ARRAY_CARRAY_RO);
    if (out->partner != NULL && out->seconds != NULL && n_by_layer != NULL) {
        out->n_tokens = (PyArrayObject *)PyArray_FROMANY(n_by_layer, NPY_INT64, 1, 1,
                                                         NPY_ARRAY_CARRAY_RO);
    }
    if (out->seconds == NULL || out->partner == NULL ||
        (out->n_tokens == NULL && n_by_layer != NULL)) {
        return -1;
    }
    npy_intp n_layers = PyArray_DIM(out->seconds, 1);
    npy_intp n_given = out->n_tokens == NULL ? n_layers : PyArray_DIM(out->n_tokens, 0);
    if (PyArray_DIM(out->seconds, 0) != N_COST_ROWS || n_given != n_layers ||
        n_layers > INT32_MAX) {
        krul_error err;
        krul_fail(&err, KRUL_STATUS_BAD_SHAPE, "costs is (%lld, %lld) but %s has %lld layers",
                  (long long)PyArray_DIM(out->seconds, 0), (long long)n_layers, name,
                  (long long)n_given);
        py_krul_raise(state, &err);
        return -1;
    }
    if (PyArray_DIM(out->partner, 0) != n_layers) {
        krul_error err;
        krul_fail(&err, KRUL_STATUS_BAD_SHAPE, "costs is (%lld, %lld) but partner has %lld layers",
                  (long long)PyArray_DIM(out->seconds, 0), (long long)n_layers,
                  (long long)PyArray_DIM(out->partner, 0));
        py_krul_raise(state, &err);
        return -1;
    }
    const double *rows = PyArray_DATA(out->seconds);
    costs->n_layers = (int32_t)n_layers;
    costs->linear_s_per_token = rows;
    costs->quadratic_s_per_token2 = rows + n_layers;
    costs->overhead_s = rows + 2 * n_layers;
    costs->read_s = rows + 3 * n_layers;
    costs->decode_s = rows + 4 * n_layers;
    costs->pair_read_s = rows + 5 * n_layers;
    costs->partner = PyArray_DATA(out->partner);
    costs->decode_on_compute = decode_on_compute != 0;
    costs->block_tokens = block_tokens;
    costs->first_block_tokens = first_block_tokens;
    return 0;
}

PyDoc_STRVAR(restore_plan_choose_doc,
             "restore_plan_choose($module, /, costs, n_tokens, n_prompt_tokens, granularity, "
             "n_required, n_recomputable, shape)\n--\n\n"
             "(shape, n_recomputed, predicted, load, recompute and bound seconds); see krul.plan.");

static PyObject *
restore_plan_choose(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"costs",      "n_tokens",       "n_prompt_tokens", "granularity",
                            "n_required", "n_recomputable", "shape",           NULL};
    py_krul_state *state = py_krul_state_of(module);
    PyObject *tuple, *n_required, *array = NULL, *result = NULL;
    borrowed_costs borrowed = {0};
    long long n_tokens, n_prompt_tokens, granularity, n_recomputable;
    int shape;
    krul_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!LLLOLi:restore_plan_choose", names,
                                     &PyTuple_Type, &tuple, &n_tokens, &n_prompt_tokens,
                                     &granularity, &n_required, &n_recomputable, &shape)) {
        return NULL;
    }
    if (borrow_costs(state, tuple, n_required == Py_None ? NULL : n_required, "n_required",
                     &borrowed) != 0) {
        goto done;
    }
    krul_restore_costs *costs = &borrowed.costs;
    costs->n_tokens = n_tokens;
    costs->n_prompt_tokens = n_prompt_tokens;
    costs->granularity = granularity;
    costs->n_recomputable = n_recomputable;
    costs->n_required = borrowed.n_tokens == NULL ? NULL : PyArray_DATA(borrowed.n_tokens);
    npy_intp n_layers = costs->n_layers;
    array = PyArray_SimpleNew(1, &n_layers, NPY_INT64);
    if (array == NULL) {
        goto done;
    }
    krul_restore_plan plan = {.n_recomputed = PyArray_DATA((PyArrayObject *)array)};
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_restore_plan_choose(costs, (krul_restore_shape)shape, &plan, &err);
    Py_END_ALLOW_THREADS
    result = status != KRUL_STATUS_OK
                 ? py_krul_raise(state, &err)
                 : Py_BuildValue("(iOdddd)", (int)plan.shape, array, plan.predicted_s, plan.load_s,
                                 plan.recompute_s, plan.bound_s);
done:
    Py_XDECREF(array);
    release_costs(&borrowed);
    return result;
}

/* Arguments of the two functions that are given n_recomputed. */
static int
take_plan(PyObject *module, PyObject *args, PyObject *kwargs, const char *format,
          borrowed_costs *out)
{
    static char *names[] = {"costs", "n_tokens", "n_prompt_tokens", "n_recomputed", NULL};
    PyObject *tuple, *n_recomputed;
    long long n_tokens, n_prompt_tokens;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &PyTuple_Type, &tuple, &n_tokens,
                                     &n_prompt_tokens, &n_recomputed)) {
        return -1;
    }
    out->costs.n_tokens = n_tokens;
    out->costs.n_recomputable = n_tokens;
    out->costs.granularity = 1;
    out->costs.n_prompt_tokens = n_prompt_tokens;
    return borrow_costs(py_krul_state_of(module), tuple, n_recomputed, "n_recomputed", out);
}

PyDoc_STRVAR(restore_plan_predict_doc,
             "restore_plan_predict($module, /, costs, n_tokens, n_prompt_tokens, n_recomputed)\n"
             "--\n\n"
             "Seconds until the first token.");

static PyObject *
restore_plan_predict(PyObject *module, PyObject *args, PyObject *kwargs)
{
    borrowed_costs borrowed = {0};
    PyObject *result = NULL;
    if (take_plan(module, args, kwargs, "O!LLO:restore_plan_predict", &borrowed) == 0) {
        double predicted_s = 0;
        krul_error err;
        krul_status status;
        Py_BEGIN_ALLOW_THREADS
        status = krul_restore_plan_predict(&borrowed.costs, PyArray_DATA(borrowed.n_tokens),
                                           &predicted_s, &err);
        Py_END_ALLOW_THREADS
        result = status == KRUL_STATUS_OK ? PyFloat_FromDouble(predicted_s)
                                          : py_krul_raise(py_krul_state_of(module), &err);
    }
    release_costs(&borrowed);
    return result;
}

static PyObject *
steps_to_list(const krul_restore_plan_step *steps, int64_t n_steps)
{
    PyObject *list = PyList_New((Py_ssize_t)n_steps);
    for (int64_t i = 0; list != NULL && i < n_steps; i++) {
        const krul_restore_plan_step *step = &steps[i];
        PyObject *item = Py_BuildValue("(iiLLddd)", (int)step->action, (int)step->layer,
                                       (long long)step->token_start, (long long)step->token_end,
                                       step->start_s, step->end_s, step->deadline_s);
        if (item == NULL) {
            Py_CLEAR(list);
        }
        else {
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
        }
    }
    return list;
}

PyDoc_STRVAR(restore_plan_steps_doc,
             "restore_plan_steps($module, /, costs, n_tokens, n_prompt_tokens, n_recomputed)\n"
             "--\n\n"
             "(action, layer, token_start, token_end, start_s, end_s, deadline_s) of each step.");

static PyObject *
restore_plan_steps(PyObject *module, PyObject *args, PyObject *kwargs)
{
    borrowed_costs borrowed = {0};
    krul_restore_plan_step *steps = NULL;
    PyObject *result = NULL;
    if (take_plan(module, args, kwargs, "O!LLO:restore_plan_steps", &borrowed) != 0) {
        goto done;
    }
    steps = PyMem_Calloc((size_t)borrowed.costs.n_layers * 3 + 1, sizeof *steps);
    if (steps == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    int64_t n_steps = 0;
    krul_error err;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_restore_plan_steps(&borrowed.costs, PyArray_DATA(borrowed.n_tokens), steps,
                                     &n_steps, &err);
    Py_END_ALLOW_THREADS
    result = status == KRUL_STATUS_OK ? steps_to_list(steps, n_steps)
                                      : py_krul_raise(py_krul_state_of(module), &err);
done:
    PyMem_Free(steps);
    release_costs(&borrowed);
    return result;
}

PyMethodDef py_restore_plan_methods[] = {
    {"restore_plan_choose", (PyCFunction)(void (*)(void))restore_plan_choose,
     METH_VARARGS | METH_KEYWORDS, restore_plan_choose_doc},
    {"restore_plan_predict", (PyCFunction)(void (*)(void))restore_plan_predict,
     METH_VARARGS | METH_KEYWORDS, restore_plan_predict_doc},
    {"restore_plan_steps", (PyCFunction)(void (*)(void))restore_plan_steps,
     METH_VARARGS | METH_KEYWORDS, restore_plan_steps_doc},
    {NULL, NULL, 0, NULL},
};
