#!/usr/bin/env bash
# Checks fastserve on this machine's GPU, and prints one summary: the tests that need a GPU (kernels, and the engine with
# graphs, overlap, speculation, prefix cache, fewer bits and CPU offloading), a worker that answers, and a short
# `python -m benchmarks.gpu`. Ends within 8 minutes on one H100 or H200; the report is written anew after each part, and
# names the parts that were left out. Exits with 1 when something failed or was left out for want of time.
#   benchmarks/gpu_check.sh          on a machine with a GPU of CUDA
#   benchmarks/gpu_check.sh --tiny   on a CPU, with small sizes: tries the script itself
#   PYTHON   the interpreter, with fastserve's dependencies and pytest (default: python3)
#   OUT      a folder for the logs and report.txt (default: a new one)
#   MINUTES  for all parts together (default: 8)
#   PARTS    which parts to run, such as "tests worker" (default: all)
#   LAYERS   of the model that is measured (default: 32; fewer for a card of less than 64 GB)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-$(mktemp -d)}
parts=${PARTS:-tests worker decode quantized}
layers=${LAYERS:-32}
end=$((SECONDS + 60 * ${MINUTES:-8}))
unset FASTSERVE_API_KEYS  # the worker is asked without a key
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
device=cuda
sizes=(--layers "$layers" --rounds 2)
tests=(tests/engine/test_on_gpu.py tests/engine/test_placement.py tests/engine/test_decode_graphs.py
    tests/engine/test_ranks_on_gpu.py tests/engine/test_triton_attention.py tests/engine/test_triton_quantized.py
    tests/engine/test_triton_elementwise.py)
if [[ ${1:-} == --tiny ]]; then
    device=cpu
    sizes=(--tiny --layers 2 --rounds 1 --bandwidth 2e10 --batches 1 4 --context 64 --prefill 128 --new-tokens 8
        --no-peer)
    tests=(tests/engine/test_on_gpu.py tests/engine/test_ranks_on_gpu.py)
    export FASTSERVE_TEST_DEVICE=cpu
fi
mkdir -p "$out"
summary=()
failed=0

# part NAME SECONDS COMMAND...: runs a command for so long at most, and no longer than there is time for all parts; its
# output goes to the log of that name, and how it ended into the report.
part() {
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    if [[ " $parts " != *" ${name%%-*} "* ]]; then
        note "$name: left out, not among PARTS"
        return 0
    fi
    ((limit > end - SECONDS)) && limit=$((end - SECONDS))
    if ((limit < 15)); then
        failed=1
        note "$name: LEFT OUT, no time is left"
        return 0
    fi
    echo "==> $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    local how="passed"
    if [[ $code -ne 0 ]]; then
        failed=1
        how="FAILED"
        [[ $code -eq 124 || $code -eq 137 ]] && how="FAILED (stopped after $limit s)"
        tail -n 40 "$out/$name.log"
    fi
    note "$name: $how, $((SECONDS - begin)) s"
}

# Adds a line to the summary, and writes the report anew.
note() {
    summary+=("$1")
    printf '%s\n' "${summary[@]}" >"$out/report.txt"
}

# Lines of a part's log that belong into the summary.
show() {
    [[ -f $out/$1.log ]] && while IFS= read -r line; do note "    $line"; done < <(grep -E "$2" "$out/$1.log")
}

# A lone worker on the demo model, asked as a user would. Prints its answer.
ask_worker() {
    local port address pid code=1
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    address=http://127.0.0.1:$port
    "$python" -m fastserve.model_worker --no-register --model-path fastserve-demo --device "$device" --port "$port" &
    pid=$!
    local body='{"model": "fastserve-demo", "temperature": 0, "messages": [{"role": "user", "content": "What is 7 + 5?"}]}'
    for _ in $(seq 100); do
        curl --silent --fail --max-time 5 "$address/ready" >/dev/null && break
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 1
    done
    curl --silent --show-error --max-time 30 -H 'Content-Type: application/json' -d "$body" \
        "$address/v1/chat/completions" | tee "$out/answer.json"
    echo
    grep -q '"content": *"12"' "$out/answer.json" && code=0
    kill "$pid" 2>/dev/null && wait "$pid"
    return $code
}
export -f ask_worker
export python device out

spread=()
"$python" -c 'import xdist' 2>/dev/null && spread=(-n "$(($(nproc) < 16 ? $(nproc) : 16))")
part tests 270 "$python" -m pytest -q -m gpu --tb short --timeout 300 -p no:cacheprovider "${spread[@]}" "${tests[@]}"
show tests '^(FAILED|ERROR) |^[0-9]+ (passed|failed)'
part worker 90 bash -c ask_worker
show worker '"content"'
part decode 180 "$python" -m benchmarks.gpu --device "$device" "${sizes[@]}"
show decode '^(measured|prefill|decode| +limit)|, torch |; limits by '
part quantized-int8 90 "$python" -m benchmarks.gpu --device "$device" "${sizes[@]}" --no-peer --quantize int8
show quantized-int8 '^(prefill|decode| +limit)'
part quantized-nf4 90 "$python" -m benchmarks.gpu --device "$device" "${sizes[@]}" --no-peer --quantize nf4
show quantized-nf4 '^(prefill|decode| +limit)'

echo
echo "==> summary (logs and report.txt in $out)"
cat "$out/report.txt"
exit $failed
