#!/usr/bin/env bash
# What only a GPU can show, in stages of at most eight minutes each, in order of importance. Needs no network.
#
#   benchmarks/gpu.sh STAGE... FOLDER
#
#   build       the extension for this GPU, and what this machine has (every other stage begins with it)
#   correct     the GPU tests and the kernels' own: every kernel and dtype against float64, graphs, no synchronisation
#   sanitize    compute-sanitizer memcheck and racecheck over the kernels at small, ragged shapes
#   bench       the table: our ops, eager, other packages
#   class_mean  class_mean_ema against copy bandwidth
#   compiled    torch.compile of eager at the main shapes (compiling takes most of its time)
#   tune        block sizes by time
#   ncu         tensor-pipe and memory utilisation of the main kernels at N = 16k, D = 128
#   train       a training step of ResNet-50 with AllNC and with plain CE: contrast over 1,024 and 4,096 images
#   all         all of these
#
# FOLDER gets one log a stage and the CSV files. What a machine lacks is said and left out. Wheels in ./.whl (pytest's
# plugins, rivals) are installed first. Where only few files can be taken home: tar czf home.tgz FOLDER
set -uo pipefail
cd "$(dirname "$0")/.."
known="build correct sanitize bench class_mean compiled tune ncu train"
if [ $# -lt 2 ]; then
    sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=${!#}
stages=("${@:1:$#-1}")
[ "${stages[0]}" = all ] && read -ra stages <<<"$known"
for stage in "${stages[@]}"; do
    case " $known " in
        *" $stage "*) ;;
        *) echo "no stage '$stage'; there are: $known, all" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
summary=()
log=$out/build.txt

say() { echo "$*" | tee -a "$log"; }

missing() { # missing WHAT CONSEQUENCE: something this machine does not have
    say "MISSING: $1: $2"
    summary+=("missing  $1: $2")
}

part() { # part NAME SECONDS COMMAND...: run it, keep its output, go on if it fails
    local name=$1 seconds=$2 start=$SECONDS code lines
    shift 2
    say "== $name (at most $seconds s): $*"
    lines=$(wc -l <"$log")
    timeout -k 10 "$seconds" "$@" >>"$log" 2>&1
    code=$?
    if [ $code -eq 0 ]; then
        summary+=("ok       $name, $((SECONDS - start)) s")
    elif [ $code -eq 124 ] || [ $code -eq 137 ]; then
        summary+=("STOPPED  $name after $seconds s; what it had is in $log")
        failed=1
    else
        summary+=("FAILED   $name (exit $code), $((SECONDS - start)) s; $log:")
        # The first failures, and the last words: what one wants to see without fetching the log.
        while IFS= read -r line; do summary+=("         | ${line:0:180}"); done < <(
            tail -n "+$((lines + 1))" "$log" | grep -E '^(FAILED|ERROR|E  )|Error|========= (Invalid|Race|ERROR SUMMARY)' | head -n 8
            tail -n 4 "$log"
        )
        failed=1
    fi
    tail -n "+$((lines + 1))" "$log" | tail -n 3
}

has() { "$python" -c "import $1" 2>/dev/null; }

build() {
    if compgen -G ".whl/*.whl" >/dev/null; then
        part wheels 120 "$python" -m pip install -q --no-index --no-deps --upgrade --target /tmp/allnc-wheels .whl/*.whl
        export PYTHONPATH=$PYTHONPATH:/tmp/allnc-wheels
    fi
    if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then # this GPU alone: a third of the time
        TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null) \
            && export TORCH_CUDA_ARCH_LIST || unset TORCH_CUDA_ARCH_LIST
    fi
    part build 400 "$python" setup.py build_ext --inplace
    part info 60 "$python" -m allnc.info
    "$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))' >>"$log" 2>&1 \
        || missing "CUDA device" "figures are a CPU's, GPU tests skip"
    "$python" -c 'from allnc import _extension; raise SystemExit(not _extension.has_cuda())' \
        || missing "CUDA kernels in the extension" "class_mean_ema falls back to eager on a GPU"
    has jsonargparse || missing jsonargparse "the tests of the trainer, configuration and README are left out"
    for package in pytorch_metric_learning inf_cl siglip_kernel; do
        has $package || missing $package "its rows say so"
    done
}

correct() {
    has pytest || { missing pytest "no tests are run"; return; }
    has hypothesis || missing hypothesis "tests that import it are left out"
    local rest=()
    has jsonargparse || rest=(--ignore=tests/trainer --ignore=tests/test_config.py --ignore=tests/test_readme.py)
    has xdist && rest+=(-n 6) # most of the time is Triton compiling, on the CPU
    local run=("$python" -m pytest -q --continue-on-collection-errors --tb=short -p no:cacheprovider)
    part correct 260 "${run[@]}" -m gpu tests "${rest[@]}"
    part kernels 200 "${run[@]}" --ignore=tests/kernels/test_compile.py tests/kernels "${rest[@]}"
}

sanitize() {
    type -P compute-sanitizer >/dev/null || { missing compute-sanitizer "memory errors and races are not looked for"; return; }
    # No caching allocator: an access past the end of one tensor must not land in the next.
    local tool=(compute-sanitizer --error-exitcode 1 --print-limit 20)
    part memcheck 220 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool[@]}" --tool memcheck "$python" benchmarks/exercise.py
    part racecheck 160 "${tool[@]}" --tool racecheck "$python" benchmarks/exercise.py --n 130 --d 40 128 --dtypes bfloat16
    part racecheck-deterministic 80 "${tool[@]}" --tool racecheck "$python" benchmarks/exercise.py --n 130 --d 128 --dtypes bfloat16 --deterministic
}

bench() {
    local run=("$python" benchmarks/run.py --preset "$preset" --seconds "$seconds" --min-runs 5)
    part bench-hycon 210 "${run[@]}" --ops hycon --providers autocast dense fused fused-graph --out "$out"
    part bench-pairs 110 "${run[@]}" --ops pairs supcon \
        --providers autocast fused fused-graph pytorch-metric-learning inf-cl siglip-kernel --out "$out"
    part bench-others 80 "${run[@]}" --ops p2p all_around --providers autocast dense fused fused-graph --out "$out"
    local one=(--ops hycon --n $main_rows --d 128 --classes 1000 --providers dense fused --out "$out")
    part bench-tf32 40 "${run[@]}" "${one[@]}" --dtype tf32
    part bench-float32 40 "${run[@]}" "${one[@]}" --dtype float32
}

class_mean() {
    part class_mean 200 "$python" benchmarks/run.py --preset "$preset" --ops class_mean_ema --seconds "$seconds" --min-runs 10 \
        --providers fused --out "$out"
}

compiled() {
    part compiled 400 "$python" benchmarks/run.py --preset "$preset" --ops hycon pairs class_mean_ema --n $main_rows --d 128 \
        --classes 1000 --features 512 --seconds "$seconds" --providers compiled fused --out "$out/compiled"
}

tune() {
    local d
    for d in 128 64 256 512; do
        part "tune-$d" 110 "$python" benchmarks/machine_code/tune.py --n 16384 --dim $d --dtype bfloat16
        sed -n '/^== tune-'$d' /,$p' "$log" | tail -n 12 # the rows to paste
    done
}

ncu() {
    type -P ncu >/dev/null || { missing ncu "utilisation is not measured"; return; }
    # Tensor pipe, the unit of the exponentials, memory, all units; names differ between architectures and versions.
    local wanted=(
        sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
        sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active
        sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active
        sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active
        sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active
        sm__throughput.avg.pct_of_peak_sustained_elapsed
        sm__warps_active.avg.pct_of_peak_sustained_active
        dram__throughput.avg.pct_of_peak_sustained_elapsed
        lts__throughput.avg.pct_of_peak_sustained_elapsed
        gpu__time_duration.sum
    )
    local there metrics="" metric
    there=$(command ncu --query-metrics 2>>"$log" | awk '{print $1}')
    for metric in "${wanted[@]}"; do
        if grep -qx "${metric%%.*}" <<<"$there"; then metrics+=${metrics:+,}$metric; else say "ncu has no ${metric%%.*} here"; fi
    done
    part ncu 300 ncu --clock-control none --target-processes all --kernel-name 'regex:hycon|all_around|^(count|scan|group|heavy|split|segment|segment_sum|update|gradient)_kernel' \
        --metrics "$metrics" --csv --page raw --log-file "$out/ncu.csv" \
        "$python" benchmarks/exercise.py --ops hycon class_mean_ema --n 16384 --d 128 --classes 1000 --features 2048 \
        --dtypes bfloat16 --rounds 2
}

train() {
    has jsonargparse || { missing jsonargparse "the trainer is not measured"; return; }
    local size
    for size in $images; do
        part "train-$size" 200 "$python" benchmarks/step_share.py imagenet_lt --batch-size "$size" --micro-batch "$micro" --seconds 20
    done
}

failed=0
if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
    preset=gpu seconds=0.5 main_rows=16384 images='256 1024 4096' micro=256
else # a rehearsal
    preset=cpu seconds=0.2 main_rows=512 images=8 micro=4
fi
: >"$log"
build
for stage in "${stages[@]}"; do
    [ "$stage" = build ] && continue
    log=$out/$stage.txt
    : >"$log"
    "$stage"
done
case " ${stages[*]} " in
    *" bench "* | *" class_mean "* | *" compiled "*)
        echo "== forward and backward"
        "$python" benchmarks/table.py $(find "$out" -name '*.csv' ! -name ncu.csv | sort) | tee "$out/table.txt"
        ;;
esac
echo "== summary"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
