# shellcheck shell=bash
# What every script here shares: where things are, which server is meant, and how to become root when that is needed.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
PGRX_VERSION=0.18.1
TOOLS=${XDG_CACHE_HOME:-$HOME/.cache}/amazon_pii/cargo-pgrx-$PGRX_VERSION
# shellcheck disable=SC2034  # used by those who read this file
PYTHON=/usr/bin/python3

# cargo-pgrx of another version may be the user's own: ours, where there is one, comes first.
export PATH="$TOOLS/bin:$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"

# pgrx appends a backtrace with build paths to every error's detail when the server's environment has this.
unset RUST_BACKTRACE

say() { printf '%s\n' "== $*"; }
die() { printf '%s\n' "error: $*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "root rights are needed for: $*  (run as root, or install sudo)"
    fi
}

major_of() { "$1" --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/'; }

# Sets PG, PG_CONFIG, PGRX_HOME and FEATURES. PG_CONFIG names a server of the user's; otherwise PG chooses one of ours.
choose_server() {
    OWN_SERVER=
    if [ -n "${PG_CONFIG:-}" ] && [ "$PG_CONFIG" != "$(default_pg_config "${PG:-15}")" ]; then
        OWN_SERVER=yes
        [ -x "$(command -v "$PG_CONFIG")" ] || die "PG_CONFIG=$PG_CONFIG cannot be run"
        PG_CONFIG=$(command -v "$PG_CONFIG")
        local found
        found=$(major_of "$PG_CONFIG")
        [ -z "${PG:-}" ] || [ "$PG" = "$found" ] || die "PG=$PG, but $PG_CONFIG is of PostgreSQL $found"
        PG=$found
        [ "$PG_CONFIG" != "$(default_pg_config "$PG")" ] || OWN_SERVER=
    fi
    PG=${PG:-15}
    case $PG in 14 | 15 | 16 | 17 | 18) ;; *) die "PG=$PG is not one of 14 to 18" ;; esac
    PG_CONFIG=${PG_CONFIG:-$(default_pg_config "$PG")}

    if [ "$PG" = 15 ] && [ -z "$OWN_SERVER" ]; then
        PGRX_HOME=$ROOT/pgrx-config
    else
        PGRX_HOME=$TARGET/pg/home-$PG
    fi
    # The bindings are generated once a feature; only this variable makes cargo generate them again for other headers.
    if [ -n "$OWN_SERVER" ]; then
        export PGRX_PG_CONFIG_PATH=$PG_CONFIG
    else
        unset PGRX_PG_CONFIG_PATH
    fi
    # The default features stand for 15; naming them again would compile the crate a second time.
    FEATURES=()
    # shellcheck disable=SC2034  # used by those who read this file
    [ "$PG" = 15 ] || FEATURES=(--no-default-features --features "pg$PG")
    export PG PG_CONFIG PGRX_HOME
}

default_pg_config() {
    case $1 in
        15) echo /usr/lib/postgresql/15/bin/pg_config ;;
        *) echo "$TARGET/pg/server-$1/bin/pg_config" ;;
    esac
}

# cargo-pgrx reads the one entry it needs, so that `cargo pgrx init` and its downloads are not needed. The file is
# rewritten only when it changes: the bindings depend on its time stamp.
write_pgrx_home() {
    [ "$PGRX_HOME" != "$ROOT/pgrx-config" ] || return 0
    mkdir -p "$PGRX_HOME"
    local text
    text=$(printf '[configs]\npg%s = "%s"' "$PG" "$PG_CONFIG")
    [ "$(cat "$PGRX_HOME/config.toml" 2>/dev/null)" = "$text" ] || printf '%s\n' "$text" >"$PGRX_HOME/config.toml"
}
