#!/usr/bin/env bash
# run.sh - builds the CUDA code as C++ against an emulator and runs its tests; or compiles it for GPUs.
#
# Usage: tests/cuda/run.sh [-c C_COMPILER] [-s SANITIZERS] [-f FLAGS] [-o DIR] [-r N] [NAME...]
#        tests/cuda/run.sh -g [-b] [-c C_COMPILER] [-o DIR] [-p PREFIX] [NAME...]
#        tests/cuda/run.sh -n [-o DIR]
#   -g  build the same tests with nvcc and run them on the GPU at hand (on_gpu.h); NAMEs are then
#       without cuda_. Where there is no GPU they are built for one, which is said, and not run
#   -b  only build
#   -p  what runs each program, and gives it the argument "quick": "compute-sanitizer --tool memcheck"
#   -r  run each program N times more, with its threads in other orders (EMULATE_ORDER)
#   -n  only compile every cuda/*.cu with nvcc, for every architecture, warnings being errors; the
#       objects are thrown away. Where there is no nvcc that is said, and nothing fails.
#   -c  gcc, clang-19, ...; its C++ compiler is found by name. Default cc
#   -s  a list for -fsanitize=, default none
#   -f  more compiler and linker flags
#   -o  where objects go, default build/cuda/<compiler>-<sanitizers>
#   NAME  run test_NAME.cpp only; default all
# Exit status 0 when every test passed; the last line tells how many programs did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

compiler=cc sanitizers='' more='' out='' for_gpus='' on_gpu='' only_build='' prefix='' n_orders=0
while getopts c:s:f:o:ngbp:r: option; do
    case $option in
        c) compiler=$OPTARG ;;
        s) sanitizers=$OPTARG ;;
        f) more=$OPTARG ;;
        o) out=$OPTARG ;;
        n) for_gpus=1 ;;
        g) on_gpu=1 ;;
        b) only_build=1 ;;
        p) prefix=$OPTARG ;;
        r) n_orders=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))

if [[ -n $for_gpus ]]; then
    nvcc=${NVCC:-nvcc}
    command -v "$nvcc" >/dev/null || { echo "no nvcc: the CUDA code was not compiled"; exit 0; }
    architectures=()
    for number in 80 86 89 90 100 120; do
        architectures+=(-gencode "arch=compute_$number,code=sm_$number")
    done
    architectures+=(-gencode arch=compute_80,code=compute_80) # PTX, for what comes after
    out=${out:-build/cuda/nvcc}
    mkdir -p "$out"
    printf '%s\n' cuda/*.cu | xargs -P 2 -I {} sh -c 'source=$1 out=$2; shift 2
        "$@" -c "$source" -o "$out/$(basename "$source").o" || exit 255' sh {} "$out" \
        "$nvcc" -std=c++17 -O3 -Icsrc -Icuda --threads 2 -Werror all-warnings \
        -Xcompiler -Wall,-Wextra,-Werror "${architectures[@]}"
    echo "$("$nvcc" --version | tail -n 2 | head -n 1): $(ls cuda/*.cu | wc -l) files for" \
        "$(((${#architectures[@]} - 2) / 2)) architectures and PTX, no warning"
    rm -f "$out"/*.cu.o
    exit 0
fi

if [[ -n $on_gpu ]]; then
    nvcc=${NVCC:-nvcc}
    architecture=native
    if ! nvidia-smi --id=0 >/dev/null 2>&1; then
        architecture=sm_80 only_build=1
        echo "there is no GPU: the tests are built for one, and not run"
    fi
    out=${out:-build/cuda/gpu}
    mkdir -p "$out"
    c_flags=(-std=c11 -D_GNU_SOURCE -O2 -g -ffp-contract=off -pthread -Icsrc -Icuda -Wall -Wextra
        -Werror)
    nvcc_flags=(-std=c++17 -O3 -lineinfo "-arch=$architecture" -DKRUL_ON_GPU -Icsrc -Icuda -Itests/c
        -Itests/cuda -Werror all-warnings -Xcompiler "-Wall,-Wextra,-Werror,-pthread")
    if (($#)); then
        names=("$@")
    else
        names=(decode encode estimator predict restore)
    fi
    make_one() { # SOURCE OBJECT
        [[ $2 -nt $1 && $2 -nt $newest_header ]] && return
        case $1 in
            *.c) "$compiler" "${c_flags[@]}" -c "$1" -o "$2" ;;
            *.cu) "$nvcc" "${nvcc_flags[@]}" -c "$1" -o "$2" ;;
            *) "$nvcc" "${nvcc_flags[@]}" -include tests/cuda/emulate.h -c "$1" -o "$2" ;;
        esac
    }
    newest_header=$(ls -t csrc/*.h csrc/*/*.h csrc/*/*.inc tests/c/*.h tests/cuda/*.h cuda/*.cuh \
        cuda/*.h tests/cuda/run.sh | head -n 1)
    objects=() jobs=()
    n_jobs=$(nproc --all)
    for source in cuda/*.cu "${names[@]/#/tests/cuda/test_cuda_}" csrc/*.c csrc/kernels/*.c; do
        [[ $source == tests/* ]] && source+=.cpp
        object=$out/$(basename "$source").o
        [[ $source == tests/* ]] || objects+=("$object")
        make_one "$source" "$object" &
        jobs+=($!)
        if ((${#jobs[@]} >= n_jobs)); then
            wait "${jobs[0]}"
            jobs=("${jobs[@]:1}")
        fi
    done
    for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job"; done
    "$compiler" -std=c11 -O2 -fPIC -shared -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t \
        tests/c/stub_blas.c -o "$out/libstub_cblas.so" -lm
    read -ra runner <<<"$prefix"
    [[ -z $prefix ]] || runner_argument=quick
    n_passed=0 failed=()
    for name in "${names[@]}"; do
        program=$out/test_cuda_$name
        "$nvcc" "-arch=$architecture" "$out/test_cuda_$name.cpp.o" "${objects[@]}" -o "$program" \
            -lm -ldl -lpthread
        [[ -z $only_build ]] || continue
        printf '%s: ' "test_cuda_$name"
        if ${runner[@]+"${runner[@]}"} "$program" ${runner_argument:-}; then
            n_passed=$((n_passed + 1))
        else
            failed+=("$name")
        fi
    done
    if [[ -n $only_build ]]; then
        echo "nvcc $architecture: ${#names[@]} programs built"
        exit 0
    fi
    echo "on the GPU: $n_passed programs passed, ${#failed[@]} failed ${failed[*]-}"
    ((${#failed[@]} == 0))
    exit
fi

case $compiler in
    cc) cxx=c++ ;;
    *gcc*) cxx=${compiler/gcc/g++} ;;
    *clang*) cxx=${compiler/clang/clang++} ;;
    *) echo "no C++ compiler is known that goes with $compiler" >&2; exit 2 ;;
esac
out=${out:-build/cuda/$compiler-${sanitizers:-plain}}
mkdir -p "$out"

common=(-D_GNU_SOURCE -O1 -g -ffp-contract=off -pthread -Icsrc -Icuda -Itests/c -Itests/cuda
    -Wall -Wextra -Werror)
[[ -z $sanitizers ]] || common+=("-fsanitize=$sanitizers" -fno-omit-frame-pointer -fno-sanitize-recover=all)
read -ra extra <<<"$more"
common+=(${extra[@]+"${extra[@]}"})
c_flags=(-std=c11 "${common[@]}")
# #pragma unroll and casts that only look wrong on a CPU.
cxx_flags=(-std=c++17 "${common[@]}" -Wno-unknown-pragmas -include tests/cuda/emulate.h
    -include tests/cuda/emulate_mma.h)

# Objects two at a time, each only when something it may include is newer.
newest_header=$(ls -t csrc/*.h csrc/*/*.h csrc/*/*.inc tests/c/*.h tests/cuda/*.h cuda/*.cuh cuda/*.h | head -n 1)
objects=() pending=()
for source in csrc/*.c csrc/kernels/*.c cuda/*.cu; do
    [[ -e $source ]] || continue
    object=$out/$(basename "$source").o
    objects+=("$object")
    if [[ ! $object -nt $source || ! $object -nt $newest_header ]]; then
        pending+=("$source")
    fi
done
compile() {
    local source=$1 object
    object=$out/$(basename "$source").o
    case $source in
        *.c) "$compiler" "${c_flags[@]}" -c "$source" -o "$object" ;;
        *) "$cxx" "${cxx_flags[@]}" -x c++ -c "$source" -o "$object" ;;
    esac
}
running=()
for source in ${pending[@]+"${pending[@]}"}; do
    compile "$source" &
    running+=($!)
    if ((${#running[@]} == 2)); then
        wait "${running[0]}"
        running=("${running[1]}")
    fi
done
for job in ${running[@]+"${running[@]}"}; do wait "$job"; done

# Libraries that tests open beside their programs; without sanitizers, as real ones are.
libraries=(
    "stub_cblas tests/c/stub_blas.c -DSTUB_CBLAS=cblas_sgemm -DSTUB_INTEGER=int32_t"
    "stub_cublas tests/cuda/stub_cublas.c"
    "stub_cublas_13 tests/cuda/stub_cublas.c -Wl,-soname,libcublas.so.13"
    "stub_cublas_lacking tests/cuda/stub_cublas.c -DSTUB_LACKS_GEMM"
)
for library in "${libraries[@]}"; do
    read -ra words <<<"$library"
    file=$out/lib${words[0]}.so
    if [[ ! $file -nt ${words[1]} || ! $file -nt tests/cuda/run.sh ]]; then
        "$compiler" -std=c11 -O2 -g -fPIC -shared -Wall -Wextra -Werror "${words[@]:2}" "${words[1]}" \
            -o "$file" -lm
    fi
done

n_passed=0 failed=()
if (($#)); then
    tests=("${@/#/tests/cuda/test_}") && tests=("${tests[@]/%/.cpp}")
else
    tests=(tests/cuda/test_*.cpp)
fi
for test in "${tests[@]}"; do
    program=$out/$(basename "$test" .cpp)
    "$cxx" "${cxx_flags[@]}" "$test" "${objects[@]}" -o "$program" -lm -ldl
    printf '%s: ' "$(basename "$program")"
    export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1}
    is_good=1
    "$program" || is_good=''
    # From 2 on, since what a test asks for itself is added, and 0 and 1 it has asked for. The
    # emulator's own test is about the orders that it asks for.
    for ((order = 2; order < 2 + n_orders; order++)); do
        [[ $test != */test_emulate.cpp ]] || continue
        printf '%s, order %d: ' "$(basename "$program")" "$order"
        EMULATE_ORDER=$order "$program" || is_good=''
    done
    if [[ -n $is_good ]]; then
        n_passed=$((n_passed + 1))
    else
        failed+=("$(basename "$program")")
    fi
done
echo "$compiler ${sanitizers:-no sanitizer}: $n_passed programs passed, ${#failed[@]} failed ${failed[*]-}"
((${#failed[@]} == 0))
