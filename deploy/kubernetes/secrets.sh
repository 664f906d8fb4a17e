#!/usr/bin/env bash
# Makes what the manifests take from Secrets, and prints these Secrets for `kubectl apply -f -`. Needs the `opd` command and
# kubectl, and asks no cluster. FOLDER keeps tokens and passwords: run it again, with more tenants say, and the others
# stay as they are. Whoever can read the folder has every right: operator.password is that of the one user who may
# administer Redis, and goes into no Secret. A token of a model hub that lies in FOLDER as hub.token becomes one.
#
#   deploy/kubernetes/secrets.sh FOLDER --pool teacher --tenant student | kubectl apply -f -
set -euo pipefail
usage() {
    echo "usage: $0 FOLDER --pool NAME [--pool NAME ...] --tenant NAME [--tenant NAME ...]" >&2
    exit 2
}

[ $# -gt 0 ] || usage
folder=$1
shift
pools=()
tenants=()
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || usage
    case $1 in
        --pool) pools+=("$2") ;;
        --tenant) tenants+=("$2") ;;
        *) usage ;;
    esac
    shift 2
done
if [ ${#pools[@]} -eq 0 ] || [ ${#tenants[@]} -eq 0 ]; then usage; fi
for tenant in "${tenants[@]}"; do
    case $tenant in
        pool | operator | default)
            echo "$0: --tenant $tenant: is the name of a Redis user that is there already; choose another" >&2
            exit 2
            ;;
        metrics | hub)
            echo "$0: --tenant $tenant: $tenant.token in FOLDER is a token of another kind; choose another name" >&2
            exit 2
            ;;
    esac
done

umask 077
mkdir -p "$folder"
secret() {  # 256 random bits, once
    if [ ! -s "$folder/$1" ]; then
        head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$folder/$1.new"
        mv "$folder/$1.new" "$folder/$1"
    fi
}
sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}
secret pool.password
secret operator.password
secret metrics.token
for tenant in "${tenants[@]}"; do
    [ -s "$folder/$tenant.token" ] \
        || opd tenants add "$tenant" --file "$folder/tenants.toml" --token-file "$folder/$tenant.token" >&2
done
{
    opd tenants acl --file "$folder/tenants.toml" "${pools[@]/#/--teacher=}" --pool-user pool \
        --pool-password-file "$folder/pool.password" --close-default
    # Sets the users of the Redis that runs, by `opd tenants acl --apply`; no pod knows its password.
    echo "user operator reset on #$(sha256 "$folder/operator.password") ~* &* +@all"
} > "$folder/users.acl.new"
mv "$folder/users.acl.new" "$folder/users.acl"

show() {  # NAME KEY=FILE
    echo "---"
    kubectl create secret generic "$1" --namespace opd --from-file="${2%%=*}=$folder/${2#*=}" --dry-run=client -o yaml
}
show opd-tenants tenants.toml=tenants.toml
show opd-redis-users users.acl=users.acl
show opd-pool-password password=pool.password
show opd-metrics-token token=metrics.token
if [ -s "$folder/hub.token" ]; then show opd-hub-token token=hub.token; fi
for tenant in "${tenants[@]}"; do
    show "opd-token-$tenant" "token=$tenant.token"
done
