/* cpu_target.h - how a file switches the compiler to another instruction set.
 *
 * setuptools has no flags per file, so the file itself says what it is compiled for. gcc takes a
 * pragma for all that follows; clang takes an attribute between push and pop, and no
 * prefer-vector-width in it, so that KRUL_CPU_WIDE is empty there. */
#ifndef KRUL_CPU_TARGET_H
#define KRUL_CPU_TARGET_H

#define KRUL_CPU_PRAGMA(words) _Pragma(#words)

#if defined(__clang__)
#define KRUL_CPU_WIDE ""
#define KRUL_CPU_TARGET_BEGIN(names)                                                               \
    KRUL_CPU_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define KRUL_CPU_TARGET_END _Pragma("clang attribute pop")
#else
#define KRUL_CPU_WIDE ",prefer-vector-width=512"
#define KRUL_CPU_TARGET_BEGIN(names)                                                               \
    KRUL_CPU_PRAGMA(GCC push_options) KRUL_CPU_PRAGMA(GCC target(names))
#define KRUL_CPU_TARGET_END _Pragma("GCC pop_options")
#endif

#endif /* KRUL_CPU_TARGET_H */
