#!/usr/bin/env bash
# drain.sh SECONDS: Envoy takes no new connections and sends clients away; ends when no request is active, or after SECONDS.
set -euo pipefail

# ask METHOD PATH: the answer of Envoy's own port
ask() {
    exec 3<>/dev/tcp/127.0.0.1/"${ENVOY_ADMIN_PORT:-9901}"
    printf '%s %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n' "$1" "$2" >&3
    cat <&3
    exec 3>&-
}

ask POST '/healthcheck/fail' >/dev/null
ask POST '/drain_listeners?graceful' >/dev/null
end=$((SECONDS + $1))
sleep 2 # requests that arrive now are still taken
while ((SECONDS < end)) && ask GET '/stats?filter=http.edge.downstream_rq_active' | grep -Eq 'downstream_rq_active: [1-9]'; do
    sleep 0.5
done
