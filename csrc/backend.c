/* backend.c - which tables exist, and which of them serves. */
#include "backend.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <string.h>

#include "internal.h"

static const krul_backend *const best_first[] = {
#if defined(__x86_64__)
    &krul_backend_avx512_gather,
    &krul_backend_avx512,
    &krul_backend_avx2,
#elif defined(__aarch64__)
    &krul_backend_neon,
#endif
    &krul_backend_scalar,
};

int
krul_backend_count(void)
{
    return (int)KRUL_LENGTH(best_first);
}

const krul_backend *
krul_backend_at(int index)
{
    assert(index >= 0 && index < krul_backend_count());
    return best_first[index];
}

const char *
krul_backend_name(const krul_backend *backend)
{
    return backend->name;
}

bool
krul_backend_is_usable(const krul_backend *backend)
{
    return backend->abi == KRUL_BACKEND_ABI && backend->is_usable();
}

krul_status
krul_backend_find(const char *name, const krul_backend **out, krul_error *err)
{
    bool is_any = name == NULL || name[0] == '\0';
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = best_first[i];
        if (is_any ? krul_backend_is_usable(backend) : strcmp(name, backend->name) == 0) {
            if (!krul_backend_is_usable(backend)) {
                return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                                 "backend '%s' cannot run on this processor", name);
            }
            *out = backend;
            return KRUL_STATUS_OK;
        }
    }
    return krul_fail(err, KRUL_STATUS_BAD_VALUE, "backend '%s' does not exist", name);
}

bool
krul_has_amx_bf16(void)
{
#if defined(__x86_64__)
    enum { LEAF = 7, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d;
    return __get_cpuid_count(LEAF, 0, &a, &b, &c, &d) != 0 && (d & AMX_BF16) != 0 &&
           (d & AMX_TILE) != 0;
#else
    return false;
#endif
}
