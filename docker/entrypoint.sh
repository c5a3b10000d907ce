#!/usr/bin/env bash
# Starts tritonserver on a deployed repository. Settings come from the environment; a wrong setting is refused before the start.
set -euo pipefail
trap 'exit 143' TERM INT # process 1 gets these signals only if it has a handler

TRITON_HOME=${TRITON_HOME:-/opt/tritonserver}
MODEL_REPOSITORY=${MODEL_REPOSITORY:-/models}
CONFIG=${CONFIG:-default}
BIND_ADDRESS=${BIND_ADDRESS:-0.0.0.0}
METRICS_ADDRESS=${METRICS_ADDRESS:-$BIND_ADDRESS}
GRPC_PORT=${GRPC_PORT:-8001}
HTTP_PORT=${HTTP_PORT:-8000}
METRICS_PORT=${METRICS_PORT:-8002}
HEALTH_PORT=${HEALTH_PORT:-8003}
HEALTH_ADDRESS=${HEALTH_ADDRESS:-$BIND_ADDRESS}
EXIT_TIMEOUT_S=${EXIT_TIMEOUT_S:-600}
NOTICE_S=${NOTICE_S:-0}
LOG_FORMAT=${LOG_FORMAT:-text}
OTEL_TRACES_RATE=${OTEL_TRACES_RATE:-1}
REFUSAL_EXIT_CODE=${REFUSAL_EXIT_CODE:-2} # compose.yaml sets 0, because Docker restarts a container that exits with another code

LAST_S=15 # for Triton's own shutdown, which begins when the last sample has ended or EXIT_TIMEOUT_S has passed

fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit "$REFUSAL_EXIT_CODE"
}

# number NAME VALUE MIN MAX
number() {
    if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
        fail "$1 must be in $3..$4, got '$2'" "set $1 in the environment"
    fi
}

# readable NAME PATH
readable() {
    [[ -r $2 && -s $2 ]] || fail "$1 must be a readable, non-empty file, got '$2'" "mount it as a secret"
}

for name in GRPC_PORT HTTP_PORT METRICS_PORT HEALTH_PORT; do number "$name" "${!name}" 1 65535; done
number EXIT_TIMEOUT_S "$EXIT_TIMEOUT_S" 0 86400
number NOTICE_S "$NOTICE_S" 0 600
number OTEL_TRACES_RATE "$OTEL_TRACES_RATE" 1 999999
[[ $CONFIG =~ ^(default|cpu|onnxruntime|torch)$ ]] || fail "CONFIG must be default, cpu, onnxruntime or torch, got '$CONFIG'" "CONFIG=default serves TensorRT plans"
[[ $LOG_FORMAT =~ ^(text|json)$ ]] || fail "LOG_FORMAT must be text or json, got '$LOG_FORMAT'" "LOG_FORMAT=json writes one JSON object per line"
[[ -r $MODEL_REPOSITORY/hunyuan3d_sampler/config.pbtxt ]] || fail "MODEL_REPOSITORY must be a model repository, got '$MODEL_REPOSITORY'" "make one with hunyuan3d-export deploy --repository DIR and mount it there"
compose_export="docker compose --profile export run --rm export"
case $CONFIG in
    default) artifact=model.plan hint="$compose_export engine --checkpoint FILE --onnx build/onnx --out build/plans, then $compose_export deploy --artifacts build/plans" ;;
    torch) artifact=checkpoint.safetensors hint="hunyuan3d-export deploy --checkpoint FILE --repository DIR" ;;
    *) artifact=model.onnx hint="make deploy CHECKPOINT=FILE" ;;
esac
[[ -r $MODEL_REPOSITORY/hunyuan3d_dit/1/$artifact ]] || fail "hunyuan3d_dit must have a deployed $artifact for CONFIG=$CONFIG, found none in '$MODEL_REPOSITORY'" "$hint"
if [[ $CONFIG == torch ]] && ! python3 -c 'import hunyuan3d_export, torch' 2>/dev/null; then
    fail "CONFIG=torch must run where torch and hunyuan3d_export are installed, got an image without them" \
        "use CONFIG=default or cpu, or serve without a container: hunyuan3d-export serve --config torch"
fi

# Every API except inference and health requires the key. Without API_KEY_FILE the key is random, so nobody can use those APIs.
if [[ -n ${API_KEY_FILE:-} ]]; then
    readable API_KEY_FILE "$API_KEY_FILE"
    key=$(<"$API_KEY_FILE")
    [[ $key =~ ^[A-Za-z0-9_-]{16,}$ ]] || fail "API_KEY_FILE must hold at least 16 letters, digits, - or _, got ${#key} characters" "openssl rand -hex 32 > api_key"
else
    key=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
fi
# Triton's HTTP has no TLS. If gRPC uses TLS, HTTP by default listens on 127.0.0.1 only, for the health checks.
HTTP_ADDRESS=${HTTP_ADDRESS:-${TLS_CERT_FILE:+127.0.0.1}}
HTTP_ADDRESS=${HTTP_ADDRESS:-$BIND_ADDRESS}
restricted=metadata,model-config,shared-memory,model-repository,statistics,trace,logging

here=$(dirname "$0")
if [[ $LOG_FORMAT == json ]]; then
    exec {log}> >(exec python3 -u "$here/json_log.py")
else
    exec {log}>&2
fi

# logged COMMAND...: becomes the command, whose lines are then in the form of LOG_FORMAT
logged() {
    if [[ $LOG_FORMAT == json ]]; then
        exec "$@" >&"$log" 2>&1
    else
        exec "$@"
    fi
}

state=$(mktemp -d "${TMPDIR:-/tmp}/hunyuan3d.XXXXXX")
trap 'rm -rf "$state"' EXIT
mkdir "$state/models"
pool=$(python3 "$here/loadable.py" "$MODEL_REPOSITORY" "$CONFIG" "$state/models" 2>&"$log")
compatible=
if [[ $CONFIG == default ]]; then # TensorRT's own words about a plan of another version name neither the cause nor a remedy
    code=0
    compatible=$(python3 "$here/server_image.py" "$state/models") || code=$?
    ((code != 2)) || exit "$REFUSAL_EXIT_CODE"
    ((code == 0)) || exit "$code"
fi

flags=(
    "--model-repository=$state/models"
    "--backend-directory=$TRITON_HOME/backends"
    "--model-config-name=$CONFIG"
    --model-control-mode=none
    --disable-auto-complete-config
    "--exit-timeout-secs=$((EXIT_TIMEOUT_S < LAST_S ? EXIT_TIMEOUT_S : LAST_S))"
    "--grpc-address=$BIND_ADDRESS" "--grpc-port=$GRPC_PORT"
    "--http-address=$HTTP_ADDRESS" "--http-port=$HTTP_PORT"
    "--metrics-address=$METRICS_ADDRESS" "--metrics-port=$METRICS_PORT"
    "--grpc-restricted-protocol=$restricted:hunyuan3d-key=$key"
    "--http-restricted-api=$restricted:hunyuan3d-key=$key"
)
for flag in "$pool" "$compatible"; do [[ -z $flag ]] || flags+=("$flag"); done
if [[ -n ${TLS_CERT_FILE:-}${TLS_KEY_FILE:-}${TLS_CLIENT_CA_FILE:-} ]]; then
    readable TLS_CERT_FILE "${TLS_CERT_FILE:-}"
    readable TLS_KEY_FILE "${TLS_KEY_FILE:-}"
    flags+=(--grpc-use-ssl=1 "--grpc-server-cert=$TLS_CERT_FILE" "--grpc-server-key=$TLS_KEY_FILE")
fi
if [[ -n ${TLS_CLIENT_CA_FILE:-} ]]; then
    readable TLS_CLIENT_CA_FILE "$TLS_CLIENT_CA_FILE"
    flags+=(--grpc-use-ssl-mutual=1 "--grpc-root-cert=$TLS_CLIENT_CA_FILE")
fi
if [[ -n ${OTEL_TRACES_URL:-} ]]; then
    flags+=(--trace-config=mode=opentelemetry "--trace-config=opentelemetry,url=$OTEL_TRACES_URL" --trace-config=level=TIMESTAMPS "--trace-config=rate=$OTEL_TRACES_RATE")
fi

# While tritonserver shuts down, it refuses every request, even those from the sampler to the denoiser, so a running sample
# could not make its next step. The script therefore first says that the server is no longer ready, and waits NOTICE_S, in which a
# proxy or Kubernetes takes the server out of its turn. Then it tells the sampler, by the drain file, to take no new samples. It
# stops the server when the last sample has ended or EXIT_TIMEOUT_S has passed.
export HUNYUAN3D_DRAIN_FILE=$state/drain HTTP_PORT HTTP_ADDRESS METRICS_PORT METRICS_ADDRESS HEALTH_PORT HEALTH_ADDRESS
stopping=
trap 'stopping=yes' TERM INT

logged "$TRITON_HOME/bin/tritonserver" "${flags[@]}" "$@" &
server=$!
logged python3 "$here/guard.py" "$server" "$state" & # answers whether the server is ready, and ends one whose model has died
exec {log}>&-
code=0
idle=
[[ -n $stopping ]] || wait "$server" || code=$? # a signal also ends this wait
if [[ -n $stopping ]]; then
    end=$((SECONDS + NOTICE_S + EXIT_TIMEOUT_S))
    : >"$state/leaving"
    for ((waited = 0; waited < NOTICE_S; waited++)); do
        kill -0 "$server" 2>/dev/null || break
        sleep 1
    done
    : >"$HUNYUAN3D_DRAIN_FILE"
    sleep 0.5 # requests that arrived just before the drain file may not be counted yet
    while ((SECONDS < end)) && kill -0 "$server" 2>/dev/null; do
        if python3 "$here/health.py" idle; then
            idle=yes
            break
        fi
        sleep 0.2
    done
    kill -TERM "$server" 2>/dev/null || true
    code=0
    wait "$server" || code=$? # this gives the exit code even if the server has already ended
    while kill -0 "$server" 2>/dev/null; do # another signal has ended the wait
        code=0
        wait "$server" || code=$?
    done
    if ((code != 0)) && [[ -n $idle ]]; then
        # Triton can crash if requests arrive during its shutdown. No sample is lost by now, so the exit code is 0.
        printf 'warning: tritonserver ended with code %d after its last sample\n' "$code" >&2
        code=0
    fi
fi
exit "$code"
