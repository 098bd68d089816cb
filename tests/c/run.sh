#!/usr/bin/env bash
# run.sh - build the C library once and run every tests/c/test_*.c against it; no Python.
#
# Usage: tests/c/run.sh [-c COMPILER] [-s SANITIZERS] [-f "MORE FLAGS"] [-o DIRECTORY] [NAME...]
#   -c  compiler, default cc            -s  a list for -fsanitize=, default none
#   -f  more compiler and linker flags  -o  where objects go, default build/c/<compiler>-<sanitizers>
#   NAME  run test_NAME.c only; default all
# Exit status 0 when every test passed; the last line tells how many programs did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

compiler=cc sanitizers='' more='' out=''
while getopts c:s:f:o: option; do
    case $option in
        c) compiler=$OPTARG ;;
        s) sanitizers=$OPTARG ;;
        f) more=$OPTARG ;;
        o) out=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
out=${out:-build/c/$compiler-${sanitizers:-plain}}
mkdir -p "$out"

flags=(-std=c11 -D_GNU_SOURCE -O2 -g -ffp-contract=off -pthread
    -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wvla -Wstrict-prototypes -Wmissing-prototypes
    -Wformat=2 -Werror)
[[ -z $sanitizers ]] || flags+=("-fsanitize=$sanitizers" -fno-omit-frame-pointer -fno-sanitize-recover=all)
read -ra extra <<<"$more"
flags+=(${extra[@]+"${extra[@]}"})

# Objects in parallel, two at a time, each only when something it may include is newer.
newest_header=$(ls -t csrc/*.h csrc/*/*.h csrc/*/*.inc tests/c/*.h | head -n 1)
objects=() pending=()
for source in csrc/*.c csrc/kernels/*.c; do
    object=$out/$(basename "$source" .c).o
    objects+=("$object")
    if [[ ! $object -nt $source || ! $object -nt $newest_header ]]; then
        pending+=("$source")
    fi
done
if ((${#pending[@]})); then
    printf '%s\n' "${pending[@]}" | xargs -P 2 -I {} \
        sh -c 'out=$1 source=$2; shift 2; "$@" -c "$source" -o "$out/$(basename "$source" .c).o"' \
        sh "$out" {} "$compiler" "${flags[@]}"
fi

# Libraries for test_blas.c, each right or wrong in its own way; without sanitizers, as real ones are.
stubs=(
    "none"
    "cblas -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t"
    "cblas_64 -DSTUB_CBLAS=scipy_cblas_sgemm64_ -DSTUB_INTEGER=int64_t"
    "cblas_wide -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int64_t"
    "fortran -DSTUB_FORTRAN=sgemm_ -DSTUB_INTEGER=int32_t"
    "fortran_64 -DSTUB_FORTRAN=sgemm_64_ -DSTUB_INTEGER=int64_t"
    "fortran_wide -DSTUB_FORTRAN=sgemm_ -DSTUB_INTEGER=int64_t"
    "counts -DSTUB_FORTRAN=SGEMM_64 -DSTUB_INTEGER=int64_t -DSTUB_COUNTS_THREADS"
    "bf16 -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t -DSTUB_BF16=0"
    "bf16_wrong -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t -DSTUB_BF16=1"
    "ignores_beta -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t -DSTUB_IGNORES_BETA"
    "reads_c -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t -DSTUB_READS_C"
    "writes_beside -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t -DSTUB_WRITES_BESIDE"
    "mixed_up -DSTUB_FORTRAN=sgemm_ -DSTUB_INTEGER=int32_t -DSTUB_MIXED_UP"
)
for stub in "${stubs[@]}"; do
    read -ra words <<<"$stub"
    library=$out/libstub_${words[0]}.so
    if [[ ! $library -nt tests/c/stub_blas.c || ! $library -nt tests/c/run.sh ]]; then
        "$compiler" -std=c11 -O1 -g -fPIC -shared -Wall -Wextra -Werror "${words[@]:1}" \
            tests/c/stub_blas.c -o "$library"
    fi
done

n_passed=0 failed=()
if (($#)); then tests=("${@/#/tests/c/test_}") && tests=("${tests[@]/%/.c}"); else tests=(tests/c/test_*.c); fi
for test in "${tests[@]}"; do
    program=$out/$(basename "$test" .c)
    "$compiler" "${flags[@]}" -Icsrc -Itests/c "$test" "${objects[@]}" -o "$program" -lm -ldl
    printf '%s: ' "$(basename "$program")"
    if ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1} TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1} \
        "$program"; then
        n_passed=$((n_passed + 1))
    else
        failed+=("$(basename "$program")")
    fi
done
echo "$compiler ${sanitizers:-no sanitizer}: $n_passed programs passed, ${#failed[@]} failed ${failed[*]-}"
((${#failed[@]} == 0))
