#!/bin/bash
# Checks the form of the sources: gofmt, go vet and staticcheck with every build tag, shellcheck. usage: hack/lint.sh
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"

STATICCHECK=v0.7.0
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

packages shellcheck gcc libc6-dev libseccomp-dev pkg-config
staticcheck=$MICROVM_CACHE/tools/bin/staticcheck-$STATICCHECK
if [ ! -x "$staticcheck" ]; then
	say "building staticcheck $STATICCHECK"
	scratch
	GOBIN=$SCRATCH go install "honnef.co/go/tools/cmd/staticcheck@$STATICCHECK"
	put "$SCRATCH/staticcheck" "$staticcheck"
fi
mapfile -t scripts < <(git ls-files --cached --others --exclude-standard | xargs -r grep -lE '^#!(/bin/(ba)?sh|/usr/bin/env bash)' --)

check gofmt unformatted
check "go vet" go vet ./...
check "go vet -tags $TAGS" go vet -tags "$TAGS" ./...
check staticcheck "$staticcheck" -tags "$TAGS" ./...
check shellcheck shellcheck -S warning -x -P SCRIPTDIR "${scripts[@]}"
exit $failed
