#!/usr/bin/env bash
# Fails for files of over 1 MB, which stay in the history for ever.
set -euo pipefail
status=0
for file in "$@"; do
  if [[ -f $file && $(wc -c <"$file") -gt 1048576 ]]; then
    echo "$file: is larger than 1 MB; models and results do not belong into the repository" >&2
    status=1
  fi
done
exit $status
