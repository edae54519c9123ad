#!/bin/bash
# Checks the form of the sources: gofmt, go vet and staticcheck with every build tag, gosec, known vulnerabilities of what is
# linked in, shellcheck. usage: hack/lint.sh
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"

STATICCHECK=v0.7.0
GOSEC=v2.22.8
GOVULNCHECK=v1.1.4
# The database of vulnerabilities as a module: for where its own server cannot be reached, and as old as its version says.
VULNDB=v0.0.0-20261105234957-e22db6528018
# Known vulnerabilities that do not concern the programs: GO-2026-6604 is os.Root on Windows (fixed in Go 1.26.9).
VULNERABILITIES_ACCEPTED='GO-2026-6604'
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

# Of what the programs of cmd/ link and call: tests bring more along, a client of CRI and gRPC, which nobody is given.
# Where no database can be had there is nothing to compare with: that is said, and is no failure.
vulnerabilities() {
	local output rc=0 dir found
	local scan=("$govulncheck" -tags no_grpc)
	output=$("${scan[@]}" ./cmd/... 2>&1) || rc=$?
	if [[ $output == *'fetching vulnerabilities:'* ]]; then
		dir=$(go mod download -json "golang.org/x/vulndb@$VULNDB" 2>/dev/null | sed -nE 's/^\s*"Dir": "(.*)",$/\1/p') || :
		if [ -z "$dir" ]; then
			say "NOT CHECKED for known vulnerabilities: their database cannot be reached from here"
			return 0
		fi
		say "the database of vulnerabilities cannot be reached from here: compared with the module's $VULNDB"
		rc=0
		# A directory of OSV entries without an index; govulncheck makes that itself.
		output=$("${scan[@]}" -db "file://$dir/data/osv" ./cmd/... 2>&1) || rc=$?
	fi
	[ $rc != 0 ] || return 0
	# 3 is that there are some.
	found=$(sed -nE 's/^Vulnerability #[0-9]+: //p' <<<"$output" | grep -vxE "$VULNERABILITIES_ACCEPTED") || [ $rc != 3 ] || return 0
	echo "$output"
	echo "not accepted: ${found:-govulncheck has failed}"
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
