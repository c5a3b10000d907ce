#!/usr/bin/env bash
# Runs hunyuan3d-export as the user who owns the project's folder, which is mounted at /work.
set -euo pipefail
owner=$(stat -c %u "${WORK:-/work}")
group=$(stat -c %g "${WORK:-/work}")
if [[ $(id -u) != 0 || $owner == 0 ]]; then # `docker compose run --user` chose a user, or rootless Docker's root is the caller
    exec hunyuan3d-export "$@"
fi
exec setpriv --reuid "$owner" --regid "$group" --clear-groups hunyuan3d-export "$@"
