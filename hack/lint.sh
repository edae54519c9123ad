#!/bin/bash
# Checks the form of the sources: gofmt, go vet and staticcheck with every build tag, gosec, known vulnerabilities of what is
# linked in, shellcheck. usage: hack/lint.sh
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"

STATICCHECK=v0.7.0
GOSEC=v2.22.8
GOVULNCHECK=v1.1.4
# What gosec says of every program of this kind: unsafe code (which has its own check here), errors that are not looked at,
# conversions between integers, paths and programs that are variables, and modes of files that others are to read.
GOSEC_EXCLUDED=G103,G104,G115,G204,G301,G302,G304
# The tags of tests that do not run everywhere; agentkernel and guestkernel both have a TestMain, in different packages.
TAGS=e2e,guestkernel,agentkernel,privileged,seccomp
cd "$REPO"
failed=0
check() { # check NAME COMMAND...: fails the script at its end, so that one run shows everything
	say "$1"
	shift
	"$@" || failed=1
}

mapfile -t go_files < <(git ls-files --cached --others --exclude-standard '*.go')
unformatted() {
	local found
	found=$(gofmt -l "${go_files[@]}")
	[ -z "$found" ] || { echo "gofmt would change: $found"; return 1; }
}

# Code that can break memory safety has a name that says so.
unsafe_elsewhere() {
	local found
	found=$(grep -lE '^(import )?\s*_?\s*"unsafe"' "${go_files[@]}" | grep -vE '_unsafe(_test)?\.go$|\.pb\.go$') || return 0
	echo "imports unsafe, but is not called *_unsafe.go: $found"
	return 1
}

# Where the database of vulnerabilities cannot be reached there is nothing to compare with: that is said, and is no failure.
vulnerabilities() {
	local output
	output=$("$govulncheck" ./... 2>&1) && return 0
	if [[ $output == *'fetching vulnerabilities:'* ]]; then
		say "NOT CHECKED for known vulnerabilities: their database cannot be reached from here"
		return 0
	fi
	echo "$output"
	return 1
}

# tool NAME MODULE VERSION: the path of a program of that version, built if need be.
tool() {
	local path=$MICROVM_CACHE/tools/bin/$1-$3
	if [ ! -x "$path" ]; then
		say "building $1 $3"
		GOBIN=$SCRATCH go install "$2@$3"
		put "$SCRATCH/$1" "$path"
	fi
	echo "$path"
}

packages shellcheck gcc libc6-dev libseccomp-dev pkg-config
scratch
staticcheck=$(tool staticcheck honnef.co/go/tools/cmd/staticcheck $STATICCHECK)
gosec=$(tool gosec github.com/securego/gosec/v2/cmd/gosec $GOSEC)
govulncheck=$(tool govulncheck golang.org/x/vuln/cmd/govulncheck $GOVULNCHECK)
mapfile -t scripts < <(git ls-files --cached --others --exclude-standard | xargs -r grep -lE '^#!(/bin/(ba)?sh|/usr/bin/env bash)' --)

check gofmt unformatted
check "go vet" go vet ./...
check "go vet -tags $TAGS" go vet -tags "$TAGS" ./...
check staticcheck "$staticcheck" -tags "$TAGS" ./...
check "gosec -exclude $GOSEC_EXCLUDED" "$gosec" -quiet -exclude "$GOSEC_EXCLUDED" ./cmd/... ./pkg/...
check "unsafe code" unsafe_elsewhere
check "known vulnerabilities" vulnerabilities
# Modules of their own, whose dependencies are not the project's.
for module in hack/images test/e2e/k8s; do
	check "go vet in $module" go -C "$module" vet -tags e2e ./...
	check "staticcheck in $module" env -C "$module" "$staticcheck" -tags e2e ./...
done
check shellcheck shellcheck -S warning -x -P SCRIPTDIR "${scripts[@]}"
exit $failed
