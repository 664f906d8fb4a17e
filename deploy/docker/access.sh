#!/bin/sh
# Makes what the services of docker-compose.yml prove themselves with, each in the folder that its owner alone mounts:
# tokens of TENANTS, passwords of the pool's user and of the operator, and Redis's users, rendered from them for POOLS.
# What is there already stays, so a second run changes nothing; a new tenant works once Redis has read its users again
# (docker-compose restart redis).
set -eu
umask 022
root=${ACCESS_DIR:-/access}
: "${TENANTS:?names of the tenants, with spaces between}" "${POOLS:?names of the pools that they may ask}"
tenants_file=$root/teacher/tenants.toml
for folder in redis teacher status operator prometheus grafana; do mkdir -p "$root/$folder"; done

# secret FILE: 256 random bits, once.
secret() {
    if [ ! -s "$1" ]; then
        python -c 'import secrets; print(secrets.token_urlsafe(32))' > "$1.new"
        mv "$1.new" "$1"
    fi
}

for tenant in $TENANTS; do
    case $tenant in
    pool | operator | health | default)
        echo "access: TENANTS: $tenant is the name of a Redis user that is there already; choose another" >&2
        exit 2
        ;;
    esac
done

# Containers run as users of their own; who may read a file is decided by who mounts its folder.
for tenant in $TENANTS; do
    token_file=$root/tenants/$tenant/token
    mkdir -p "$root/tenants/$tenant"
    if [ ! -s "$token_file" ]; then
        opd tenants add "$tenant" --file "$tenants_file" --token-file "$token_file"
    fi
    chmod 644 "$token_file"
done
chmod 644 "$tenants_file"
secret "$root/teacher/pool.password"
cp "$root/teacher/pool.password" "$root/status/pool.password"
secret "$root/operator/operator.password"
secret "$root/teacher/metrics.token"
cp "$root/teacher/metrics.token" "$root/prometheus/metrics_token"
secret "$root/grafana/admin.password"

pools=""
for pool in $POOLS; do pools="$pools --teacher $pool"; done
sha256=$(python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.read().strip().encode()).hexdigest())' \
    < "$root/operator/operator.password")
{
    # shellcheck disable=SC2086
    opd tenants acl --file "$tenants_file" $pools --pool-user pool \
        --pool-password-file "$root/teacher/pool.password" --close-default
    echo "user operator reset on #$sha256 ~* &* +@all"
    # Knows no secret and may ask only whether Redis answers.
    echo "user health reset on nopass +ping"
} > "$root/redis/users.acl.new"
mv "$root/redis/users.acl.new" "$root/redis/users.acl"
