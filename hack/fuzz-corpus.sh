#!/bin/bash
# Takes over what hack/fuzz.sh has found: to testdata/fuzz of its package, for each target, a few short inputs of Go's cache that
# together run what the others do, of the package and those below. What is there already stays, and counts.
# usage: hack/fuzz-corpus.sh [PATTERN]     PATTERN is a regular expression for "package target"
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"
# shellcheck source=tools/fuzz.sh
. "$(dirname "$0")/tools/fuzz.sh"
MOST=25         # inputs of a target
MAX_BYTES=1536  # of an input's file
TRIED=150       # inputs that are looked at, of all lengths
cd "$REPO"
scratch

# profile NAME INPUT: what the target NAME runs for an input; nothing if it fails, or takes long.
profile() {
	local dir
	dir=$(mktemp -d "$SCRATCH/run.XXXXXX")
	mkdir -p "$dir/testdata/fuzz/$1" "$SCRATCH/profiles"
	cp "$2" "$dir/testdata/fuzz/$1/"
	(cd "$dir" && timeout 20 "$SCRATCH/test" -test.run "^$1\$/^${2##*/}\$" -test.coverprofile="$dir/profile" >"$dir/output" 2>&1) &&
		mv "$dir/profile" "$SCRATCH/profiles/${2##*/}" || say "left out: $1 $2: $(tail -n 3 "$dir/output" | tr '\n' ' ')"
	rm -rf "$dir"
}
export -f profile say
export SCRATCH SCRIPT REPO

# choose: of the profiles named by new=1 PROFILE..., those that add most to what the ones named by new=0 PROFILE... cover, the
# best one first, until there are $MOST. What is covered is a statement, with how often it ran, as a power of two.
choose() {
	awk -v most="$MOST" '
		FNR == 1 { files[++n] = FILENAME; fresh[n] = new }
		FNR > 1 && $3 > 0 { parts[n, ++count[n]] = $1 "@" int(log($3) / log(2)) }
		function take(i, j) { taken[i] = 1; most--; for (j = 1; j <= count[i]; j++) covered[parts[i, j]] = 1 }
		function gain(i, j, g) { for (j = 1; j <= count[i]; j++) if (!(parts[i, j] in covered)) g++; return g + 0 }
		END {
			for (i = 1; i <= n; i++) if (!fresh[i]) take(i)
			while (most > 0) {
				best = 0; most_gained = 0
				for (i = 1; i <= n; i++) if (!taken[i] && (g = gain(i)) > most_gained) { best = i; most_gained = g }
				if (!best) break
				take(best)
				sub(".*/", "", files[best])
				print files[best]
			}
		}' "$@"
}

mapfile -t targets < <(fuzz_targets "${1:-.}")
for target in "${targets[@]}"; do
	read -r package name <<<"$target"
	corpus=$package/testdata/fuzz/$name
	cache=$(go env GOCACHE)/fuzz/$(go list "./$package")/$name
	go test -c -cover -covermode=atomic -coverpkg="./$package/..." -o "$SCRATCH/test" "./$package"
	rm -rf "$SCRATCH/profiles"
	mapfile -t have < <(find "$corpus" -type f 2>/dev/null | sort)
	# The shorter comes first, and so is chosen of two that do the same.
	mapfile -t new < <(find "$cache" -type f -size "-$((MAX_BYTES + 1))c" -printf '%s %p\n' 2>/dev/null | sort -n | cut -d ' ' -f 2- |
		awk -v tried="$TRIED" '{ line[NR] = $0 } END { for (i = 0; i < NR && i < tried; i++) print line[1 + int(i * (NR > tried ? NR / tried : 1))] }')
	[ ${#new[@]} -gt 0 ] || { say "$target: nothing in the cache; hack/fuzz.sh comes first"; continue; }
	printf '%s\0' "${have[@]}" "${new[@]}" | xargs -r0 -n 1 -P "$(nproc)" bash -c 'profile "$@"' profile "$name"
	profiles=(new=0)
	for input in "${have[@]}" new=1 "${new[@]}"; do
		if [ "$input" = new=1 ]; then profiles+=("$input"); continue; fi
		[ ! -e "$SCRATCH/profiles/${input##*/}" ] || profiles+=("$SCRATCH/profiles/${input##*/}")
	done
	added=0
	for input in $(choose "${profiles[@]}"); do
		mkdir -p "$corpus"
		cp "$cache/$input" "$corpus/"
		added=$((added + 1))
	done
	printf '%-66s %4d of %4d\n' "$target" "$added" "${#new[@]}"
done
