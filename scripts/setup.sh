#!/bin/sh
# Install what the lock file and pyproject.toml say into .venv; do nothing if it is there. `make` calls this.
#
# PYTHON  the interpreter to use; default: the newest of 3.13, 3.12, 3.11 that works
# CUDA    1 or 0: with NVIDIA's libraries or without; default: as .venv has it, and for a new one, with them if there
#         is an NVIDIA driver
#
# Writes to .venv and to cnnpipe.egg-info only. Packages come from where the user's pip settings say.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/cnnpipe-setup # written last: its presence means that the rest is complete
log=$venv/setup.log

fail() {
    printf 'setup: %s\n' "$1" >&2
    exit 1
}

version_of() { # prints 3.11, for example; fails if the interpreter does not run, like the stubs of version managers
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_suitable() {
    case $1 in 3.11 | 3.12 | 3.13) return 0 ;; *) return 1 ;; esac
}

can_make_venvs() { # Debian has both modules in a package of their own
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

choose_python() { # sets `python`
    unsuitable= incomplete=
    set -- python3.13 python3.12 python3.11 python3 python
    if [ -n "${PYTHON:-}" ]; then
        version_of "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON does not run; name a Python that does, or leave it out"
        set -- "$PYTHON"
    fi
    for candidate in "$@"; do
        version=$(version_of "$candidate") || continue
        if ! is_suitable "$version"; then
            unsuitable="$unsuitable $candidate is $version,"
        elif ! can_make_venvs "$candidate"; then
            incomplete=${incomplete:-$version}
        else
            python=$candidate
            return
        fi
    done
    if [ -n "$incomplete" ]; then
        fail "Python $incomplete has no venv module; install it (Debian, Ubuntu: apt-get install python$incomplete-venv)"
    fi
    found=${unsuitable:+; found:${unsuitable%,}}
    fail "needs Python 3.11, 3.12 or 3.13${found:-; found none}; install one (Debian, Ubuntu: apt-get install python3 \
python3-venv; macOS: brew install python@3.13), or name it: make PYTHON=/path/to/python3"
}

choose_lock() { # sets `lock`; CUDA wheels exist for Linux on x86-64 only
    lock=requirements.lock
    case ${CUDA:-auto} in
    1) lock=requirements-cuda.lock ;;
    0) ;;
    auto)
        chosen=$([ -f "$stamp" ] && cat "$stamp") || chosen=
        if [ -n "$chosen" ] && [ -f "${chosen%% *}" ]; then # what was asked for once is kept
            lock=${chosen%% *}
        elif [ "$(uname -sm)" = "Linux x86_64" ] &&
            { [ -e /proc/driver/nvidia/version ] || [ -e /usr/lib/wsl/lib/libcuda.so.1 ]; }; then
            lock=requirements-cuda.lock
        fi
        ;;
    *) fail "CUDA must be 0 or 1, received '$CUDA'" ;;
    esac
}

venv_is_usable() {
    version=$(version_of "$venv/bin/python") && is_suitable "$version" &&
        { [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$version" ]; }
}

run() { # runs a command with its output in the log; if it fails, ends with the line that says why
    if ! "$@" >>"$log" 2>&1; then
        reason=$(grep -i 'error' "$log" | tail -n 1)
        fail "failed: ${reason:-$(tail -n 1 "$log")}; whole log: $log; fix it and run make again"
    fi
}

choose_lock
wanted="$lock $(cat "$lock" pyproject.toml | cksum) $(pwd -P)"
if venv_is_usable && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

began=$(date +%s)
rm -f "$stamp"
if ! venv_is_usable || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    choose_python
    printf 'setup: making %s with Python %s\n' "$venv" "$version"
    "$python" -m venv --clear "$venv" || fail "$python cannot make $venv here; see the lines above"
fi

: >"$log"
set -- --disable-pip-version-check --no-input --quiet
printf 'setup: installing %s packages from %s; takes minutes the first time\n' "$(grep -c '^[a-z]' "$lock")" "$lock"
run "$venv/bin/python" -m pip install "$@" --require-hashes --no-deps --only-binary :all: -r "$lock"
run "$venv/bin/python" -m pip install "$@" --no-deps --no-build-isolation --editable .
run "$venv/bin/python" -m pip check --disable-pip-version-check
printf '%s\n' "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
printf 'setup: done in %s s\n' "$(($(date +%s) - began))"
