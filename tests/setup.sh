#!/bin/sh
# Brings in what the tests, the linters and the benchmark use: Debian packages (as root) and a virtual
# environment in .venv. Does nothing, quickly, when everything is there already.
set -eu
cd "$(dirname "$0")/.."

PACKAGES="chromium curl gcc haproxy libc6-dev liburing2 lighttpd logrotate nginx-light openssl python3-venv qemu-system-arm qemu-system-x86 seccomp strace tar wrk"

missing_packages() {
    for package in $PACKAGES; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' || echo "$package"
    done
}

# nginx and lighttpd are here to be measured, not to run: while apt works, a policy forbids starting services.
install_packages() {
    guard=/usr/sbin/policy-rc.d
    if [ ! -e "$guard" ]; then
        trap 'rm -f "$guard"' EXIT
        trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\nexit 101\n' >"$guard"
        chmod +x "$guard"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends "$@" </dev/null
}

if command -v apt-get >/dev/null; then
    missing=$(missing_packages)
    if [ -n "$missing" ]; then
        if [ "$(id -u)" = 0 ]; then
            # shellcheck disable=SC2086  # a list of words
            install_packages $missing
        else
            echo "Missing Debian packages; tests that need them are skipped. To install them:" >&2
            echo "    sudo apt-get install --no-install-recommends" $missing >&2
        fi
    fi
else
    echo "No apt-get here; the tests use of these what they find: $PACKAGES" >&2
fi

# The system's own Python is the one the server meets in the field; another will do where it is older than 3.11.
python=${PYTHON:-}
for candidate in /usr/bin/python3 python3; do
    if [ -z "$python" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
    fi
done
[ -n "$python" ] || { echo "tarweb needs Python 3.11 or newer" >&2; exit 1; }

# The copy of the requirements is written last, so that an interrupted installation is taken up again.
if ! cmp -s tests/requirements.txt .venv/requirements.txt; then
    "$python" -m venv .venv
    .venv/bin/pip install -q --disable-pip-version-check -r tests/requirements.txt
    cp tests/requirements.txt .venv/requirements.txt
fi
