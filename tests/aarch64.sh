#!/usr/bin/env bash
# Runs tests/edge and tests/protocol with aarch64 wheels under qemu-user, in a Debian root that debootstrap makes.
# Arguments go to pytest. What takes long is kept below build/aarch64 and made again when what it is made of changes.
#
#   AARCH64_DIR    folder to keep it in, instead of build/aarch64
#   DEBIAN_MIRROR  where Debian's packages come from, instead of apt's mirror or debootstrap's default
#   PYTHON         interpreter with hosl[export,dev]: its pip fetches the wheels, its torch makes the tiny bundles
set -euo pipefail
cd "$(dirname "$0")/.."

SUITE=bookworm # its Python is the one that constraints.txt is for
PYTHON_VERSION=3.11
PYTHON=${PYTHON:-python3}
KEPT=$(realpath -m "${AARCH64_DIR:-build/aarch64}")
ROOT=$KEPT/root

say() { echo "aarch64: $*"; }
die() {
    echo "aarch64: error: $*" >&2
    exit 1
}

check_machine() {
    [ "$(id -u)" = 0 ] || die "debootstrap and chroot need root: sudo make test-aarch64"
    local packages=()
    command -v debootstrap >/dev/null || packages+=(debootstrap)
    command -v qemu-aarch64-static >/dev/null || packages+=(qemu-user-static)
    command -v update-binfmts >/dev/null || packages+=(binfmt-support)
    [ ${#packages[@]} = 0 ] || die "packages are missing: apt-get install ${packages[*]}"
}

# Runs a command whose mounts end with it, however it ends.
alone() { unshare --mount nice -n 19 "$@"; }

# Runs a command in the root, with nothing of this machine's environment.
inside() {
    # shellcheck disable=SC2016
    alone bash -c '
        mount -t proc proc "$0/proc" && mount -t tmpfs tmpfs "$0/tmp" &&
        mkdir -p "$0/dev/pts" && mount -t devpts -o newinstance,ptmxmode=0666 devpts "$0/dev/pts" &&
        touch "$0/dev/ptmx" && mount --bind "$0/dev/pts/ptmx" "$0/dev/ptmx" && exec chroot "$0" "$@"' "$ROOT" \
        /usr/bin/env -i -C /srv/hosl PATH=/srv/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        HOSL_TEST_BUNDLES=/srv/bundles "$@"
}

# Calls a function, unless it was called with the same contents of these files, after the same steps before it.
once_for() {
    local stamp=$KEPT/$1.sha256
    done_so_far=$({ echo "$done_so_far" && declare -f "$1" && cat -- /dev/null "${@:2}"; } | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" != "$done_so_far" ] || return 0
    rm -f "$stamp"
    "$1"
    echo "$done_so_far" >"$stamp"
}
done_so_far="$SUITE $PYTHON_VERSION"

# The kernel may forget the formats with the last mount of their folder: it stays mounted until this script ends.
let_binaries_run() {
    local formats=/proc/sys/fs/binfmt_misc
    if [ ! -e $formats/register ]; then
        mount -t binfmt_misc binfmt_misc $formats || die "binfmt_misc cannot be mounted on $formats"
        trap 'umount /proc/sys/fs/binfmt_misc' EXIT
    fi
    [ -e $formats/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64 || true
    [ -e $formats/qemu-aarch64 ] || die "$formats lacks qemu-aarch64, and update-binfmts could not enable it"
}

apt_mirror() {
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Release: $SUITE" 'Component: main' | sed -n 1p
}

make_root() {
    say "making a Debian root in $ROOT"
    rm -rf "$ROOT"
    # Without a compiler: the wheel brings the kernel, as it does on a device.
    alone debootstrap --arch=arm64 --variant=minbase --include=python3,python3-venv "$SUITE" "$ROOT" \
        ${MIRROR:+"$MIRROR"} >"$KEPT/debootstrap.log" ||
        die "debootstrap failed, see $KEPT/debootstrap.log"
    echo "127.0.0.1 localhost" >"$ROOT/etc/hosts" # debootstrap writes none, and tests name this machine
}

# The base distribution's requirements: wheels come through this machine's pip as it is set up.
install_wheels() {
    say "fetching wheels"
    local wheels=$ROOT/srv/wheels platforms=(--platform manylinux2014_aarch64) minor
    for minor in {17..36}; do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
    rm -rf "$wheels" "$ROOT/srv/venv"
    mkdir -p "$wheels"
    "$PYTHON" - >"$wheels/requirements.txt" <<'END'
import tomllib
from pathlib import Path

settings = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))
print(*settings["project"]["dependencies"], "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", sep="\n")
END
    "$PYTHON" -m pip download -qq --disable-pip-version-check --only-binary=:all: "${platforms[@]}" \
        --python-version "$PYTHON_VERSION" --constraint constraints.txt --requirement "$wheels/requirements.txt" \
        --dest "$wheels"
    say "installing wheels"
    inside python3 -m venv /srv/venv
    inside pip install --quiet --no-index --find-links /srv/wheels --requirement /srv/wheels/requirements.txt
}

# The tests that need bundles run here first. What they made goes into the root: bundles, and beside them, as .npz files,
# what torch computes from them.
make_bundles() {
    say "making tiny bundles"
    rm -rf "$KEPT/made" "$ROOT/srv/bundles"
    nice -n 19 "$PYTHON" -m pytest --quiet -p no:cacheprovider --basetemp="$KEPT/made" "${workers[@]}" "${needing_bundles[@]}"
    mv "$KEPT/made/shared" "$ROOT/srv/bundles"
    rm -rf "$KEPT/made"
}

copy_tree() {
    rm -rf "$ROOT/srv/hosl"
    mkdir -p "$ROOT/srv/hosl"
    tracked . | tar --create --null --files-from=- | tar --extract --directory="$ROOT/srv/hosl"
}

install_hosl() {
    say "making and installing hosl's wheel"
    make --silent PYTHON="$PYTHON" wheels
    rm -rf "$ROOT/srv/dist"
    cp --recursive dist "$ROOT/srv/dist"
    inside pip install --quiet --no-index --find-links /srv/dist --only-binary :all: --no-deps --force-reinstall hosl
}

tracked() { git -c safe.directory="$PWD" ls-files -z -- "$@"; }

check_machine
mkdir -p "$KEPT"
exec 9>"$KEPT/lock"
flock --nonblock 9 || die "$KEPT is in use by another run"
workers=(-n "$(nproc)" --dist loadfile --no-loadscope-reorder)
MIRROR=${DEBIAN_MIRROR:-$(apt_mirror)}
let_binaries_run

mapfile -d '' sources < <(tracked . ':!tests' ':!examples')
once_for make_root
copy_tree
once_for install_wheels pyproject.toml constraints.txt
once_for install_hosl "${sources[@]}"
mapfile -t needing_bundles < <(grep --files-with-matches make_bundle --recursive --include='test_*.py' tests/edge tests/protocol)
once_for make_bundles "${sources[@]}" tests/conftest.py tests/helpers/saved_models.py "${needing_bundles[@]}"
say "running the tests"
inside python -m pytest -p no:cacheprovider "${workers[@]}" --timeout 3000 --durations 25 tests/edge tests/protocol "$@"
