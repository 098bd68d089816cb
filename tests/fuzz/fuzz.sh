#!/usr/bin/env bash
# fuzz.sh - replay what the fuzzers ever found, or look for more.
#
# Usage: tests/fuzz/fuzz.sh [-t SECONDS] [-c COMPILER] [NAME...]
#   -t  fuzz each target for so long with libFuzzer (needs clang); without it, replay the corpus,
#       tests/data/golden and tests/data/malformed with any compiler
#   -c  compiler, default clang-19 or clang for -t, cc for a replay
#   NAME  store, codecs; default both
# What a run finds is left in build/fuzz as crash-*: move it to tests/fuzz/corpus/<NAME> once fixed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds='' compiler=''
while getopts t:c: option; do
    case $option in
        t) seconds=$OPTARG ;;
        c) compiler=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
names=("$@")
(($#)) || names=(store codecs)
if [[ -z $compiler ]]; then
    compiler=cc
    [[ -z $seconds ]] || compiler=$(command -v clang-19 || command -v clang)
fi

out=build/fuzz
mkdir -p "$out"
flags=(-std=c11 -D_GNU_SOURCE -O1 -g -ffp-contract=off -pthread -Icsrc
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
    -Wall -Wextra -Wshadow -Wvla -Werror)
# Products for fuzz_codecs.c, without sanitizers, as real libraries are.
"$compiler" -std=c11 -O1 -fPIC -shared -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t \
    tests/c/stub_blas.c -o "$out/libstub_cblas.so"
for name in "${names[@]}"; do
    sources=("tests/fuzz/fuzz_$name.c" csrc/*.c csrc/kernels/*.c)
    if [[ -n $seconds ]]; then
        "$compiler" "${flags[@]}" -fsanitize=fuzzer -o "$out/fuzz_$name" "${sources[@]}" -lm -ldl
        mkdir -p "$out/$name"
        "$out/fuzz_$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=8192 \
            -print_final_stats=1 -artifact_prefix="$out/" "$out/$name" "tests/fuzz/corpus/$name"
    else
        "$compiler" "${flags[@]}" -o "$out/replay_$name" tests/fuzz/replay.c "${sources[@]}" -lm -ldl
        printf '%s: ' "$name"
        "$out/replay_$name" "tests/fuzz/corpus/$name" tests/data/golden tests/data/malformed
    fi
done
