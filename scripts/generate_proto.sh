#!/usr/bin/env bash
# Generates opd/wire/pb from proto/; with --check it only says whether what lies there is up to date.
#
# The generated module is moved under our own package, since `opd.v1` is a schema package and not a Python one.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m grpc_tools.protoc -Iproto --python_out="$work" --pyi_out="$work" --grpc_python_out="$work" \
    proto/opd/v1/teacher.proto
for name in teacher_pb2.py teacher_pb2.pyi teacher_pb2_grpc.py; do
    sed -i 's/^from opd\.v1 import/from opd.wire.pb import/' "$work/opd/v1/$name"
    if [ "${1:-}" = --check ]; then
        cmp -s "$work/opd/v1/$name" "opd/wire/pb/$name" || {
            echo "opd/wire/pb/$name differs from proto/; run make proto" >&2
            exit 1
        }
    else
        cp "$work/opd/v1/$name" "opd/wire/pb/$name"
    fi
done
