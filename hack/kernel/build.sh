#!/bin/bash
# Builds the guest kernel: Debian's linux-source package with microvm.config and one line changed, as a stripped vmlinux in bin/.
# The result is cached under the package's version and the contents of this directory, so a repeat run returns at once.
# usage: hack/kernel/build.sh
set -euo pipefail
# shellcheck source=../tools/lib.sh
. "$(dirname "$0")/../tools/lib.sh"

SOURCE=linux-source-6.12
MAX_SIZE=$((28 << 20))
# How many files a build compiles, for the progress line only.
FILES=1940

HERE=$REPO/hack/kernel
CACHE=$MICROVM_CACHE/kernel

source_version() {
	apt-cache show --no-all-versions $SOURCE 2>/dev/null | sed -n 's/^Version: //p' | head -n 1
}

# install_result: puts the cached kernel into bin/, touching nothing if it is there.
install_result() {
	cmp -s "$CACHE/$KEY/vmlinux" "$REPO/bin/vmlinux" || put "$CACHE/$KEY/vmlinux" "$REPO/bin/vmlinux"
	say "bin/vmlinux: Linux $VERSION, $(stat -c %s "$REPO/bin/vmlinux") bytes"
}

# verify_config: every line of the fragment must have survived; olddefconfig drops what lacks a dependency in silence.
verify_config() {
	local line name lost=0
	while read -r line; do
		case $line in
		CONFIG_*)
			grep -qxF -- "$line" .config && continue
			;;
		'# CONFIG_'*' is not set')
			name=${line#\# }
			grep -q "^${name%% *}=" .config || continue
			;;
		*) continue ;;
		esac
		say "microvm.config asks for: $line"
		lost=1
	done <"$HERE/microvm.config"
	[ $lost = 0 ] || die "the kernel's configuration does not have what microvm.config asks for (lines above)"
}

# correct: changes the one line of the source that no configuration does. What FUSE mounts by itself where the host has a
# mount, which is everything that a container sees of a share, gets neither SB_POSIXACL, without which there are no ACLs and
# those of the host are not looked at, nor SB_NOSEC, without which each write(2) is two requests: it asks for the file's
# capabilities first, as if the file server would not drop them (FUSE_HANDLE_KILLPRIV_V2).
correct() {
	local file=fs/fuse/inode.c line='sb->s_xattr = parent_sb->s_xattr;'
	sed -i "s/^\t$line\$/&\n\tsb->s_flags |= parent_sb->s_flags \& (SB_POSIXACL | SB_NOSEC);/" $file
	[ "$(grep -c 'parent_sb->s_flags & (SB_POSIXACL | SB_NOSEC);$' $file)" = 1 ] || die "$file is not what it was: $line"
}

# compile: runs make with its output in a log, and tells how far it is.
compile() {
	local log=$SCRATCH/build.log start=$SECONDS last=$SECONDS pid rc=0
	make -j"$(nproc)" vmlinux >"$log" 2>&1 &
	pid=$!
	while kill -0 $pid 2>/dev/null; do
		sleep 1
		if [ $((SECONDS - last)) -ge 10 ]; then
			last=$SECONDS
			say "$((SECONDS - start)) s: compiled $(grep -c '^  CC ' "$log") of about $FILES files"
		fi
	done
	wait $pid || rc=$?
	if [ $rc != 0 ]; then
		cp "$log" "$CACHE/build.log"
		tail -n 30 "$log" >&2
		die "the kernel's build failed (whole log: $CACHE/build.log)"
	fi
	say "compiled in $((SECONDS - start)) s"
}

VERSION=$(source_version)
[ -n "$VERSION" ] || { apt_update >/dev/null; VERSION=$(source_version); }
[ -n "$VERSION" ] || die "apt knows no package $SOURCE"
KEY=$({ echo "$VERSION"; cat "$HERE/microvm.config" "$HERE/build.sh"; } | sha256sum | cut -c 1-20)

[ -e "$CACHE/$KEY/vmlinux" ] || lock "$CACHE/lock"
if [ -e "$CACHE/$KEY/vmlinux" ]; then
	install_result
	exit
fi

packages bc binutils bison cpio flex gcc libc6-dev libelf-dev make perl xz-utils
scratch
say "fetching and unpacking $SOURCE $VERSION"
download_deb $SOURCE "$SCRATCH/deb"
archive=$SCRATCH/deb/usr/src/$SOURCE.tar.xz
mkdir "$SCRATCH/src"
tar -C "$SCRATCH/src" --strip-components=1 -xf "$archive"
cd "$SCRATCH/src"
correct

# The names and dates a kernel carries are the same on every machine. LOCALVERSION is set so that a git repository
# around the cache does not add a "+" to the version.
export ARCH=x86_64 LOCALVERSION='' KBUILD_BUILD_USER=microvm KBUILD_BUILD_HOST=microvm KBUILD_BUILD_VERSION=1
KBUILD_BUILD_TIMESTAMP=$(date -u -d "@$(stat -c %Y "$archive")")
export KBUILD_BUILD_TIMESTAMP

make -s KCONFIG_ALLCONFIG="$HERE/microvm.config" allnoconfig
make -s olddefconfig
verify_config
compile

strip --strip-all -o "$SCRATCH/vmlinux" vmlinux
size=$(stat -c %s "$SCRATCH/vmlinux")
[ "$size" -lt $MAX_SIZE ] || die "the stripped vmlinux has $size bytes, more than $MAX_SIZE"
put .config "$CACHE/$KEY/config"
put System.map "$CACHE/$KEY/System.map"
put "$SCRATCH/vmlinux" "$CACHE/$KEY/vmlinux"
install_result
